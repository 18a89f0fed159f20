"""The form in which a run keeps the kernels of its frozen base: `config.base_weights`.

A folder and a checkpoint's fingerprints speak of the kernels as they were; they are put into this
form when they have been read.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from llm_jax.core import params as params_lib
from llm_jax.core import plugins, tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Adapter
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.nn import int8
from llm_jax.parallel import hosts, sharding

FORMS = ('int8',)


def check(config: Config) -> None:
  """Raises ValueError for a form that is not known, or a run without a frozen base."""
  form = config.base_weights
  if form and form not in FORMS:
    raise ValueError(
      f'config.base_weights={form!r} is not known{plugins.nearest(form, FORMS)}; known: '
      f'{", ".join(FORMS)}; leave it empty for kernels as they are.'
    )
  if form and not config.adapter.get('name'):
    raise ValueError(
      f'config.base_weights={form!r} is of a base that is frozen, and without an adapter all is '
      'trained; give config.adapter.name (lora, say).'
    )


def chosen(
  config: Config, adapter: Adapter | None, infos: Mapping[str, Info], base: frozenset[str]
) -> frozenset[str]:
  """The paths of the kernels that are kept in another form.

  Args:
    config: the config.
    adapter: says what is trained.
    infos: what each parameter is, by path.
    base: the paths of those that are not the adapter's own.

  Raises:
    ValueError: there are none.
  """
  check(config)
  if not config.base_weights or adapter is None:
    return frozenset()
  frozen = (path for path in base if not adapter.trains(path, infos[path], True))
  found = frozenset(path for path in frozen if infos[path].formable and _in_layers(infos[path]))
  if not found:
    raise ValueError(
      f'config.base_weights={config.base_weights!r} is of the kernels of `nn.linear.Linear` in the '
      'layers of a model, and here none of them is frozen; leave it empty.'
    )
  return found


def abstract(params: PyTree, infos: Mapping[str, Info], paths: frozenset[str]) -> dict[str, Any]:
  """The shapes of parameters, those of `paths` in their form."""

  def form(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
    return _shapes(infos[path], leaf) if path in paths else leaf

  return tree.nest({path: form(path, leaf) for path, leaf in tree.flatten(params).items()})


def with_parts(infos: Mapping[str, Info], paths: frozenset[str]) -> dict[str, Info]:
  """What each parameter is, and each array of a form."""
  found = dict(infos)
  for path in paths:
    info = infos[path]
    layers = info.names[: info.stacked]
    outputs = tuple(info.names[info.stacked + axis] for axis in info.outputs)
    found[f'{path}/values'] = info
    found[f'{path}/scale'] = Info((*layers, *outputs), layer=info.layer, period=info.period)
  return found


def kept(
  params: PyTree, infos: Mapping[str, Info], paths: frozenset[str], layout: sharding.Layout
) -> dict[str, Any]:
  """Parameters on the mesh, those of `paths` in their form; one kernel after the other, so that not
  all are there twice.
  """
  if not paths:
    return params
  leaves, everything = tree.flatten(params), with_parts(infos, paths)
  for path in sorted(paths & leaves.keys()):
    names = f'{path}/values', f'{path}/scale'
    form = _shapes(infos[path], leaves[path])
    specs = (
      layout.parameter_spec(everything[name].names, leaf.shape)
      for name, leaf in zip(names, (form.values, form.scale), strict=True)
    )
    where = int8.Int8(*(jax.sharding.NamedSharding(layout.mesh, spec) for spec in specs))
    leaves[path] = _quantize(infos[path], where)(leaves[path])
  return tree.nest(leaves)


def dense(params: PyTree, infos: Mapping[str, Info], shapes: PyTree) -> dict[str, Any]:
  """Parameters with arrays in place of forms, which multiply as these do.

  Args:
    params: nested.
    infos: what each of them is, by path.
    shapes: the arrays as they were, with their types.
  """
  types = {path: leaf.dtype for path, leaf in tree.flatten(shapes).items()}

  def array(path: str, leaf: Any) -> Any:
    return int8.dense(leaf, infos[path], types[path]) if params_lib.is_form(leaf) else leaf

  return tree.nest({path: array(path, leaf) for path, leaf in params_lib.leaves(params).items()})


def _in_layers(info: Info) -> bool:
  """Whether it is of a layer, not of a head."""
  return info.layer is not None and info.layer >= 0


def _shapes(info: Info, kernel: jax.ShapeDtypeStruct) -> int8.Int8:
  return jax.eval_shape(functools.partial(int8.quantized, info=info), kernel)


@functools.cache
def _quantize(info: Info, where: int8.Int8) -> Any:
  return hosts.compiled(jax.jit(functools.partial(int8.quantized, info=info), out_shardings=where))
