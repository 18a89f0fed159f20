"""What a run starts from, `config.init_from`: another run's folder, or a Hugging Face folder.

Such a folder says what its model is, so a config need not: `fill_in` takes from it what the config
leaves open.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from llm_jax.core import config as config_lib
from llm_jax.core import files, tree
from llm_jax.core import params as params_lib
from llm_jax.core.config import Config
from llm_jax.core.contracts import Objective, Tokenizer
from llm_jax.core.params import Info
from llm_jax.core.state import Loaded
from llm_jax.core.tree import PyTree
from llm_jax.data import chat_template
from llm_jax.data.tokenizers import marian
from llm_jax.hf import families as hf_families
from llm_jax.hf import folders as hf
from llm_jax.hf import peft, sentences
from llm_jax.hf.family import Family, decisive
from llm_jax.parallel import hosts
from llm_jax.programs import assemble, bases, checkpoints, forms, workdir
from llm_jax.programs.inference import Inference

CLASSIFY, SEQ2SEQ = 'classify', 'seq2seq'
CHATS = ('chat', 'dpo')  # objectives that read conversations by a template
# Options that a folder decides: what a text is read by, and what stands before a last layer. An
# objective with both reads a model as classifiers do, one with the first alone makes vectors.
POOL, TRANSFORM = READING = ('pool', 'transform')
FIRST_TOKEN = {'nsp', 'sop'}  # objectives that train what the first token says
AUTO = 'auto'
# AdamW's rate for fine-tuning: 1e-4 at the width of MiniLM (arXiv:2002.10957), 3e-5 at that of
# BERT-base and 2e-5 at that of BERT-large (arXiv:1810.04805, appendix A.3), and a power between.
RATE, WIDTH, POWER, LEAST = 1e-4, 384, 1.6, 2e-5
SEQ_LEN = 512  # where neither the config nor the model's own limit says less


def fill_in(config: Config, folder: pathlib.Path | None = None) -> Config:
  """The config with what `init_from` decides filled in.

  A Hugging Face folder decides the model's shape: a variant that the config names gives way to it,
  an option that the config sets to something else is an error. A run's folder fills a model
  section without a name. Both bring their tokenizer, fill an objective without a name, and a row
  length that is not set.

  Args:
    config: as it is read from a file.
    folder: the workdir to train in. A run that continues there has all of this itself, and its
      `init_from` may be gone.

  Raises:
    ValueError: a folder that is neither; an option that contradicts it.
  """
  config = _with_texts_of_teacher(config, folder)
  if config.init_from:
    origin = files.local('config.init_from', config.init_from).absolute()
    config = dataclasses.replace(config, init_from=str(origin))
    if folder is not None and hosts.agree(lambda: workdir.has_checkpoints(folder)):
      config = _continued(config, workdir.read_config(folder))
    elif peft.is_folder(origin):
      config = _from_peft(config, origin)
    elif hf.is_folder(str(origin)):
      config = _from_hf(config, origin)
    else:
      config = _from_run(config, origin)
  config = _with_template(config)
  if config.seq_len is None:
    limits = [SEQ_LEN, _room(config)]
    limits += [sentences.max_len(_base(config.init_from))] if config.init_from else []
    config = dataclasses.replace(config, seq_len=min(filter(None, limits)))
  return _with_rate(config)


def _with_texts_of_teacher(config: Config, folder: pathlib.Path | None) -> Config:
  """The config with the documents that its teacher learned from, where it names none."""
  if not config.teacher or config.data.get('source') or config.data.get('parts'):
    return config
  origin = files.local('config.teacher', config.teacher)
  if folder is not None and hosts.agree(lambda: workdir.has_checkpoints(folder)):
    origin = folder  # a run that goes on has them itself
  if is_foreign(origin) or not (origin / 'config.json').exists():
    return config
  saved = workdir.read_config(origin)
  own = config_lib.given(config.data)
  kept = {name: own[name] for name in ('cache', 'workers') if name in own}
  return dataclasses.replace(config, data=saved.data | kept, validation=saved.validation)


def _with_template(config: Config) -> Config:
  """The config with the chat template of a file in place of its name."""
  given = config.objective.get('template')
  if config.objective.get('name') not in CHATS or given is None or given in chat_template.KNOWN:
    return config
  objective = config.objective | {'template': chat_template.text(given)}
  return dataclasses.replace(config, objective=objective)


def _room(config: Config) -> int | None:
  """The positions that a model has beside those of an adapter; None where it does not say."""
  adapter, most = assemble.create_adapter(config), config.model.get('max_len')
  return most and most - (0 if adapter is None else adapter.positions)


def load_tokenizer(config: Config) -> Tokenizer:
  """The tokenizer that belongs to the weights of `init_from`.

  Raises:
    ValueError: none there, or one with more ids than the model has rows.
  """
  folder = pathlib.Path(config.init_from)
  if is_foreign(folder):
    tokenizer = assemble.create_tokenizer(config, lambda: iter(()), '', '')
    if tokenizer.vocab_size > config.model['vocab_size']:
      raise ValueError(
        f'the tokenizer of {folder} has {tokenizer.vocab_size:,} ids, and the model only '
        f'{config.model["vocab_size"]:,} (vocab_size of its config.json): they do not belong '
        'together.'
      )
  else:
    tokenizer = assemble.load_tokenizer(config, str(folder / 'tokenizer'))
  logging.info('Tokenizer: that of %s, %s ids.', folder, f'{tokenizer.vocab_size:,}')
  return tokenizer


def load_params(
  program: Inference,
  folder: pathlib.Path,
  step: int | None = None,
  held: Mapping[str, jax.Array] | None = None,
  in_forms: bool = False,
) -> Loaded:
  """The parameters in a folder that a network wants too; of a run, those of its best checkpoint,
  with those of the base that it names.

  Args:
    program: of the network.
    folder: of a run, of Hugging Face, which holds nothing of an adapter, or of the library peft.
    step: of a run, that of another checkpoint.
    held: parameters that are in memory; where they are those of a run's base, it is not read.
    in_forms: kernels that a folder holds in the form in which the network keeps them stay in it;
      otherwise arrays stand in place of all forms.

  Raises:
    ValueError: nothing to load there, a parameter of another shape, a base that is gone or another.
  """
  if peft.is_folder(folder):
    loaded = load_params(program, pathlib.Path(peft.base(folder)))
    wanted, adapter = tree.flatten(program.params), program.network.adapter
    known = families(program.config)
    leave = _head_of_other_size(folder, wanted)
    return peft.load(folder, known, wanted, program.infos, adapter, loaded, leave)
  if not hf.is_folder(str(folder)):
    which = 'best' if step is None else step
    loaded = _from_checkpoint(program, folder, which, in_forms)
    return _with_base(program, folder, loaded, held or {})
  head = _head_of_other_classes(program.objective, folder)
  base, added = params_lib.split(
    program.params, lambda path: path in program.base and path.split('/')[0] != head
  )
  loaded = hf.load(str(folder), families(program.config), base, program.infos)
  return loaded._replace(new=[*loaded.new, *tree.paths(added)])


def compression(folder: pathlib.Path) -> dict[str, Any]:
  """The section `compress` of the run in a folder; nothing where it is no run."""
  return {} if is_foreign(folder) else dict(workdir.read_config(folder).compress)


def _from_checkpoint(
  program: Inference, folder: pathlib.Path, which: str | int, in_forms: bool
) -> Loaded:
  method = assemble.create_compression(workdir.read_config(folder))
  schemes = forms.of_method(method, program.infos, program.params)
  shapes = forms.placed(program.params, program.infos, schemes, program.layout)
  formed = {path: leaf for path, leaf in params_lib.leaves(shapes).items() if path in schemes}
  loaded = checkpoints.restore_params(folder / 'checkpoints', program.params, which, formed)
  types = tree.flatten(program.params)
  for path, leaf in loaded.params.items():
    kept = in_forms and program.formed.get(path) == schemes.get(path)
    if params_lib.is_form(leaf) and not kept:
      loaded.params[path] = leaf.dense(types[path].dtype)
  return loaded


def without_top(loaded: Loaded, drawn: PyTree, infos: Mapping[str, Info], count: int) -> Loaded:
  """What was loaded, with the `count` layers from the top as they were drawn (Zhang et al. 2021,
  arXiv:2006.05987, section 4).

  Args:
    loaded: of `load_params`.
    drawn: new parameters of the network, nested.
    infos: what each of them is.
    count: at most all layers.

  Raises:
    ValueError: more layers than the model has.
  """
  params, leaves = dict(loaded.params), tree.flatten(drawn)
  found = {path: infos[path].depths(leaf.shape) for path, leaf in leaves.items()}
  depths = {path: depth for path, depth in found.items() if depth is not None and depth.max() >= 0}
  layers = 1 + max((int(depth.max()) for depth in depths.values()), default=-1)
  if count > layers:
    raise ValueError(
      f'config.reinit_layers={count} is more than the {layers} layers of the model; lower it.'
    )
  for path in depths.keys() & params.keys():
    leaf, new = leaves[path], depths[path] >= layers - count
    mask = new.reshape(-1, *[1] * (leaf.ndim - 1)) if new.ndim else new
    choose = jax.jit(functools.partial(jnp.where, mask), out_shardings=leaf.sharding)
    params[path] = choose(leaf, params[path])
  logging.info('The upper %d of %d layers start anew.', count, layers)
  return loaded._replace(params=params)


def read_base(
  program: Inference,
  workdir: pathlib.Path,
  said: Mapping[str, Any],
  held: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """The parameters that the checkpoints of a run have from elsewhere, by path.

  Args:
    program: of a network that wants some of them.
    workdir: of the run.
    said: what a checkpoint says of them.
    held: parameters that are in memory; where they are the base's, it is not read.

  Raises:
    ValueError: they are gone, or others.
  """
  load = functools.partial(load_params, program)
  wanted = tree.paths(program.params)
  return bases.read(bases.Base(**said), workdir, load, wanted, program.mesh, held or {})


def _with_base(
  program: Inference, workdir: pathlib.Path, loaded: Loaded, held: Mapping[str, jax.Array]
) -> Loaded:
  if loaded.base is None:
    return loaded
  found = read_base(program, workdir, loaded.base, held)
  new = [path for path in loaded.new if path not in found]
  return loaded._replace(params=loaded.params | found, new=new)


def _head_of_other_classes(objective: Objective, folder: pathlib.Path) -> str | None:
  """The head that a network should not take from a Hugging Face folder: its outputs are other
  classes there, or in another order. Names that say nothing fit as many classes.
  """
  predictor, labels = getattr(objective, 'predictor', None), hf.labels(str(folder))
  if predictor is None or labels is None:
    return None
  classes = predictor.classes or ()
  outputs = classes[1:] if predictor.task == 'binary' else classes
  unnamed = labels == tuple(f'LABEL_{i}' for i in range(len(labels)))
  if (
    labels in (classes, outputs) or (unnamed or not classes) and len(labels) == max(1, len(outputs))
  ):
    return None
  logging.warning(
    'The last layer of %s is left out, and starts anew: it is for the classes %s, and this run has '
    '%s.',
    folder,
    ', '.join(labels[:20]),
    ', '.join(classes[:20]) or 'one output',
  )
  return 'heads_tagger' if hf.tags_tokens(str(folder)) else 'heads_classifier'


def _head_of_other_size(folder: pathlib.Path, wanted: Mapping[str, Any]) -> str | None:
  """The head that a network should not take from a folder of the library peft, which has another
  number of classes there.
  """
  outputs = peft.outputs(folder)
  for head in ('heads_classifier', 'heads_tagger'):
    leaf = wanted.get(f'{head}/dense/kernel')
    if leaf is not None and outputs not in (None, leaf.shape[-1]):
      logging.warning(
        'The last layer of %s is left out, and starts anew: it is for %d classes, and this run has '
        '%d.',
        folder,
        outputs,
        leaf.shape[-1],
      )
      return head
  return None


def families(config: Config) -> dict[str, tuple[str, Family]]:
  """Hugging Face's model types: the name of the model of ours that holds each, and how.

  Those that ship with the package, and those that a user's own model declares.
  """
  name = config.model.get('name')
  return hf_families.known(name, assemble.model_module(name) if name else None)


def _base(folder: str) -> str:
  """The folder of a model, where another stands beside it."""
  return peft.base(folder) if peft.is_folder(folder) else folder


def missing_folder(config: Config) -> bool:
  """Whether `init_from` names a folder that is neither of Hugging Face nor of a run."""
  folder = pathlib.Path(config.init_from).expanduser()
  is_run = (folder / 'config.json').exists() or workdir.has_checkpoints(folder)
  return not (is_run or is_foreign(folder))


def is_foreign(folder: pathlib.Path) -> bool:
  """Whether a folder is one of Hugging Face's: of a model, or of an adapter of the library peft."""
  return hf.is_folder(str(folder)) or peft.is_folder(folder)


