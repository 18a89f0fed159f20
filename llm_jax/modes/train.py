"""`--mode=train`: trains a run in the workdir, from the start or from where it was left."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import logging

from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.core.config import Config
  from llm_jax.training import logs, loop

NEEDS_CONFIG = True
WORKDIR = 'always'
SAVES = True


def prepare() -> None:
  """Before anything else, in a process of the program's own: how a CPU's memory is held."""
  from llm_jax.parallel.cpu import memory

  memory.set_up()


def run(command: Command) -> Callable[[], Any]:
  """Prepares the run; what is returned trains it."""
  from llm_jax.core import ownership
  from llm_jax.parallel import hosts

  hosts.agree(lambda: ownership.check(command.workdir))  # before imports that take seconds
  from llm_jax.training import loop

  config = command.parsed()
  command.use_compilation_cache(command.workdir)
  if config.folds and config.fold is None:
    first = _fold(config, command.workdir, 1)
    return lambda: _cross_validate(config, command.workdir, first)
  started = loop.prepare(config, command.workdir)
  return lambda: _train(started)


def _train(run: 'loop.Run') -> dict[str, float]:
  from llm_jax.inference import testing
  from llm_jax.training import loop

  values = loop.train(run, [samples, *configured(run)])
  testing.score(run)
  return values


def _cross_validate(
  config: 'Config', workdir: pathlib.Path, run: 'loop.Run'
) -> dict[str, dict[str, float]]:
  """Trains the runs of all folds, one after the other; a call that is interrupted is gone on with
  by the same call.

  Args:
    config: has `folds`.
    workdir: holds the workdirs of the runs, and the report.
    run: of the first fold, prepared.

  Returns:
    The numbers of each fold.
  """
  from llm_jax.training import folds, logs

  numbers = {}
  for fold in range(1, config.folds + 1):
    run = run if fold == 1 else _fold(config, workdir, fold)
    _train(run)
    if not run.over:  # stopped by a signal
      return numbers
    numbers[folds.folder(workdir, fold).name] = folds.best(logs.read(run.workdir))
  folds.report(workdir, list(numbers.values()))
  return numbers


def _fold(config: 'Config', workdir: pathlib.Path, fold: int) -> 'loop.Run':
  from llm_jax.training import folds, loop

  logging.info('Fold %d of %d.', fold, config.folds)
  return loop.prepare(dataclasses.replace(config, fold=fold), folds.folder(workdir, fold))


def samples(run: 'loop.Run', log: 'logs.Log') -> Any:
  """The hook that shows what a decoder writes."""
  from llm_jax.inference.samples import Samples

  return Samples.of(run, log)


def configured(run: 'loop.Run') -> list[Callable[..., Any]]:
  """Makers of the hooks that the config names."""
  from llm_jax.programs import assemble

  config = run.program.config

  def maker(name: str) -> Callable[..., Any]:
    return lambda run, log: assemble.create_hook(config, name, run=run, log=log)

  return [maker(name) for name in config.hooks]
