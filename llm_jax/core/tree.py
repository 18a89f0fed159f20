"""Pytrees by path: 'model/layers/attention/query/kernel' names a leaf wherever the program speaks
of one.

A path joins the keys on the way to a leaf by '/', whatever the containers are (dictionaries,
tuples, dataclasses); None and empty containers have no leaves, hence no paths.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def flatten(tree: Any) -> dict[str, Any]:
  """The leaves by path, in the order of `jax.tree.leaves`."""
  return {_join(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def paths(tree: Any) -> list[str]:
  """The path of each leaf, in the order of `jax.tree.leaves`."""
  return list(flatten(tree))


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """A tree of `fn(path, leaf, *leaves of rest)`; the other trees may have subtrees where `tree` has
  leaves.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(_join(path), *leaves), tree, *rest
  )


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dictionaries from leaves by path."""
  root = {}
  for path, leaf in flat.items():
    *parents, name = path.split('/')
    node = root
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return root


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
  """`tree` with the leaves at the given paths exchanged, the others as they are.

  Raises:
    ValueError: a path that the tree does not have, with the nearest that it has.
  """
  known = paths(tree)
  for path in leaves:
    if path not in known:
      raise ValueError(f'{path!r} is no path of the tree; nearest: {_nearest(path, known)}.')
  return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def difference(expected: Any, found: Any) -> str:
  """What separates two trees of arrays (or of anything with shape and dtype), a line a leaf; ''
  where nothing does.

  '- path' stands in `expected` only, '+ path' in `found` only, '! path' in both with another shape
  or type.
  """
  expected, found = flatten(expected), flatten(found)
  lines = [f'- {path} {_describe(leaf)}' for path, leaf in expected.items() if path not in found]
  lines += [f'+ {path} {_describe(leaf)}' for path, leaf in found.items() if path not in expected]
  lines += [
    f'! {path}: expected {_describe(leaf)}, found {_describe(found[path])}'
    for path, leaf in expected.items()
    if path in found and _describe(leaf) != _describe(found[path])
  ]
  return '\n'.join(lines)


def _describe(leaf: Any) -> str:
  return f'{leaf.dtype}{list(leaf.shape)}'


def _join(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _nearest(path: str, known: Sequence[str]) -> str:
  return ', '.join(difflib.get_close_matches(path, known, n=3, cutoff=0.0)) or 'there are none'
