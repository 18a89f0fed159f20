"""Attention on a TPU by the splash kernel that JAX ships
(jax.experimental.pallas.ops.tpu.splash_attention): tiles of the scores stay in the chip's own
memory (FlashAttention, arXiv:2205.14135), and tiles that a mask leaves empty are not computed.

Letters are those of `llm_jax.nn.options`.
"""

import functools

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from llm_jax.core import scopes
from llm_jax.nn.attention.masks import RESIDUALS
from llm_jax.parallel import sharding

LANES = 128  # tiles are whole multiples of this many positions


def refusal(q_BTNH: jax.Array, drops: bool) -> str | None:
  """Why the kernel cannot take these queries, or drop probabilities; None where it can."""
  T, _, H = q_BTNH.shape[1:]
  layout = sharding.current()
  if layout is not None and layout.platform != 'tpu':
    return f'it runs on TPUs, not on {layout.platform}'
  if layout is not None and layout.mesh.shape['sequence'] > 1:
    return f'it wants whole rows, and mesh.sequence={layout.mesh.shape["sequence"]} cuts them'
  if drops:
    return 'it drops no probabilities (attention_dropout=0 leaves dropout out)'
  if T % LANES:
    return f'rows of {T} tokens are not a multiple of {LANES}'
  if H % 8:
    return f'heads of {H} dimensions are not a multiple of 8'
  if q_BTNH.dtype.itemsize > 4:
    return f'it computes in float32, not in {q_BTNH.dtype}'
  return None


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  segments_BT: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """As `llm_jax.nn.attention.dispatch.attention`, for what `refusal` has nothing against.

  Batch and heads are cut as the layout in force says; rows are whole on a device. `interpret`: on
  any device, slowly.
  """
  run = functools.partial(_local, causal=causal, window=window, interpret=interpret)
  layout = sharding.current()
  if layout is None:
    return run(q_BTNH, k_BSKH, v_BSKH, segments_BT)
  k_BSKH, v_BSKH = (sharding.divisible_heads(x, q_BTNH.shape[2]) for x in (k_BSKH, v_BSKH))
  rows, _, heads, _ = layout.spec(('batch', None, 'heads', None), q_BTNH.shape)
  cut, by_row = P(rows, None, heads, None), P(rows, None)
  return jax.shard_map(
    run, mesh=layout.mesh, in_specs=(cut, cut, cut, by_row), out_specs=cut, check_vma=False
  )(q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _local(q_BTNH, k_BSKH, v_BSKH, segments_BT, *, causal, window, interpret):
  """One device's rows and heads."""
  T, N, H = q_BTNH.shape[1:]
  sizes = blocks(T, H, causal or window is not None)
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([_mask(T, causal, window)] * N),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=RESIDUALS,
    interpret=interpret,
  )
  q_BNTH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
  segments = None if segments_BT is None else kernels.SegmentIds(segments_BT, segments_BT)
  with jax.named_scope(scopes.kernel_flops(**_flops(q_BTNH.shape, sizes, causal, window))):
    return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments).swapaxes(1, 2)


def _flops(
  shape: tuple[int, ...], sizes: kernels.BlockSizes, causal: bool, window: int | None
) -> dict[str, int]:
  """FLOPs of each of the kernel's passes over queries [B, T, N, H]: so many products of scores or
  their like, for what it visits.

  Forward: scores, and the mix. Backward for keys and values: scores again, and the gradients of
  probabilities, values and keys; fused, also of the queries. Backward for queries alone: scores,
  and the gradients of probabilities and queries.
  """
  B, T, N, H = shape
  visited = functools.partial(_visited, T, causal, window)
  passes = {
    'fwd': (2, sizes.block_q, sizes.block_kv),
    'dkv': (5 if sizes.use_fused_bwd_kernel else 4, sizes.block_q_dkv, sizes.block_kv_dkv),
  }
  if not sizes.use_fused_bwd_kernel:
    passes['dq'] = 3, sizes.block_q_dq, sizes.block_kv_dq
  return {
    name: products * 2 * B * N * H * visited(*tile) for name, (products, *tile) in passes.items()
  }


def _visited(length: int, causal: bool, window: int | None, queries: int, keys: int) -> int:
  """Scores in those tiles of `queries` x `keys` of which the mask leaves something."""
  before = length if window is None else window - 1 if causal else window // 2
  after = 0 if causal else length if window is None else window // 2
  q_Q1, k_1K = np.arange(0, length, queries)[:, None], np.arange(0, length, keys)[None, :]
  seen_QK = (k_1K <= q_Q1 + queries - 1 + after) & (k_1K + keys - 1 >= q_Q1 - before)
  return int(seen_QK.sum()) * queries * keys


def _mask(length: int, causal: bool, window: int | None) -> masks.Mask:
  """The static mask, as `llm_jax.nn.attention.masks.visible` has it."""
  shape = (length, length)
  if window is not None:
    return masks.LocalMask(shape, (window - 1, 0) if causal else (window // 2, window // 2), 0)
  return masks.CausalMask(shape) if causal else masks.FullMask(shape)


def blocks(length: int, head_dim: int, sparse: bool) -> kernels.BlockSizes:
  """Tiles that fit in a chip's memory, as large as they may be: each iteration of the kernel costs
  some time whatever it does.

  The fused backward pass computes each tile of the scores once instead of twice, but writes one
  gradient of the queries for each piece of the keys, and skips only what a mask empties of a whole
  piece: up to two pieces it wins.
  """
  tile, most = _divisor(length, 512), 2048 if head_dim <= 128 else 1024
  # The hardware pads a last dimension of less than 128 up to it; positions last, nothing is padded.
  layout = (
    kernels.QKVLayout.HEAD_DIM_MINOR if head_dim % LANES == 0 else kernels.QKVLayout.SEQ_MINOR
  )
  forward = dict(
    block_q=tile,
    block_kv=tile,
    block_q_dkv=tile,
    block_kv_dkv_compute=tile,
    q_layout=layout,
    k_layout=layout,
    v_layout=layout,
  )
  piece = _divisor(length, min(most, max(length // 2, tile) if sparse else length))
  if length // piece <= 2 and piece % tile == 0:
    return kernels.BlockSizes(**forward, block_kv_dkv=piece, use_fused_bwd_kernel=True)
  return kernels.BlockSizes(**forward, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile)


def _divisor(length: int, most: int) -> int:
  """The longest multiple of `LANES` up to `most` that divides `length`."""
  return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)
