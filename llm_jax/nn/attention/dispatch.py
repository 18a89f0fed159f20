"""Scaled dot-product attention (arXiv:1706.03762, eq. 1) with grouped heads (arXiv:2305.13245), as
one pure function.

Letters are those of `llm_jax.nn.layers`; G is the number of query heads that share a key head, N =
K G. Implementations:

    xla        the equation as it stands; all scores of a row in memory, and but on a CPU computed again for the backward pass
    blockwise  the same a tile of queries at a time, on any device: never more scores than those (`llm_jax.nn.attention.ring`)
    splash     for TPUs: a kernel that keeps tiles of the scores in the chip's own memory (`llm_jax.nn.attention.splash`)
    cudnn      for NVIDIA GPUs: cuDNN's kernel of that kind (`llm_jax.nn.attention.cudnn`)
    ring       for rows that are cut over the mesh axis `sequence` (`llm_jax.nn.attention.ring`)
    auto       ring where rows are cut; else splash on a TPU and cudnn on a GPU, where they can do what is asked; else blockwise
               for rows longer than `LONG` places, and xla for others

Where no more than a few places of a row are read, `attention_at` is theirs over the whole of it. A
row that grows token by token (`llm_jax.inference.decoding`) keeps its `KeyValues`: `extended`
writes to them, `recall` is attention of the newest token over them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from llm_jax.nn.attention import cudnn as cudnn_attention
from llm_jax.nn.attention import ring as ring_attention
from llm_jax.nn.attention import splash as splash_attention
from llm_jax.nn.attention.masks import visible
from llm_jax.nn.dropout import dropout
from llm_jax.parallel import sharding

IMPLEMENTATIONS = ('auto', 'xla', 'blockwise', 'splash', 'cudnn', 'ring')
KERNELS = {'tpu': 'splash', 'gpu': 'cudnn'}
LONG = 1024  # places


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  segments_BT: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
  implementation: str = 'auto',
) -> jax.Array:
  """Mixes values by the softmax of scaled scores; query head n reads key head n // G.

  Scores and softmax are at least float32, whatever the inputs are. A token always sees itself, so
  no softmax is over nothing: padding (segment 0) sees padding, and comes out meaningless and
  finite.

  Args:
    q_BTNH: queries.
    k_BSKH: keys of the same row, S = T.
    v_BSKH: values.
    segments_BT: one number a document; a token sees only its own number. None: the row is one
      document.
    causal: a token sees no later place of the row.
    window: None for no limit. Causal: the last `window` places, its own among them (Mistral,
      arXiv:2310.06825). Otherwise `window // 2` places to either side (ModernBERT,
      arXiv:2412.13663).
    dropout_rate: share of the probabilities that is dropped. Which ones is drawn anew by each
      implementation.
    dropout_rng: key for the dropout; None for no dropout.
    implementation: one of `IMPLEMENTATIONS`.

  Returns:
    [B, T, N, H] in the type of `q_BTNH`.

  Raises:
    ValueError: key heads that do not divide the query heads, queries and keys of unequal length, an
      implementation that is not known or cannot do what is asked.
  """
  T, N, H = q_BTNH.shape[1:]
  S, K = k_BSKH.shape[1:3]
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'attention={implementation!r} is not known; known: {", ".join(IMPLEMENTATIONS)}.'
    )
  if N % K:
    raise ValueError(f'heads={N} must be a multiple of kv_heads={K}.')
  if S != T:
    raise ValueError(f'{T} queries and {S} keys: both must be the places of one row.')
  drops = dropout_rng is not None and dropout_rate > 0.0
  masks = dict(segments_BT=segments_BT, causal=causal, window=window)
  drop = dict(dropout_rate=dropout_rate, dropout_rng=dropout_rng) if drops else {}
  chosen = _chosen(implementation, q_BTNH, drops)
  if chosen == 'splash':
    return splash_attention.attention(q_BTNH, k_BSKH, v_BSKH, **masks)
  if chosen == 'cudnn':
    return cudnn_attention.attention(q_BTNH, k_BSKH, v_BSKH, **masks)
  if chosen in ('ring', 'blockwise'):
    tile = ring_attention.BLOCK if chosen == 'blockwise' else ring_attention.TILE
    return ring_attention.attention(q_BTNH, k_BSKH, v_BSKH, **masks, **drop, tile=tile)
  return _scored(
    q_BTNH, k_BSKH, v_BSKH, jnp.arange(T)[None], (segments_BT, segments_BT), causal, window, **drop
  )


def attention_at(
  q_BPNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  places_BP: jax.Array,
  *,
  segments_BT: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
) -> jax.Array:
  """What `attention` gives at some places of each row, by the equation as it stands: P x T scores
  in memory.

  Args:
    q_BPNH: queries of these places.
    k_BTKH: keys of all places of the row.
    v_BTKH: their values.
    places_BP: the places, in any order, any of them more than once.
    segments_BT, causal, window, dropout_rate, dropout_rng: as in `attention`.

  Returns:
    [B, P, N, H] in the type of `q_BPNH`.
  """
  drop = (
    dict(dropout_rate=dropout_rate, dropout_rng=dropout_rng)
    if dropout_rng is not None and dropout_rate > 0.0
    else {}
  )
  queries = None if segments_BT is None else jnp.take_along_axis(segments_BT, places_BP, axis=1)
  return _scored(q_BPNH, k_BTKH, v_BTKH, places_BP, (queries, segments_BT), causal, window, **drop)


class KeyValues(NamedTuple):
  """Keys and values of the tokens so far, [B, K, S, H] each; the token at position p stands in slot
  p mod S.
  """

  keys: jax.Array
  values: jax.Array


def extended(
  cache: KeyValues, k_BTKH: jax.Array, v_BTKH: jax.Array, lengths_B: jax.Array
) -> KeyValues:
  """A cache with new tokens in it.

  Args:
    cache: of one layer.
    k_BTKH: keys: of the newest token where T = 1; otherwise of the first tokens, in place of all
      that the cache held.
    v_BTKH: their values.
    lengths_B: tokens of each row so far, these included; places from there on are padding, and stay
      out.
  """
  S = cache.keys.shape[2]
  if k_BTKH.shape[1] == 1:
    write = jax.vmap(
      lambda old_KSH, new_1KH, slot: jax.lax.dynamic_update_slice_in_dim(
        old_KSH, new_1KH.swapaxes(0, 1), slot, 1
      )
    )
    slots_B = (lengths_B - 1) % S
    new = KeyValues(
      *(
        write(old, x.astype(old.dtype), slots_B)
        for old, x in zip(cache, (k_BTKH, v_BTKH), strict=True)
      )
    )
  else:
    places_BS = jnp.clip(_places(lengths_B, S), 0, k_BTKH.shape[1] - 1)
    new = KeyValues(
      *(
        jnp.take_along_axis(x, places_BS[..., None, None], axis=1).swapaxes(1, 2).astype(old.dtype)
        for old, x in zip(cache, (k_BTKH, v_BTKH), strict=True)
      )
    )
  return KeyValues(*(sharding.constrain(x, 'batch', 'kv_heads', None, None) for x in new))


def recall(q_B1NH: jax.Array, cache: KeyValues, lengths_B: jax.Array) -> jax.Array:
  """Mixes the values of a cache by the softmax of scaled scores, at least float32, for the newest
  token of each row.

  Args:
    q_B1NH: its queries.
    cache: has the newest token in it. All that is in it is seen: a layer with a window has no more
      slots than its window.
    lengths_B: tokens of each row so far, at least 1.

  Returns:
    [B, 1, N, H] in the type of `q_B1NH`.
  """
  (B, _, N, H), (K, S) = q_B1NH.shape, cache.keys.shape[1:3]
  wide = jnp.promote_types(q_B1NH.dtype, jnp.float32)
  q_BKGH = q_B1NH.reshape(B, K, N // K, H)
  scores_BKGS = (
    jnp.einsum('BKGH,BKSH->BKGS', q_BKGH, cache.keys, preferred_element_type=wide) * H**-0.5
  )
  full_BS = _places(lengths_B, S) >= 0
  scores_BKGS = jnp.where(full_BS[:, None, None], scores_BKGS, jnp.finfo(wide).min / 2)
  weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(cache.values.dtype)
  return jnp.einsum('BKGS,BKSH->BKGH', weights_BKGS, cache.values).reshape(B, 1, N, H)


def _places(lengths_B: jax.Array, slots: int) -> jax.Array:
  """The position of the token in each slot, [B, S]; negative where there is none yet."""
  last_B1 = lengths_B[:, None] - 1
  return last_B1 - (last_B1 - jnp.arange(slots)[None]) % slots


def _chosen(implementation: str, q_BTNH: jax.Array, drops: bool) -> str:
  """The name of the implementation to use."""
  layout = sharding.current()
  sequence = 1 if layout is None else layout.mesh.shape['sequence']
  cut = f'mesh.sequence={sequence} cuts the rows' if sequence > 1 else None
  refusals = {
    'ring': ring_attention.refusal(q_BTNH),
    'splash': splash_attention.refusal(q_BTNH, drops),
    'cudnn': cudnn_attention.refusal(q_BTNH, drops),
    'blockwise': cut,
    'xla': None,
  }
  if implementation == 'auto':
    anywhere = 'blockwise' if q_BTNH.shape[1] > LONG and not cut else 'xla'
    wanted = 'ring' if cut else KERNELS.get(sharding.platform(), anywhere)
    chosen = anywhere if refusals[wanted] else wanted
    if layout is not None:
      _report(
        f'attention: {chosen}'
        + (f', as {wanted} cannot do this: {refusals[wanted]}' if refusals[wanted] else '')
      )
    return chosen
  if refusals[implementation]:
    able = ', '.join(repr(name) for name, refusal in refusals.items() if not refusal)
    raise ValueError(
      f'attention={implementation!r} cannot do this: {refusals[implementation]}. What can: {able}.'
    )
  return implementation


def _scored(
  q_BTNH, k_BSKH, v_BSKH, places_BT, segments, causal, window, dropout_rate=0.0, dropout_rng=None
):
  """The equation as it stands, its scores kept for the backward pass on a CPU alone."""
  run = functools.partial(_xla, causal=causal, window=window, dropout_rate=dropout_rate)
  if sharding.platform() != 'cpu':
    # T x T scores of every layer would not fit. Where a layer is computed again as a whole, the
    # compiler may merge the two.
    run = jax.checkpoint(run, prevent_cse=False)
  return run(q_BTNH, k_BSKH, v_BSKH, places_BT, segments, dropout_rng)


def _xla(q_BTNH, k_BSKH, v_BSKH, places_BT, segments, dropout_rng, *, causal, window, dropout_rate):
  """Query heads of one key head side by side, so that nothing is repeated in memory."""
  (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
  wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTS = (
    jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=wide) * H**-0.5
  )
  mask = visible(
    places_BT,
    jnp.arange(k_BSKH.shape[1]),
    None if segments[1] is None else segments,
    causal,
    window,
  )
  if mask is not None:
    # Finite, so that no gradient is NaN; low enough for an exact zero after the softmax.
    scores_BKGTS = jnp.where(mask, scores_BKGTS, jnp.finfo(wide).min / 2)
  weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
  if dropout_rng is not None:
    weights_BKGTS = dropout(weights_BKGTS, dropout_rate, dropout_rng)
  return jnp.einsum('BKGTS,BSKH->BTKGH', weights_BKGTS, v_BSKH).reshape(B, T, N, H)


@functools.cache
def _report(line: str) -> None:
  logging.info('%s.', line)
