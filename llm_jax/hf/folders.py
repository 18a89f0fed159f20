"""Folders of Hugging Face's: `config.json` and safetensors, read into our parameters and written
from them.

What a family is stands with the models (`family.Family`, and `HF` in each model's module). Reading
goes parameter by parameter and device by device, from the memory-mapped file straight into each
device's part: beyond the arrays themselves, the host holds the part that is being filled, and the
one before it until JAX lets go of it. Writing goes tensor by tensor. Names and shapes are all
checked before the first weight is read.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from llm_jax.core import tree
from llm_jax.core.plugins import nearest
from llm_jax.hf import safetensors
from llm_jax.hf.family import OUTPUT, TOKEN, Family, Place, differences, values
from llm_jax.parallel import hosts

CONFIG = 'config.json'
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.h5', '.msgpack')
_DTYPES = {
  safetensors.DTYPES[code].name: safetensors.DTYPES[code] for code in ('F32', 'BF16', 'F16', 'F64')
}
DTYPES = tuple(_DTYPES)
POSITION, CLASSIFIER = 'model/embedder/position/embedding', 'heads_classifier/dense/kernel'
_IDS = dict.fromkeys(
  ('pad_token_id', 'bos_token_id', 'eos_token_id')
)  # not known here; left out, they would be a default's
_COMPARED = 1 << 22  # elements of two tensors that are compared at once

Families = Mapping[str, tuple[str, Family]]  # model_type -> (our model's name, family)


class Loaded(NamedTuple):
  """Parameters by path; the paths that the folder does not hold (heads only), and its tensors that
  have no place here.
  """

  params: dict[str, jax.Array]
  new: tuple[str, ...]
  unused: tuple[str, ...]


def is_folder(path: str) -> bool:
  """Whether a path is such a folder, complete or not: one whose config.json names a model, or that
  holds weights of this kind.
  """
  if not os.path.isdir(path):
    return False
  files = os.listdir(path)
  if CONFIG in files:
    try:
      config = safetensors.read_json(os.path.join(path, CONFIG))
      return isinstance(config, dict) and ('model_type' in config or 'architectures' in config)
    except ValueError:
      pass
  return any(file in (safetensors.SINGLE, safetensors.INDEX, 'pytorch_model.bin') for file in files)


def read_config(path: str) -> dict[str, Any]:
  """The config.json of a folder.

  Raises:
    ValueError: there is none, it is broken or names no `model_type`; or the weights are no
      safetensors.
  """
  file = os.path.join(path, CONFIG)
  if not os.path.exists(file):
    raise ValueError(f'{path} holds no {CONFIG}; it is not a whole Hugging Face folder.')
  config = safetensors.read_json(file)
  if not isinstance(config, dict) or not isinstance(config.get('model_type'), str):
    raise ValueError(f'{file} must name its model_type.')
  files = os.listdir(path)
  if not any(name in files for name in (safetensors.SINGLE, safetensors.INDEX)):
    pickled = sorted(name for name in files if name.endswith(PICKLES))
    if pickled:
      raise ValueError(
        f'{path} holds its weights in {pickled[0]}, which could execute code when it is read, and '
        'is not read. '
        'Convert it where you trust it: '
        'transformers.AutoModel.from_pretrained(...).save_pretrained(DIR, '
        'safe_serialization=True), with the class that config.json names.'
      )
    raise ValueError(f'{path} holds neither {safetensors.SINGLE} nor {safetensors.INDEX}.')
  return config


def model_options(path: str, families: Families) -> dict[str, Any]:
  """The section `config.model` of a folder: the name of our model, and its options.

  Raises:
    ValueError: a family that is not known, or a config.json that asks for what its model cannot do
      here.
  """
  config = read_config(path)
  name, family = _family(path, config, families)
  try:
    return {'name': name} | family.read(config)
  except ValueError as error:
    raise ValueError(f'{os.path.join(path, CONFIG)}: {config["model_type"]}: {error}') from None


def labels(path: str) -> tuple[str, ...] | None:
  """The names of the classes, in order, where the folder's model classifies sequences; otherwise
  None.
  """
  config = read_config(path)
  architectures = config.get('architectures')
  if not isinstance(architectures, list) or not any(
    'ForSequenceClassification' in str(name) for name in architectures
  ):
    return None
  names = config.get(
    'id2label', {'0': 'LABEL_0', '1': 'LABEL_1'}
  )  # what is left out is transformers' own default
  if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
    raise ValueError(
      f'{os.path.join(path, CONFIG)}: id2label={names!r} must name the classes 0, 1, ... .'
    )
  return tuple(str(names[str(i)]) for i in range(len(names)))


def load(path: str, families: Families, abstract_params: Any) -> Loaded:
  """The parameters of a folder.

  Args:
    path: the folder.
    families: what is known, as for `model_options`.
    abstract_params: the parameters that are wanted, nested or by path: a `jax.ShapeDtypeStruct`
      each; without a sharding, the array lies on the first device.

  Returns:
    The parameters that the folder holds, in the types wanted. A head that it holds in part only is
    new as a whole.

  Raises:
    ValueError: a tensor is missing or of another shape, or is a part of the layers and has no
      place; a projection on the vocabulary that is tied by config.json and not by its values;
      whatever `read_config` and `safetensors.read_folder` raise.
  """
  config = read_config(path)
  _, family = _family(path, config, families)
  wanted = tree.flatten(abstract_params)
  tensors = safetensors.read_folder(path)
  try:
    there = family.canonical(config, tensors)
    chosen = _choose(family, wanted, there)
    _check_shapes(chosen, wanted, tensors, there)
    unused, pairs = _left_over(family, config, chosen, there)
    for name, other in pairs:
      _check_equal(tensors, name, other)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  params = {name: _read(wanted[name], place, tensors, there) for name, place in chosen.items()}
  return Loaded(params, tuple(name for name in wanted if name not in chosen), unused)


def save(
  directory: str,
  families: Families,
  model_name: str,
  model: Any,
  params: Any,
  classes: Sequence[str] | None = None,
  dtype: str = 'float32',
  *,
  extra: Mapping[str, Any] | None = None,
  also: Callable[[str], None] | None = None,
  shard_bytes: int = safetensors.SHARD_BYTES,
) -> tuple[str, ...]:
  """Writes a folder that `transformers` opens, whole or not at all; all processes call it, the
  first one writes.

  Args:
    directory: a new or empty folder.
    families: what is known; the first that holds the model exactly is taken.
    model_name: our model's name.
    model: the model.
    params: its parameters and those of the heads, nested or by path; sharded as they may be.
    classes: names of the classes, where there is a classifier.
    dtype: of the file.
    extra: further keys of config.json: ids of special tokens (pad_token_id, ...), problem_type.
    also: writes further files (a tokenizer) into the folder before it gets its name; called on the
      first process only.
    shard_bytes: the most that one file holds.

  Returns:
    Paths of parameters that the family has no place for, and which are left out: heads of
    objectives that it does not know.

  Raises:
    ValueError: no family holds the model (which option stands in the way), or its classifier; or
      the folder is not empty.
  """
  if dtype not in DTYPES:
    raise ValueError(f'dtype={dtype!r} must be one of {", ".join(DTYPES)}.')
  directory = os.path.abspath(directory)
  if hosts.agree(
    lambda: os.path.isfile(directory) or (os.path.isdir(directory) and bool(os.listdir(directory)))
  ):
    raise ValueError(f'{directory} exists already and is not empty; give a new folder.')
  extra = {key: value for key, value in (extra or {}).items() if value is not None}
  model, params = _without_free_rows(model, tree.flatten(params), extra.get('pad_token_id'))
  kind, family = _holding(families, model_name, model)
  chosen = {path: found[0] for path, found in family.places(params).items() if found}
  left_out = tuple(path for path in params if path not in chosen)
  name = _class(kind, family, model, params, left_out)
  config = (
    _IDS
    | family.write(values(model))
    | _labels(name, params, classes)
    | extra
    | {'architectures': [name], 'model_type': kind, 'dtype': dtype}
  )
  pieces = _pieces(family, chosen, prefixed=name != list(family.classes)[-1], copied=not model.tied)
  shapes = {file: (_DTYPES[dtype], piece.shape(params)) for file, piece in pieces.items()}
  _write(
    directory,
    config,
    shapes,
    lambda file: pieces[file].array(params, *shapes[file]),
    shard_bytes,
    also,
  )
  for path in left_out:
    logging.warning('%s has no place in a %s and is left out.', path, name)
  return left_out


class _Piece(NamedTuple):
  """A tensor to write: what it is made of, by its path in `place.tensor`: one of our parameters,
  and which layer of it.
  """

  place: Place
  sources: dict[str, tuple[str, int | None]]

  def shape(self, params: Mapping[str, Any]) -> tuple[int, ...]:
    path, layer = next(iter(self.sources.values()))
    return self.place.tensor.shape(params[path].shape[layer is not None :])

  def array(self, params: Mapping[str, Any], dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor, on the host; all processes have to come here."""
    array = np.empty(shape, dtype)
    for inner, (path, layer) in self.sources.items():
      value = _fetch(params[path], layer)
      self.place.tensor.part(array, inner, value.shape)[...] = value
    return array


