"""What a trained model is for besides going on: its numbers on a validation set, its answers to new
texts, its export.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Source, Tokenizer
from llm_jax.data import pipeline
from llm_jax.data.sources import jsonl, text
from llm_jax.hf import folders as hf
from llm_jax.parallel import hosts
from llm_jax.programs import build, pretrained
from llm_jax.programs import workdir as runs
from llm_jax.programs.build import Program
from llm_jax.training import corpora as prepare
from llm_jax.training import evaluation as scores

# Our task -> what Hugging Face calls it in config.json.
PROBLEMS = {
  'regression': 'regression',
  'multilabel': 'multi_label_classification',
  'multiclass': 'single_label_classification',
}
# Texts that predict lays out together: at least so many, and of so many batches if each had a row
# of its own.
LEAST_BLOCK, BLOCK_BATCHES = 4096, 64


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model to be used: the folder that holds its weights, its config and its tokenizer."""

  origin: pathlib.Path
  config: Config
  tokenizer: Tokenizer


def open_model(workdir: pathlib.Path | None, given: Config | None = None) -> Opened:
  """Opens what `config.init_from` names, or else the run in the workdir.

  Args:
    workdir: of a run; None where the config names a folder.
    given: a config. Where it names no folder, its data, evaluation and batch size go before the
      run's own.

  Raises:
    ValueError: no such run or folder, or a tokenizer that does not belong to it.
  """
  if given is not None and given.init_from:
    tokenizer = pretrained.load_tokenizer(given)
    return Opened(
      pathlib.Path(given.init_from),
      build.resolve(given, tokenizer.vocab_size, build.class_names(given)),
      tokenizer,
    )
  config = runs.read_config(workdir)
  if given is not None:
    config = _with_data_of(given, config)
  return Opened(workdir, config, runs.load_tokenizer(config, workdir))


def load_params(program: Program, origin: pathlib.Path, heads: bool = True) -> Any:
  """The parameters in a folder, of a run those of its best checkpoint, as the program wants them.

  Args:
    program: wants them.
    origin: the folder.
    heads: all heads must be there; otherwise those that are not are left out.

  Raises:
    ValueError: there are none, or some are missing.
  """
  loaded = pretrained.load_params(program, origin)
  missing = {path.split('/')[0] for path in loaded.new}
  if loaded.new and not heads and not any(path.split('/')[0] in missing for path in loaded.params):
    logging.info('%s has no %s.', origin, ', '.join(sorted(missing)))
  elif loaded.new:
    raise ValueError(f'{origin} lacks parameters that this needs:\n  ' + '\n  '.join(loaded.new))
  logging.info(
    'Parameters of %s%s.', origin, '' if loaded.step is None else f', step {loaded.step}'
  )
  if loaded.unused:
    logging.info('Not used: %s.', ', '.join(loaded.unused))
  return tree.nest(loaded.params)


