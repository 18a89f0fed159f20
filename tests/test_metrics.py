import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import metrics


def test_parts_add_up_to_the_whole_where_means_do_not():
  values = np.random.default_rng(0).normal(size=(4, 5))
  weights = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
  parts = [{'loss': (jnp.sum(jnp.array(v * w)), jnp.sum(jnp.array(w)))} for v, w in zip(values, weights, strict=True)]
  whole = parts[0]
  for part in parts[1:]:
    whole = metrics.add(whole, part)
  exact = np.average(values, weights=weights)
  np.testing.assert_allclose(metrics.divide(whole)['loss'], exact, rtol=1e-5)
  assert abs(np.nanmean([metrics.divide(part)['loss'] for part in parts]) - exact) > 1e-3


def test_no_weight_is_no_mean():
  means = jax.jit(metrics.divide)({'a': (jnp.array(0.0), jnp.array(0)), 'b': (jnp.array(3.0), jnp.array(2))})
  assert np.isnan(means['a']) and means['b'] == 1.5


def test_total_and_its_gradient():
  def loss(x):
    pairs = {'mlm': (x**2, jnp.array(4.0)), 'nsp': (jnp.sqrt(x), jnp.array(0.0)), 'accuracy': (x, 1.0)}
    return metrics.total(pairs, {'mlm': 2.0, 'nsp': 1.0})

  value, gradient = jax.value_and_grad(loss)(3.0)
  assert value == 2 * 9 / 4 and gradient == 2 * 6 / 4
