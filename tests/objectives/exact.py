"""What the tests of exact gradients share: tiny networks in float64, whole batches, and how far two
results may be apart.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.data.tokenizers import byte
from llm_jax.programs import network as networks

TOLERANCE = 1e-10
TOKENIZER = byte.create()


def shape(max_len, **changes):
  """Options of a model of one layer."""
  sizes = dict(dim=8, layers=1, heads=2, mlp_dim=16, max_len=max_len, unroll=0)
  plain = dict(dropout=0.0, attention_dropout=0.0, dtype='float64', param_dtype='float64')
  return sizes | plain | changes


def network_of(model, objective, batch):
  """A network, and parameters that are not those at the start, where biases are zero and scales
  one.
  """
  network = networks.Network(model=model, heads=objective.heads(model), objective=objective)
  shapes = nn.meta.unbox(jax.eval_shape(network.init, jax.random.PRNGKey(0), batch)['params'])
  rng = np.random.default_rng(1)
  return network, jax.tree.map(
    lambda s: jnp.asarray(rng.normal(0.5 if s.ndim < 2 else 0.0, 0.5, s.shape), s.dtype), shapes
  )


def filled(examples, rows):
  """A batch of so many rows, the last ones zeros."""
  zeros = {name: np.zeros_like(array) for name, array in examples[0].items()}
  examples = [*examples, *[zeros] * (rows - len(examples))]
  return {name: np.stack([each[name] for each in examples]) for name in zeros}


def answers(objective, rows, said):
  """What is said of each text, by its number."""
  found = {}
  for index in range(len(rows)):
    row = {name: np.asarray(values)[index] for name, values in said.items()}
    found |= dict(zip(rows.texts(index), objective.answers(row, rows, index), strict=True))
  return found


def assert_same(found, wanted):
  """To `TOLERANCE`."""
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE)
