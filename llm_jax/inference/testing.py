"""The test set of a run, `config.test`: scored once, at the end, by the best checkpoint."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import logging

from llm_jax.core import config as config_lib
from llm_jax.core import files, metrics, tree
from llm_jax.core.tree import PyTree
from llm_jax.inference import answers
from llm_jax.inference.prediction import Labeller
from llm_jax.inference.records import merged
from llm_jax.parallel import hosts
from llm_jax.programs import assemble, pretrained
from llm_jax.training import evaluation
from llm_jax.training.loop import Run

NUMBERS, REPORT, ANSWERS = 'test.json', 'test_report.txt', 'test_answers.jsonl'


def score(run: Run) -> None:
  """Writes the numbers of the test set to `test.json` of the workdir, and what evaluators say to
  people to `test_report.txt`, and where texts are answered, each record with its answer to
  `test_answers.jsonl`; nothing where there is no test set, the run is not over, or the same
  checkpoint was scored on the same documents before.
  """
  if not run.over or not len(run.test):
    return
  program = run.program
  loaded = pretrained.load_params(program, run.workdir)
  scored = {'step': loaded.step, 'data': config_lib.given(program.config.test)}
  if program.objective.predictor is not None:
    program.objective.predictor.calibrate(loaded.values or {})
  path = run.workdir / NUMBERS
  if hosts.agree(lambda: _holds(path, scored)):
    return
  params, report = program.kept(tree.nest(loaded.params)), run.workdir / REPORT
  values = evaluation.scores(program, params, run.data.tokenizer, run.test, report)
  lines = [] if program.objective.predictor is None else list(_answered(run, params))
  if not hosts.primary():
    return
  if lines:
    answers.write(run.workdir / ANSWERS, lines)
  with files.whole_file(path) as file:
    json.dump(scored | values, file, indent=2)
  numbers = '  '.join(f'{name} {value}' for name, value in metrics.shown(values).items())
  logging.info(
    'Test set, by the checkpoint of step %d: %s. Also in %s.', loaded.step, numbers, path
  )


def _answered(run: Run, params: PyTree) -> Iterator[dict[str, Any]]:
  """The records of the test set, what they are labelled with as `input_label`, with answers."""
  program, config = run.program, run.program.config
  source = assemble.split_source(config, 'test')
  records = [source[index] for index in range(len(source))]
  labeller = Labeller(program, run.data.tokenizer, assemble.encoder(config))
  for record, answer in zip(records, labeller(params, records), strict=True):
    yield merged(record, answer)


def _holds(path: pathlib.Path, scored: dict[str, object]) -> bool:
  """Whether the file was written for this checkpoint and these documents."""
  if not path.exists():
    return False
  found = json.loads(path.read_text())
  return all(found.get(key) == value for key, value in json.loads(json.dumps(scored)).items())
