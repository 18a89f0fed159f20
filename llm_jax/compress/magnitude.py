"""The smallest weights are left out: at once, or more and more while a run is trained
(arXiv:1710.01878).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.compress import _masks
from llm_jax.core import tree
from llm_jax.core.contracts import Seen, Smaller
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree


class Compression(_masks.Growing):
  """Kernels of linear maps in the layers with zeros in place of their smallest weights. Their
  shapes and the time of products stay; a folder gets smaller as far as zeros are packed.

  In training, weights that are left out get no gradient; which they are is looked up every so many
  steps, until the schedule ends.

  Attributes:
    share: of the weights of each kernel that go.
    pattern: or 'n:m': of every m inputs next to one another n stay.
    begin, end: shares of the run between which the share grows to its whole, in training.
    every: steps between two looks, in training.
    keep: patterns of paths that stay as they are.
  """

  def shrink(self, model: Smaller, seen: Seen) -> None:
    """See the contract."""
    leaves = tree.flatten(model.params)
    masks = {
      path: self.sparsity.mask(jnp.abs(leaves[path]), model.infos[path], self.sparsity.share)
      for path in self.sparsity.paths(model.infos, leaves)
    }
    model.params = _masks.applied(model.params, masks)

  def extras(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    """The masks, all true."""
    paths = self.sparsity.paths(infos, tree.flatten(params))
    ones = lambda x: jnp.ones(x.shape, bool)
    return {_masks.MASK: jax.tree.map(ones, _masks.chosen(params, paths))}

  def after_update(
    self, params: PyTree, extras: dict[str, Any], done: jax.Array, infos: Mapping[str, Info]
  ) -> tuple[PyTree, dict[str, Any]]:
    """Masks by the weights as they are, now and then; zeros where they say so."""
    masks, leaves = tree.flatten(extras[_masks.MASK]), tree.flatten(params)
    sizes = {path: jnp.abs(leaves[path]) for path in masks}
    masks = self.renewed(masks, sizes, infos, done)
    return _masks.applied(params, masks), {_masks.MASK: tree.nest(masks)}