def _with_rate(config: Config) -> Config:
  """The config with `optimizer.learning_rate='auto'` decided by the width of its model.

  Raises:
    ValueError: the model does not say how wide it is.
  """
  if config.optimizer.get('learning_rate') != AUTO:
    return config
  dim = assemble.model_options(config, 1).get('dim')
  if dim is None:
    raise ValueError(
      "config.optimizer.learning_rate='auto' goes by config.model.dim, which this model does not "
      'have; give a number.'
    )
  rate = float(f'{max(LEAST, RATE * (WIDTH / dim) ** POWER):.1e}')
  logging.info('Learning rate: %g, for a model that is %d wide.', rate, dim)
  return dataclasses.replace(config, optimizer=config.optimizer | {'learning_rate': rate})


def _from_hf(config: Config, folder: pathlib.Path) -> Config:
  found = hf.model_options(str(folder), families(config))
  model = assemble.model_module(found['name']).Model
  causal, objective = model.causal, config_lib.given(config.objective)
  if 'name' not in objective:
    own = {'name': SEQ2SEQ} if model.reads_source() else _objective(folder, causal)
    objective = own | objective
  if objective['name'] == SEQ2SEQ:
    objective = hf.writing_ids(folder) | objective
  elif objective['name'] in CHATS and 'template' not in objective:
    template = hf.chat_template(folder)
    objective |= {} if template is None else {'template': template}
    logging.info('objective.template: %s.', 'none there' if template is None else f'of {folder}')
  options = assemble.objective_options(objective['name'])
  if POOL in options and POOL not in objective:
    reading = _reading(TRANSFORM in options, folder, causal, families(config))
    objective = {key: value for key, value in reading.items() if key in options} | objective
    logging.info('objective.pool=%s, as %s has it.', objective['pool'], folder)
  elif TRANSFORM in options and POOL not in options and TRANSFORM not in objective:
    reading = hf.classifier(str(folder), families(config))
    objective |= {key: value for key, value in reading.items() if key == TRANSFORM}
  return dataclasses.replace(
    config,
    model=_decided(config.model, found, folder),
    objective=objective,
    tokenizer={'name': _tokenizer(folder), 'path': str(folder)},
  )


