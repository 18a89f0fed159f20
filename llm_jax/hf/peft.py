"""Folders of the library `peft`: adapter_config.json and adapter_model.safetensors, which stand
beside a Hugging Face folder, their base.

What the parameters of a method are called there, an adapter says itself (`contracts.Ported`); where
they belong, the base's family. A tensor of the base that is several maps of ours (queries, keys and
values in one) has one pair of matrices there. Ours are written into it side by side: A's one below
the other, B's on a diagonal of blocks, at a rank that is so many times ours.
All maps get that rank, for an adapter has one; the rest is zeros.

(Formats: huggingface.co/docs/peft, "checkpoint format"; tests hold this module to peft 0.21.2.)
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core import files, tree
from llm_jax.core.contracts import Adapter, Model, Piece
from llm_jax.core.params import Info
from llm_jax.core.state import Loaded
from llm_jax.hf import folders, reading, safetensors, writing
from llm_jax.hf.family import Families, Family
from llm_jax.hf.tensors import ANSWERS, CLASSIFIES, FLOATS, TAGS, Location, Tensor
from llm_jax.parallel import hosts

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
TASKS = {
  'SEQ_CLS': (CLASSIFIES,),
  'TOKEN_CLS': (TAGS,),
  'QUESTION_ANS': (ANSWERS,),
  'CAUSAL_LM': ('ForCausalLM', 'LMHeadModel'),
}
"""peft's names of tasks -> ends of the names of their classes."""

_ROOT = 'base_model.model.'
_RANK = 'R'  # the letter of an adapter's own axis, in `contracts.Piece`


