"""Rotary position embedding (RoFormer, arXiv:2104.09864): queries and keys are rotated by their
position, so that their products know the distance between two positions alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

Rotation = tuple[jax.Array, jax.Array]  # sine and cosine, [B, T, 1, H / 2]


def frequencies(
  head_dim: int, theta: float, scaling: tuple[float, ...] | None = None
) -> np.ndarray:
  """Radians per position for each pair of dimensions (arXiv:2104.09864, eq. 15), [H / 2] float64.

  Args:
    head_dim: H, even.
    theta: the base.
    scaling: None; or (factor,), all waves stretched alike (arXiv:2306.15595); or LLaMA 3's
      (arXiv:2407.21783; code of release 3.1): (factor, low, high, length). Waves shorter than
      length / high are kept, those longer than length / low are stretched `factor` times, those
      between partly.

  Raises:
    ValueError: an odd head dimension, or a scaling that is not one number, or four with low < high.
  """
  if head_dim % 2:
    raise ValueError(
      f'positions="rope" rotates pairs of dimensions; head_dim={head_dim} must be even.'
    )
  plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  if scaling is None:
    return plain
  if len(scaling) == 1:
    return plain / scaling[0]
  if len(scaling) != 4 or not scaling[1] < scaling[2]:
    raise ValueError(
      f'rope_scaling={scaling} must be (factor,), or (factor, low, high, original length) with low '
      '< high.'
    )
  factor, low, high, length = scaling
  rounds = length * plain / (2 * np.pi)  # of each pair within the original length
  kept = np.clip((rounds - low) / (high - low), 0.0, 1.0)
  return plain * (kept + (1.0 - kept) / factor)


def rotation(positions_BT: jax.Array, frequencies: np.ndarray, dtype: jnp.dtype) -> Rotation:
  """Sine and cosine of each position's angles, [B, T, 1, H / 2] each, in `dtype`."""
  per_pair = jnp.asarray(frequencies, dtype).reshape(1, 1, 1, -1)
  angles = positions_BT[:, :, None, None].astype(dtype) * per_pair
  return jnp.sin(angles), jnp.cos(angles)


def rotate(x_BTNH: jax.Array, by: Rotation) -> jax.Array:
  """Rotates dimension i together with dimension i + H / 2 (the halved layout of GPT-NeoX), in at
  least float32.
  """
  sine, cosine = by
  a, b = jnp.split(x_BTNH.astype(sine.dtype), 2, axis=-1)
  rotated = jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)
  return rotated.astype(x_BTNH.dtype)
