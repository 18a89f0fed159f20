"""The host loop: next batch, step, log, evaluate, save, hooks.

Numbers of step n are fetched after step n + 1 is dispatched.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from llm_jax.core import metrics as metrics_lib
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Example, Hook, Objective, Tokenizer
from llm_jax.core.state import AVERAGES, TrainState
from llm_jax.data import pipeline
from llm_jax.generation import completion
from llm_jax.objectives.shared import learned
from llm_jax.parallel import hosts
from llm_jax.parallel.cpu import memory as host_memory
from llm_jax.programs import assemble, bases, pretrained, reference, summary, teachers, workdir
from llm_jax.programs.checkpoints import Checkpoints
from llm_jax.training import (
  adapted,
  corpora,
  evaluation,
  held_out,
  logs,
  memory,
  meter,
  page,
)
from llm_jax.training import program as programs
from llm_jax.training.held_out import HeldOut
from llm_jax.training.program import Training

DOCUMENTS_SHOWN = 3  # of those of which not every token is learned


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
    validation: the validation set; empty where there is none.
    test: what is scored once, at the end; likewise.
    epoch: steps of a pass over the training rows.
    state: at the step where it continues.
    position: examples consumed so far.
    patience: where early stopping stands.
    unlogged: sums of the metrics since the last line of the log.
    base: what checkpoints say of parameters that they do not hold (`programs.bases`); None where
      they hold all.
    teacher: likewise of the teacher's (`programs.teachers`); None where there is none.
  """

  program: Training
  data: corpora.Data
  workdir: pathlib.Path
  checkpoints: Checkpoints
  train: Sequence[Example]
  validation: HeldOut
  test: HeldOut
  epoch: int
  state: TrainState
  position: int
  patience: Patience
  unlogged: Mapping[str, Sequence[float]]
  base: Mapping[str, Any] | None
  teacher: Mapping[str, Any] | None = None

  @property
  def step(self) -> int:
    """Optimizer steps taken."""
    return int(self.state.step)

  @property
  def over(self) -> bool:
    """Whether there is nothing left to train."""
    return self.step >= self.program.config.steps or self.patience.over

  @property
  def eval_every(self) -> int:
    """Steps between two evaluations."""
    return self.program.config.eval_every or self.epoch

  @functools.cached_property
  def completer(self) -> completion.Completer:
    """What the model writes with; what it has compiled serves all evaluations."""
    program = self.program
    return completion.of(program, self.data.tokenizer, program.config.batch_size)


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
  if config.base_weights and config.init_from is None:  # a plan needs none
    raise ValueError(
      f'config.base_weights={config.base_weights!r} needs a base that is read: give '
      'config.init_from.'
    )
  held_out.check_slices(config)
  workdir.open_workdir(folder)
  return start(corpora.load(config, folder), folder)


def start(data: corpora.Data, folder: pathlib.Path) -> Run:
  """Builds the program and restores the newest checkpoint, or makes a first state.

  Raises:
    ValueError: a corpus too small, a checkpoint that does not fit, a parameter of an adapter that
      would not learn, or whatever in the config is not possible.
  """
  config, objective, splits = data.config, data.objective, data.splits
  rows = pipeline.training_rows(splits.train, objective, config.seq_len, config.batch_size)
  config, epoch = _with_steps(config, sum(map(len, rows)))
  train = pipeline.train_examples(rows, splits.weights, objective, config.seed)
  limit = config.evaluation.rows
  validation = held_out.lay_out(config, 'validation', splits.validation, objective, limit)
  test = held_out.lay_out(config, 'test', splits.test, objective)
  asked = None
  if objective.needs_reference:
    laid_out = [*rows, *validation.laid_out, *test.laid_out]
    cache = corpora.cache_directory(config)
    asked = reference.attach(config, objective, data.tokenizer, laid_out, cache)
  example = train[0]
  program = memory.fitting(config, lambda config: programs.build(config, objective, example))
  logging.info('Parameters:\n%s', logs.parameter_overview(program.params))
  checkpoints = Checkpoints(folder / 'checkpoints', config.checkpoint.keep)
  elsewhere = functools.partial(_frozen_elsewhere, program, data.tokenizer, example, folder)
  restored = checkpoints.restore(program.state, elsewhere)
  if shown := _learned(objective, train, data.tokenizer):
    logging.info('What is learned stands between signs:\n%s', learned.as_text(shown))
  if restored is None:
    (state, found), position, unlogged = _first_state(program), 0, {}
    state, teacher = _with_teacher(program, state, data.tokenizer, example, asked)
    patience = Patience(config.evaluation.patience)
    if teacher is not None:
      rows = hosts.rows(program.mesh, config.batch_size)
      batches = pipeline.batches(train, config.batch_size, 0, rows, put=program.put)
      with contextlib.closing(batches):
        teachers.check_teaches(program, state.network_params, next(batches))
    if program.network.adapter is not None:
      logging.info('What is trained:\n%s', adapted.report(program, state, train))
  else:
    _check_corpus(restored.meta, splits, restored.step, folder)
    if not bool(program.finite(restored.state)):
      raise ValueError(
        f'{folder}/checkpoints/{restored.step} holds numbers that are not finite; remove that '
        'folder, and the run goes on from the checkpoint before it.'
      )
    state, position, found = restored.state, restored.position, restored.meta.get('base')
    teacher = restored.meta.get('teacher')
    if asked is not None:
      teachers.check_same(config, asked, teacher)
    unlogged = restored.meta.get('unlogged', {})
    patience = Patience(config.evaluation.patience, **restored.meta['patience'])
    logging.info('Resumed from the checkpoint of step %d, at example %d.', restored.step, position)
  return Run(
    program=program,
    data=data,
    workdir=folder,
    checkpoints=checkpoints,
    train=train,
    validation=validation,
    test=test,
    epoch=epoch,
    state=state,
    position=position,
    patience=patience,
    unlogged=unlogged,
    base=found,
    teacher=teacher,
  )


