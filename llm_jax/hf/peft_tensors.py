"""What an adapter has beside the maps of its base, as tensors of the library `peft`.

A tensor of the base that is several maps of ours (queries, keys and values in one) has one set of
pieces there. Matrices of ours are written into it side by side: A's one below the other, B's on a
diagonal of blocks, at a rank that is so many times ours. All maps get that rank, for an adapter has
one; the rest is zeros.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.contracts import Piece
from llm_jax.core.params import Info
from llm_jax.hf import safetensors, writing
from llm_jax.hf.family import Family
from llm_jax.hf.tensors import TOKEN, Location, Tensor

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
ROOT, PROMPT_ROOT = 'base_model.model.', 'base_model.'
"""What stands before the base's names of maps and heads, and where the adapter is a prompt."""

_RANK, _PARTS = 'R', 'S'  # letters of axes, in `contracts.Piece` and in `Tensor`


class Map(NamedTuple):
  """A map of ours that is adapted.

  Attributes:
    path: its path.
    layer: which of its layers; None where it is no stack.
    inputs: the dimensions of its kernel that are summed over.
  """

  path: str
  layer: int | None
  inputs: tuple[int, ...]


class Group(NamedTuple):
  """The maps of ours that are one tensor of the base.

  Attributes:
    location: of one of them.
    held: those that are adapted, by their path in the tensor.
    pieces: what is beside each.
  """

  location: Location
  held: dict[str, Map]
  pieces: tuple[Piece, ...]

  @property
  def inputs_first(self) -> bool:
    """Whether the weight is [inputs, outputs], as GPT-2's are."""
    inputs = next(iter(self.held.values())).inputs
    theirs, ours = self.location.tensor.axes.split('->')
    return ours[inputs[0]] in re.match(r'\(\w+\)|\w', theirs)[0]

  def arrays(
    self, name: str, values: Mapping[str, Any], times: int, dtype: np.dtype
  ) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors, by the map's name with their suffix, of `times` the rank."""
    for piece in self.pieces:
      array = (
        self._ranks(piece, values, times) if _RANK in piece.theirs else self._one(piece, values)
      )
      yield name + piece.suffix, array.astype(dtype)

  def _parts(
    self, piece: Piece, values: Mapping[str, Any]
  ) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    """The path in the tensor, the tensor, and the value of each map."""
    for path, (module, layer, inputs) in self.held.items():
      value = np.asarray(writing.fetch(values[f'{module}/{piece.name}'], layer))
      yield path, _tensor(self.location.tensor, piece, inputs), value

  def _ranks(self, piece: Piece, values: Mapping[str, Any], times: int) -> np.ndarray:
    """A matrix in which each map has ranks of its own."""
    axis, whole = piece.theirs.index(_RANK), None
    for number, (path, tensor, value) in enumerate(self._parts(piece, values)):
      shape = list(tensor.shape(value.shape))
      size = shape[axis]
      if whole is None:
        shape[axis] *= times
        whole = np.zeros(shape, value.dtype)
      own = whole[(slice(None),) * axis + (slice(number * size, (number + 1) * size),)]
      tensor.part(own, path, value.shape)[...] = value
    return whole

  def _one(self, piece: Piece, values: Mapping[str, Any]) -> np.ndarray:
    """A vector of the outputs, a part for each map, or of the inputs, which are shared."""
    whole, names = None, ', '.join(self.location.tensor.paths)
    lacking = len(self.held) < len(self.location.tensor.paths)
    for path, tensor, value in self._parts(piece, values):
      shared = _PARTS not in tensor.axes
      if lacking and (shared or piece.fill is None):
        raise ValueError(
          f'{tensor.name} of the base is all of {names}, and only some of them are adapted; '
          '--export=merged writes a whole model.'
        )
      if whole is None:
        whole = np.full(tensor.shape(value.shape), piece.fill or 0, value.dtype)
      elif shared and not np.array_equal(tensor.part(whole, path, value.shape), value):
        raise ValueError(
          f'{tensor.name} of the base is all of {names}, and peft has one {piece.suffix} for their '
          'inputs, where each has its own here; --export=merged writes a whole model.'
        )
      tensor.part(whole, path, value.shape)[...] = value
    return whole


