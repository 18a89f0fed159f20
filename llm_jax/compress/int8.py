"""Weights in 8 bits, and the activations that they multiply, if wanted (arXiv:2208.07339; W8A8 in
arXiv:2211.10438): a quarter of the bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.compress import _kernels
from llm_jax.core import contracts
from llm_jax.core.contracts import Scheme, Seen
from llm_jax.core.params import Info
from llm_jax.core.plugins import nearest
from llm_jax.nn.forms import int8


class Compression(contracts.Compression):
  """Kernels of linear maps in 8 bits, with a scale for each output channel.

  Attributes:
    group: inputs that share a scale; None: all of a channel.
    activations: 'none'; 'token': what is multiplied is rounded to 8 bits too, by a scale of each
      token; 'tensor': by one scale for all, that of the largest value that texts lead to. Products
      are then those of whole numbers.
    sensitive: kernels whose products on texts come out wrong by more than this share (of their
      root mean square) stay in floating point; None: none is looked at.
    vocabulary: whether the token table and the projection on the vocabulary are rounded too; what
      they multiply is not.
    keep: patterns of paths that stay as they are; found by `sensitive` where it is given.
  """

  trains = True

  def __init__(
    self,
    group: int | None = None,
    activations: str = 'none',
    sensitive: float | None = None,
    vocabulary: bool = True,
    keep: Sequence[str] | None = None,
  ):
    _kernels.check_positive('group', group)
    if activations not in int8.ACTIVATIONS:
      raise ValueError(
        f'config.compress.activations={activations!r} is not known'
        f'{nearest(activations, int8.ACTIVATIONS)}; known: {", ".join(int8.ACTIVATIONS)}.'
      )
    if group is not None and activations != 'none':
      raise ValueError(
        f'config.compress.group={group} is of weights alone; with activations={activations!r} all '
        'inputs of a channel share a scale.'
      )
    if sensitive is not None and not 0 < sensitive < 1:
      raise ValueError(
        f'config.compress.sensitive={sensitive} must be a share, above 0 and below 1.'
      )
    self.scheme = int8.Scheme(group, activations)
    self.sensitive, self.vocabulary, self.keep = sensitive, vocabulary, tuple(keep or ())
    if activations == 'tensor' or sensitive is not None:
      self.looks_at = (contracts.ACTIVATIONS,)

  def schemes(self, infos: Mapping[str, Info], shapes: Mapping[str, Any]) -> Mapping[str, Scheme]:
    """See the contract."""
    paths = _kernels.of_model(infos, self.vocabulary)
    return _kernels.fitting(self.scheme, _kernels.without(paths, self.keep), infos, shapes)

  def decide(self, seen: Seen) -> dict[str, Any]:
    """The kernels that stay in floating point."""
    if self.sensitive is None:
      return {}
    wrong = {path: float(said['error'].max()) for path, said in seen.activations.items()}
    found = sorted(path for path, error in wrong.items() if error > self.sensitive)
    return {'keep': (*self.keep, *(f'^{path}$' for path in found))}
