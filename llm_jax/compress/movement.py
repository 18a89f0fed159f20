"""Weights that training moves toward zero are left out, whatever their size (Sanh et al. 2020,
arXiv:2005.07683): for models that are fine-tuned.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.compress import _masks
from llm_jax.core import contracts, tree
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree

SCORES, ASIDE = 'scores', 'aside'


class Compression(_masks.Growing):
  """Each weight of the kernels in the layers has a score, S <- S - rate * W dL/dW (equation 3), the
  gradient being that at the masked weights; those with the lowest scores are zeros in the network.
  A weight that is left out keeps its value, aside, and comes back where its score rises.

  Attributes:
    share: of the weights of each kernel that go.
    pattern: or 'n:m': of every m inputs next to one another n stay.
    begin, end: shares of the run between which the share grows to its whole.
    every: steps between two looks at the scores.
    keep: patterns of paths that stay as they are.
  """

  def shrink(self, model: contracts.Smaller, seen: contracts.Seen) -> None:
    """Refuses: there is no movement without training."""
    raise ValueError(
      'config.compress.name=movement is learned: train with it; --mode=compress has magnitude.'
    )

  def extras(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    """Masks, scores, and the weights that are left out."""
    paths = self.sparsity.paths(infos, tree.flatten(params))
    some = _masks.chosen(params, paths)
    return {
      _masks.MASK: jax.tree.map(lambda x: jnp.ones(x.shape, bool), some),
      SCORES: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), some),
      ASIDE: jax.tree.map(jnp.zeros_like, some),
    }

  def before_update(
    self, grads: PyTree, params: PyTree, extras: dict[str, Any], done: jax.Array
  ) -> tuple[PyTree, dict[str, Any]]:
    """Scores move; weights that are left out do not."""
    masks, leaves = tree.flatten(extras[_masks.MASK]), tree.flatten(params)
    found, aside = tree.flatten(grads), tree.flatten(extras[ASIDE])
    scores = {
      path: score - (leaves[path] + aside[path]) * found[path].astype(score.dtype)
      for path, score in tree.flatten(extras[SCORES]).items()
    }
    grads = _masks.applied(grads, masks)
    return grads, dict(extras) | {SCORES: tree.nest(scores)}

  def after_update(
    self, params: PyTree, extras: dict[str, Any], done: jax.Array, infos: Mapping[str, Info]
  ) -> tuple[PyTree, dict[str, Any]]:
    """Masks by the scores, now and then."""
    masks, leaves = tree.flatten(extras[_masks.MASK]), tree.flatten(params)
    scores, aside = tree.flatten(extras[SCORES]), tree.flatten(extras[ASIDE])
    new = self.renewed(masks, scores, infos, done)
    # A step of the optimizer moves what is left out too (decay, momentum): it stays as it was.
    whole = {path: jnp.where(masks[path], leaves[path], aside[path]) for path in masks}
    kept = {path: jnp.where(new[path], whole[path], 0) for path in masks}
    aside = {path: jnp.where(new[path], 0, whole[path]) for path in masks}
    params = tree.map_with_path(lambda path, x: kept.get(path, x), params)
    carried = {_masks.MASK: tree.nest(new), ASIDE: tree.nest(aside)}
    return params, dict(extras) | carried
