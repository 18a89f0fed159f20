"""Folders of the library `peft`: adapter_config.json and adapter_model.safetensors, which stand
beside a Hugging Face folder, their base.

What the parameters of a method are called there, an adapter says itself (`contracts.Ported`); where
they belong, the base's family (`peft_tensors`).

(Formats: huggingface.co/docs/peft, "checkpoint format"; tests hold this module to peft 0.21.2.)
"""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.core import files, tree
from llm_jax.core.contracts import Adapter, Model, Piece, Ported
from llm_jax.core.params import Info
from llm_jax.core.state import Loaded
from llm_jax.hf import folders, peft_tensors, reading, safetensors, writing
from llm_jax.hf.family import Families, Family
from llm_jax.hf.peft_tensors import CONFIG, PROMPT_ROOT, ROOT, WEIGHTS
from llm_jax.hf.tensors import ANSWERS, CLASSIFIES, FLOATS, TAGS, TOKEN, Location
from llm_jax.parallel import hosts

TASKS = {
  'SEQ_CLS': (CLASSIFIES,),
  'TOKEN_CLS': (TAGS,),
  'QUESTION_ANS': (ANSWERS,),
  'CAUSAL_LM': ('ForCausalLM', 'LMHeadModel'),
}
"""peft's names of tasks -> ends of the names of their classes."""


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