def _tokenizer(folder: pathlib.Path) -> str:
  """The name of the tokenizer that reads a Hugging Face folder."""
  return 'marian' if (folder / marian.SOURCE).exists() else 'hf'


def _from_peft(config: Config, folder: pathlib.Path) -> Config:
  """The config with the base of a folder of the library peft, and the adapter that is in it.

  Raises:
    ValueError: a method that is not known, or another than the config has; see `hf.peft`.
  """
  settings = peft.read_config(folder)
  base, known = pathlib.Path(peft.base(folder)), families(config)
  try:
    found, ported = assemble.ported_adapter(settings, config.steps)
    peft.check_task(ported, settings.get('task_type'), base)
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from None
  if ported.pieces:
    found |= peft.maps(folder, known, ported.pieces)
  if peft.rank(folder, ported.pieces) not in (0, found.get('rank')):
    raise ValueError(f'{folder}: its matrices are not of the rank that {peft.CONFIG} says.')
  for key, value in config_lib.given(config.adapter).items():
    if value != found.get(key, value):
      raise ValueError(
        f'config.adapter.{key}={value!r} is not what {folder} has, {found[key]!r}; leave it unset.'
      )
  objective, task = config_lib.given(config.objective), settings.get('task_type')
  if 'name' not in objective and task in peft.TASKS:
    objective = _of_task(task, base, peft.outputs(folder)) | objective
  if objective.get('name') == CLASSIFY and task == 'SEQ_CLS':
    name = hf.model_options(str(base), known)['name']
    causal = assemble.model_module(name).Model.causal
    objective = _of_class(base, causal, known) | objective  # its head was trained on that
  config = dataclasses.replace(
    config, adapter=found | config_lib.given(config.adapter), objective=objective
  )
  return _from_hf(config, base)


