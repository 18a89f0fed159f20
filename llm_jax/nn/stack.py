"""All layers of a model: one scan over the periods of the layer pattern, or one layer after the
other.

The scan keeps the parameters of all periods stacked on axis 0, under `layers`; so does every other
collection of variables that a layer has. Without a loop the layers see the same paths: the values
of one period are taken out of the stack for it, and what it writes is stacked again.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope, unfreeze

from llm_jax.core import params as params_lib
from llm_jax.nn.attention.cache import KeyValues
from llm_jax.nn.attention.dispatch import LONG
from llm_jax.nn.attention.masks import RESIDUALS
from llm_jax.nn.block import PROJECTIONS, Block, LayerContext
from llm_jax.nn.options import Options, check_positive
from llm_jax.nn.rows import at
from llm_jax.parallel.sharding import current

_SAVED = jax.checkpoint_policies
# Attention's own residuals are kept by all but 'full', where its kernel names them: computing them
# again is computing it all.
REMAT = {
  'none': None,
  'dots': _SAVED.save_from_both_policies(
    _SAVED.dots_with_no_batch_dims_saveable, _SAVED.save_only_these_names(RESIDUALS)
  ),
  'narrow': _SAVED.save_only_these_names(RESIDUALS, PROJECTIONS),
  'attention': _SAVED.save_only_these_names(RESIDUALS),
  'full': _SAVED.nothing_saveable,
  'offload': _SAVED.save_and_offload_only_these_names(
    names_which_can_be_saved=[RESIDUALS],
    names_which_can_be_offloaded=[PROJECTIONS],
    offload_src='device',
    offload_dst='pinned_host',
  ),
}
"""What backpropagation keeps of a layer; all else is computed again:

    none        everything
    dots        what matrix products give
    narrow      the same, but for the mlp's hidden layer, which is the widest
    attention   what attention itself gives
    full        the layer's input alone
    offload     as narrow, in the memory of the host (TPUs, GPUs)

