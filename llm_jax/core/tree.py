"""Pytrees by path: 'model/layers/attention/query/kernel' names a leaf wherever the program speaks
of one.

A path joins the keys on the way to a leaf by '/', whatever the containers are (dictionaries,
tuples, dataclasses). None and empty containers have no leaves, hence no paths.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax

PyTree: TypeAlias = Any  # containers of arrays, nested; `jax.tree` says which there are


def flatten(tree: PyTree) -> dict[str, Any]:
  """The leaves by path, in the order of `jax.tree.leaves`."""
  return {_join(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def paths(tree: PyTree) -> list[str]:
  """The path of each leaf, in the order of `jax.tree.leaves`."""
  return list(flatten(tree))


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> Any:
  """A tree of `fn(path, leaf, *leaves of rest)`; the other trees may have subtrees where `tree` has
  leaves.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(_join(path), *leaves), tree, *rest
  )


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dictionaries from leaves by path."""
  root: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split('/')
    node = root
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return root


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> Any:
  """`tree` with the leaves at the given paths exchanged, the others as they are.

  Raises:
    ValueError: a path that the tree does not have, with the nearest that it has.
  """
  known = paths(tree)
  for path in leaves:
    if path not in known:
      raise ValueError(f'{path!r} is no path of the tree; nearest: {_nearest(path, known)}.')
  return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def with_shardings(shapes: PyTree, shardings: PyTree) -> Any:
  """Abstract arrays of these shapes and types, each with its sharding; the trees are alike."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def difference(expected: PyTree, found: PyTree) -> str:
  """What separates two trees of arrays (or of anything with shape and dtype), one line per leaf.

  '- path' is in `expected` only, '+ path' in `found` only, '! path' in both with another shape or
  type; '' where the trees are alike.
  """
  expected, found = flatten(expected), flatten(found)
  missing = [f'- {path} {_describe(leaf)}' for path, leaf in expected.items() if path not in found]
  surplus = [f'+ {path} {_describe(leaf)}' for path, leaf in found.items() if path not in expected]
  changed = []
  for path, leaf in expected.items():
    wanted, got = _describe(leaf), _describe(found.get(path, leaf))
    if wanted != got:
      changed.append(f'! {path}: expected {wanted}, found {got}')
  return '\n'.join([*missing, *surplus, *changed])


def _describe(leaf: Any) -> str:
  return f'{leaf.dtype}{list(leaf.shape)}'


def _join(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _nearest(path: str, known: Iterable[str]) -> str:
  return ', '.join(difflib.get_close_matches(path, known, n=3, cutoff=0.0)) or 'there are none'