def _of_task(task: str, base: pathlib.Path, outputs: int | None) -> dict[str, Any]:
  """The objective that an adapter was trained for; its classes are the base's, where they are as
  many as the head has outputs.
  """
  if task not in ('SEQ_CLS', 'TOKEN_CLS'):
    return {'name': 'qa' if task == 'QUESTION_ANS' else 'clm'}
  labels = hf.labels(str(base)) or ()
  if outputs not in (None, len(labels)):
    labels = tuple(f'LABEL_{i}' for i in range(outputs))
  if task == 'TOKEN_CLS':
    return {'name': 'tag', 'tags': labels}
  if len(labels) == 1:
    return {'name': CLASSIFY, 'task': 'regression'}
  return {'name': CLASSIFY, 'task': 'multiclass', 'classes': labels}


def _continued(config: Config, saved: Config) -> Config:
  """The config of a run that continues; what it sets otherwise than the run did is left in it, to
  be refused or taken.
  """
  if saved.init_from and saved.tokenizer.get('path') == saved.init_from:  # a Hugging Face folder
    model = _decided(config.model, saved.model, saved.init_from)
  else:
    model = _named_or(config.model, saved.model)
  objective = _named_or(config.objective, saved.objective)
  options = assemble.objective_options(objective['name'])
  for key in READING:
    if key in options and objective.get(key) is None and key in saved.objective:
      objective[key] = saved.objective[key]
  return dataclasses.replace(
    config,
    model=model,
    tokenizer=saved.tokenizer,
    seq_len=config.seq_len or saved.seq_len,
    objective=objective,
  )