def template(tokenizer: Tokenizer, causal: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids that stand before and after one text, as the model was trained."""
  if tokenizer.template is not None:
    return tokenizer.template
  return ((tokenizer.bos_id,), ()) if causal else ((tokenizer.cls_id,), (tokenizer.sep_id,))


def texts(source: pathlib.Path, field: str) -> Source:
  """The texts of one file: .jsonl, in the field of that name; or .txt, a text a line, lines of
  white space left out.

  Raises:
    ValueError: no such file.
  """
  if source.suffix not in ('.jsonl', '.txt') or not source.is_file():
    raise ValueError(f'--input={source} must be a .jsonl or .txt file that exists.')
  return (
    jsonl.Source(str(source), field)
    if source.suffix == '.jsonl'
    else text.Source(str(source), unit='line')
  )


def evaluate(opened: Opened, workdir: pathlib.Path | None = None) -> dict[str, float]:
  """Prints, and writes to `eval.json` in the workdir, a model's numbers on a validation set;
  data.validation=0: on all documents.

  Args:
    opened: the model, and in its config the data.
    workdir: where to write; None to print only.

  Raises:
    ValueError: an unusable source, an empty corpus, parameters that are missing.
  """
  config, tokenizer = opened.config, opened.tokenizer
  documents = prepare.documents(config, tokenizer)
  chosen = documents.validation if config.data['validation'] else documents.train
  objective = build.create_objective(config, tokenizer)
  examples = pipeline.validation_examples(
    chosen, objective, config.seq_len, config.seed, config.evaluation.rows
  )
  program = build.build(dataclasses.replace(config, micro_batches=1), tokenizer, examples[0])
  params = load_params(program, opened.origin)
  values = scores.scores(program, params, examples, workdir and workdir / 'eval_report.txt')
  values |= scores.baselines(program, tokenizer, examples)
  if hosts.primary():
    for name, value in values.items():
      print(f'{name:>24} {value:.6g}')
    if workdir:
      (workdir / 'eval.json').write_text(
        json.dumps({'model': str(opened.origin), 'data': config.data} | values, indent=2)
      )
  return values


def _with_data_of(given: Config, config: Config) -> Config:
  if (given.data.get('pair') is None) != (config.data.get('pair') is None):
    raise ValueError(
      f'the run read config.data.pair={config.data.get("pair")!r}, and is to be evaluated on '
      f'config.data.pair={given.data.get("pair")!r}; both need pairs, or neither.'
    )
  chosen = dataclasses.replace(
    config, data=given.data, evaluation=given.evaluation, batch_size=given.batch_size
  )
  for line in sum(config_lib.differences(chosen, given), []):
    logging.info('as in the run, not as in --config: %s', line)
  return chosen


def export(opened: Opened, target: pathlib.Path) -> None:
  """Writes a model, its heads and its tokenizer as a folder that Hugging Face's transformers opens.

  Args:
    opened: a run or a Hugging Face folder.
    target: a folder that is empty or not there yet.

  Raises:
    ValueError: a model that none of their architectures holds, parameters that are missing, a
      folder that holds something.
  """
  config = dataclasses.replace(opened.config, micro_batches=1)
  program = build.outline(config, jax.devices(), opened.tokenizer)
  params, model = load_params(program, opened.origin, heads=False), program.network.model
  tokenizer = functools.partial(
    opened.tokenizer.export,
    causal=model.causal,
    max_len=model.max_len,
    token_types=getattr(model, 'token_types', 0) > 1,
  )
  ids = {
    f'{name}_token_id': getattr(opened.tokenizer, f'{name}_id')
    for name in ('pad', 'bos', 'eos')[: 3 if model.causal else 1]
  }
  task = PROBLEMS.get(getattr(program.objective.predictor, 'task', None))
  hf.save(
    str(target),
    pretrained.families(),
    config.model['name'],
    model,
    params,
    classes=build.class_names(config),
    extra=ids | {'problem_type': task},
    also=tokenizer,
  )
  logging.info('Exported to %s: transformers opens it by from_pretrained.', target)


def predict(opened: Opened, source: pathlib.Path, target: pathlib.Path) -> None:
  """Labels the texts of a jsonl file: each line again, with the prediction in it.

  The text stands in the field that the run was trained on (`text` by default), the second of a pair
  likewise. A field that the prediction brings too (`label`, say) is kept as `input_label`.

  Args:
    opened: a model whose objective is, or contains, `classify`.
    source: the lines.
    target: written whole or not at all.

  Raises:
    ValueError: no such run, an objective that predicts no labels, a line that is not as it should
      be.
  """
  if source.suffix != '.jsonl' or not source.is_file():
    raise ValueError(f'--input={source} must be one .jsonl file that exists.')
  if target.is_dir() or not target.absolute().parent.is_dir():
    raise ValueError(f'--output={target} must be a file in a folder that exists.')
  tokenizer = opened.tokenizer
  config = dataclasses.replace(
    opened.config, objective=build.predictor_section(opened.config), micro_batches=1
  )
  objective = build.create_objective(config, tokenizer)
  lines = jsonl.Source(str(source), config.data.get('text') or 'text', config.data.get('pair'))
  blocks = _blocks(
    lines, tokenizer, objective, config.seq_len, max(LEAST_BLOCK, BLOCK_BATCHES * config.batch_size)
  )
  first = next(blocks)
  program = build.build(config, tokenizer, first[0])
  predict = scores.predictions(program, load_params(program, opened.origin), ())
  answered = (
    (block, _answers(program, predict, block)) for block in itertools.chain([first], blocks)
  )
  if not hosts.primary():
    for _ in answered:  # the devices of all processes are needed for each
      pass
    return
  partial, cut = target.with_name(f'{target.name}.partial'), 0
  with (
    open(source, encoding='utf-8-sig', newline='\n') as given,
    open(partial, 'w', encoding='utf-8') as file,
  ):
    unread = filter(str.strip, given)
    for block, answers in answered:
      cut += block.rows.cut
      for answer in answers:
        file.write(
          json.dumps(
            _merged(json.loads(next(unread)), objective.describe(answer)), ensure_ascii=False
          )
          + '\n'
        )
  partial.rename(target)
  if cut:
    logging.warning(
      '%d of %d texts are longer than seq_len=%d allows; their ends were not read.',
      cut,
      len(lines),
      config.seq_len,
    )
  logging.info('%d predictions in %s.', len(lines), target)


def _merged(line: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
  return {f'input_{key}' if key in answer else key: value for key, value in line.items()} | answer


class _Block:
  """Some texts after one another in a source, tokenized: documents without labels; and as a
  sequence, their rows.
  """

  labels = None

  def __init__(
    self, texts: Sequence[Mapping[str, str]], tokenizer: Tokenizer, objective: Any, seq_len: int
  ):
    self._first = [tokenizer.encode(text['text']) for text in texts]
    self._second = (
      [tokenizer.encode(text['pair']) for text in texts] if 'pair' in texts[0] else None
    )
    self.ids, self.lengths = np.arange(len(texts)), np.array([len(ids) for ids in self._first])
    self.pair_lengths = (
      None if self._second is None else np.array([len(ids) for ids in self._second])
    )
    self.rows = objective.encode(self, seq_len)

  def text(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    return self._first[index][start:stop]

  def pair(self, index: int) -> np.ndarray:
    return self._second[index]

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self.rows.example(index, np.random.default_rng(0))


def _blocks(
  source: Source, tokenizer: Tokenizer, objective: Any, seq_len: int, size: int
) -> Iterator[_Block]:
  """The texts of a source, `size` at a time: few enough for any memory, many enough to fill rows;
  made ahead by a thread.
  """
  load = lambda first: _Block(
    [source[i] for i in range(first, min(first + size, len(source)))], tokenizer, objective, seq_len
  )
  with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='texts') as pool:
    waiting = pool.submit(load, 0)
    for start in range(size, len(source), size):
      done, waiting = waiting, pool.submit(load, start)
      yield done.result()
    yield waiting.result()


def _answers(program: Program, predict: Any, block: _Block) -> list[dict[str, np.ndarray]]:
  """What is predicted for each text of a block, in its order."""
  answers: list[Any] = [None] * len(block.ids)
  row = 0
  for batch in map(jax.device_get, map(predict, scores.batches(program, block))):
    for index in range(
      row, min(row + program.config.batch_size, len(block))
    ):  # the last batch is filled up
      for slot, number in enumerate(block.rows.texts(index)):
        answers[number] = {key: values[index - row, slot] for key, values in batch.items()}
    row += program.config.batch_size
  return answers