def is_folder(path: str | os.PathLike[str]) -> bool:
  """Whether a path is such a folder."""
  return os.path.isfile(os.path.join(path, CONFIG))


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The adapter_config.json of a folder.

  Raises:
    ValueError: it is broken or names no method, or the weights are not in safetensors.
  """
  file = os.path.join(path, CONFIG)
  config = safetensors.read_json(file)
  if not isinstance(config, dict) or not isinstance(config.get('peft_type'), str):
    raise ValueError(f'{file} must name its peft_type.')
  if not os.path.exists(os.path.join(path, WEIGHTS)):
    raise ValueError(f'{path} holds no {WEIGHTS}; save it by peft with safe_serialization=True.')
  return config


def base(path: str | os.PathLike[str]) -> str:
  """The Hugging Face folder that an adapter stands beside.

  Raises:
    ValueError: its config names none that is here.
  """
  named = read_config(path).get('base_model_name_or_path')
  for folder in (named, os.path.join(path, named)) if named else ():
    if folders.is_folder(folder):
      return os.path.abspath(folder)
  raise ValueError(
    f'{os.path.join(path, CONFIG)}: base_model_name_or_path={named!r} is no Hugging Face folder '
    'here; write the path of the one that the adapter was trained on there.'
  )


def maps(path: str | os.PathLike[str], families: Families, pieces: Sequence[Piece]) -> str:
  """A pattern for the linear maps that an adapter acts on, for `config.adapter.targets`.

  Args:
    path: the folder.
    families: as `families.known` gives them.
    pieces: what the method has beside each map.

  Raises:
    ValueError: a map that the base does not have, or one that is adapted in some layers only.
  """
  folder = base(path)
  config = folders.read_config(folder)
  _, family = folders.family_of(folder, config, families)
  layers = folders.model_options(folder, families)['layers']
  found: dict[str, set[int]] = {}
  for module in _modules(_tensors(path), pieces):
    tensor, layer = _tensor_of(path, module, family)
    for name in tensor.paths:
      found.setdefault(name.removesuffix('/kernel'), set()).add(layer)
  for name, held in found.items():
    if held not in ({-1}, set(range(layers))):
      raise ValueError(
        f'{path} adapts {name} in {len(held)} of {layers} layers, and all layers of a model have '
        'the same maps adapted here; merge it by peft (merge_and_unload) and open the result.'
      )
  return '|'.join(map(re.escape, sorted(found)))


def rank(path: str | os.PathLike[str], pieces: Sequence[Piece]) -> int:
  """The rank that the matrices of an adapter have; 0 where its method has none.

  Raises:
    ValueError: there are several.
  """
  tensors = _tensors(path)
  known = {
    tensors[_ROOT + module + piece.suffix].shape[piece.theirs.index(_RANK)]
    for module in _modules(tensors, pieces)
    for piece in pieces
    if _RANK in piece.theirs
  }
  if len(known) > 1:
    raise ValueError(
      f'{path} has matrices of the ranks {", ".join(map(str, sorted(known)))}, and an adapter here '
      'has one rank; merge it by peft (merge_and_unload) and open the result.'
    )
  return known.pop() if known else 0


def outputs(path: str | os.PathLike[str]) -> int | None:
  """How many classes the head has that was trained with an adapter; None where there is none."""
  tensors = _tensors(path)
  names = ('score.weight', 'classifier.out_proj.weight', 'classifier.weight', 'qa_outputs.weight')
  return next((tensors[_ROOT + name].shape[0] for name in names if _ROOT + name in tensors), None)


def load(
  path: str | os.PathLike[str],
  families: Families,
  abstract_params: Mapping[str, Any],
  infos: Mapping[str, Info],
  adapter: Adapter,
  loaded: Loaded,
  leave: str | None = None,
) -> Loaded:
  """The parameters of an adapter, and of the heads that were trained with it, beside its base's.

  Args:
    path: the folder.
    families: as `families.known` gives them.
    abstract_params: all parameters wanted, by path.
    infos: what each of them is.
    adapter: gives `Adapter.ported`.
    loaded: the base's, from its own folder.
    leave: a head whose last layer starts anew, whatever the folder holds of it.

  Raises:
    ValueError: a tensor that belongs to no parameter, or is of another shape; a parameter of the
      adapter that is not there.
  """
  config = folders.read_config(base(path))
  _, family = folders.family_of(base(path), config, families)
  tensors, new = _tensors(path), set(loaded.new)
  names = {name.removeprefix(_ROOT): name for name in tensors if name.startswith(_ROOT)}
  pieces = {piece.name: piece for piece in adapter.ported().pieces}
  own = {p for p in abstract_params if p in new and p.rpartition('/')[2] in pieces}
  rest = {p: leaf for p, leaf in abstract_params.items() if p not in own}
  locations = family.locations(rest, infos)
  params, used = dict(loaded.params), set()

  def read(name: str, location: Location, theirs: Mapping[str, str]) -> None:
    leaf = {name: abstract_params[name]}
    try:
      reading.check_shapes({name: location}, leaf, tensors, theirs)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None
    params[name] = reading.read(leaf[name], location, tensors, theirs)
    used.update(theirs[each] for each in location.names)

  for name in own:
    kernel = f'{name.rpartition("/")[0]}/kernel'
    location = _beside(locations[kernel][0], pieces[name.rpartition('/')[2]], infos[kernel].inputs)
    read(name, location, _full_names(path, location.names, family, names))
  left = family.canonical(config, [name for name, full in names.items() if full not in used])
  left = {name: names[full] for name, full in left.items()}
  architectures = TASKS.get(str(read_config(path).get('task_type')), ())
  for name in (name for name in rest if name.startswith('heads_')):
    there = [each for each in locations[name] if set(each.names) <= set(left)]
    held = [each for each in there if each.tensor.held_by(architectures)]
    if held and name.split('/')[0] == leave:
      used.update(left[each] for each in held[0].names)
    elif held:
      read(name, held[0], left)
  lost = sorted(set(tensors) - used)
  if lost:
    raise ValueError(f'{path} holds {lost[0]!r}, which belongs to no parameter of this run.')
  values = tree.flatten(adapter.from_ported(tree.nest(params), infos))
  return loaded._replace(
    params=values, new=tuple(name for name in loaded.new if name not in params)
  )


def save(
  directory: str | os.PathLike[str],
  families: Families,
  model_name: str,
  model: Model,
  params: Mapping[str, Any],
  infos: Mapping[str, Info],
  adapter: Adapter,
  own: Collection[str],
  *,
  origin: str | None,
  dtype: str = 'float32',
  also: Callable[[str], None] | None = None,
) -> None:
  """Writes what was trained beside a base, and the heads, as peft reads them; whole or not at all.

  All processes call it; the first one writes.

  Args:
    directory: a new or empty folder.
    families: as `families.known` gives them.
    model_name: our model's name.
    model: the model.
    params: all parameters, by path.
    infos: what each of them is.
    adapter: gives `Adapter.ported`.
    own: the paths of the adapter's parameters.
    origin: the Hugging Face folder that the run started from; None where it is another thing.
    dtype: the type of the tensors.
    also: writes further files; see `folders.save`.

  Raises:
    ValueError: peft has no such method, or no family holds the model or one of the maps.
  """
  folders.check_free(directory)
  kind, family = writing.family_of(families, model_name, model)
  rest = {path: x for path, x in params.items() if path not in own}
  trained = [p for p in rest if adapter.trains(p, infos[p], base=True)]
  locations = family.locations(rest, infos)
  left_out = [path for path, found in locations.items() if not found]
  architecture = writing.class_of(kind, family, model, rest, left_out)
  known = {path: found[0] for path, found in locations.items() if found}
  heads = writing.pieces(family, architecture, {p: known[p] for p in trained if p in known}, True)
  lost = [p for p in trained if p not in known or p.startswith('heads_mlm/')]
  if lost:
    raise ValueError(f'a folder of peft cannot hold {lost[0]}; --export=merged writes everything.')
  bodies = writing.pieces(family, architecture, known, True)
  values = tree.flatten(adapter.to_ported(tree.nest(dict(params)), infos))
  groups = dict(_groups(bodies, adapter, own, infos))
  if not groups:
    raise ValueError('the adapter adds no parameter; --export=merged writes what it trained.')
  arrays = {
    f'{_ROOT}{name}': piece.array(rest, FLOATS[dtype], piece.shape(rest))
    for name, piece in heads.items()
  }
  times = max(len(group.held) for group in groups.values())
  for name, group in groups.items():
    arrays |= {f'{_ROOT}{key}': x for key, x in group.arrays(name, values, times, FLOATS[dtype])}
  task = next((task for task, ends in TASKS.items() if architecture.endswith(ends)), None)
  config = dict(adapter.ported(times).settings) | {
    'fan_in_fan_out': any(group.inputs_first for group in groups.values()),
    'base_model_name_or_path': origin,
    'task_type': task,
    'target_modules': sorted(groups),
    'modules_to_save': sorted({_whole_module(name, heads, bodies) for name in heads}) or None,
    'bias': 'none',
    'inference_mode': True,
  }
  _write(os.path.abspath(directory), config, arrays, also)


class _Group(NamedTuple):
  """The maps of ours that are one tensor of the base.

  Attributes:
    location: of one of them.
    held: path in the tensor -> (path of the map, its layer or None, dimensions that are inputs);
      those that are adapted.
    pieces: what is beside each.
  """

  location: Location
  held: dict[str, tuple[str, int | None, tuple[int, ...]]]
  pieces: tuple[Piece, ...]

  @property
  def inputs_first(self) -> bool:
    """Whether the weight is [inputs, outputs], as GPT-2's are."""
    _, _, inputs = next(iter(self.held.values()))
    theirs, ours = self.location.tensor.axes.split('->')
    return ours[inputs[0]] in re.match(r'\(\w+\)|\w', theirs)[0]

  def arrays(
    self, name: str, values: Mapping[str, Any], times: int, dtype: np.dtype
  ) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors, by the map's name with their suffix, of `times` the rank."""
    for piece in self.pieces:
      yield name + piece.suffix, self._array(piece, values, times).astype(dtype)

  def _array(self, piece: Piece, values: Mapping[str, Any], times: int) -> np.ndarray:
    whole = None
    for number, (path, (module, layer, inputs)) in enumerate(self.held.items()):
      value = np.asarray(writing.fetch(values[f'{module}/{piece.name}'], layer))
      tensor = _tensor(self.location.tensor, piece, inputs)
      if whole is None:
        shape = list(tensor.shape(value.shape))
        if _RANK in piece.theirs:
          shape[piece.theirs.index(_RANK)] *= times
        elif len(self.held) < len(tensor.paths) and not piece.fills:
          raise ValueError(
            f'{module.rpartition("/")[0]}: {self.location.tensor.name} of the base is all of '
            f'{", ".join(tensor.paths)}, and only some of them are adapted.'
          )
        whole = np.zeros(shape, value.dtype)
      part = whole
      if _RANK in piece.theirs:
        axis = piece.theirs.index(_RANK)
        size = whole.shape[axis] // times
        part = whole[(slice(None),) * axis + (slice(number * size, (number + 1) * size),)]
      tensor.part(part, path, value.shape)[...] = value
    return whole