def _decided(
  section: Mapping[str, Any], found: Mapping[str, Any], folder: pathlib.Path | str
) -> dict[str, Any]:
  """The section of a model whose shape a Hugging Face folder decides: its name and variant give
  way to what was found there, any other option must agree with it.
  """
  model = assemble.model_module(found['name']).Model
  shape = decisive(model)
  given = config_lib.given(section)
  for key in (name for name in shape if name in given):
    has = found.get(key, getattr(model, key, None))  # or else the model's default
    if _as_in_json(given[key]) != _as_in_json(has):
      raise ValueError(
        f'config.model.{key}={given[key]!r} is not what {folder} has, {has!r}; leave it unset.'
      )
  decided = {*shape, 'name', 'variant'}
  return dict(found) | {key: value for key, value in given.items() if key not in decided}


def _as_in_json(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value


def _from_run(config: Config, folder: pathlib.Path) -> Config:
  if missing_folder(config):
    raise ValueError(
      f'config.init_from={folder} is the folder neither of a run nor of a Hugging Face model: no '
      'config.json.'
    )
  saved = workdir.read_config(folder)
  adapter = config_lib.given(saved.adapter)
  if adapter and adapter != config_lib.given(config.adapter):
    logging.warning(
      '%s was trained with config.adapter=%s, and this run has another: what that added beside the '
      'base is not taken (bitfit and freeze add nothing). To start from both, export that run '
      '(--mode=export) and name the folder in config.init_from.',
      folder,
      adapter,
    )
  objective = _named_or(config.objective, saved.objective)
  options = assemble.objective_options(objective['name'])
  if POOL in options and objective.get('pool') is None:
    objective |= {'pool': _pool(saved, TRANSFORM in options)}
    logging.info('objective.pool=%s, as %s was trained.', objective['pool'], folder)
  return dataclasses.replace(
    config,
    tokenizer=saved.tokenizer,
    seq_len=config.seq_len or saved.seq_len,
    model=_named_or(config.model, saved.model),
    objective=objective,
  )


def _pool(saved: Config, classifies: bool) -> str:
  """What an objective reads of a run's model: what the run did; a classifier, the first token where
  the run learned from it.
  """
  names = {saved.objective['name'], *(saved.objective.get('parts') or {})}
  if saved.objective.get('pool'):
    return saved.objective['pool']
  if classifies and names & (FIRST_TOKEN | {CLASSIFY}):
    return 'cls'
  return 'last' if assemble.model_module(saved.model['name']).Model.causal else 'mean'


def _named_or(given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
  return dict(given) if given.get('name') else dict(saved) | config_lib.given(given)


def _reading(
  classifies: bool, folder: pathlib.Path, causal: bool, known: Mapping[str, tuple[str, Family]]
) -> dict[str, Any]:
  """How an objective reads the model of a Hugging Face folder: as a sentence-transformers model
  makes its vectors; else as the classifiers of the family do, or for vectors by the mean, of a
  decoder by the last token.
  """
  said = sentences.read(folder) if hf.labels(str(folder)) is None else None
  if said is not None:
    if said.lower:
      logging.warning(
        '%s makes vectors of texts in small letters; here they are read as they are.', folder
      )
    return {'pool': said.pool}
  if not classifies:
    return {'pool': 'last' if causal else 'mean'}
  return _of_class(folder, causal, known)


def _of_class(
  folder: pathlib.Path, causal: bool, known: Mapping[str, tuple[str, Family]]
) -> dict[str, Any]:
  """How transformers' classifiers of a family read a model."""
  return {'pool': 'last' if causal else 'cls'} | hf.classifier(str(folder), known)


def _objective(folder: pathlib.Path, causal: bool) -> dict[str, Any]:
  """The objective that the class of a Hugging Face checkpoint was trained for; without a head, the
  one that suits the model.
  """
  labels = hf.labels(str(folder))
  if hf.answers_questions(str(folder)):
    return {'name': 'qa'}
  if hf.chooses(str(folder)):
    return {'name': 'choice'}
  if labels is None:
    return {'name': 'clm' if causal else 'mlm'}
  if hf.tags_tokens(str(folder)):
    return {'name': 'tag', 'tags': labels}
  if len(labels) == 1:
    return {'name': 'classify', 'task': 'regression'}
  several = hf.read_config(str(folder)).get('problem_type') == 'multi_label_classification'
  task = 'multilabel' if several else 'multiclass'
  return {'name': 'classify', 'task': task, 'classes': labels}
