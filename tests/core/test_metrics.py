import math

import jax
import jax.numpy as jnp

from llm_jax.core import metrics


def test_divides_once_and_no_weight_is_no_mean():
  means = metrics.divide(
    jax.device_get({'a': (jnp.array(0.0), jnp.array(0)), 'b': (jnp.array(3.0), 2.0)})
  )
  assert math.isnan(means['a']) and means['b'] == 1.5 and isinstance(means['b'], float)


def test_total_and_its_gradient():
  def loss(x):
    found = {
      'mlm': (x**2, jnp.array(4.0)),
      'nsp': (jnp.sqrt(x), jnp.array(0.0)),
      'accuracy': (x, 1.0),
    }
    return metrics.total(found, {'mlm': 2.0, 'nsp': 1.0})

  value, gradient = jax.value_and_grad(loss)(3.0)
  assert value == 2 * 9 / 4 and gradient == 2 * 6 / 4
