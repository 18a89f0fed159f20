"""Scaled dot-product attention (arXiv:1706.03762, eq. 1) with grouped heads (arXiv:2305.13245), as
one pure function.

Letters are those of `llm_jax.nn.options`. Implementations, each a module beside this one:

    xla        the equation as it stands; all scores of a row in memory, and everywhere but on a CPU
               computed again for the backward pass
    blockwise  the same for one tile of queries at a time, on any device: never more scores than
               those of a tile (module `ring`)
    splash     for TPUs: a kernel that keeps tiles of the scores in the chip's own memory
    cudnn      for NVIDIA GPUs: cuDNN's kernel of that kind
    ring       for rows that are cut over the mesh axis `sequence`
    auto       ring where rows are cut; else splash on a TPU and cudnn on a GPU, where they can do
               what is asked; else blockwise for rows of more than `LONG` tokens, and xla for others

Keys and values before a row (`masks.Prefix`) are for xla alone; scores with a bias, keys of another
row (cross-attention), and keys that are seen from before them (prefix LM), for xla, blockwise and
ring.

Where no more than a few positions of a row are read, `xla.attention_at` is theirs over the whole of
it. A row that grows token by token keeps its keys and values (module `cache`).
"""

import functools
from collections.abc import Sequence

import jax
from absl import logging

from llm_jax.nn.attention import cudnn, ring, splash, xla
from llm_jax.nn.attention.masks import Prefix
from llm_jax.parallel import sharding

