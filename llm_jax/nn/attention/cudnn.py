"""Attention on an NVIDIA GPU by cuDNN's fused kernel, through JAX (`jax.nn.dot_product_attention`):
no scores in main memory.

The kernel knows causal rows and their windows by itself. What else hides a key (documents that
share a row, windows to both sides) goes in as a mask, one number for each pair of positions and the
same for all heads. Letters are those of `llm_jax.nn.options`.
"""

import jax
import jax.numpy as jnp

from llm_jax.nn.attention.masks import visible
from llm_jax.parallel import sharding


def refusal(q_BTNH: jax.Array, drops: bool) -> str | None:
  """Why the kernel cannot take these queries, or drop probabilities; None where it can."""
  T, _, H = q_BTNH.shape[1:]
  layout = sharding.current()
  platform = jax.default_backend() if layout is None else layout.platform
  if platform != 'gpu':
    return f'it runs on GPUs, not on {platform}'
  if layout is not None and layout.mesh.shape['sequence'] > 1:
    return f'it wants whole rows, and mesh.sequence={layout.mesh.shape["sequence"]} cuts them'
  if drops:
    return 'it drops no probabilities (attention_dropout=0 leaves dropout out)'
  if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
    return f'it computes in bfloat16 or float16, not in {q_BTNH.dtype}'
  if H % 8 or H > 128:
    return f'heads of {H} dimensions are not a multiple of 8 up to 128'
  if T % 2:
    return f'rows of {T} tokens are not even'
  return None


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  segments_BT: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
  implementation: str = 'cudnn',
) -> jax.Array:
  """As `llm_jax.nn.attention.dispatch.attention`, for what `refusal` has nothing against.

  Args:
    q_BTNH, k_BSKH, v_BSKH, segments_BT, causal, window: as there.
    implementation: that of `jax.nn.dot_product_attention`; 'xla' gives the same anywhere, slowly.
  """
  indices = jnp.arange(q_BTNH.shape[1])
  segments = None if segments_BT is None else (segments_BT, segments_BT)
  mask = visible(indices, indices, segments, causal=False, window=None if causal else window)
  return jax.nn.dot_product_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    mask=None if mask is None else mask[:, 0],
    is_causal=causal,
    implementation=implementation,
    local_window_size=(window - 1, 0) if causal and window is not None else None,
  )