def _family(path: str, config: Mapping[str, Any], families: Families) -> tuple[str, Family]:
  kind = config['model_type']
  if kind not in families:
    raise ValueError(
      f'{os.path.join(path, CONFIG)}: model_type={kind!r} is not known{nearest(kind, families)}; '
      'known: '
      f'{", ".join(families)}.'
    )
  return families[kind]


def _choose(
  family: Family, wanted: Mapping[str, Any], there: Mapping[str, str]
) -> dict[str, Place]:
  """The place that each parameter is read from; heads that are not there in whole are left out."""
  places, chosen = family.places(wanted), {}
  for path, found in places.items():
    complete = [place for place in found if all(name in there for name in place.names)]
    if complete:
      chosen[path] = complete[0]
    elif path.startswith('model/') and path != OUTPUT:
      lacking = [name for place in found for name in place.names if name not in there] or [
        'a tensor'
      ]
      raise ValueError(f'{lacking[0]} is not there, which {path} is made of.')
  partial = {path.split('/')[0] for path in wanted if path not in chosen and path != OUTPUT}
  return {path: place for path, place in chosen.items() if path.split('/')[0] not in partial}


def _check_shapes(
  chosen: Mapping[str, Place],
  wanted: Mapping[str, Any],
  tensors: safetensors.Tensors,
  there: Mapping[str, str],
) -> None:
  for path, place in chosen.items():
    shape = place.tensor.shape(wanted[path].shape[place.stacked :])
    for name in place.names:
      found = tensors[there[name]]
      if found.shape != shape:
        way_out = (
          ' The vocabularies differ; leave model.vocab_size unset.'
          if path in (TOKEN, OUTPUT)
          else ''
        )
        raise ValueError(
          f'{there[name]} of shape {list(found.shape)} does not fit {path} of shape '
          f'{list(wanted[path].shape)}, '
          f'which needs {list(shape)} there.{way_out}'
        )
      if found.dtype.name not in DTYPES:
        raise ValueError(
          f'{there[name]} is of type {found.dtype.name}; {path} can be read from '
          f'{", ".join(DTYPES)}.'
        )


