"""Folders of Hugging Face's: config.json and safetensors, read into our parameters and written from
them.

`families` says what each family is. Names and shapes are all checked before the first weight is
read. Reading goes parameter by parameter and device by device, from the memory-mapped file straight
into each device's part: beyond the arrays themselves, the host holds the part that is being filled,
and the one before it until JAX lets go of it. Writing goes tensor by tensor.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from llm_jax.core import tree
from llm_jax.core.contracts import Model
from llm_jax.core.params import Info
from llm_jax.core.plugins import nearest
from llm_jax.core.state import Loaded
from llm_jax.core.tree import PyTree
from llm_jax.hf import reading, safetensors, writing
from llm_jax.hf.family import CONFIG, Families, Family, values
from llm_jax.hf.tensors import ANSWERS, CHOOSES, CLASSIFIES, FLOATS, TABLE_BIAS, TAGS
from llm_jax.parallel import hosts

DTYPES = tuple(FLOATS)  # that a folder can be written in
WRITING_IDS = {  # of encoder-decoders: how config.json and generation_config.json name them
  'start': 'decoder_start_token_id',
  'forced_bos': 'forced_bos_token_id',
  'forced_eos': 'forced_eos_token_id',
}
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.h5', '.msgpack')
_WEIGHTS = (safetensors.SINGLE, safetensors.INDEX)
_NO_IDS = dict.fromkeys(('pad_token_id', 'bos_token_id', 'eos_token_id'))
"""Written as null where they are not known: left out, they would be transformers' defaults."""


def is_folder(path: str | os.PathLike[str]) -> bool:
  """Whether a path is such a folder, whole or not: one whose config.json names a model, or that
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
  return any(file in (*_WEIGHTS, 'pytorch_model.bin') for file in files)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The config.json of a folder.

  Raises:
    ValueError: there is none, it is broken or names no `model_type`; or the weights are not in
      safetensors.
  """
  file = os.path.join(path, CONFIG)
  if not os.path.exists(file):
    raise ValueError(f'{path} holds no {CONFIG}; it is not a whole Hugging Face folder.')
  config = safetensors.read_json(file)
  if not isinstance(config, dict) or not isinstance(config.get('model_type'), str):
    raise ValueError(f'{file} must name its model_type.')
  _check_weights(path)
  return config


def model_options(path: str | os.PathLike[str], families: Families) -> dict[str, Any]:
  """The section `config.model` of a folder: the name of our model, and its options.

  Args:
    path: the folder.
    families: as `families.known` gives them.

  Raises:
    ValueError: a family that is not known, or a config.json with a value that is not supported.
  """
  config = read_config(path)
  name, family = family_of(path, config, families)
  config = _with_own_projection(path, config, family)
  try:
    return {'name': name} | family.read(config)
  except ValueError as error:
    raise ValueError(f'{os.path.join(path, CONFIG)}: {config["model_type"]}: {error}') from None


def labels(path: str | os.PathLike[str]) -> tuple[str, ...] | None:
  """The names of the classes, in order, where the folder's model classifies sequences or tokens;
  else None.

  Raises:
    ValueError: the names are not those of classes 0, 1, ....
  """
  config = read_config(path)
  if not (_is_class(config, CLASSIFIES) or _is_class(config, TAGS)):
    return None
  names = config.get('id2label')
  if names is None:
    names = _numbered(config)
  if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
    raise ValueError(
      f'{os.path.join(path, CONFIG)}: id2label={names!r} must name the classes 0, 1, ....'
    )
  return tuple(str(names[str(i)]) for i in range(len(names)))


def answers_questions(path: str | os.PathLike[str]) -> bool:
  """Whether the folder's model finds the spans of answers."""
  return _is_class(read_config(path), ANSWERS)


def chooses(path: str | os.PathLike[str]) -> bool:
  """Whether the folder's model picks one of several candidates."""
  return _is_class(read_config(path), CHOOSES)


def writing_ids(path: str | os.PathLike[str]) -> dict[str, int]:
  """What the folder of an encoder-decoder says of the tokens that it writes: `start`, the id that
  the decoder begins with; `forced_bos` and `forced_eos`, those of its first and its last possible
  new token. What is not said is left out.

  Raises:
    ValueError: what is no id.
  """
  file, found = os.path.join(path, 'generation_config.json'), read_config(path)
  later = safetensors.read_json(file) if os.path.exists(file) else {}
  said = found | {key: value for key, value in later.items() if value is not None}
  ids = {}
  for name, key in WRITING_IDS.items():
    if (one := said.get(key)) is None:
      continue
    if type(one) is not int or one < 0:
      raise ValueError(f'{path}: {key}={one!r} must be an id of the vocabulary.')
    ids[name] = one
  return ids


