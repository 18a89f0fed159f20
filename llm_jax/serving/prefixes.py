"""The caches of prompts that were read, from which prompts that begin alike go on."""

from collections.abc import Sequence
from typing import NamedTuple

from llm_jax.core.tree import PyTree


class _Kept(NamedTuple):
  """A prompt's first whole pieces, and the cache with them in it."""

  ids: tuple[int, ...]
  cache: PyTree


class Prefixes:
  """Keeps the caches of the prompts that were used last.

  Args:
    most: how many are kept; each takes as much memory as a row.
    piece: tokens of a piece: prompts share whole ones, so that a prompt is read in the same steps,
      and gets the same numbers to the bit, whether it goes on from a cache or not.
    forgets: whether a cache has lost its first tokens (a window), so that only prompts that begin
      with all of it go on from it.
  """

  def __init__(self, most: int, piece: int, forgets: bool):
    self._most, self._piece, self._forgets = most, piece, forgets
    self._kept: list[_Kept] = []  # the one that was used last is last

  def find(self, prompt: Sequence[int]) -> tuple[PyTree | None, int]:
    """A cache, and how many tokens of the prompt are in it, not all of them; None and 0 where there
    is none.
    """
    best, shared = None, 0
    for kept in self._kept:
      length = self._shared(kept.ids, prompt)
      if length > shared:
        best, shared = kept, length
    if best is None:
      return None, 0
    self._kept.remove(best)
    self._kept.append(best)
    return best.cache, shared

  def keep(self, ids: Sequence[int], cache: PyTree) -> None:
    """Keeps the cache of a prompt's whole pieces, in place of those that it goes on from."""
    ids = tuple(ids)
    if self._most and ids and all(kept.ids[: len(ids)] != ids for kept in self._kept):
      if not self._forgets:
        self._kept = [kept for kept in self._kept if ids[: len(kept.ids)] != kept.ids]
      self._kept = [*self._kept, _Kept(ids, cache)][-self._most :]

  def _shared(self, ids: Sequence[int], prompt: Sequence[int]) -> int:
    most, length = min(len(ids), len(prompt) - 1), 0
    while (end := length + self._piece) <= most and ids[length:end] == tuple(prompt[length:end]):
      length = end
    return 0 if self._forgets and length < len(ids) else length