'auto' beside them is the first of the five that fits, which `llm_jax.training.memory` finds; in
programs that do not train it means none.
"""

Caches = Mapping[str, tuple[KeyValues, ...]]  # 'layers' or 'group_<g>' -> one per block


class Group(nn.Module):
  """The blocks of one period of a layer pattern, each with its own static window: the body that
  `Stack` scans.

  Attributes:
    options: shared options.
    windows: of each block.
    first: the layer number of the first block in the first period.
  """

  options: Options
  windows: tuple[int | None, ...]
  first: int = 0

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    context: LayerContext,
    caches: tuple[KeyValues, ...] | None = None,
  ) -> tuple[jax.Array, tuple[KeyValues, ...] | None]:
    """The last block's output, which alone reads `context.read_BP`, and each block's cache."""
    written = []
    for i, window in enumerate(self.windows):
      last = i == len(self.windows) - 1
      name = f'block_{i}' if len(self.windows) > 1 else 'block'
      known = context if last else context.replace(read_BP=None)
      with params_lib.in_layer(self.first + i):
        block = Block(self.options, window, name=name)
        x_BTD, cache = block(x_BTD, known, caches and caches[i])
      written.append(cache)
    return x_BTD, None if caches is None else tuple(written)


class Stack(nn.Module):
  """All layers, in a loop or one by one.

  Layer i sees everywhere when i is a multiple of `global_every`, and `window` otherwise. Layer g P
  + j of a pattern of period P (1 where all layers are alike) is index g of `layers/block_j`
  (`layers/block` where P = 1); with `first_bare`, layer 0 stands by itself as `first`, and the
  pattern starts at layer 1. Parameters that are `unstacked` are run one by one.

  Attributes:
    options: shared options.
    window: window of the local layers; None where there are none.
    global_every: how often a layer is global; 1 where all are, 0 where none is.
    first_bare: layer 0 has no norm before its attention.
    remat: what backpropagation keeps, one of `REMAT`; all else is computed again.
    unroll: layer groups per iteration of the compiled loop; 0 for all (no loop). Changes no
      parameter, and no value but what dropout draws.
    depth: how many layers of another stack come before.
  """

  options: Options
  window: int | None = None
  global_every: int = 1
  first_bare: bool = False
  remat: str = 'none'
  unroll: int = 1
  depth: int = 0

  def setup(self):
    windows = self.layer_windows()
    if self.first_bare:
      first = self._rematted(Block, looped=False)
      self.first = first(self.options, windows[0], attention_norm=False)
    period = max(self.global_every, 1)
    groups = len(windows[self.first_bare :]) // period
    self.pattern = tuple(windows[self.first_bare :][:period])
    if groups:
      self.layers = self._scanned(groups)(self.options, self.pattern, self.depth + self.first_bare)

  def __call__(
    self, x_BTD: jax.Array, context: LayerContext, caches: Caches | None = None
  ) -> tuple[jax.Array, Caches | None]:
    """Runs all layers.

    Args:
      x_BTD: the embedded rows.
      context: what all layers know. `read_BP` may have its indices in any order, any of them more
        than once.
      caches: what the layers keep of rows that grow, stacked or `unstacked` as the parameters are.
        None for rows that are whole.

    Returns:
      The rows, at the indices that are read, and the caches with these tokens in them.
    """
    read_BP, context = context.read_BP, context.replace(read_BP=None)
    if self.first_bare:
      with params_lib.in_layer(self.depth):
        x_BTD, _ = self.first(x_BTD, context)
    if self.options.layers == self.first_bare:
      return at(x_BTD, read_BP), caches
    groups = self._groups(stacked=caches is None)
    if groups is None:
      x_BTD, written = self.layers(x_BTD, context, caches and caches['layers'])
      return at(x_BTD, read_BP), caches and {'layers': written}
    if read_BP is not None and reads_in_last_layer(self.unroll, x_BTD.shape[1], read_BP.shape[1]):
      return self._one_by_one(groups, x_BTD, context, caches, read_BP)
    x_BTD, caches = self._one_by_one(groups, x_BTD, context, caches, None)
    return at(x_BTD, read_BP), caches

  @nn.nowrap
  def _groups(self, stacked: bool) -> dict[str, dict[str, Any]] | None:
    """The variables of each group by its name, where no loop runs them: `unstacked` as they come,
    or taken out of the stack where that is wanted. None where a loop is to run.

    Parameters are created in the loop, which draws them for all layers at once.
    """
    variables = unfreeze(self.variables)
    if 'group_0' not in variables.get('params', {}):
      creates = self.is_initializing() or self.is_mutable_collection('params')
      if self.unroll or not stacked or creates:
        return None
    groups = {}
    for collection, values in variables.items():
      if 'layers' in values:
        values = unstacked({'layers': values['layers']})
      for name, part in values.items():
        if name.startswith('group_'):
          groups.setdefault(name, {})[collection] = part
    return dict(sorted(groups.items(), key=lambda item: int(item[0].removeprefix('group_'))))

  @nn.nowrap
  def _one_by_one(
    self,
    groups: Mapping[str, dict[str, Any]],
    x_BTD: jax.Array,
    context: LayerContext,
    caches: Caches | None,
    read_BP: jax.Array | None,
  ) -> tuple[jax.Array, Caches | None]:
    """Runs each group in a scope that stands where the loop's does; the last reads `read_BP`."""
    module = self._rematted(Group, looped=False)
    written, changed = {}, []
    for i, (name, variables) in enumerate(groups.items()):
      if i == len(groups) - 1:
        context = context.replace(read_BP=read_BP)
      rngs = {'dropout': self.make_rng('dropout')} if self.has_rng('dropout') else {}
      scope = Scope(
        variables,
        rngs,
        name='layers',
        mutable=self.scope.mutable,
        path=self.layers.path,
        flags=self.scope.flags,
      )
      first = self.depth + self.first_bare
      group = module(self.options, self.pattern, first, parent=scope, name='layers')
      x_BTD, written[name] = group(x_BTD, context, caches and caches[name])
      changed.append(scope.mutable_variables())
    self._stack(changed)
    return x_BTD, None if caches is None else written

  @nn.nowrap
  def _stack(self, changed: list[Mapping[str, Any]]) -> None:
    """Puts what each group has written back as one stack."""
    for collection in changed[0]:
      values = [variables[collection] for variables in changed]
      if jax.tree.leaves(values):
        self.put_variable(collection, 'layers', jax.tree.map(lambda *x: jnp.stack(x), *values))

  @nn.nowrap
  def layer_windows(self) -> list[int | None]:
    """The window of each layer."""
    every = self.global_every
    return [
      None if every and layer % every == 0 else self.window for layer in range(self.options.layers)
    ]

  @nn.nowrap
  def _scanned(self, groups: int) -> Callable[..., nn.Module]:
    unroll = groups if self.unroll == 0 else min(self.unroll, groups)
    return nn.scan(
      self._rematted(Group, looped=unroll == 1),
      length=groups,
      unroll=unroll,
      in_axes=(nn.broadcast, 0),
      variable_axes={True: 0},
      split_rngs={'params': True, 'dropout': True},
      metadata_params={nn.PARTITION_NAME: params_lib.LAYERS, 'period': max(self.global_every, 1)},
    )

  @nn.nowrap
  def _rematted(self, module: Callable[..., nn.Module], looped: bool) -> Callable[..., nn.Module]:
    if self.remat in ('none', 'auto'):
      return module
    # In a loop nothing can be merged with the forward pass; outside of one the compiler must be
    # kept from undoing the remat.
    return nn.remat(module, policy=REMAT[self.remat], prevent_cse=not looped)