def chat_template(path: str | os.PathLike[str]) -> str | None:
  """The Jinja template by which a folder's model reads conversations; None where it has none."""
  file = os.path.join(path, 'chat_template.jinja')
  if os.path.isfile(file):
    with open(file, encoding='utf-8') as opened:
      return opened.read()
  settings = os.path.join(path, 'tokenizer_config.json')
  found = safetensors.read_json(settings) if os.path.isfile(settings) else {}
  template = found.get('chat_template') if isinstance(found, dict) else None
  if isinstance(template, list):  # several by name
    named = {one.get('name'): one.get('template') for one in template if isinstance(one, dict)}
    template = named.get('default')
  return template if isinstance(template, str) else None


def tags_tokens(path: str | os.PathLike[str]) -> bool:
  """Whether the folder's model classifies tokens."""
  return _is_class(read_config(path), TAGS)


def classifier(path: str | os.PathLike[str], families: Families) -> dict[str, Any]:
  """Options of the objective `classify` that the folder's classifier has, where they are not BERT's
  or a decoder's.

  Args:
    path: the folder.
    families: as `families.known` gives them.
  """
  config = read_config(path)
  _, family = family_of(path, config, families)
  return {} if family.classifier is None else family.classifier.read(config)


def _is_class(config: Mapping[str, Any], kind: str) -> bool:
  return any(kind in name for name in _architectures(config))


def _architectures(config: Mapping[str, Any]) -> list[str]:
  names = config.get('architectures')
  return [str(name) for name in names] if isinstance(names, list) else []


def _numbered(config: Mapping[str, Any]) -> dict[str, str]:
  """The names of classes where id2label is not there: those of label2id, else transformers' own."""
  count = config.get('num_labels') or 2
  named = {str(number): name for name, number in (config.get('label2id') or {}).items()}
  if named and len(named) == (config.get('num_labels') or len(named)):
    return named
  return {str(number): f'LABEL_{number}' for number in range(count)}


def load(
  path: str | os.PathLike[str],
  families: Families,
  abstract_params: PyTree,
  infos: Mapping[str, Info],
) -> Loaded:
  """Reads the parameters that a folder holds, in the types wanted.

  Args:
    path: the folder.
    families: as `families.known` gives them.
    abstract_params: the parameters wanted, nested or by path, each leaf with shape, type and
      sharding.
    infos: what each of them is, by path (`core.params.infos`).

  Returns:
    The parameters by path. `new` are those of heads that the folder does not hold, or only in
    part; `unused` are its tensors that belong to no parameter.

  Raises:
    ValueError: a tensor is missing or of another shape; one in the layers would not be read; a
      projection on the vocabulary is tied by config.json and not by its values; whatever
      `read_config` and `safetensors.read_folder` raise.
  """
  config = read_config(path)
  _, family = family_of(path, config, families)
  config = _with_own_projection(path, config, family)
  wanted = tree.flatten(abstract_params)
  tensors = safetensors.read_folder(str(path))
  try:
    names = family.canonical(config, tensors)
    chosen = reading.choose(family, wanted, infos, names, _architectures(config))
    reading.check_shapes(chosen, wanted, tensors, names)
    unused, pairs = reading.left_over(family, config, chosen, names)
    for name, other in pairs:
      reading.check_equal(tensors, name, other)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  params = {
    name: reading.read(wanted[name], location, tensors, names) for name, location in chosen.items()
  }
  new = tuple(name for name in wanted if name not in chosen)
  return Loaded(params, new, unused, step=None)