def maps(
  path: str | os.PathLike[str], families: Families, pieces: Sequence[Piece]
) -> dict[str, Any]:
  """The options of `config.adapter` that `pieces` name: patterns for the linear maps that an
  adapter acts on, '' where there is none, and whether it acts on a table.

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
  model = folders.model_options(folder, families)
  found: dict[tuple[str, str], set[int]] = {}
  for module, piece in peft_tensors.adapted(peft_tensors.read(path, pieces), pieces).items():
    tensor, layer = peft_tensors.of_map(path, module, family, piece.beside)
    for name in tensor.paths:
      found.setdefault((piece.targets, name.rpartition('/')[0]), set()).add(layer)
  for (_, name), held in found.items():
    side = family.side(name).removesuffix('/')
    layers = model.get(f'{side}_layers') or model['layers']
    if held not in ({-1}, set(range(layers))):
      raise ValueError(
        f'{path} adapts {name} in {len(held)} of {layers} layers, and all layers of a model have '
        'the same maps adapted here; merge it by peft (merge_and_unload) and open the result.'
      )
  options: dict[str, Any] = {}
  for piece in pieces:
    names = [_pattern(name, family) for option, name in sorted(found) if option == piece.targets]
    options[piece.targets] = '|'.join(names) if piece.beside == 'kernel' else bool(names)
  return options


def _pattern(name: str, family: Family) -> str:
  """What an adapter calls a linear map; where a model has several stacks, those of one."""
  side = family.side(name)
  within = re.escape(name.removeprefix(side))
  return f'{re.escape(side)}.*/{within}' if side else within


def rank(path: str | os.PathLike[str], pieces: Sequence[Piece]) -> int:
  """The rank that the matrices of an adapter have; 0 where its method has none.

  Raises:
    ValueError: there are several.
  """
  known = peft_tensors.ranks(peft_tensors.read(path, pieces), pieces)
  if len(known) > 1:
    raise ValueError(
      f'{path} has matrices of the ranks {", ".join(map(str, sorted(known)))}, and an adapter here '
      'has one rank; merge it by peft (merge_and_unload) and open the result.'
    )
  return known.pop() if known else 0


def outputs(path: str | os.PathLike[str]) -> int | None:
  """How many classes the head has that was trained with an adapter; None where there is none."""
  tensors = peft_tensors.read(path)
  names = ('score.weight', 'classifier.out_proj.weight', 'classifier.weight', 'qa_outputs.weight')
  there = (root + name for name in names for root in (ROOT, PROMPT_ROOT))
  return next((tensors[name].shape[0] for name in there if name in tensors), None)


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
  ported, new = adapter.ported(), set(loaded.new)
  tensors = peft_tensors.read(path, ported.pieces)
  root = ROOT if ported.prompt is None else PROMPT_ROOT
  names = {name.removeprefix(root): name for name in tensors if name.startswith(root)}
  pieces = {piece.name: piece for piece in ported.pieces or (ported.prompt,)}
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

  used |= _base_layers(path, tensors, params)
  if ported.prompt is not None:
    params |= _read_prompt(
      path, tensors, ported.prompt, {p: abstract_params[p] for p in own}, infos
    )
    used.add(ported.prompt.suffix)
  for name in own if ported.prompt is None else ():
    module, _, last = name.rpartition('/')
    path_of = f'{module}/{pieces[last].beside}'
    inputs = peft_tensors.inputs_of(path_of, infos)
    location = peft_tensors.beside(locations[path_of][0], pieces[last], inputs)
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
  task = next((task for task, ends in TASKS.items() if architecture.endswith(ends)), None)
  ported = adapter.ported()
  check_task(ported, task, architecture)
  root = ROOT if ported.prompt is None else PROMPT_ROOT
  arrays = {
    f'{root}{name}': piece.array(rest, FLOATS[dtype], piece.shape(rest))
    for name, piece in heads.items()
  }
  values = tree.flatten(adapter.to_ported(tree.nest(dict(params)), infos))
  if ported.prompt is None:
    settings, more = _beside_maps(bodies, adapter, values, own, infos, FLOATS[dtype])
  else:
    settings, found = dict(ported.settings), ported.prompt
    mine = {p: x for p, x in values.items() if p in own and p.rpartition('/')[2] == found.name}
    more = {found.suffix: peft_tensors.prompt(found, mine, infos).astype(FLOATS[dtype])}
  config = settings | {
    'base_model_name_or_path': origin,
    'task_type': task,
    'modules_to_save': sorted({_whole_module(name, heads, bodies) for name in heads}) or None,
    'inference_mode': True,
  }
  _write(os.path.abspath(directory), config, arrays | more, also)


def check_task(ported: Ported, task: str | None, what: str) -> None:
  """Raises ValueError where an adapter does not do there what it does here.

  Args:
    ported: what it is there.
    task: peft's name of the task; None for none.
    what: what is of this task, for the message.
  """
  if ported.tasks and task not in ported.tasks:
    raise ValueError(
      f'{ported.settings["peft_type"]} of {what}, task_type={task}: peft refuses it, or computes '
      f'there what is not computed here; both agree in {", ".join(ported.tasks)}. Other adapters '
      '(lora, adalora, ia3) have all tasks.'
    )


def _base_layers(
  path: str | os.PathLike[str], tensors: safetensors.Tensors, params: Mapping[str, Any]
) -> set[str]:
  """The names of tensors that peft copies from the base, where tokens' vectors are adapted.

  Raises:
    ValueError: one is not the base's.
  """
  names = {name for name in tensors if name.endswith('.base_layer.weight')}
  for name in names:
    table = np.asarray(writing.fetch(params[TOKEN], None))
    if not np.array_equal(tensors.view(name).astype(table.dtype), table):
      raise ValueError(
        f'{path}: {name} is not what the base has, whose vocabulary may have grown; merge it by '
        'peft (merge_and_unload) and open the result.'
      )
  return names


def _read_prompt(
  path: str | os.PathLike[str],
  tensors: safetensors.Tensors,
  piece: Piece,
  leaves: Mapping[str, Any],
  infos: Mapping[str, Info],
) -> dict[str, jax.Array]:
  """The parameters that are one tensor of the whole model."""
  shapes = {name: leaf.shape for name, leaf in leaves.items()}
  wanted = peft_tensors.prompt_shape(piece, shapes, infos)
  if piece.suffix not in tensors or tensors[piece.suffix].shape != wanted:
    found = list(tensors[piece.suffix].shape) if piece.suffix in tensors else 'nowhere'
    raise ValueError(
      f'{path}: {piece.suffix} must be of shape {list(wanted)} for this model, and is {found}.'
    )
  array, params = tensors.view(piece.suffix), {}
  for name, leaf in leaves.items():
    value = peft_tensors.of_prompt(array, piece, name, shapes, infos).astype(leaf.dtype)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params[name] = jax.make_array_from_callback(leaf.shape, sharding, value.__getitem__)
  return params


def _beside_maps(
  bodies: Mapping[str, writing.Piece],
  adapter: Adapter,
  values: Mapping[str, Any],
  own: Collection[str],
  infos: Mapping[str, Info],
  dtype: np.dtype,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Settings and tensors of a method that stands beside the maps of the base."""
  pieces = adapter.ported().pieces
  groups = dict(peft_tensors.groups(bodies, pieces, own, infos))
  if not groups:
    raise ValueError('the adapter adds no parameter; --export=merged writes what it trained.')
  times = max(len(group.held) for group in groups.values())
  arrays = {}
  for name, group in groups.items():
    arrays |= {f'{ROOT}{key}': x for key, x in group.arrays(name, values, times, dtype)}
  lists = {piece.listed: [] for piece in pieces if piece.listed}
  for name, group in sorted(groups.items()):
    for listed in {piece.listed for piece in group.pieces if piece.listed}:
      lists[listed].append(name)
  settings = {
    'fan_in_fan_out': any(group.inputs_first for group in groups.values()),
    'target_modules': sorted(groups),
  }
  return dict(adapter.ported(times).settings) | settings | lists, arrays


def _whole_module(name: str, heads: Collection[str], everything: Collection[str]) -> str:
  """The largest module around a tensor of a head of which all tensors are a head's."""
  parts = name.split('.')[:-1]
  for count in range(1, len(parts)):
    module = '.'.join(parts[:count])
    if all(other in heads for other in everything if other.startswith(f'{module}.')):
      return module
  return '.'.join(parts)


def _full_names(
  path: str | os.PathLike[str], wanted: Sequence[str], family: Family, names: Mapping[str, str]
) -> dict[str, str]:
  """The folder's names of tensors by those without prefix."""
  found = {name: names.get(family.prefix + name, names.get(name, '')) for name in wanted}
  lacking = [name for name, full in found.items() if not full]
  if lacking:
    raise ValueError(f'{path} has no {ROOT}{family.prefix}{lacking[0]}.')
  return found


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
