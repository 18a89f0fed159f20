"""Kernels as the product of two thin ones, by singular values, weighted by what texts lead to
(arXiv:2403.07378).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.compress import _kernels
from llm_jax.core import contracts
from llm_jax.core.contracts import Scheme
from llm_jax.core.params import Info
from llm_jax.nn.forms import low_rank


class Compression(contracts.Compression):
  """Kernels of linear maps in the layers become [I, R] times [R, O].

  Attributes:
    share: of the parameters of a kernel that the two have together; R follows for each kernel.
    rank: or R itself, for all kernels.
    weighted: whether inputs count by their mean square on texts; otherwise all alike.
    keep: patterns of paths that stay as they are.
  """

  def __init__(
    self,
    share: float | None = None,
    rank: int | None = None,
    weighted: bool = True,
    keep: Sequence[str] = (),
  ):
    if (share is None) == (rank is None):
      raise ValueError(
        f'config.compress.share={share} and config.compress.rank={rank}: give one of the two; '
        'share=0.5 halves each kernel.'
      )
    if share is not None and not 0 < share < 1:
      raise ValueError(f'config.compress.share={share} must be above 0 and below 1.')
    _kernels.check_positive('rank', rank)
    self.share, self.rank, self.keep = share, rank, tuple(keep)
    self.looks_at = (contracts.ACTIVATIONS,) if weighted else ()

  def schemes(self, infos: Mapping[str, Info], shapes: Mapping[str, Any]) -> Mapping[str, Scheme]:
    """See the contract."""
    found: dict[str, Scheme] = {}
    by_scheme: dict[low_rank.Scheme, list[str]] = {}
    for path in _kernels.without(_kernels.of_model(infos, vocabulary=False), self.keep):
      inputs, outputs = low_rank.sides(shapes[path].shape, infos[path])
      rank = self.rank or max(1, int(self.share * inputs * outputs / (inputs + outputs)))
      by_scheme.setdefault(low_rank.Scheme(rank), []).append(path)
    for scheme, paths in by_scheme.items():
      found |= _kernels.fitting(scheme, paths, infos, shapes)
    return found
