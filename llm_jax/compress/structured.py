"""Heads, mlp channels and layers that matter least are left out: shapes shrink, and with them the
folder and the time (Michel et al. 2019, arXiv:1905.10650; layers as in arXiv:2004.03844).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax.compress import _shapes
from llm_jax.core import contracts
from llm_jax.core.contracts import Seen, Smaller
from llm_jax.core.params import Info


class Compression(contracts.Compression):
  """Each layer keeps as many heads and mlp channels as every other, not the same ones: those
  without which the loss on texts would change most, in first order. Of grouped heads all that share
  keys and values go together. Layers are taken out evenly: of 12 with `layers=6` every second
  stays.

  Attributes:
    heads: the share of the heads that stays; None: all.
    mlp: likewise of the channels of each mlp.
    layers: how many layers stay; None: all.
  """

  def __init__(
    self, heads: float | None = None, mlp: float | None = None, layers: int | None = None
  ):
    if heads is None and mlp is None and layers is None:
      raise ValueError(
        'config.compress.name=structured leaves nothing out: give config.compress.heads, mlp or '
        'layers (heads=0.5, say).'
      )
    for name, share in (('heads', heads), ('mlp', mlp)):
      if share is not None and not 0 < share < 1:
        raise ValueError(
          f'config.compress.{name}={share} is the share that stays, above 0 and below 1.'
        )
    self.heads, self.mlp, self.layers = heads, mlp, layers
    if heads is not None or mlp is not None:
      self.looks_at = (contracts.GRADIENTS,)

  def check(self, infos: Mapping[str, Info], shapes: Mapping[str, Any]) -> None:
    """See the contract."""
    for axis, share in (('heads', self.heads), ('kv_heads', self.heads), ('mlp', self.mlp)):
      if share is not None:
        _shapes.rounded(axis, _shapes.size(infos, shapes, axis), share)
    if self.layers is not None:
      _shapes.layers_left(infos, shapes, self.layers)

  def shrink(self, model: Smaller, seen: Seen) -> None:
    """See the contract."""
    if self.heads is not None:
      _shrink_heads(model, seen, self.heads)
    if self.mlp is not None:
      _shrink_mlp(model, seen, self.mlp)
    if self.layers is not None:
      kept = _shapes.layers_left(model.infos, _shapes.of(model.params), self.layers)
      model.params = _shapes.layers_taken(model.params, model.infos, kept)
      model.options['layers'] = self.layers


def _shrink_heads(model: Smaller, seen: Seen, share: float) -> None:
  infos, shapes = model.infos, _shapes.of(model.params)
  heads, groups = (_shapes.size(infos, shapes, axis) for axis in ('heads', 'kv_heads'))
  each, head_dim = heads // groups, _shapes.size(infos, shapes, 'head_dim')
  count = _shapes.rounded('kv_heads', groups, share)
  kept_N, kept_K = {}, {}
  for block, matters_LN in _shapes.importance(infos, seen, 'heads').items():
    matters_LK = matters_LN.reshape(*matters_LN.shape[:-1], groups, each).sum(-1)
    kept_K[block] = kept_LK = _shapes.best(matters_LK, count)
    of_group = kept_LK[..., None] * each + np.arange(each)
    kept_N[block] = of_group.reshape(*kept_LK.shape[:-1], -1)
  model.params = _shapes.taken(model.params, infos, 'heads', kept_N)
  model.params = _shapes.taken(model.params, infos, 'kv_heads', kept_K)
  model.options |= {'heads': count * each, 'head_dim': head_dim}
  if each > 1:
    model.options['kv_heads'] = count


def _shrink_mlp(model: Smaller, seen: Seen, share: float) -> None:
  size = _shapes.size(model.infos, _shapes.of(model.params), 'mlp')
  count = _shapes.rounded('mlp', size, share)
  matters = _shapes.importance(model.infos, seen, 'mlp')
  kept = {block: _shapes.best(each, count) for block, each in matters.items()}
  model.params = _shapes.taken(model.params, model.infos, 'mlp', kept)
  model.options['mlp_dim'] = count
