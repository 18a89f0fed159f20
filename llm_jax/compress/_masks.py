"""Masks of weights that are left out: the smallest of each kernel of a layer, or of each few
inputs.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.compress import _kernels
from llm_jax.core import contracts, tree
from llm_jax.core import params as params_lib
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree

MASK = 'mask'


class Sparsity:
  """How many weights are left out, and where.

  Attributes:
    share: of the weights of each kernel, above 0 and below 1.
    pattern: (n, m): of every m inputs next to one another n stay; None: anywhere.
    keep: patterns of paths that stay as they are.

  Raises:
    ValueError: a share or a pattern that is not possible.
  """

  def __init__(self, share: float | None, pattern: str | None, keep: Sequence[str]):
    if (share is None) == (pattern is None):
      raise ValueError(
        f'config.compress.share={share} and config.compress.pattern={pattern!r}: give one of the '
        "two; share=0.5 leaves half of the weights out, pattern='2:4' two of every four."
      )
    if share is not None and not 0 < share < 1:
      raise ValueError(
        f'config.compress.share={share} is that of the weights that are left out, above 0 and '
        'below 1.'
      )
    self.pattern = None if pattern is None else _parsed(pattern)
    self.share = share if self.pattern is None else 1 - self.pattern[0] / self.pattern[1]
    self.keep = tuple(keep)

  def paths(self, infos: Mapping[str, Info], shapes: Mapping[str, Any]) -> list[str]:
    """The kernels that lose weights.

    Raises:
      ValueError: there are none, or the share is none of a kernel.
    """
    found = _kernels.without(_kernels.of_model(infos, vocabulary=False), self.keep)
    for path in found:
      info, shape = infos[path], shapes[path].shape
      if self.pattern is not None and shape[info.stacked + info.inputs[-1]] % self.pattern[1]:
        raise ValueError(
          f'config.compress.pattern: the inputs of {path}, {shape}, do not divide by '
          f'{self.pattern[1]}; name it in config.compress.keep.'
        )
      size = 1
      for length in shape[info.stacked :]:
        size *= length
      if int(self.share * size) < 1:
        raise ValueError(
          f'config.compress.share={self.share} of the {size} weights of {path} is none.'
        )
    return found

  def mask(self, scores: jax.Array, info: Info, share: jax.Array | float) -> jax.Array:
    """Which weights stay, bool.

    Args:
      scores: of each weight, of the kernel's shape; the smallest go.
      info: of the kernel.
      share: how many go now; with a pattern 0, or all that it says.
    """
    if self.pattern is not None:
      return jnp.where(share > 0, _of_pattern(scores, info, *self.pattern), True)
    axes = tuple(range(info.stacked, scores.ndim))
    flat = jnp.sort(scores.reshape(*scores.shape[: info.stacked], -1), axis=-1)
    count = jnp.floor(share * flat.shape[-1]).astype(jnp.int32)
    least = jnp.take(flat, jnp.maximum(count - 1, 0), axis=-1)
    least = jnp.expand_dims(least, axes)
    return jnp.where(count > 0, scores > least, True)


class Growing(contracts.Compression):
  """What both methods have in common: masks that grow while a run is trained.

  Args:
    steps: of the run.
    share, pattern, keep: of `Sparsity`.
    begin, end: shares of the run between which the share grows to its whole.
    every: steps between two looks at what the masks go by.
  """

  trains = True

  def __init__(
    self,
    steps: int = 1,
    share: float | None = None,
    pattern: str | None = None,
    begin: float = 0.0,
    end: float = 0.75,
    every: int = 10,
    keep: Sequence[str] = (),
  ):
    check_schedule(begin, end, every)
    self.sparsity = Sparsity(share, pattern, keep)
    self.begin, self.end, self.every, self.steps = begin, end, every, steps

  def check(self, infos: Mapping[str, Info], shapes: Mapping[str, Any]) -> None:
    """See the contract."""
    self.sparsity.paths(infos, shapes)

  def renewed(
    self,
    masks: Mapping[str, jax.Array],
    scores: Mapping[str, jax.Array],
    infos: Mapping[str, Info],
    done: jax.Array,
  ) -> dict[str, jax.Array]:
    """The masks by path, by the scores as they are where a look is due."""
    share = share_at(done, self.begin, self.end, self.sparsity.share)
    step = jnp.round(done * self.steps).astype(jnp.int32)
    last = jnp.ceil(self.end * self.steps).astype(jnp.int32)
    due = (step <= last) & ((step % self.every == 0) | (step == last))
    look = lambda: {path: self.sparsity.mask(scores[path], infos[path], share) for path in masks}
    return jax.lax.cond(due, look, lambda: dict(masks))


def share_at(done: jax.Array, begin: float, end: float, share: float) -> jax.Array:
  """The share that is left out when a part of the run is over: from 0 at `begin` to all of it at
  `end` by a cubic curve (arXiv:1710.01878, equation 1).
  """
  at = jnp.clip((done - begin) / max(end - begin, 1e-9), 0.0, 1.0)
  return share * (1 - (1 - at) ** 3)


def check_schedule(begin: float, end: float, every: int) -> None:
  """Raises ValueError unless masks grow within the run."""
  if not 0 <= begin < end <= 1:
    raise ValueError(
      f'config.compress.begin={begin} and config.compress.end={end} are shares of the run, the '
      'former below the latter, both from 0 to 1.'
    )
  _kernels.check_positive('every', every)


def applied(params: PyTree, masks: Mapping[str, jax.Array]) -> dict[str, Any]:
  """Parameters with zeros where a mask says so."""

  def leaf(path: str, x: jax.Array) -> jax.Array:
    return jnp.where(masks[path], x, 0) if path in masks else x

  return tree.map_with_path(leaf, params)


def chosen(params: PyTree, paths: Sequence[str]) -> dict[str, Any]:
  """The parameters of these paths, nested."""
  return params_lib.split(params, set(paths).__contains__)[0]


def _parsed(pattern: str) -> tuple[int, int]:
  match = re.fullmatch(r'(\d+):(\d+)', pattern)
  if match is None or not 0 < int(match[1]) < int(match[2]):
    raise ValueError(
      f"config.compress.pattern={pattern!r} must be n:m, n of every m stay, such as '2:4'."
    )
  return int(match[1]), int(match[2])


def _of_pattern(scores: jax.Array, info: Info, stay: int, of: int) -> jax.Array:
  """Of every `of` inputs next to one another the `stay` with the highest scores."""
  axis = info.stacked + info.inputs[-1]
  moved = jnp.moveaxis(scores, axis, -1)
  groups = moved.reshape(*moved.shape[:-1], -1, of)
  rank = jnp.argsort(jnp.argsort(-groups, axis=-1, stable=True), axis=-1)
  return jnp.moveaxis((rank < stay).reshape(moved.shape), -1, axis)