def _groups(
  bodies: Mapping[str, writing.Piece],
  adapter: Adapter,
  own: Collection[str],
  infos: Mapping[str, Info],
) -> Iterator[tuple[str, _Group]]:
  """The adapted maps of the base, by their full names."""
  pieces = adapter.ported().pieces
  for name, body in bodies.items():
    held = {}
    for inner, (path, layer) in body.sources.items():
      module = path.removesuffix('/kernel')
      if path.endswith('/kernel') and f'{module}/{pieces[0].name}' in own:
        held[inner] = module, layer, infos[path].inputs
    if held:
      yield name.removesuffix('.weight'), _Group(body.location, held, pieces)


def _whole_module(name: str, heads: Collection[str], everything: Collection[str]) -> str:
  """The largest module around a tensor of a head of which all tensors are a head's."""
  parts = name.split('.')[:-1]
  for count in range(1, len(parts)):
    module = '.'.join(parts[:count])
    if all(other in heads for other in everything if other.startswith(f'{module}.')):
      return module
  return '.'.join(parts)


def _tensor(weight: Tensor, piece: Piece, inputs: tuple[int, ...]) -> Tensor:
  """The tensor beside a weight that is a piece of an adapter."""
  theirs, ours = weight.axes.split('->')
  letters = dict(I=''.join(ours[i] for i in inputs), R=_RANK)
  letters['O'] = ''.join(letter for letter in ours if letter not in letters['I'])
  axes = dict(R=_RANK)
  for axis in re.findall(r'\(\w+\)|\w', theirs):
    axes['I' if set(axis) & set(letters['I']) else 'O'] = axis
  spelled = ''.join(axes[letter] for letter in piece.theirs)
  ours = ''.join(letters[letter] for letter in piece.ours)
  name = weight.name.removesuffix('.weight') + piece.suffix
  return Tensor(name, f'{spelled}->{ours}', weight.paths)


