"""What a trained run is for besides going on: its numbers on a validation set, and its answers to new texts."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging

from llm_jax import build, hosts, prepare, tree
from llm_jax import config as config_lib
from llm_jax import evaluate as scores
from llm_jax.build import Program
from llm_jax.checkpoint import restore_params
from llm_jax.config import Config
from llm_jax.contracts import Source, Tokenizer
from llm_jax.data import pipeline
from llm_jax.data.sources import jsonl


def load_params(program: Program, workdir: pathlib.Path) -> tuple[Any, int]:
  """The parameters of the run's best checkpoint, as the program wants them, and its step.

  Raises:
    ValueError: there is no checkpoint, or it lacks parameters.
  """
  loaded = restore_params(workdir / 'checkpoints', program.state.params)
  if loaded.new:
    raise ValueError(f'the checkpoint of step {loaded.step} in {workdir} lacks:\n  ' + '\n  '.join(loaded.new))
  logging.info('Parameters of step %d of %s.', loaded.step, workdir)
  return tree.replace(program.state.params, loaded.params), loaded.step


def evaluate(workdir: pathlib.Path, given: Config | None = None) -> dict[str, float]:
  """Prints, and writes to `eval.json` in the workdir, the numbers of its best checkpoint on a validation set.

  Args:
    workdir: of the run.
    given: a config whose data, evaluation and batch size go before the run's own; data.validation=0 evaluates all documents.

  Raises:
    ValueError: no such run, an unusable source, an empty corpus.
  """
  config = prepare.read_config(workdir)
  if given is not None:
    config = _with_data_of(given, config)
  tokenizer = prepare.load_tokenizer(config, workdir)
  documents = prepare.documents(config, tokenizer)
  chosen = documents.validation if config.data['validation'] else documents.train
  objective = build.create_objective(config, tokenizer)
  examples = pipeline.validation_examples(chosen, objective, config.seq_len, config.seed, config.evaluation.rows)
  program = build.build(dataclasses.replace(config, micro_batches=1), tokenizer, examples[0])
  params, step = load_params(program, workdir)
  values = scores.scores(program, params, examples, workdir / 'eval_report.txt')
  values |= scores.baselines(program, tokenizer, examples)
  if hosts.primary():
    for name, value in values.items():
      print(f'{name:>24} {value:.6g}')
    (workdir / 'eval.json').write_text(json.dumps({'step': step, 'data': config.data} | values, indent=2))
  return values


def _with_data_of(given: Config, config: Config) -> Config:
  if (given.data.get('pair') is None) != (config.data.get('pair') is None):
    raise ValueError(f'the run read config.data.pair={config.data.get("pair")!r}, and is to be evaluated on '
                     f'config.data.pair={given.data.get("pair")!r}; both need pairs, or neither.')
  chosen = dataclasses.replace(config, data=given.data, evaluation=given.evaluation, batch_size=given.batch_size)
  for line in sum(config_lib.differences(chosen, given), []):
    logging.info('as in the run, not as in --config: %s', line)
  return chosen


def predict(workdir: pathlib.Path, source: pathlib.Path, target: pathlib.Path) -> None:
  """Labels the texts of a jsonl file: each line again, with the prediction in it.

  The text stands in the field that the run was trained on (`text` by default), the second of a pair likewise. A field that the
  prediction brings too (`label`, say) is kept as `input_label`.

  Args:
    workdir: of a run whose objective is, or contains, `classify`.
    source: the lines.
    target: written whole or not at all.

  Raises:
    ValueError: no such run, an objective that predicts no labels, a line that is not as it should be.
  """
  if source.suffix != '.jsonl' or not source.is_file():
    raise ValueError(f'--input={source} must be one .jsonl file that exists.')
  if target.is_dir() or not target.absolute().parent.is_dir():
    raise ValueError(f'--output={target} must be a file in a folder that exists.')
  config = prepare.read_config(workdir)
  config = dataclasses.replace(config, objective=build.predictor_section(config), micro_batches=1)
  tokenizer = prepare.load_tokenizer(config, workdir)
  objective = build.create_objective(config, tokenizer)
  lines = jsonl.Source(str(source), config.data.get('text') or 'text', config.data.get('pair'))
  texts = _Texts(lines, tokenizer, objective, config.seq_len)
  program = build.build(config, tokenizer, texts[0])
  params, _ = load_params(program, workdir)
  predict = scores.predictions(program, params, ('cut',))
  answers = _rows(jax.device_get(predict(batch)) for batch in scores.batches(program, texts))
  if not hosts.primary():
    for _ in answers:  # the devices of all processes are needed for each
      pass
    return
  partial, cut = target.with_name(f'{target.name}.partial'), 0
  with open(source, encoding='utf-8-sig', newline='\n') as lines, open(partial, 'w', encoding='utf-8') as file:
    for line, row in zip(filter(str.strip, lines), answers, strict=False):  # the last batch is filled up
      cut += int(row.pop('cut'))
      given, answer = json.loads(line), objective.describe(row)
      kept = {f'input_{key}' if key in answer else key: value for key, value in given.items()}
      file.write(json.dumps(kept | answer, ensure_ascii=False) + '\n')
  partial.rename(target)
  if cut:
    logging.warning('%d of %d texts are longer than seq_len=%d allows; their ends were not read.', cut, len(texts),
                    config.seq_len)
  logging.info('%d predictions in %s.', len(texts), target)


class _Texts:
  """The texts of a source as rows without labels; `cut` is 1 where a text is longer than a row."""

  def __init__(self, source: Source, tokenizer: Tokenizer, objective: Any, seq_len: int):
    self._source, self._tokenizer, self._objective, self._seq_len = source, tokenizer, objective, seq_len

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    document = self._source[index]
    first = self._tokenizer.encode(document['text'])
    second = self._tokenizer.encode(document['pair']) if 'pair' in document else None
    example, cut = self._objective.encode(first, second, self._seq_len)
    return example | {'cut': np.int32(cut > 0)}


def _rows(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
  for batch in batches:
    for index in range(len(next(iter(batch.values())))):
      yield {key: values[index] for key, values in batch.items()}