def _learned(
  objective: Objective, train: Sequence[Example], tokenizer: Tokenizer
) -> list[list[learned.Piece]]:
  """A few documents, where not every token of them is learned."""
  if not objective.shows_learned:
    return []
  return learned.pieces(train[0], tokenizer)[:DOCUMENTS_SHOWN]


def _with_steps(config: Config, rows: int) -> tuple[Config, int]:
  """The config with the steps that `epochs` asks for, and the steps of one epoch."""
  epoch = -(-rows // config.batch_size)
  if config.epochs is None:
    return config, epoch
  steps = max(1, math.ceil(config.epochs * rows / config.batch_size))
  logging.info(
    '%g epochs of %d rows, %d a step: %d steps.', config.epochs, rows, config.batch_size, steps
  )
  return dataclasses.replace(config, steps=steps), epoch


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
        'This run is over: step %d of %d. Raise config.steps or config.epochs to train on.',
        run.step,
        config.steps,
      )
      return {}
    if hosts.primary():
      workdir.write_config(run.workdir, config)
      _write_summary(run)
    values = _train(run, log, hooks)
    if run.over:
      params, tokenizer = run.program.kept(run.state.answering_params), run.data.tokenizer
      shown = _learned(run.program.objective, run.train, tokenizer)
      held = run.validation.examples
      page.write(run.workdir, run.step, values, run.program, params, tokenizer, held, shown)
    _say_how_it_ended(run, log)
    return values


def _write_summary(run: Run) -> None:
  predictor = run.program.objective.predictor
  classes = (predictor.classes if predictor is not None else None) or ()
  summary.write(run.workdir, summary.of(run.data.splits.train, run.data.tokenizer, classes))


def _train(run: Run, log: logs.Log, hooks: Sequence[MakeHook]) -> dict[str, float]:
  program, config = run.program, run.program.config
  baselines = {}
  if len(run.validation):
    baselines = evaluation.baselines(program, run.data.tokenizer, run.validation.examples)
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
  train_step, gauge = (
    hosts.compiled(program.train_step),
    meter.Meter(program, log, step, run.unlogged),
  )
  values: dict[str, float] = {}
  stopping, peaks, kept = False, meter.Peaks(), _kept(program)
  peaks.over('the data')
  while step < config.steps and not run.patience.over and not stopping:
    profiler.before(step, gauge)
    kept.wait()
    with jax.profiler.StepTraceAnnotation('train', step_num=step + 1):
      run.state, metrics = train_step(run.state, next(batches))
    run.position += config.batch_size
    step += 1
    gauge.dispatched(step, metrics)
    profiler.after(step, gauge)
    stopping = preempted()
    evaluated = len(run.validation) > 0 and _due(step, run.eval_every, config.steps)
    saving = _due(step, config.checkpoint.every, config.steps) or stopping
    called = [] if stopping else [hook for hook in hooks if _due(step, hook.every, config.steps)]
    if not (evaluated or saving or called):
      continue
    peaks.over('the steps')
    kept.pause()
    gauge.flush()  # what is said about a step stands in the log before the step is saved
    if evaluated:
      values = _evaluate(run, log, step, baselines)
      peaks.over('evaluation')
      if 'loss' in values:  # the evaluators that were chosen may give none
        saving |= run.patience.better(values['loss']) or run.patience.over
    if saving:
      _check_finite(run, step)
      run.unlogged = gauge.unlogged
      measured = values if evaluated else None
      run.checkpoints.save(step, _held(run), run.position, _meta(run), measured)
      if program.layout.platform == 'cpu':
        run.checkpoints.wait()  # beside the next steps it would take as long, and memory
      peaks.over('saving')
    for hook in called:
      hook(step, run.state, gauge.values | (values if evaluated else {}))
    kept.renew()
    gauge.restart(step)
  peaks.say(log)
  return values | (baselines if values else {})


