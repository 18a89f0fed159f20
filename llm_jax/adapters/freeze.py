"""The base is frozen as it is, but for its last layers: the heads are trained (linear probing), and
the layers from the top, as many as are asked for, from the start or one after the other (gradual
unfreezing: ULMFiT, arXiv:1801.06146, section 3.3).
"""

from collections.abc import Collection, Mapping

import numpy as np

from llm_jax.adapters import _targets
from llm_jax.core import contracts, tree
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree


class Adapter(contracts.Adapter):
  """Trains heads, and the layers from the top.

  Args:
    layers: how many layers are trained, and the norm after the last one with them.
    every: so many steps pass before the uppermost layer is trained, and again before each further
      one; 0: all are trained from the start.
    heads: the heads that are trained, a regular expression for their names; '' for none, None for
      all but the masked-LM head.

  Raises:
    ValueError: a number below 0, `every` without layers, no regular expression.

  Example:
    >>> adapter = Adapter()
    >>> adapter.trains('heads_classifier/dense/kernel', None, True)
    True
  """

  def __init__(self, layers: int = 0, every: int = 0, heads: str | None = None):
    for name, value in (('layers', layers), ('every', every)):
      if value < 0:
        raise ValueError(f'config.adapter.{name}={value} must be at least 0.')
    if every and not layers:
      raise ValueError(
        f'config.adapter.every={every} unfreezes one layer after the other, and '
        'config.adapter.layers=0 has none; say how many in the end.'
      )
    self.top, self.every, self.heads = layers, every, _targets.Heads(heads)

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    self.heads.check(base)
    if self.top and not any(_in_stack(info) for info in infos.values()):
      raise ValueError(
        f'config.adapter.layers={self.top}: the parameters of this model do not say which layer '
        'they belong to (`core.params.in_layer`).'
      )
    if not self.top and not any(path in self.heads for path in base):
      raise ValueError(
        "config.adapter.name='freeze' trains heads, and this objective has none that is trained; "
        "set config.adapter.layers, or name a head in config.adapter.heads ('mlm')."
      )

  def trains(self, path: str, info: Info, base: bool) -> bool:
    return path in self.heads or (self.top > 0 and (_in_stack(info) or _is_last_norm(path, info)))

  def no_gradient(self, path: str) -> str | None:
    return _targets.softmax_hides(path)

  def trained_layers(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, np.ndarray]:
    if not self.top:
      return {}
    below = _below(params, infos)
    count = 1 + max(int(number.max()) for number in below.values())
    if self.top > count:
      raise ValueError(
        f'config.adapter.layers={self.top} is more than the {count} layers of the model.'
      )
    return {path: number < self.top for path, number in below.items()}

  def begins(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, np.ndarray]:
    if not self.every:
      return {}
    found = {path: self.every * (1 + number) for path, number in _below(params, infos).items()}
    last = [path for path in tree.flatten(params) if _is_last_norm(path, infos[path])]
    return found | {path: np.asarray(self.every) for path in last}


def _below(params: PyTree, infos: Mapping[str, Info]) -> dict[str, np.ndarray]:
  """How many layers stand above each layer of a parameter, by path."""
  leaves = tree.flatten(params)
  depths = {path: infos[path].depths(leaf.shape) for path, leaf in leaves.items()}
  numbers = {path: depth for path, depth in depths.items() if depth is not None}
  highest = max(int(depth.max()) for depth in numbers.values())
  return {path: highest - depth for path, depth in numbers.items()}


def _in_stack(info: Info) -> bool:
  return info.layer is not None and info.layer >= 0


def _is_last_norm(path: str, info: Info) -> bool:
  """Whether a parameter of the model comes after all layers, but for the vocabulary's."""
  return path.startswith('model/') and info.layer is None and 'vocab' not in info.names
