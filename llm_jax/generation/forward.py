"""A decoder, with its encoder where it has one, as generation runs it: parameters in the compute
type, and in the form that multiplies fastest where each row has one token.

A loop over layers copies the weights of each out of their stack, so stacks of layers (`nn.stack`)
are taken apart; on a single CPU their kernels are transposed (`parallel.cpu.products`), and the
projection on the vocabulary is multiplied matrix first. Models without such stacks, from outside,
run as they are.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.contracts import SOURCE, Adapter, Batch, Model, WeightForm
from llm_jax.core.params import LAYERS, Info
from llm_jax.core.tree import PyTree
from llm_jax.nn.attention.cache import Crossing, KeyValues
from llm_jax.nn.stack import Stack, unstacked
from llm_jax.parallel import sharding
from llm_jax.parallel.cpu import products
from llm_jax.programs.network import Network


class Weights(NamedTuple):
  """A model's parameters in the form in which they are run.

  Attributes:
    params: nested by name.
    table_VD: the projection on the vocabulary, or a weight form of it, where it is to be kept
      beside them: on a single CPU, unless it is one of them as it stands.
  """

  params: PyTree
  table_VD: jax.Array | WeightForm | None


class Forward:
  """Functions of a decoder to trace.

  Args:
    model: the decoder (`core.contracts.Model`). All arrays of its cache have the row on axis 0, but
      those of a `nn.stack.Stack`, whose layers come before it.
    infos: what each of its parameters is, by path.
    layout: the mesh that it runs on; None for one device.
    adapter: what was trained beside it, if anything was.
  """

  def __init__(
    self,
    model: Model,
    infos: Mapping[str, Info],
    layout: sharding.Layout | None,
    adapter: Adapter | None = None,
  ):
    self._model = model.clone(remat='none') if hasattr(model, 'remat') else model
    self._infos, self._adapter = infos, adapter
    self._platform = jax.default_backend() if layout is None else layout.platform
    self._one_cpu = self._platform == 'cpu' and (layout is None or layout.mesh.size == 1)

  def weights(self, params: PyTree) -> Weights:
    """Parameters as they were created, in the form in which they are run."""
    dtype = self._model.options.compute_dtype
    if self._adapter is not None:
      params = self._adapter.weights({'model': params})['model']

    def cast(path: str, x: jax.Array) -> jax.Array:
      # What is inside a weight form is no parameter, and stays as it is.
      return x.astype(dtype) if path in self._infos and self._infos[path].inputs else x

    params = tree.map_with_path(cast, params)
    if self._platform == 'tpu':
      params = _unpacked(params)
    table_VD = self._for_few_rows(params) if self._one_cpu else None
    if any(table_VD is leaf for leaf in jax.tree.leaves(params)):
      table_VD = None
    for path in self._stacks:
      params = _replaced(params, path.split('/'), self._layers(params, path))
    return Weights(params, table_VD)

  def __call__(
    self,
    weights: Weights,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    cache: PyTree,
    source: Batch | None = None,
    open_BT: jax.Array | None = None,
    cached_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """Hidden states [B, T, D], and the cache with these tokens in it; `source`: the arrays of the
    rows that a model reads beside them, before the first token; `open_BT`: which tokens all of
    their row see; `cached_BT`: how many tokens of each row the cache holds, which these follow.
    """
    batch = {'tokens': tokens_BT, 'segments': segments_BT, 'positions': positions_BT}
    batch |= {f'{SOURCE}{name}': x for name, x in (source or {}).items()}
    batch |= {} if open_BT is None else {'prefix': open_BT}
    batch |= {} if cached_BT is None else {'cached': cached_BT}
    outputs = self._apply(weights.params, lambda network: network.model(batch, cache=cache))
    return outputs.hidden, outputs.cache

  def logits(self, weights: Weights, x_BD: jax.Array) -> jax.Array:
    """Projection on the vocabulary, [B, V], at least float32."""
    logits_BV = self._projected(weights, x_BD, self._model.options.accumulation_dtype)
    dtype = logits_BV.dtype
    bias_V = self._apply(weights.params, lambda network: network.model.table_bias())
    if bias_V is not None:
      logits_BV += bias_V[None].astype(dtype)
    return sharding.constrain(logits_BV, 'batch', None)

  def _projected(self, weights: Weights, x_BD: jax.Array, dtype: DTypeLike) -> jax.Array:
    table = weights.table_VD
    if params_lib.is_form(table):
      return table.product('...D,DV->...V', x_BD, x_BD.dtype, dtype)
    projection = self._apply(weights.params, lambda network: network.model.projection())
    if projection is not None:
      spec, form = projection
      return form.product(spec, x_BD, x_BD.dtype, dtype)
    table_VD = self._table(weights.params) if table is None else table
    if self._one_cpu:
      return products.matrix_first(x_BD, table_VD, dtype)
    table_VD = table_VD.astype(x_BD.dtype)
    return jnp.einsum('BD,VD->BV', x_BD, table_VD, preferred_element_type=dtype)

  def _for_few_rows(self, params: PyTree) -> jax.Array | WeightForm:
    """The projection on the vocabulary as a single CPU is fast at it."""
    projection = self._apply(params, lambda network: network.model.projection())
    if projection is None:
      return self._table(params)
    form = projection[1]
    return form.few_rows() if hasattr(form, 'few_rows') else self._table(params)

  @property
  def reads_pieces(self) -> bool:
    """Whether the model reads rows piece by piece."""
    return 'cached' in self._model.inputs

  @property
  def reads_source(self) -> bool:
    """Whether the model reads a second row."""
    return self._model.reads_source()

  def empty_cache(self, rows: int, slots: int, source: int = 0) -> Any:
    """The model's empty cache, its layers apart where those of the parameters are; `source`: the
    most tokens of a row that it reads beside its own.
    """
    given = (source,) if self.reads_source else ()
    cache = self._model.empty_cache(rows, slots, *given)
    if not self._stacks:
      return cache

    def is_stack(part: PyTree) -> bool:
      return isinstance(part, Mapping) and LAYERS in part

    return jax.tree.map(
      lambda part: unstacked(part) if is_stack(part) else part, cache, is_leaf=is_stack
    )

  @cached_property
  def _stacks(self) -> tuple[str, ...]:
    """The paths of the stacks of layers in the model."""
    found = set()

    def note(next_fun, args, kwargs, context):
      if isinstance(context.module, Stack):
        found.add('/'.join(context.module.path))
      return next_fun(*args, **kwargs)

    batch = {name: jnp.ones((1, 1), jnp.int32) for name in self._model.inputs}
    with sharding.use(None), nn.intercept_methods(note):
      jax.eval_shape(lambda: self._model.init(jax.random.key(0), batch))
    return tuple(sorted(found))

  def _layers(self, params: PyTree, path: str) -> dict[str, Any]:
    """The parameters of one stack in the form in which they are run."""
    part, prefix = params, f'{path}/'
    for name in path.split('/'):
      part = part[name]
    if self._one_cpu:
      infos = {
        name.removeprefix(prefix): info
        for name, info in self._infos.items()
        if name.startswith(prefix)
      }
      part = products.transposed(part, infos)
    return unstacked(part) if LAYERS in part else part

  def _table(self, params: PyTree) -> jax.Array:
    return self._apply(params, lambda network: network.model.table())

  def _apply(self, params: PyTree, method: Callable[[Network], Any]) -> Any:
    """What `method` of a bound network gives: modules have the paths there that adapters know."""
    network, variables = Network(self._model, {}), {'params': {'model': params}}
    if self._adapter is None:
      return network.apply(variables, method=method)
    with nn.intercept_methods(self._adapter.intercept):
      return network.apply(variables, method=method)


def _unpacked(params: PyTree) -> PyTree:
  """Forms as a TPU reads them, where that is another way than they are kept."""
  change = lambda leaf: leaf.unpacked() if hasattr(leaf, 'unpacked') else leaf
  return jax.tree.map(change, params, is_leaf=params_lib.is_form)


def reordered(cache: PyTree, move: Callable[[jax.Array], jax.Array]) -> Any:
  """A cache whose rows are moved among those of the same prompt, which share what is kept of their
  source.
  """

  def moved(part: PyTree) -> Any:
    if isinstance(part, Crossing):
      return part._replace(own=jax.tree.map(move, part.own))
    return move(part)

  return jax.tree.map(moved, cache, is_leaf=lambda part: isinstance(part, Crossing))


def laid_out(cache: PyTree) -> Any:
  """A cache as the layout in force has it: rows over the batch's axes, heads over theirs."""

  def constrained(part: PyTree) -> Any:
    if isinstance(part, KeyValues):
      whole = lambda x: sharding.constrain(x, 'batch', 'kv_heads', None, None)
      return jax.tree.map(whole, part)
    return sharding.constrain(part, 'batch', *[None] * (part.ndim - 1))

  return jax.tree.map(constrained, cache, is_leaf=lambda part: isinstance(part, KeyValues))


def _replaced(params: PyTree, names: list[str], part: PyTree) -> Any:
  """`params` with `part` in place of what stands under `names`."""
  if not names:
    return part
  return {**params, names[0]: _replaced(params[names[0]], names[1:], part)}
