"""From our model and parameters to a folder; `folders.save` says what of it a user sees."""

import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax.core import files
from llm_jax.core.contracts import Model
from llm_jax.hf import safetensors
from llm_jax.hf.family import CONFIG, Families, Family, differences, values
from llm_jax.hf.tensors import (
  CLASSIFIER,
  CLASSIFIES,
  OUTPUT,
  POSITION,
  TABLE_BIAS,
  TAGGER,
  TAGS,
  Location,
)
from llm_jax.parallel import hosts


class Piece(NamedTuple):
  """A tensor to write.

  Attributes:
    location: of one of the parameters that it is made of.
    sources: path in the tensor -> our parameter, and which of its layers (None: all of it).
  """

  location: Location
  sources: dict[str, tuple[str, int | None]]

  def shape(self, params: Mapping[str, Any]) -> tuple[int, ...]:
    """Its shape."""
    path, _ = next(iter(self.sources.values()))
    return self.location.tensor.shape(self.location.in_layer(params[path].shape))

  def array(self, params: Mapping[str, Any], dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor, on the host; all processes have to call this."""
    array = np.empty(shape, dtype)
    for inner, (path, layer) in self.sources.items():
      value = fetch(params[path], layer)
      self.location.tensor.part(array, inner, value.shape)[...] = value
    return array


def without_free_rows(
  model: Model, params: Mapping[str, Any], pad_token_id: int | None
) -> tuple[Any, dict[str, Any]]:
  """The same function without `position_offset`, where a RoBERTa would count other positions.

  It counts them from pad_token_id + 1; a model that counts from elsewhere is exported as a BERT.
  """
  offset = getattr(model, 'position_offset', 0)
  if model.causal or not offset or model.positions != 'learned':
    return model, dict(params)
  if pad_token_id in (None, offset - 1):
    return model, dict(params)
  return model.clone(position_offset=0), {**params, POSITION: params[POSITION][offset:]}


def family_and_form(
  families: Families, model_name: str, model: Model, params: Mapping[str, Any]
) -> tuple[str, Family, Any, dict[str, Any]]:
  """The family of a model, and the model and its parameters in the form that the family has: where
  it has a bias of the projection on the vocabulary and the model none, one of zeros.

  Raises:
    ValueError: as `family_of`.
  """
  try:
    return *family_of(families, model_name, model), model, dict(params)
  except ValueError:
    if getattr(model, 'output_biased', True):
      raise
    biased = model.clone(output_biased=True)
    try:
      found = family_of(families, model_name, biased)
    except ValueError:
      found = None
    if found is None:
      raise
  zeros = np.zeros(model.vocab_size, np.float32)
  return *found, biased, {**params, TABLE_BIAS: zeros}


def family_of(families: Families, model_name: str, model: Model) -> tuple[str, Family]:
  """The first family whose config.json, written for the model and read again, is the same model.

  Raises:
    ValueError: there is none; which options the nearest one does not have.
  """
  refused: list[tuple[float, str, list[str]]] = []
  for kind, (name, family) in families.items():
    if name != model_name:
      continue
    try:
      again = type(model)(**family.read(family.write(values(model))))
    except ValueError as error:
      refused.append((math.inf, kind, [str(error).rstrip('.')]))
      continue
    obstacles = differences(model, again)
    if not obstacles:
      return kind, family
    refused.append((len(obstacles), kind, obstacles))
  if not refused:
    raise ValueError(f"no family of Hugging Face's models is known for model {model_name!r}.")
  _, kind, obstacles = min(refused, key=lambda each: each[0])
  raise ValueError(
    f"no family of Hugging Face's models is this model. Nearest is {kind}, where these options "
    f'stand in the way: {", ".join(obstacles)}.'
  )


def class_of(
  kind: str, family: Family, model: Model, params: Mapping[str, Any], left_out: Sequence[str]
) -> str:
  """The most special class whose heads are all there.

  Raises:
    ValueError: there is a classifier or a tagger, and no class of the family has one like it.
  """
  heads = _heads(params)
  present = heads - _heads(left_out)
  if OUTPUT in params or (model.causal and model.tied):
    present.add('vocabulary')
  name, held = next(
    (name, held) for name, held in family.classes.items() if present.issuperset(held)
  )
  if 'choice' in heads and 'choice' not in held:
    raise ValueError(
      f'transformers has no {kind} that chooses as this model does: BERT and RoBERTa do, trained '
      "with objective.pool='cls'."
    )
  if 'classifier' in heads and 'classifier' not in held:
    raise ValueError(
      f'transformers has no {kind} that classifies as this model does. Classifiers can be exported '
      "that were trained with objective.pool='cls' (BERT, RoBERTa, bert_tiny), with 'last' "
      "(decoders), or with objective.transform='norm' (ModernBERT)."
    )
  if 'tagger' in heads and 'tagger' not in held:
    raise ValueError(
      f'transformers has no {kind} that tags as this model does; ModernBERT does with '
      "objective.transform='norm', encoders like BERT without."
    )
  if 'moves' in heads:
    raise ValueError(
      "transformers has no tagger that scores moves from tag to tag: with objective.loss='softmax' "
      'a tagger can be exported.'
    )
  return name


def class_names(
  architecture: str, params: Mapping[str, Any], classes: Sequence[str] | None
) -> dict[str, Any]:
  """What config.json says of the classes, where `architecture` classifies."""
  heads = {CLASSIFIES: CLASSIFIER, TAGS: TAGGER}
  path = next((path for kind, path in heads.items() if kind in architecture), None)
  if path is None:
    return {}
  outputs = params[path].shape[-1]
  names = list(classes or [f'LABEL_{i}' for i in range(outputs)])
  binary = classes is not None and len(classes) == 2 and outputs == 1
  if binary:
    names = names[1:]  # the one logit is that of the second class
  if len(names) != outputs:
    raise ValueError(f'{len(names)} names of classes for {outputs} outputs: {", ".join(names)}.')
  config: dict[str, Any] = {
    'id2label': {str(i): name for i, name in enumerate(names)},
    'label2id': {name: i for i, name in enumerate(names)},
  }
  if binary:
    config['problem_type'] = 'multi_label_classification'  # transformers then takes the sigmoid
  return config


def classifier_keys(
  architecture: str, family: Family, objective: Mapping[str, Any]
) -> dict[str, Any]:
  """What config.json says of a classifier beside its classes."""
  if CLASSIFIES not in architecture or family.classifier is None:
    return {}
  return family.classifier.write(objective)


def pieces(
  family: Family, architecture: str, chosen: Mapping[str, Location], tied: bool
) -> dict[str, Piece]:
  """The tensors to write, by their full names.

  Args:
    family: to write.
    architecture: its class.
    chosen: the location of each parameter.
    tied: the projection on the vocabulary is the token table.
  """
  prefixed = architecture != list(family.classes)[-1]
  found: dict[str, Piece] = {}
  for path, location in chosen.items():
    prefix = family.prefix if prefixed and location.tensor in family.body else ''
    for layer, name in enumerate(location.names):
      piece = found.setdefault(prefix + name, Piece(location, {}))
      piece.sources[location.path] = path, layer if location.stacked else None
  if not tied:  # transformers then does not tie the projection's bias either
    for copy, name in family.copies.items():
      if copy.endswith('.bias') and name in found:
        found[copy] = found[name]
  return found


def write(
  directory: str,
  config: Mapping[str, Any],
  tensors: Mapping[str, Piece],
  params: Mapping[str, Any],
  dtype: np.dtype,
  also: Callable[[str], None] | None,
) -> None:
  """Writes the folder, whole or not at all.

  The first process writes; the others only help to make the tensors, in the same order.
  """
  shapes = {name: (dtype, piece.shape(params)) for name, piece in tensors.items()}
  produce = lambda name: tensors[name].array(params, *shapes[name])
  if not hosts.primary():
    for name in shapes:
      produce(name)
    hosts.barrier()
    return
  os.makedirs(os.path.dirname(directory), exist_ok=True)
  with files.whole_folder(directory) as partial:
    safetensors.write_folder(str(partial), shapes, produce)
    with open(partial / CONFIG, 'w') as file:
      json.dump(config, file, indent=2, sort_keys=True)
      file.write('\n')
    if also is not None:
      also(str(partial))
  hosts.barrier()


def _heads(paths: Mapping[str, Any] | Sequence[str]) -> set[str]:
  """The names of the heads that these parameters belong to."""
  modules = {path.split('/')[0] for path in paths}
  return {name.removeprefix('heads_') for name in modules if name.startswith('heads_')}


def fetch(x: Any, layer: int | None) -> np.ndarray:
  """An array, or one layer of it, on the host of each process."""
  if layer is not None and isinstance(x, np.ndarray):
    x = x[layer]
  elif layer is not None:
    x = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = _gather(x.sharding.mesh)(x).addressable_data(0)
  return np.asarray(x)


@functools.cache
def _gather(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.jit(lambda x: x, out_shardings=whole)