def _left_over(
  family: Family, config: Mapping[str, Any], chosen: Mapping[str, Place], there: Mapping[str, str]
) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
  """The tensors without a place, and those that must be equal to others; ValueError where a layer
  would lack a part of it.
  """
  used = {name for place in chosen.values() for name in place.names}
  copies = family.equal(config)
  unused, pairs = [], []
  for name, actual in there.items():
    if name in used or any(re.fullmatch(pattern, name) for pattern in family.ignored):
      continue
    if copies.get(name) in there:
      pairs.append((actual, there[copies[name]]))
    elif family.within_layers(name):
      raise ValueError(
        f'{actual} is a part of a layer that this model has no place for; config.json says nothing '
        'of it.'
      )
    else:
      unused.append(actual)
  return tuple(unused), pairs


def _check_equal(tensors: safetensors.Tensors, name: str, other: str) -> None:
  a, b = tensors.view(name), tensors.view(other)
  same = a.shape == b.shape and a.dtype == b.dtype
  a, b = a.reshape(-1), b.reshape(-1)
  if not same or not all(
    np.array_equal(a[i : i + _COMPARED], b[i : i + _COMPARED]) for i in range(0, a.size, _COMPARED)
  ):
    raise ValueError(
      f'{name} and {other} differ, and must be the same. Where the model has a projection on the '
      'vocabulary of '
      'its own, config.json must say tie_word_embeddings=false.'
    )


def _read(
  leaf: Any, place: Place, tensors: safetensors.Tensors, there: Mapping[str, str]
) -> jax.Array:
  """One parameter, each part of it copied from the file for the devices that hold it, before the
  next.
  """
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
  for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
    bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, leaf.shape, strict=True))
    holders.setdefault(bounds, []).append(device)
  arrays = []
  for bounds, devices in holders.items():
    part = np.empty([stop - start for start, stop in bounds], leaf.dtype)
    cuts = tuple(slice(*bound) for bound in bounds)
    names, rows = (place.names[cuts[0]], part) if place.stacked else (place.names, part[None])
    for name, row in zip(names, rows, strict=True):
      view = place.tensor.part(tensors.view(there[name]), place.path, leaf.shape[place.stacked :])
      row[...] = view[cuts[place.stacked :]]
    arrays += [jax.block_until_ready(jax.device_put(part, device)) for device in devices]
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _fetch(x: Any, layer: int | None) -> np.ndarray:
  """An array, or one layer of it, on the host of each process."""
  if layer is not None:
    x = (
      x[layer]
      if isinstance(x, np.ndarray)
      else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    )
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = _gather(x.sharding.mesh)(x).addressable_data(0)
  return np.asarray(x)