def save(
  directory: str | os.PathLike[str],
  families: Families,
  model_name: str,
  model: Model,
  params: PyTree,
  infos: Mapping[str, Info],
  *,
  classes: Sequence[str] | None = None,
  dtype: str = 'float32',
  extra: Mapping[str, Any] | None = None,
  objective: Mapping[str, Any] | None = None,
  also: Callable[[str], None] | None = None,
) -> tuple[str, ...]:
  """Writes a folder that `transformers` opens, whole or not at all.

  All processes call it; the first one writes.

  Args:
    directory: a new or empty folder.
    families: what is known; the first that holds the model exactly is taken.
    model_name: our model's name.
    model: the model.
    params: its parameters and those of the heads, nested or by path, sharded in any way.
    infos: what each of them is, by path (`core.params.infos`).
    classes: names of the classes, where there is a classifier.
    dtype: the type of the tensors, one of `DTYPES`.
    extra: further keys of config.json: ids of special tokens (pad_token_id, ...), problem_type.
    objective: the section of the objective, for what a family's config.json says of a classifier.
    also: writes further files (a tokenizer) into the folder before it gets its name; called on the
      first process only.

  Returns:
    Paths of parameters that the family has no tensor for, and which are left out: heads of
    objectives that it does not know.

  Raises:
    ValueError: no family holds the model (which option stands in the way), one of its parameters
      outside of the heads, or its classifier; or the folder is not empty.
  """
  if dtype not in FLOATS:
    raise ValueError(f'dtype={dtype!r} must be one of {", ".join(FLOATS)}.')
  directory = os.path.abspath(directory)
  check_free(directory)
  extra = {key: value for key, value in (extra or {}).items() if value is not None}
  model, params = writing.without_free_rows(model, tree.flatten(params), extra.get('pad_token_id'))
  kind, family, model, params = writing.family_and_form(families, model_name, model, params)
  locations = family.locations(params, {TABLE_BIAS: Info(('vocab',)), **infos})
  chosen = {path: found[0] for path, found in locations.items() if found}
  left_out = tuple(path for path in params if path not in chosen)
  lost = [path for path in left_out if path.startswith('model/')]
  if lost:
    raise ValueError(
      f'a {kind} has no tensor for {", ".join(lost)}, and without them the model is another one.'
    )
  architecture = writing.class_of(kind, family, model, params, left_out)
  config = {
    **_NO_IDS,
    **family.write(values(model)),
    **writing.class_names(architecture, params, classes),
    **writing.classifier_keys(architecture, family, objective or {}),
    **extra,
    'architectures': [architecture],
    'model_type': kind,
    'dtype': dtype,
  }
  tensors = writing.pieces(family, architecture, chosen, model.tied)
  writing.write(directory, config, tensors, params, FLOATS[dtype], also)
  for path in left_out:
    logging.warning('%s has no tensor in a %s and is left out.', path, architecture)
  return left_out


def family_of(
  path: str | os.PathLike[str], config: Mapping[str, Any], families: Families
) -> tuple[str, Family]:
  """The name of our model that holds a folder's, and its family.

  Raises:
    ValueError: a family that is not known.
  """
  kind = config['model_type']
  if kind not in families:
    raise ValueError(
      f'{os.path.join(path, CONFIG)}: model_type={kind!r} is not known{nearest(kind, families)}; '
      f'known: {", ".join(families)}.'
    )
  return families[kind]


def _with_own_projection(
  path: str | os.PathLike[str], config: dict[str, Any], family: Family
) -> dict[str, Any]:
  """The config.json of a folder, where its values say that the projection on the vocabulary is not
  tied: transformers 5 writes of every T5 that it is.
  """
  if not family.tied_by_values or not family.tied(config):
    return config
  tensors = safetensors.read_folder(str(path))
  names = family.canonical(config | {'tie_word_embeddings': False}, tensors)
  projection, table = (names.get(name) for name in family.ends)
  if projection is None or table is None or reading.equal(tensors, projection, table):
    return config
  scaled = config.get('scale_decoder_outputs', True)
  return config | {'tie_word_embeddings': False, 'scale_decoder_outputs': scaled}


def _check_weights(path: str | os.PathLike[str]) -> None:
  files = os.listdir(path)
  if any(name in files for name in _WEIGHTS):
    return
  pickled = sorted(name for name in files if name.endswith(_PICKLES))
  if pickled:
    raise ValueError(
      f'{path} holds its weights in {pickled[0]}, which could execute code when it is read, and '
      'is not read. Convert it where you trust it: '
      'transformers.AutoModel.from_pretrained(...).save_pretrained(DIR, safe_serialization=True), '
      'with the class that config.json names.'
    )
  raise ValueError(f'{path} holds neither {safetensors.SINGLE} nor {safetensors.INDEX}.')


def check_free(directory: str | os.PathLike[str]) -> None:
  """Raises ValueError on all hosts for a folder that holds something."""
  directory = os.path.abspath(directory)
  if hosts.agree(lambda: _occupied(directory)):
    raise ValueError(f'{directory} exists already and is not empty; give a new folder.')


def _occupied(directory: str) -> bool:
  return os.path.isfile(directory) or (os.path.isdir(directory) and bool(os.listdir(directory)))
