"""A model, its heads and its tokenizer as a folder that Hugging Face's transformers opens."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from absl import logging

from llm_jax.core import files, tree
from llm_jax.core import params as params_lib
from llm_jax.data import chat_template
from llm_jax.hf import folders as hf
from llm_jax.hf import peft, sentences
from llm_jax.inference.session import Session
from llm_jax.programs import portable, pretrained

# Our task -> what Hugging Face calls it in config.json.
PROBLEMS = {
  'regression': 'regression',
  'multilabel': 'multi_label_classification',
  'multiclass': 'single_label_classification',
}


MERGED, BASE, ADAPTER, STABLEHLO = 'merged', 'base', 'adapter', 'stablehlo'
FUNCTION, SIGNATURE = 'model.stablehlo', 'signature.json'


def export(
  session: Session, target: pathlib.Path, dtype: str = 'float32', form: str = MERGED
) -> None:
  """Writes the folder.

  Args:
    session: a run or a Hugging Face folder.
    target: a folder that is empty or not there yet.
    dtype: of the weights in the files.
    form: of a run with an adapter, 'merged' into its base, the 'base' without it, or the 'adapter'
      alone as the library peft reads it; or 'stablehlo', one function (`programs.portable`) with
      the tokenizer beside it.

  Raises:
    ValueError: an adapter that cannot be merged, a model that none of their architectures holds,
      parameters that are missing, a folder that holds something.
  """
  program, config = session.program, session.config
  model, predictor = program.network.model, program.objective.predictor
  pool = program.objective.embedding_pool
  write_tokenizer = functools.partial(
    session.tokenizer.export,
    causal=model.causal and not model.reads_source(),
    closed=model.reads_source() or model.causal and predictor is not None and pool is None,
    max_len=model.max_len,
    token_types=getattr(model, 'token_types', 0) > 1,
  )
  if form == STABLEHLO:
    _write_function(session, target, write_tokenizer)
    return
  template = getattr(program.objective, 'template', None)
  if isinstance(template, chat_template.Template):
    write_tokenizer = functools.partial(_write_with_template, write_tokenizer, template.source)
  if program.objective.opens_prompts:
    raise ValueError(
      'a prefix LM lets all tokens of a prompt see each other, and no decoder of transformers does '
      'that; it cannot be exported.'
    )
  if form == ADAPTER:
    _write_adapter(session, target, dtype, write_tokenizer)
    return
  extra = _token_ids(session)
  if predictor is not None:
    extra['problem_type'] = PROBLEMS.get(predictor.task)
  hf.save(
    str(target),
    pretrained.families(config),
    config.model['name'],
    model,
    _params(session, form),
    infos=program.infos,
    classes=None if predictor is None else predictor.classes,
    dtype=dtype,
    extra=extra,
    objective=config.objective,
    also=functools.partial(_write_beside, write_tokenizer, pool, model.options.dim, config.seq_len),
  )
  logging.info('Exported to %s: transformers opens it by from_pretrained.', target)
  if pool is not None:
    logging.info('So does sentence-transformers: vectors by pool=%s, of length 1.', pool)


def _write_function(session: Session, target: pathlib.Path, also: Callable[[str], None]) -> None:
  program, config = session.program, session.config
  if target.exists() and any(target.iterdir()):
    raise ValueError(f'{target} holds something already; name a folder that is not there.')
  content = portable.exported(program, session.params, config.seq_len)
  predictor = program.objective.predictor
  said = {
    'inputs': {'tokens': ['B', config.seq_len], 'lengths': ['B'], 'dtype': 'int32'},
    'classes': None if predictor is None else predictor.classes,
  }
  target.mkdir(parents=True, exist_ok=True)
  also(str(target))
  (target / SIGNATURE).write_text(json.dumps(said, indent=2))
  with files.whole_file(target / FUNCTION, 'wb') as file:
    file.write(content)
  logging.info('Exported to %s: jax.export.deserialize opens %s.', target, FUNCTION)


def _write_with_template(write: Callable[[str], None], template: str, folder: str) -> None:
  write(folder)
  (pathlib.Path(folder) / 'chat_template.jinja').write_text(template, encoding='utf-8')


def _write_beside(
  write_tokenizer: Callable[[str], None], pool: str | None, dim: int, seq_len: int, folder: str
) -> None:
  """What stands beside the weights: the tokenizer, and how vectors are made."""
  write_tokenizer(folder)
  if pool is not None:
    sentences.write(folder, pool, dim, seq_len)


def _params(session: Session, form: str) -> Any:
  """The parameters of the base, with what an adapter has learned or without."""
  program, adapter = session.program, session.program.network.adapter
  if form not in (MERGED, BASE):
    raise ValueError(f'--export={form!r} must be {MERGED}, {BASE} or {ADAPTER}.')
  params = program.dense(session.params)
  if adapter is None:
    return params
  if form == BASE:
    base, _ = params_lib.split(params, program.base.__contains__)
    return base
  try:
    return adapter.merged(params, program.infos)
  except ValueError as error:
    raise ValueError(f'{error} --export={BASE} writes the base without it.') from None


def _write_adapter(
  session: Session, target: pathlib.Path, dtype: str, also: Callable[[str], None]
) -> None:
  program, config = session.program, session.config
  adapter = program.network.adapter
  if adapter is None:
    raise ValueError(f'--export={ADAPTER} needs a run with config.adapter; this one has none.')
  params = tree.flatten(program.dense(session.params))
  origin = config.init_from or ''
  if peft.is_folder(origin):
    origin = peft.base(origin)
  elif not hf.is_folder(origin):
    origin = None
  peft.save(
    str(target),
    pretrained.families(config),
    config.model['name'],
    program.network.model,
    params,
    program.infos,
    adapter,
    [path for path in params if path not in program.base],
    origin=origin,
    dtype=dtype,
    also=also,
  )
  if origin is None:
    logging.warning(
      'The run started from no Hugging Face folder: export its base (--export=%s) and write that '
      'folder into base_model_name_or_path of %s.',
      BASE,
      peft.CONFIG,
    )
  logging.info('The adapter was exported to %s: PeftModel.from_pretrained opens it.', target)


def _token_ids(session: Session) -> dict[str, Any]:
  """Ids of special tokens, as config.json names them."""
  tokenizer = session.tokenizer
  if not session.causal:
    return {'pad_token_id': tokenizer.pad_id}
  first, *others = tokenizer.eos_ids
  start = {}
  if session.program.network.model.reads_source():
    start = {
      name: session.writing_ids[key]
      for key, name in hf.WRITING_IDS.items()
      if session.writing_ids.get(key) is not None
    }
  return start | {
    'pad_token_id': tokenizer.pad_id,
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': [first, *others] if others else first,
  }