@functools.cache
def _gather(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(
    lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  )


def _without_free_rows(
  model: Any, params: dict[str, Any], pad_token_id: int | None
) -> tuple[Any, dict[str, Any]]:
  """The same function without `position_offset`, where RoBERTa, which counts places from
  pad_token_id + 1, would count others.
  """
  offset = getattr(model, 'position_offset', 0)
  if model.positions != 'learned' or pad_token_id is None or offset in (0, pad_token_id + 1):
    return model, params
  return model.clone(position_offset=0), params | {POSITION: params[POSITION][offset:]}


def _holding(families: Families, model_name: str, model: Any) -> tuple[str, Family]:
  """The first family whose config.json, written for the model and read again, is the same model."""
  ways = {}
  for kind, (name, family) in families.items():
    if name != model_name:
      continue
    try:
      ways[kind] = differences(model, type(model)(**family.read(family.write(values(model)))))
    except ValueError as error:
      ways[kind] = [
        str(error).rstrip('.')
      ] * 99  # less near than any family that can at least be written
    if not ways[kind]:
      return kind, family
  if not ways:
    raise ValueError(f"no family of Hugging Face's models is known for model {model_name!r}.")
  kind = min(ways, key=lambda kind: len(ways[kind]))
  raise ValueError(
    f"no family of Hugging Face's models is this model. Nearest is {kind}, where these options "
    'stand in the way: '
    f'{", ".join(dict.fromkeys(ways[kind]))}.'
  )


def _class(
  kind: str, family: Family, model: Any, params: Mapping[str, Any], left_out: Sequence[str]
) -> str:
  """The most special class whose heads are all there."""
  heads = {
    path.split('/')[0].removeprefix('heads_') for path in params if path.startswith('heads_')
  }
  present = heads - {path.split('/')[0].removeprefix('heads_') for path in left_out}
  if OUTPUT in params or (model.causal and model.tied):
    present.add('vocabulary')
  name, held = next(
    (name, held) for name, held in family.classes.items() if present.issuperset(held)
  )
  if 'classifier' in heads and 'classifier' not in held:
    raise ValueError(
      f'transformers has no {kind} that classifies as this model does. Classifiers can be exported '
      'that were '
      "trained with objective.pool='cls' (BERT, RoBERTa, bert_tiny) or 'last' (decoders)."
    )
  return name


def _labels(name: str, params: Mapping[str, Any], classes: Sequence[str] | None) -> dict[str, Any]:
  """Names of the classes in config.json, where `name` is a class that classifies."""
  if 'ForSequenceClassification' not in name:
    return {}
  outputs = params[CLASSIFIER].shape[-1]
  binary = (
    classes is not None and len(classes) == 2 and outputs == 1
  )  # one logit, for the second class
  names = classes[1:] if binary else classes or [f'LABEL_{i}' for i in range(outputs)]
  if len(names) != outputs:
    raise ValueError(f'{len(names)} names of classes for {outputs} outputs: {", ".join(names)}.')
  said = {
    'id2label': {str(i): name for i, name in enumerate(names)},
    'label2id': {name: i for i, name in enumerate(names)},
  }
  return said | (
    {'problem_type': 'multi_label_classification'} if binary else {}
  )  # transformers then takes the sigmoid


def _pieces(
  family: Family, chosen: Mapping[str, Place], prefixed: bool, copied: bool
) -> dict[str, _Piece]:
  """The tensors to write, by their full names."""
  pieces: dict[str, _Piece] = {}
  for path, place in chosen.items():
    prefix = family.prefix if prefixed and place.tensor in family.body else ''
    for layer, name in enumerate(place.names):
      piece = pieces.setdefault(prefix + name, _Piece(place, {}))
      piece.sources[place.path] = path, layer if place.stacked else None
  if copied:  # where the projection is not tied, transformers does not tie its bias either
    pieces |= {
      copy: pieces[name]
      for copy, name in family.copies.items()
      if name.endswith('.bias') and name in pieces
    }
  return pieces


def _write(
  directory: str,
  config: Mapping[str, Any],
  shapes: safetensors.Shapes,
  produce: Callable[[str], np.ndarray],
  shard_bytes: int,
  also: Callable[[str], None] | None,
) -> None:
  """Writes the folder beside its place, and then renames it; all processes but the first only help
  to make the tensors.
  """
  if not hosts.primary():
    for name in shapes:
      produce(name)
    hosts.barrier()
    return
  partial = f'{directory}.partial'
  shutil.rmtree(partial, ignore_errors=True)
  try:
    os.makedirs(partial)
    safetensors.write_folder(partial, shapes, produce, shard_bytes)
    with open(os.path.join(partial, CONFIG), 'w') as file:
      json.dump(config, file, indent=2, sort_keys=True)
      file.write('\n')
    if also is not None:
      also(partial)
    os.replace(partial, directory)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  hosts.barrier()
