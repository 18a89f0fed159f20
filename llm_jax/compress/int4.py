"""Weights in 4 bits, two in a byte: an eighth of the bytes, and scales (groups as in
arXiv:2210.17323).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.compress import _kernels
from llm_jax.core import contracts
from llm_jax.core.contracts import Scheme
from llm_jax.core.params import Info
from llm_jax.nn.forms import int4, int8


class Compression(contracts.Compression):
  """Kernels of linear maps in 4 bits, with a scale for each group of inputs of an output channel.

  Attributes:
    group: inputs that share a scale; a kernel whose inputs do not divide by it stays as it is.
    vocabulary: whether the token table and the projection on the vocabulary are rounded too, to 8
      bits: their error would be that of every token.
    keep: patterns of paths that stay as they are.
  """

  trains = True

  def __init__(self, group: int = 64, vocabulary: bool = True, keep: Sequence[str] = ()):
    _kernels.check_positive('group', group)
    self.scheme, self.vocabulary, self.keep = int4.Scheme(group), vocabulary, tuple(keep)

  def schemes(self, infos: Mapping[str, Info], shapes: Mapping[str, Any]) -> Mapping[str, Scheme]:
    """See the contract."""
    paths = _kernels.without(_kernels.of_model(infos, self.vocabulary), self.keep)
    ends = [path for path in paths if _kernels.is_end(infos[path])]
    inner = [path for path in paths if path not in ends]
    found = dict(_kernels.fitting(self.scheme, inner, infos, shapes))
    return found | dict.fromkeys(ends, int8.Scheme())