def _kept(program: Training) -> host_memory.Kept:
  """What a CPU keeps from one step to the next."""
  cpu = program.layout.platform == 'cpu'
  return host_memory.Kept(jax.local_device_count() * memory.temporaries(program) if cpu else 0)


def _due(step: int, every: int, last: int) -> bool:
  return step % every == 0 or step == last


def _evaluate(run: Run, log: logs.Log, step: int, baselines: dict[str, float]) -> dict[str, float]:
  program, report = run.program, run.workdir / 'report.txt'
  params, tokenizer = program.kept(run.state.answering_params), run.data.tokenizer
  values = evaluation.scores(
    program, params, tokenizer, run.validation, report, lambda: run.completer
  )
  shown = values | baselines
  log.write(step, 'validation', shown)
  if hosts.primary() and report.exists():
    log.text(step, 'report', report.read_text())
  said = '  '.join(f'{name} {value}' for name, value in metrics_lib.shown(shown).items())
  log.say('step %d  validation: %s', step, said)
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
    'unlogged': run.unlogged,
    'base': run.base,
    'teacher': run.teacher,
  }


def _held(run: Run) -> TrainState:
  """The state but for what its checkpoints have from elsewhere."""
  named = {path for said in (run.base, run.teacher) if said for path in said['fingerprints']}
  if not named:
    return run.state
  _, own = params_lib.split(run.state.frozen, named.__contains__)
  return run.state.replace(frozen=own)


def _frozen_elsewhere(
  program: Training,
  tokenizer: Tokenizer,
  example: Example,
  folder: pathlib.Path,
  meta: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """The frozen parameters that a checkpoint does not hold, by their paths in the state."""
  found: dict[str, jax.Array] = {}
  if meta.get('base') is not None:
    found |= pretrained.read_base(program, folder, meta['base'])
  if meta.get('teacher') is not None and teachers.in_state(program.config):
    found |= teachers.read(program, tokenizer, example, folder, meta['teacher'])
  kept = program.kept(tree.nest(found))
  return {f'frozen/{path}': leaf for path, leaf in tree.flatten(kept).items()}


def _with_teacher(
  program: Training,
  state: TrainState,
  tokenizer: Tokenizer,
  example: Example,
  asked: bases.Base | None,
) -> tuple[TrainState, dict[str, Any] | None]:
  """A new state with the teacher's parameters, and what checkpoints say of them; as it is where
  there is none, or where it was asked before.
  """
  if not teachers.in_state(program.config):
    return state, None if asked is None else asked._asdict()
  loaded, said = teachers.load(program, tokenizer, example)
  _, others = params_lib.split(state.frozen, loaded.params.__contains__)
  theirs = program.kept(tree.nest(dict(loaded.params)))
  return state.replace(frozen=params_lib.merge(others, theirs)), said._asdict()


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
  best_is = 'the newest is the best' if best is None else f'the best is {best}'
  log.say('Done. Checkpoints of steps %s; %s. %s shows the loss.', steps, best_is, picture)


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


def _first_state(program: Training) -> tuple[TrainState, dict[str, Any] | None]:
  """A new state, with the parameters of `config.init_from` if there is one, and which of those its
  checkpoints need not hold.

  Raises:
    ValueError: a folder that has no parameter in common with the model.
  """
  config = program.config
  state = program.init(config.seed)
  if config.init_from is None:
    return state, None
  folder = pathlib.Path(config.init_from)
  loaded = pretrained.load_params(program, folder)
  if not loaded.params:
    raise ValueError(f'config.init_from={folder} has no parameter in common with this model.')
  formed = program.formed.keys() if config.base_weights else ()
  unread = sorted(path for path in formed if path not in loaded.params)
  if unread:
    raise ValueError(
      f'config.base_weights={config.base_weights!r} is of a base that is read, and '
      f'config.init_from={folder} lacks {unread[0]}.'
    )
  new = [path for path in loaded.new if not path.startswith(teachers.PREFIX)]
  meter.log_found(config.init_from, len(loaded.params), new, list(loaded.unused))
  drawn = state.network_params
  if config.reinit_layers:
    loaded = pretrained.without_top(loaded, drawn, program.infos, config.reinit_layers)
  whole = tree.replace(drawn, loaded.params)
  trained = set(tree.paths(state.params))
  params, frozen = params_lib.split(whole, trained.__contains__)
  if AVERAGES in state.extras:
    where = jax.tree.map(lambda leaf: leaf.sharding, program.state.extras[AVERAGES])
    copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=where)(params)
    state = state.replace(extras=dict(state.extras) | {AVERAGES: copied})
  found = bases.describe(config.init_from, loaded, tree.flatten(frozen), program.mesh)
  return state.replace(params=params, frozen=program.kept(frozen)), found and found._asdict()
