"""What generation keeps of rows that grow, and how the next token of each gets into it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax.core.tree import PyTree
from llm_jax.generation import forward
from llm_jax.generation.sampling import Numbers, among, choose
from llm_jax.parallel import sharding


@flax.struct.dataclass
class State:
  """Rows that grow, each of which goes its own way.

  Attributes:
    cache: the model's, without the newest tokens.
    ids_B: the newest token of each row, int32.
    lengths_B: how many tokens of each row are in the cache, int32.
    history_BT: the tokens of each row, its prompt and the newest included.
    numbers: how the tokens of each row are chosen.
    slots: the longest row that the cache has room for.
    source: the longest source that it has room for.
    logits_BV: what the newest tokens were chosen from; None where that is not kept.
  """

  cache: PyTree
  ids_B: jax.Array
  lengths_B: jax.Array
  history_BT: jax.Array
  numbers: Numbers
  slots: int = flax.struct.field(pytree_node=False)
  source: int = flax.struct.field(pytree_node=False, default=0)
  logits_BV: jax.Array | None = None


@flax.struct.dataclass
class Prompts:
  """What prefill reads: ids, filled up on the right, their lengths, and the numbers of each row."""

  tokens_BT: jax.Array
  lengths_B: jax.Array
  numbers: Numbers


def document_rows(tokens_BT: jax.Array, lengths_B: jax.Array) -> dict[str, jax.Array]:
  """Rows of one document each, filled up on the right."""
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  segments_BT = jnp.int32(positions_BT < lengths_B[:, None])
  return {'tokens': tokens_BT, 'segments': segments_BT, 'positions': positions_BT}


def shape(state: State) -> tuple[Any, ...]:
  """What programs are compiled for."""
  return len(state.ids_B), state.slots, state.source, state.logits_BV is None


def chosen(
  state: State, logits_BV: jax.Array, allowed_BW: jax.Array | None = None
) -> tuple[State, jax.Array]:
  """The state with the next token of each row, and these tokens, whole on each device."""
  if state.logits_BV is not None:
    state = state.replace(logits_BV=logits_BV)
  if allowed_BW is not None:
    logits_BV = among(logits_BV, allowed_BW)
  ids_B = choose(logits_BV, state.history_BT, state.lengths_B, state.numbers)
  ids_B = sharding.constrain(ids_B, 'batch')
  rows = jnp.arange(len(ids_B))
  history_BT = state.history_BT.at[rows, state.lengths_B].set(ids_B, mode='drop')
  state = laid_out(state.replace(ids_B=ids_B, history_BT=history_BT))
  return state, sharding.constrain(ids_B, None)


def with_row(state: State, new: State, row: jax.Array) -> State:
  """A state in which one row is that of another state, which has no other."""

  def put(rows: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, x.astype(rows.dtype), row, axis=0)

  return laid_out(jax.tree.map(put, state, new))


def laid_out(state: State) -> State:
  """Always laid out alike, so that one compiled step takes any state."""
  rest = jax.tree.map(
    lambda x: sharding.constrain(x, 'batch', *[None] * (x.ndim - 1)), state.replace(cache=None)
  )
  return rest.replace(cache=forward.laid_out(state.cache))