def unstacked(stack: Mapping[str, Any]) -> dict[str, Any]:
  """A stack's parameters, or caches, with each group of layers by itself: `group_g` for index g of
  `layers`.

  A loop over layers copies the weights of each out of the stack in every iteration. Where it
  computes little (one token per row), that is most of its time.
  """
  leaves, shape = jax.tree.flatten(stack['layers'])
  # Not by slices, each of whose gradients would be as large as the stack.
  parts = [jax.lax.split(x, (1,) * len(x)) for x in leaves]
  groups = {name: value for name, value in stack.items() if name != 'layers'}
  for i, part in enumerate(zip(*parts, strict=True)):
    groups[f'group_{i}'] = shape.unflatten(jnp.squeeze(x, 0) for x in part)
  return groups


def reads_in_last_layer(unroll: int, length: int, positions: int) -> bool:
  """Whether a stack runs its last layer only at the positions that are read.

  Not in a loop, whose iterations are all alike; nor where rows are cut over the mesh, or so long
  that their scores need a kernel.
  """
  layout = current()
  whole = layout is None or layout.mesh.shape['sequence'] == 1
  return unroll == 0 and positions < length <= LONG and whole


def flops(options: Options, length: int, last: int, memory: int = 0) -> float:
  """FLOPs of the matrix products of all layers in one forward pass of one row.

  2 FLOPs per weight and token; attention adds 4 T N H per token and layer, half of it where causal,
  windows not considered (PaLM, arXiv:2204.02311, appendix B).

  Args:
    options: of the stack.
    length: T.
    last: the positions at which the last layer runs, except for its keys and values.
    memory: S, the tokens that layers cross to.
  """
  D, N, H = options.dim, options.heads, options.head_dim
  projections = 2 * D * N * H
  keys_and_values = 2 * D * (options.kv_heads or N) * H
  mlp = (3 if options.gated else 2) * D * options.mlp_dim
  attention = 4 * length * N * H / (2 if options.causal else 1)
  layer = 2 * (projections + keys_and_values + mlp) + attention
  saved = 2 * (projections + mlp) + attention
  crossing = 2 * projections + 4 * memory * N * H if options.crosses else 0
  remembered = 2 * keys_and_values * memory * options.layers if options.crosses else 0
  total = length * options.layers * (layer + crossing) + remembered
  return total - (length - last) * (saved + crossing)


def check_pattern(layers: int, window: int | None, global_every: int, first_bare: bool) -> None:
  """Raises ValueError unless a stack of `layers` is whole periods of its pattern (`Stack`)."""
  check_positive('global_every', global_every)
  if window is not None:
    check_positive('window', window)
  if (window is None) != (global_every == 1):
    raise ValueError(
      f'window={window} with global_every={global_every}: local layers need a window and '
      'global_every above 1; without them window=None and global_every=1.'
    )
  if (layers - first_bare) % global_every:
    rounded = (layers - first_bare) // global_every * global_every + first_bare
    raise ValueError(
      f'layers={layers} must be {"1 + " * first_bare}a multiple of global_every={global_every}; '
      f'try {rounded or rounded + global_every} or {rounded + global_every}.'
    )
