"""The host loop: next batch, step, log, evaluate, save, hooks.

Numbers of step n are fetched after step n + 1 is dispatched.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Example, Hook
from llm_jax.core.state import TrainState
from llm_jax.data import pipeline
from llm_jax.parallel import hosts
from llm_jax.programs import assemble, pretrained, workdir
from llm_jax.programs.checkpoints import Checkpoints
from llm_jax.training import corpora, evaluation, logs, memory, meter, page, slices
from llm_jax.training import program as programs
from llm_jax.training.program import Training


@dataclasses.dataclass
class Patience:
  """Early stopping: the best validation loss, and for how many evaluations it has not been beaten.

  Attributes:
    limit: evaluations without a better loss after which to stop; 0 for never.
  """

  limit: int
  best: float = math.inf
  waited: int = 0

  def better(self, value: float) -> bool:
    """Takes note of a validation loss; returns whether it is the best so far."""
    better = value < self.best
    self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
    return better

  @property
  def over(self) -> bool:
    """Whether to stop."""
    return 0 < self.limit <= self.waited


@dataclasses.dataclass
class Run:
  """A run that is ready to go on.

  Attributes:
    program: what it trains.
    data: what it reads.
    workdir: its folder.
    checkpoints: what it has saved.
    train: the endless training stream.
    validation: the validation set.
    slices: groups of its texts, as `slices.read` gives them.
    state: at the step where it continues.
    position: examples consumed so far.
    patience: where early stopping stands.
  """

  program: Training
  data: corpora.Data
  workdir: pathlib.Path
  checkpoints: Checkpoints
  train: Sequence[Example]
  validation: Sequence[Example]
  slices: Mapping[str, Sequence[Sequence[str]]]
  state: TrainState
  position: int
  patience: Patience

  @property
  def step(self) -> int:
    """Optimizer steps taken."""
    return int(self.state.step)

  @property
  def over(self) -> bool:
    """Whether there is nothing left to train."""
    return self.step >= self.program.config.steps or self.patience.over


MakeHook = Callable[[Run, logs.Log], Hook | None]


def prepare(config: Config, folder: pathlib.Path) -> Run:
  """A run that is ready to go on, from the config as it is read: what it starts from is filled in,
  all is checked, the workdir is opened, the data tokenized, the program built, a checkpoint
  restored.

  Args:
    config: as it is read from a file.
    folder: the workdir, made where it is not there.

  Raises:
    ValueError, TypeError: whatever in the config, the data or the workdir is not possible.
  """
  config = pretrained.fill_in(config, folder)
  config = assemble.with_compute_type(config, jax.default_backend())
  programs.check(config)
  slices.check(config)
  workdir.open_workdir(folder)
  return start(corpora.load(config, folder), folder)


def start(data: corpora.Data, folder: pathlib.Path) -> Run:
  """Builds the program and restores the newest checkpoint, or makes a first state.

  Raises:
    ValueError: a corpus too small, a checkpoint that does not fit, or whatever in the config is
      not possible.
  """
  config, objective, splits = data.config, data.objective, data.splits
  train = pipeline.train_examples(
    splits.train, splits.weights, objective, config.seq_len, config.seed, config.batch_size
  )
  rows = pipeline.validation_rows(splits.validation, objective, config.seq_len)
  validation = pipeline.validation_examples(rows, objective, config.seed, config.evaluation.rows)
  groups = slices.read(config, splits.validation, rows)
  example = train[0]
  program = memory.fitting(config, lambda config: programs.build(config, objective, example))
  logging.info('Parameters:\n%s', logs.parameter_overview(program.params))
  checkpoints = Checkpoints(folder / 'checkpoints', config.checkpoint.keep)
  restored = checkpoints.restore(program.state)
  if restored is None:
    state, position = _first_state(program), 0
    patience = Patience(config.evaluation.patience)
  else:
    _check_corpus(restored.meta, splits, restored.step, folder)
    if not bool(program.finite(restored.state)):
      raise ValueError(
        f'{folder}/checkpoints/{restored.step} holds numbers that are not finite; remove that '
        'folder, and the run goes on from the checkpoint before it.'
      )
    state, position = restored.state, restored.position
    patience = Patience(config.evaluation.patience, **restored.meta['patience'])
    logging.info('Resumed from the checkpoint of step %d, at example %d.', restored.step, position)
  return Run(
    program, data, folder, checkpoints, train, validation, groups, state, position, patience
  )


def train(run: Run, hooks: Sequence[MakeHook] = ()) -> dict[str, float]:
  """Trains to the last step of the config, until no evaluation gets better, or until SIGTERM or
  Ctrl-C.

  Args:
    run: of `start`; it is changed.
    hooks: functions that make a hook of the run and its log, or None.

  Returns:
    The numbers of the last evaluation; empty where there was none.
  """
  config = run.program.config
  log = logs.Log(
    run.workdir,
    primary=hosts.primary(),
    steps=config.steps,
    resume_step=run.step,
    tensorboard=config.logging.tensorboard,
    wandb=config.logging.wandb,
    config=dataclasses.asdict(config),
  )
  with contextlib.ExitStack() as stack:
    stack.callback(workdir.leave, run.workdir)
    stack.enter_context(contextlib.closing(log))
    stack.enter_context(contextlib.closing(run.checkpoints))
    if run.over:
      log.say(
        'This run is over: it is at step %d, and config.steps=%d. Raise config.steps to train on.',
        run.step,
        config.steps,
      )
      return {}
    if hosts.primary():
      workdir.write_config(run.workdir, config)
    values = _train(run, log, hooks)
    if run.over:
      params, tokenizer = run.state.network_params, run.data.tokenizer
      page.write(run.workdir, run.step, values, run.program, params, tokenizer, run.validation)
    _say_how_it_ended(run, log)
    return values


def _train(run: Run, log: logs.Log, hooks: Sequence[MakeHook]) -> dict[str, float]:
  program, config = run.program, run.program.config
  baselines = evaluation.baselines(program, run.data.tokenizer, run.validation)
  meter.announce(program, log, run.step)
  rows = hosts.rows(program.mesh, config.batch_size)
  batches = pipeline.batches(run.train, config.batch_size, run.position, rows, put=program.put)
  made = [hook for hook in (make(run, log) for make in hooks) if hook is not None]
  profiler = meter.Profiler(config, run.workdir, log, run.step)
  with (
    contextlib.closing(batches),
    hosts.preemption() as preempted,
    contextlib.closing(profiler),
  ):
    return _loop(run, log, batches, baselines, preempted, profiler, made)


def _loop(
  run: Run,
  log: logs.Log,
  batches: Iterator[dict[str, jax.Array]],
  baselines: dict[str, float],
  preempted: Callable[[], bool],
  profiler: meter.Profiler,
  hooks: Sequence[Hook],
) -> dict[str, float]:
  program, config, step = run.program, run.program.config, run.step
  train_step, gauge = hosts.compiled(program.train_step), meter.Meter(program, log, step)
  values: dict[str, float] = {}
  stopping = False
  while step < config.steps and not run.patience.over and not stopping:
    profiler.before(step, gauge)
    with jax.profiler.StepTraceAnnotation('train', step_num=step + 1):
      run.state, metrics = train_step(run.state, next(batches))
    run.position += config.batch_size
    step += 1
    gauge.dispatched(step, metrics)
    profiler.after(step, gauge)
    stopping = preempted()
    evaluated = _due(step, config.eval_every, config.steps)
    saving = _due(step, config.checkpoint.every, config.steps) or stopping
    called = [] if stopping else [hook for hook in hooks if _due(step, hook.every, config.steps)]
    if not (evaluated or saving or called):
      continue
    gauge.flush()  # what is said about a step stands in the log before the step is saved
    if evaluated:
      values = _evaluate(run, log, step, baselines)
      if 'loss' in values:  # the evaluators that were chosen may give none
        saving |= run.patience.better(values['loss']) or run.patience.over
    if saving:
      _check_finite(run, step)
      run.checkpoints.save(step, run.state, run.position, _meta(run), values if evaluated else None)
    for hook in called:
      hook(step, run.state, gauge.values | (values if evaluated else {}))
    gauge.restart(step)
  return values | (baselines if values else {})


def _due(step: int, every: int, last: int) -> bool:
  return step % every == 0 or step == last


def _evaluate(run: Run, log: logs.Log, step: int, baselines: dict[str, float]) -> dict[str, float]:
  program, report = run.program, run.workdir / 'report.txt'
  params, tokenizer = run.state.network_params, run.data.tokenizer
  values = evaluation.scores(program, params, tokenizer, run.validation, report, run.slices)
  shown = values | baselines
  log.write(step, 'validation', shown)
  log.say(
    'step %d  validation: %s', step, '  '.join(f'{name} {x:.4f}' for name, x in shown.items())
  )
  return values


def _check_finite(run: Run, step: int) -> None:
  """Raises FloatingPointError rather than save a state that nothing can go on from."""
  if bool(run.program.finite(run.state)):
    return
  saved = run.checkpoints.steps()
  newest = f'that of step {saved[-1]} is the newest' if saved else 'there is none yet'
  raise FloatingPointError(
    f'after step {step} the parameters, or what the optimizer keeps, are no longer finite, so no '
    f'checkpoint is saved: {newest}. A lower config.optimizer.learning_rate, more warmup or '
    'config.optimizer.clip_norm is the usual way out.'
  )


def _meta(run: Run) -> dict[str, Any]:
  """What a checkpoint keeps beside the state."""
  return {
    'config': dataclasses.asdict(run.program.config),
    'corpus': run.data.splits.fingerprint,
    'tokenizer': workdir.pack_tokenizer(run.workdir),
    'patience': {'best': run.patience.best, 'waited': run.patience.waited},
  }


def _say_how_it_ended(run: Run, log: logs.Log) -> None:
  if not run.over:
    run.checkpoints.wait()
    log.say(
      'Stopped by a signal after step %d, which is saved; the same command continues from there.',
      run.step,
    )
    return
  if run.patience.over:
    log.say(
      'Stopped early: no better validation loss than %.4f for %d evaluations.',
      run.patience.best,
      run.patience.waited,
    )
  run.checkpoints.wait()
  steps = ', '.join(map(str, run.checkpoints.steps()))
  best = run.checkpoints.best_step()
  picture = run.workdir / logs.PLOT
  log.say('Done. Checkpoints of steps %s; the best is %s. %s shows the loss.', steps, best, picture)


def _check_corpus(
  meta: dict[str, Any], splits: corpora.Splits, step: int, folder: pathlib.Path
) -> None:
  """Raises ValueError where the documents are not those of the checkpoint."""
  if meta['corpus'] != splits.fingerprint:
    raise ValueError(
      f'the documents of config.data have changed since the checkpoint of step {step} was saved, '
      'so the run cannot continue with the very next example; bring them back, or start in another '
      f'--workdir with --config.init_from={folder}.'
    )


def _first_state(program: Training) -> TrainState:
  """A new state, with the parameters of `config.init_from` if there is one.

  Raises:
    ValueError: a folder that has no parameter in common with the model.
  """
  config = program.config
  state = program.init(config.seed)
  if config.init_from is None:
    return state
  folder = pathlib.Path(config.init_from)
  loaded = pretrained.load_params(config, folder, program.params, program.infos)
  if not loaded.params:
    raise ValueError(f'config.init_from={folder} has no parameter in common with this model.')
  meter.log_found(config.init_from, len(loaded.params), list(loaded.new), list(loaded.unused))
  whole = tree.replace(state.network_params, loaded.params)
  trained = set(tree.paths(state.params))
  params, frozen = params_lib.split(whole, trained.__contains__)
  return state.replace(params=params, frozen=frozen)