def groups(
  bodies: Mapping[str, writing.Piece],
  pieces: Sequence[Piece],
  own: Collection[str],
  infos: Mapping[str, Info],
) -> Iterator[tuple[str, Group]]:
  """The adapted maps of the base, by their full names.

  Args:
    bodies: the tensors of the base.
    pieces: what the method has beside a map.
    own: the paths of the adapter's parameters.
    infos: what each parameter is.

  Raises:
    ValueError: a tensor that is adapted in two ways.
  """
  kinds: dict[str, tuple[Piece, ...]] = {}
  for piece in pieces:
    kinds[piece.targets] = (*kinds.get(piece.targets, ()), piece)
  for name, body in bodies.items():
    found = []
    for kind in kinds.values():
      held = {}
      for inner, (path, layer) in body.sources.items():
        module, _, last = path.rpartition('/')
        if last == kind[0].beside and f'{module}/{kind[0].name}' in own:
          held[inner] = Map(module, layer, inputs_of(path, infos))
      if held:
        found.append(Group(body.location, held, kind))
    if len(found) > 1:
      raise ValueError(
        f'{name} of the base is adapted by {" and by ".join(kinds)}, and in peft by one of them '
        'alone; --export=merged writes a whole model.'
      )
    if found:
      yield name.removesuffix('.weight'), found[0]


def read(path: str | os.PathLike[str], pieces: Sequence[Piece] = ()) -> safetensors.Tensors:
  """The tensors of a folder; zeros stand in the pieces for the ranks that AdaLoRA has taken out of
  a map, which peft leaves out.

  Raises:
    ValueError: a tensor that has other ranks than adapter_config.json says.
  """
  tensors = safetensors.read(os.path.join(path, WEIGHTS))
  pattern = safetensors.read_json(os.path.join(path, CONFIG)).get('rank_pattern') or {}
  whole = {}
  for key, kept in pattern.items():
    module = ROOT + key.partition('.lora_')[0]
    for piece in (piece for piece in pieces if _RANK in piece.theirs):
      name = module + piece.suffix
      if name not in tensors:
        raise ValueError(f'{path} has no {name}, of which {CONFIG} gives the ranks.')
      whole[name] = _with_all_ranks(path, name, tensors.view(name), np.array(kept, bool), piece)
  return tensors.replaced(whole)


def _with_all_ranks(
  path: str | os.PathLike[str], name: str, found: np.ndarray, kept_R: np.ndarray, piece: Piece
) -> np.ndarray:
  axis = piece.theirs.index(_RANK)
  ranks = found.shape[axis]
  if ranks == len(kept_R):  # those that are out are still there
    found, ranks = np.compress(kept_R, found, axis), np.sum(kept_R)
  if ranks != np.sum(kept_R):
    raise ValueError(
      f'{path}: {name} has {ranks} ranks, and rank_pattern of {CONFIG} keeps {np.sum(kept_R)} of '
      f'{len(kept_R)}.'
    )
  whole = np.zeros((*found.shape[:axis], len(kept_R), *found.shape[axis + 1 :]), found.dtype)
  whole[(slice(None),) * axis + (kept_R,)] = found
  return whole


def adapted(tensors: safetensors.Tensors, pieces: Sequence[Piece]) -> dict[str, Piece]:
  """The names of the base's maps that an adapter acts on, and the first piece of each."""
  found: dict[str, Piece] = {}
  for piece in pieces:
    ones = [axis for axis, letter in enumerate(piece.theirs) if letter == '1']
    for name in tensors:
      if name.endswith(piece.suffix) and all(tensors[name].shape[axis] == 1 for axis in ones):
        found.setdefault(name.removesuffix(piece.suffix).removeprefix(ROOT), piece)
  return found


def of_map(
  path: str | os.PathLike[str], module: str, family: Family, beside: str = 'kernel'
) -> tuple[Tensor, int]:
  """The base's tensor that is the weight of a map, and the layer that it belongs to, or -1.

  Raises:
    ValueError: the map is not one of the model's.
  """
  short = f'{module.removeprefix(family.prefix)}.weight'
  for tensor in (*family.body, *family.heads):
    found = re.fullmatch(re.escape(tensor.name).replace(r'\{\}', r'(\d+)'), short)
    ours = tensor.paths[0]
    if beside == 'embedding' and ours != TOKEN:
      continue
    if found and ours.endswith(f'/{beside}') and not ours.startswith('heads_'):
      return tensor, int(found[1]) if found.groups() else -1
  raise ValueError(
    f'{path} adapts {module}, and here adapters stand beside the linear maps of the model alone, '
    'not of its heads, and of its tables beside that of tokens; merge it by peft '
    '(merge_and_unload) and open the result.'
  )


