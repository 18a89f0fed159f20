"""A model as one function in StableHLO (`jax.export`), which any later JAX runs without this
package.

    answer = jax.export.deserialize(open('model.stablehlo', 'rb').read()).call
    answer(tokens, lengths)  # int32 [B, T] and [B], any B

The parameters stand in it, in the forms in which the program keeps them: in 8 bits, say.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from llm_jax.core.contracts import Batch
from llm_jax.core.tree import PyTree
from llm_jax.parallel import sharding
from llm_jax.programs import network as networks
from llm_jax.programs.inference import Inference
from llm_jax.programs.network import Network

PLATFORMS = ('cpu', 'cuda', 'tpu')


def exported(program: Inference, params: PyTree, length: int) -> bytes:
  """The function (tokens, lengths) -> arrays by name, for rows of one text each.

  What it gives: of a classifier or a regressor what its predictor says (`probabilities` [B, 1, C],
  `values` [B, 1]); of another decoder the `logits` [B, V] after the last token; of another encoder
  the `hidden` states [B, T, D].

  Args:
    program: of the model.
    params: its parameters.
    length: T, of every row; shorter texts are filled up on the right.

  Raises:
    ValueError: a model that reads two rows, or whose answers need more than the tokens of a text.
  """
  if importlib.util.find_spec('flatbuffers') is None:
    raise ImportError("--export=stablehlo needs flatbuffers: pip install 'llm_jax[stablehlo]'.")
  model = program.network.model
  if model.reads_source():
    raise ValueError('an encoder-decoder reads two rows, and this export is of functions of one.')

  def function(tokens_BT: jax.Array, lengths_B: jax.Array) -> dict[str, jax.Array]:
    batch = _batch(tokens_BT, lengths_B, model.inputs)
    with sharding.use(None):
      return networks.apply(program.network, params, batch, method=_answered(program, lengths_B))

  (rows,) = jax.export.symbolic_shape('b')
  shapes = (
    jax.ShapeDtypeStruct((rows, length), jnp.int32),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
  )
  try:
    jax.eval_shape(function, *(jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for x in shapes))
  except KeyError as error:
    raise ValueError(
      f'the answers of this model need {error} of a record, and this export is of functions of '
      'tokens alone.'
    ) from error
  return jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes).serialize()


def _batch(tokens_BT: jax.Array, lengths_B: jax.Array, inputs: tuple[str, ...]) -> Batch:
  """Rows of one text each, filled up on the right."""
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  found = {
    'tokens': tokens_BT,
    'segments': (positions_BT < lengths_B[:, None]).astype(jnp.int32),
    'positions': positions_BT.astype(jnp.int32),
    'text_firsts': jnp.zeros_like(lengths_B)[:, None],
    'text_lasts': lengths_B[:, None] - 1,
  }
  return found | ({'token_types': jnp.zeros_like(tokens_BT)} if 'token_types' in inputs else {})


def _answered(program: Inference, lengths_B: jax.Array) -> Callable[[Network, Batch], Any]:
  if program.objective.predictor is not None:
    return lambda network, batch: network.predict(batch)

  def last(network: Network, batch: Batch) -> dict[str, jax.Array]:
    hidden_B1D = network.model(batch, lengths_B[:, None] - 1).hidden
    return {'logits': network.model.logits(hidden_B1D[:, 0])}

  def states(network: Network, batch: Batch) -> dict[str, jax.Array]:
    return {'hidden': network.model(batch).hidden}

  return last if program.network.model.causal else states