def _beside(location: Location, piece: Piece, inputs: tuple[int, ...]) -> Location:
  """Where a piece is that stands beside a weight; its names are without prefix."""
  tensor = _tensor(location.tensor, piece, inputs)
  names = tuple(name.removesuffix('.weight') + piece.suffix for name in location.names)
  return Location(tensor, location.path, names, location.stacked)


def _full_names(
  path: str | os.PathLike[str], wanted: Sequence[str], family: Family, names: Mapping[str, str]
) -> dict[str, str]:
  """The folder's names of tensors by those without prefix."""
  found = {name: names.get(family.prefix + name, names.get(name, '')) for name in wanted}
  lacking = [name for name, full in found.items() if not full]
  if lacking:
    raise ValueError(f'{path} has no {_ROOT}{family.prefix}{lacking[0]}.')
  return found


def _tensors(path: str | os.PathLike[str]) -> safetensors.Tensors:
  return safetensors.read(os.path.join(path, WEIGHTS))


def _modules(tensors: safetensors.Tensors, pieces: Sequence[Piece]) -> list[str]:
  """The names of the base's maps that an adapter acts on."""
  suffix = pieces[0].suffix
  found = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
  return [name.removeprefix(_ROOT) for name in found]


def _tensor_of(path: str | os.PathLike[str], module: str, family: Family) -> tuple[Tensor, int]:
  """The base's tensor that is the weight of a map, and the layer that it belongs to, or -1."""
  short = f'{module.removeprefix(family.prefix)}.weight'
  for tensor in (*family.body, *family.heads):
    found = re.fullmatch(re.escape(tensor.name).replace(r'\{\}', r'(\d+)'), short)
    if found and tensor.paths[0].endswith('/kernel') and not tensor.paths[0].startswith('heads_'):
      return tensor, int(found[1]) if found.groups() else -1
  raise ValueError(
    f'{path} adapts {module}, and here adapters stand beside the linear maps of the model alone, '
    'not of its heads; merge it by peft (merge_and_unload) and open the result.'
  )


def _write(
  directory: str,
  config: Mapping[str, Any],
  arrays: Mapping[str, np.ndarray],
  also: Callable[[str], None] | None,
) -> None:
  if hosts.primary():
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with files.whole_folder(directory) as partial:
      shapes = {name: (x.dtype, x.shape) for name, x in arrays.items()}
      safetensors.write(os.path.join(partial, WEIGHTS), shapes, arrays.__getitem__)
      with open(os.path.join(partial, CONFIG), 'w') as file:
        json.dump(config, file, indent=2, sort_keys=True)
        file.write('\n')
      if also is not None:
        also(str(partial))
  hosts.barrier()