def inputs_of(path: str, infos: Mapping[str, Info]) -> tuple[int, ...]:
  """The dimensions of a kernel that are summed over; of a table, the one that counts its rows."""
  return (0,) if path.endswith('/embedding') else infos[path].inputs


def ranks(tensors: safetensors.Tensors, pieces: Sequence[Piece]) -> set[int]:
  """The ranks that the matrices of an adapter have."""
  return {
    tensors[ROOT + module + piece.suffix].shape[piece.theirs.index(_RANK)]
    for module, first in adapted(tensors, pieces).items()
    for piece in pieces
    if _RANK in piece.theirs and piece.targets == first.targets
  }


def beside(location: Location, piece: Piece, inputs: tuple[int, ...]) -> Location:
  """Where a piece is that stands beside a weight; its names are without prefix."""
  tensor = _tensor(location.tensor, piece, inputs)
  names = tuple(name.removesuffix('.weight') + piece.suffix for name in location.names)
  return Location(tensor, location.path, names, location.stacked)


def prompt_shape(
  piece: Piece, shapes: Mapping[str, tuple[int, ...]], infos: Mapping[str, Info]
) -> tuple[int, ...]:
  """The shape of the tensor that is all parameters of these paths and shapes."""
  path = next(iter(shapes))
  return _prompt(piece).shape(_in_all_layers(piece, path, shapes, infos))


def of_prompt(
  prompt: np.ndarray,
  piece: Piece,
  path: str,
  shapes: Mapping[str, tuple[int, ...]],
  infos: Mapping[str, Info],
) -> np.ndarray:
  """The view of a prompt's tensor, or the copy of some of its layers, that is a parameter.

  Args:
    prompt: the tensor.
    piece: what it is.
    path: of the parameter.
    shapes: of all parameters that the tensor is, by path.
    infos: what each of them is.
  """
  whole = _prompt(piece).part(prompt, '', _in_all_layers(piece, path, shapes, infos))
  return whole[infos[path].depths(shapes[path])] if 'L' in piece.ours else whole


def prompt(piece: Piece, values: Mapping[str, Any], infos: Mapping[str, Info]) -> np.ndarray:
  """The tensor that is these parameters, by path."""
  fetched = {path: np.asarray(writing.fetch(x, None)) for path, x in values.items()}
  shapes = {path: x.shape for path, x in fetched.items()}
  whole = np.zeros(prompt_shape(piece, shapes, infos), next(iter(fetched.values())).dtype)
  for path, value in fetched.items():
    view = _prompt(piece).part(whole, '', _in_all_layers(piece, path, shapes, infos))
    view[infos[path].depths(value.shape) if 'L' in piece.ours else ...] = value
  return whole


def _prompt(piece: Piece) -> Tensor:
  return Tensor(piece.suffix, f'{piece.theirs}->{piece.ours}', ('',))


def _in_all_layers(
  piece: Piece, path: str, shapes: Mapping[str, tuple[int, ...]], infos: Mapping[str, Info]
) -> tuple[int, ...]:
  """The shape that a parameter would have if it were of all layers."""
  if 'L' not in piece.ours:
    return shapes[path]
  layers = 1 + max(int(np.max(infos[each].depths(shape))) for each, shape in shapes.items())
  return layers, *shapes[path][infos[path].stacked :]


def _tensor(weight: Tensor, piece: Piece, inputs: tuple[int, ...]) -> Tensor:
  """The tensor beside a weight that is a piece of an adapter."""
  theirs, ours = weight.axes.split('->')
  letters = dict(I=''.join(ours[i] for i in inputs), R=_RANK)
  letters['O'] = ''.join(letter for letter in ours if letter not in letters['I'])
  axes = {_RANK: _RANK, '1': '1'}
  for axis in re.findall(r'\(\w+\)|\w', theirs):
    axes['I' if set(axis) & set(letters['I']) else 'O'] = axis
  spelled = ''.join(axes[letter] for letter in piece.theirs)
  ours = ''.join(letters[letter] for letter in piece.ours)
  name = weight.name.removesuffix('.weight') + piece.suffix
  return Tensor(name, f'{spelled}->{ours}', weight.paths)
