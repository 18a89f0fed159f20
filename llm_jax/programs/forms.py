"""The forms in which a program keeps kernels and tables: those of a frozen base that
`config.base_weights` asks for, or those that a method of `config.compress` gives a model.

A folder holds the arrays of a form under the path of the kernel: `.../kernel/values`,
`.../kernel/scale`. Fingerprints of a base speak of kernels as they were; these are put into their
form when they have been read.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from llm_jax.core import params as params_lib
from llm_jax.core import plugins, tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Adapter, Compression, Scheme
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.nn.forms import int8
from llm_jax.parallel import hosts, sharding

BASES: dict[str, Scheme] = {'int8': int8.Scheme()}

Schemes = Mapping[str, Scheme]  # of kernels and tables, by path


def check(config: Config) -> None:
  """Raises ValueError for a form that is not known, or a run without a frozen base."""
  form = config.base_weights
  if form and form not in BASES:
    raise ValueError(
      f'config.base_weights={form!r} is not known{plugins.nearest(form, BASES)}; known: '
      f'{", ".join(BASES)}; leave it empty for kernels as they are.'
    )
  if form and not config.adapter.get('name'):
    raise ValueError(
      f'config.base_weights={form!r} is of a base that is frozen, and without an adapter all is '
      'trained; give config.adapter.name (lora, say).'
    )


def of_base(
  config: Config, adapter: Adapter | None, infos: Mapping[str, Info], base: frozenset[str]
) -> dict[str, Scheme]:
  """The kernels of a frozen base that are kept in another form, and how.

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
    return {}
  frozen = (path for path in base if not adapter.trains(path, infos[path], True))
  found = [path for path in frozen if infos[path].formable and _in_layers(infos[path])]
  if not found:
    raise ValueError(
      f'config.base_weights={config.base_weights!r} is of the kernels of `nn.linear.Linear` in the '
      'layers of a model, and here none of them is frozen; leave it empty.'
    )
  return dict.fromkeys(found, BASES[config.base_weights])


def of_method(method: Compression | None, infos: Mapping[str, Info], shapes: PyTree) -> Schemes:
  """The kernels and tables to which a method gives another form, and how."""
  if method is None:
    return {}
  return method.schemes(infos, tree.flatten(shapes))


def abstract(params: PyTree, infos: Mapping[str, Info], schemes: Schemes) -> dict[str, Any]:
  """The shapes of parameters, those with a scheme in their form."""

  def form(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
    return _shapes(schemes[path], infos[path], leaf) if path in schemes else leaf

  return tree.nest({path: form(path, leaf) for path, leaf in tree.flatten(params).items()})


def with_parts(infos: Mapping[str, Info], schemes: Schemes) -> dict[str, Info]:
  """What each parameter is, and each array of a form."""
  found = dict(infos)
  for path, scheme in schemes.items():
    found |= {f'{path}/{name}': info for name, info in scheme.parts(infos[path]).items()}
  return found


def placed(
  params: PyTree, infos: Mapping[str, Info], schemes: Schemes, layout: sharding.Layout
) -> dict[str, Any]:
  """The shapes of parameters in their forms, and where they lie."""
  shapes = abstract(params, infos, schemes)
  shardings = sharding.parameter_shardings(layout, shapes, with_parts(infos, schemes))
  return tree.with_shardings(shapes, shardings)


def kept(
  params: PyTree,
  infos: Mapping[str, Info],
  schemes: Schemes,
  layout: sharding.Layout,
  seen: Mapping[str, Mapping[str, jax.Array]] | None = None,
) -> dict[str, Any]:
  """Parameters on the mesh, those with a scheme in their form; one kernel after the other, so that
  not all are there twice.

  Args:
    params: nested; what has its form already stays as it is.
    infos: what each of them is, by path.
    schemes: how they are put into it.
    layout: where they lie.
    seen: what is known of what they multiply, by path.
  """
  if not schemes:
    return params
  leaves = params_lib.leaves(params)
  for path in sorted(schemes.keys() & leaves.keys()):
    if params_lib.is_form(leaves[path]):
      continue
    one = {'kernel': infos[path]}
    form = abstract({'kernel': leaves[path]}, one, {'kernel': schemes[path]})
    parts = with_parts(one, {'kernel': schemes[path]})
    where = sharding.parameter_shardings(layout, form, parts)['kernel']
    given = () if seen is None or path not in seen else (dict(seen[path]),)
    leaves[path] = _made(schemes[path], infos[path], tuple(jax.tree.leaves(where)))(
      leaves[path], *given
    )
  return tree.nest(leaves)


def learner(
  infos: Mapping[str, Info], schemes: Schemes
) -> Callable[[PyTree], dict[str, Any]] | None:
  """What stands for parameters while a run learns in its forms; None where it has none."""
  if not schemes:
    return None

  def forward(params: PyTree) -> dict[str, Any]:
    leaves = params_lib.leaves(params)
    for path, scheme in schemes.items():
      leaves[path] = scheme.trained(leaves[path], infos[path])
    return tree.nest(leaves)

  return forward


def dense(params: PyTree, shapes: PyTree) -> dict[str, Any]:
  """Parameters with arrays in place of forms, which multiply as these do.

  Args:
    params: nested.
    shapes: the arrays as they were, with their types.
  """
  types = {path: leaf.dtype for path, leaf in tree.flatten(shapes).items()}

  def array(path: str, leaf: Any) -> Any:
    return leaf.dense(types[path]) if params_lib.is_form(leaf) else leaf

  return tree.nest({path: array(path, leaf) for path, leaf in params_lib.leaves(params).items()})


def joined(leaves: Mapping[str, jax.Array], shapes: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves of a folder by path, the arrays of each form as one.

  Args:
    leaves: as a checkpoint has them.
    shapes: of each form, by the path of the kernel.

  Returns:
    All of them, forms by the path of the kernel; one of which an array is missing is left out.
  """
  found = dict(leaves)
  for path, form in shapes.items():
    parts = {name: found.pop(f'{path}/{name}', None) for name in tree.paths(form)}
    if all(part is not None for part in parts.values()):
      found[path] = tree.replace(form, parts)
  return found


def _in_layers(info: Info) -> bool:
  """Whether it is of a layer, not of a head."""
  return info.layer is not None and info.layer >= 0


def _shapes(scheme: Scheme, info: Info, kernel: jax.ShapeDtypeStruct) -> Any:
  return jax.eval_shape(functools.partial(scheme.form, info=info), kernel)


@functools.cache
def _made(scheme: Scheme, info: Info, where: tuple[jax.sharding.Sharding, ...]) -> Any:
  def make(kernel: jax.Array, seen: Mapping[str, jax.Array] | None = None) -> Any:
    form = scheme.form(kernel, info, seen)
    flat, shape = jax.tree.flatten(form)
    placed = [jax.lax.with_sharding_constraint(x, s) for x, s in zip(flat, where, strict=True)]
    return shape.unflatten(placed)

  return hosts.compiled(jax.jit(make))