IMPLEMENTATIONS = ('auto', 'xla', 'blockwise', 'splash', 'cudnn', 'ring')
KERNELS = {'tpu': 'splash', 'gpu': 'cudnn'}
LONG = 1024  # tokens of a row
ABLE = {  # what not all can do -> those that can
  'keys before those of a row': ('xla',),
  'bias of scores': ('xla', 'blockwise', 'ring'),
  'keys of another row': ('xla', 'blockwise', 'ring'),
  'keys that are seen from before them': ('xla', 'blockwise', 'ring'),
}


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  prefix: Prefix | None = None,
  bias_ND: jax.Array | None = None,
  segments_BT: jax.Array | None = None,
  key_segments_BS: jax.Array | None = None,
  open_BS: jax.Array | None = None,
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
    k_BSKH: keys, of the same row (S = T) or of another.
    v_BSKH: values.
    prefix: keys and values that all tokens see; None for none.
    bias_ND: what is added to the scaled scores of each head, by the distance from key to query, as
      `masks.by_distance` has it; D = 2 T - 1. None for nothing.
    segments_BT: one number per document; a token sees only its own number. None: the row is one
      document.
    key_segments_BS: the numbers of keys of another row; None where keys are of the same.
    open_BS: not 0 for keys that all tokens of their document see, later ones than themselves too,
      where `causal` (prefix LM, arXiv:1910.10683, section 3.2.1). None for none.
    causal: a token sees no later position of the row.
    window: None for no limit. Causal: the last `window` positions, its own among them (Mistral,
      arXiv:2310.06825). Otherwise `window // 2` positions to either side (ModernBERT,
      arXiv:2412.13663).
    dropout_rate: share of the probabilities that is dropped. Which ones is drawn anew by each
      implementation.
    dropout_rng: key for the dropout; None for no dropout.
    implementation: one of `IMPLEMENTATIONS`.

  Returns:
    [B, T, N, H] in the type of `q_BTNH`.

  Raises:
    ValueError: key heads that do not divide the query heads, queries and keys of unequal length in
      one row, keys of another row that are seen by where they stand, an implementation that is not
      known or cannot do what is asked.
  """
  crosses = key_segments_BS is not None
  _check(q_BTNH, k_BSKH, implementation, crosses)
  if crosses and (causal or window is not None or bias_ND is not None):
    raise ValueError('keys of another row are all seen, wherever they stand.')
  if open_BS is not None and window is not None:
    raise ValueError(f'keys that all tokens of a document see are none where window={window}.')
  drops = dropout_rng is not None and dropout_rate > 0.0
  masks = dict(segments_BT=segments_BT, causal=causal, window=window)
  drop = dict(dropout_rate=dropout_rate, dropout_rng=dropout_rng) if drops else {}
  wanted = {
    'keys before those of a row': prefix is not None,
    'bias of scores': bias_ND is not None,
    'keys of another row': crosses,
    'keys that are seen from before them': open_BS is not None,
  }
  chosen = _chosen(implementation, q_BTNH, k_BSKH, drops, [k for k, v in wanted.items() if v])
  if chosen == 'splash':
    return splash.attention(q_BTNH, k_BSKH, v_BSKH, **masks)
  if chosen == 'cudnn':
    return cudnn.attention(q_BTNH, k_BSKH, v_BSKH, **masks)
  if chosen in ('ring', 'blockwise'):
    tile = ring.BLOCK if chosen == 'blockwise' else ring.TILE
    masks |= dict(bias_ND=bias_ND, key_segments_BS=key_segments_BS, open_BS=open_BS)
    return ring.attention(q_BTNH, k_BSKH, v_BSKH, **masks, **drop, tile=tile)
  masks |= dict(bias_ND=bias_ND, key_segments_BS=key_segments_BS, open_BS=open_BS)
  return xla.attention(q_BTNH, k_BSKH, v_BSKH, prefix=prefix, **masks, **drop)


def _check(q_BTNH: jax.Array, k_BSKH: jax.Array, implementation: str, crosses: bool) -> None:
  T, N = q_BTNH.shape[1:3]
  S, K = k_BSKH.shape[1:3]
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'attention={implementation!r} is not known; known: {", ".join(IMPLEMENTATIONS)}.'
    )
  if N % K:
    raise ValueError(f'heads={N} must be a multiple of kv_heads={K}.')
  if S != T and not crosses:
    raise ValueError(f'{T} queries and {S} keys: both must be the positions of one row.')


def _chosen(
  implementation: str, q_BTNH: jax.Array, k_BSKH: jax.Array, drops: bool, wanted: Sequence[str]
) -> str:
  """The name of the implementation to use; `wanted`: what not all of them can do."""
  layout = sharding.current()
  sequence = 1 if layout is None else layout.mesh.shape['sequence']
  cut = f'mesh.sequence={sequence} cuts the rows' if sequence > 1 else None
  refusals = {
    'ring': ring.refusal(q_BTNH, k_BSKH),
    'splash': splash.refusal(q_BTNH, drops),
    'cudnn': cudnn.refusal(q_BTNH, drops),
    'blockwise': cut,
    'xla': None,
  }
  for what in wanted:
    able = ABLE[what]
    refusals |= {name: f'it takes no {what}' for name in refusals if name not in able}
  if implementation == 'auto':
    long = max(q_BTNH.shape[1], k_BSKH.shape[1]) > LONG
    anywhere = 'blockwise' if long and not refusals['blockwise'] else 'xla'
    wanted = 'ring' if cut else KERNELS.get(sharding.platform(), anywhere)
    return _best(wanted, anywhere, refusals[wanted])
  if refusals[implementation]:
    able = ', '.join(repr(name) for name, refusal in refusals.items() if not refusal)
    raise ValueError(
      f'attention={implementation!r} cannot do this: {refusals[implementation]}. What can: {able}.'
    )
  return implementation


def _best(wanted: str, anywhere: str, refusal: str | None) -> str:
  """`wanted`, or `anywhere` where it refuses; logged for a program."""
  chosen = anywhere if refusal else wanted
  if sharding.current() is not None:
    why = f', as {wanted} cannot do this: {refusal}' if refusal else ''
    _report(f'attention: {chosen}{why}')
  return chosen


@functools.cache
def _report(line: str) -> None:
  logging.info('%s.', line)
