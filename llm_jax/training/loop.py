"""The host loop: next batch, step, log, evaluate, save. Numbers of step n are fetched after step n
+ 1 is dispatched.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from llm_jax.core import metrics, tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Pairs
from llm_jax.core.state import TrainState
from llm_jax.data import pipeline
from llm_jax.inference import complete
from llm_jax.parallel import chips, hosts
from llm_jax.programs import build, pretrained
from llm_jax.programs import workdir as runs
from llm_jax.programs.build import Program
from llm_jax.programs.checkpoints import Checkpoints
from llm_jax.training import corpora as prepare
from llm_jax.training import evaluation as evaluate
from llm_jax.training import logs, memory

SAMPLES = 'samples.txt'
PROFILE = 'profile'
STEPS_TO_ESTIMATE = 3  # after the first, which compiles
TINY = {
  'encoder': 'configs/bert_tiny.py',
  'decoder': 'configs/gpt_tiny.py',
}  # what to try where a run would take days


@dataclasses.dataclass
class Run:
  """A run that is ready to go on.

  Attributes:
    state: at the step where it goes on.
    position: examples consumed so far.
    patience: where early stopping stands.
  """

  program: Program
  data: prepare.Data
  workdir: pathlib.Path
  checkpoints: Checkpoints
  train: Any
  validation: Any
  state: TrainState
  position: int
  patience: 'Patience'


@dataclasses.dataclass
class Patience:
  """Early stopping: the best validation loss so far, and for how many evaluations it has not been
  beaten.

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


def start(data: prepare.Data, workdir: pathlib.Path) -> Run:
  """Builds the program and restores the newest checkpoint, or makes a first state.

  Raises:
    ValueError: what the config asks for cannot be, a corpus too small, a checkpoint that does not
      fit.
  """
  config = data.config
  objective, splits = build.create_objective(config, data.tokenizer), data.splits
  train = pipeline.train_examples(
    splits.train, splits.weights, objective, config.seq_len, config.seed, config.batch_size
  )
  validation = pipeline.validation_examples(
    splits.validation, objective, config.seq_len, config.seed, config.evaluation.rows
  )
  example = train[0]
  program = memory.fitting(config, lambda config: build.build(config, data.tokenizer, example))
  logging.info('Parameters:\n%s', logs.parameter_overview(program.state.params))
  checkpoints = Checkpoints(workdir / 'checkpoints', config.checkpoint.keep)
  restored = checkpoints.restore(program.state)
  patience = Patience(config.evaluation.patience)
  if restored is None:
    state, position = _first_state(program), 0
  else:
    state, position = restored.state, restored.position
    if restored.meta['corpus'] != splits.fingerprint:
      raise ValueError(
        f'the documents of config.data have changed since the checkpoint of step {restored.step} '
        'was saved, so '
        'the run cannot go on with the very next example; bring them back, or start in another '
        '--workdir with '
        f'--config.init_from={workdir}.'
      )
    patience = Patience(config.evaluation.patience, **restored.meta['patience'])
    logging.info('Resumed from the checkpoint of step %d, at example %d.', restored.step, position)
  return Run(program, data, workdir, checkpoints, train, validation, state, position, patience)


def train(run: Run) -> None:
  """Trains to the last step of the config, until no evaluation gets better, or until SIGTERM."""
  program, config = run.program, run.program.config
  step = int(run.state.step)
  log = logs.Log(
    run.workdir,
    primary=hosts.primary(),
    steps=config.steps,
    resume_step=step,
    tensorboard=config.logging.tensorboard,
    wandb=config.logging.wandb,
    config=dataclasses.asdict(config),
  )
  with contextlib.closing(log), contextlib.closing(run.checkpoints):
    if step >= config.steps or run.patience.over:
      log.say(
        'This run is over: it is at step %d, and config.steps=%d. Raise config.steps to train on.',
        step,
        config.steps,
      )
      return
    if hosts.primary():
      runs.write_config(run.workdir, config)
    baselines = evaluate.baselines(program, run.data.tokenizer, run.validation)
    _announce(run, log)
    batches = pipeline.batches(
      run.train,
      config.batch_size,
      run.position,
      hosts.rows(program.mesh, config.batch_size),
      put=program.put,
    )
    with (
      contextlib.closing(batches),
      hosts.preemption() as preempted,
      contextlib.closing(Profiler(run, log, step)) as profiler,
    ):
      _loop(run, log, batches, step, baselines, preempted, profiler)
    if int(run.state.step) < config.steps and not run.patience.over:
      log.say(
        'Stopped by SIGTERM after step %d, which is saved; the same command goes on from there.',
        int(run.state.step),
      )
    if run.patience.over:
      log.say(
        'Stopped early: no better validation loss than %.4f for %d evaluations.',
        run.patience.best,
        run.patience.waited,
      )
    run.checkpoints.wait()
    steps = ', '.join(map(str, run.checkpoints.steps()))
    log.say(
      'Done. Checkpoints of steps %s; the best is %s. %s shows the loss.',
      steps,
      run.checkpoints.best_step(),
      run.workdir / logs.PLOT,
    )


def _loop(
  run: Run,
  log: logs.Log,
  batches: Iterator[dict[str, jax.Array]],
  step: int,
  baselines: dict[str, float],
  preempted: Callable[[], bool],
  profiler: 'Profiler',
) -> None:
  program, config = run.program, run.program.config
  train_step, meter = hosts.compiled(program.train_step), Meter(program, log, step)
  stopping, samples = False, _samples(run)
  while step < config.steps and not run.patience.over and not stopping:
    profiler.before(step, meter)
    with jax.profiler.StepTraceAnnotation('train', step_num=step + 1):
      run.state, pairs = train_step(run.state, next(batches))
    run.position += config.batch_size
    step += 1
    meter.dispatched(step, pairs)
    profiler.after(step, meter)
    evaluated = step % config.eval_every == 0 or step == config.steps
    stopping = preempted()
    saving = step % config.checkpoint.every == 0 or step == config.steps or stopping
    if evaluated or saving:
      meter.flush()  # what is said about a step stands in the log before the step is saved
    values = None
    if evaluated:
      values = evaluate.scores(
        program, run.state.params, run.validation, run.workdir / 'report.txt'
      )
      log.write(step, 'validation', values | baselines)
      log.say(
        'step %d  validation: %s',
        step,
        '  '.join(f'{k} {v:.4f}' for k, v in (values | baselines).items()),
      )
      saving |= run.patience.better(values['loss']) or run.patience.over
    if saving:
      meta = {
        'config': dataclasses.asdict(config),
        'corpus': run.data.splits.fingerprint,
        'tokenizer': runs.pack_tokenizer(run.workdir),
        'patience': {'best': run.patience.best, 'waited': run.patience.waited},
      }
      run.checkpoints.save(step, run.state, run.position, meta, values)
    if evaluated and samples and not stopping:
      _show(run, log, step, samples(run.state.params))
    if evaluated or saving:
      meter.restart(step)


def _samples(run: Run) -> complete.Samples | None:
  """What shows samples at evaluations: nothing but for language models that go on from a prompt."""
  count = run.program.config.evaluation.samples
  if not count or not run.program.network.model.causal or 'clm' not in run.program.objective.terms:
    return None
  return complete.Samples(run.program, run.data.tokenizer, run.data.splits.validation, count)


def _show(run: Run, log: logs.Log, step: int, samples: list[tuple[str, str]]) -> None:
  """Samples in the log and, after those of earlier evaluations, in a file of the workdir."""
  lines = [f'{beginning!r} -> {text!r}' for beginning, text in samples]
  for line in lines:
    log.say('step %d  sample: %s', step, line)
  if hosts.primary():
    with open(run.workdir / SAMPLES, 'a', encoding='utf-8') as file:
      file.write(f'step {step}\n' + ''.join(f'  {line}\n' for line in lines))


class Meter:
  """Logs the numbers of a step once the next one is on its way, and the speed since it last did."""

  def __init__(self, program: Program, log: logs.Log, step: int):
    """Starts counting at `step`; the first step, which compiles, is not part of any speed."""
    self._program, self._log, self._first = program, log, step + 1
    self._waiting: tuple[int, Pairs] | None = None
    self._estimated = False
    peaks = [chips.peak_flops(device.device_kind) for device in program.mesh.devices.flat]
    self._peak = sum(peaks) if all(peaks) else None
    self.restart(step)

  def restart(self, step: int) -> None:
    """Leaves out of the speed whatever happened since the last step."""
    self._since, self._clock, self._tokens = step, time.perf_counter(), 0.0

  def dispatched(self, step: int, pairs: Pairs) -> None:
    """Takes the numbers of the step just dispatched, and logs those of the one before."""
    self.flush()
    self._waiting = step, pairs

  def flush(self) -> None:
    """Waits for the last step, and logs it where it is time to."""
    if self._waiting is None:
      return
    (step, pairs), self._waiting = self._waiting, None
    values = metrics.divide(jax.device_get(pairs))
    if not math.isfinite(values['loss']):
      raise FloatingPointError(
        f'the loss of step {step} is {values["loss"]}: training cannot go on. The last checkpoint '
        'is as '
        'it was; a lower config.optimizer.learning_rate or more warmup is the usual way out.'
      )
    self._tokens += values.pop('tokens')
    if step == self._first:
      self.restart(step)
    config = self._program.config
    due = step % config.log_every == 0 or step == config.steps
    if due or (not self._estimated and step - self._since >= STEPS_TO_ESTIMATE):
      self._report(step, values, due)

  def _report(self, step: int, values: dict[str, float], due: bool) -> None:
    config, steps = self._program.config, step - self._since
    seconds = time.perf_counter() - self._clock
    speed = {}
    if steps:
      speed = {'tokens_per_second': self._tokens / seconds, 'seconds_per_step': seconds / steps}
      if self._peak:
        speed['model_flops_utilization'] = self._program.flops * steps / seconds / self._peak
      if not self._estimated:
        self._estimated = True
        self._log.say('%s', _estimate(config, seconds / steps, step))
    if due:
      self._log.write(step, 'train', values | speed)
      if steps:
        self._log.progress(
          step, values['loss'], speed['tokens_per_second'], speed['seconds_per_step']
        )
      self.restart(step)


class Profiler:
  """Traces the steps that config.profile asks for, whole, into `workdir/profile`: process 0 does,
  whose devices stand for all.
  """

  def __init__(self, run: Run, log: logs.Log, step: int):
    """Says if the steps that are wanted are none of those that come after `step`."""
    config = run.program.config
    self._folder, self._log, self._active = run.workdir / PROFILE, log, False
    self._start, self._stop = config.profile.start, config.profile.start + config.profile.steps
    if config.profile.steps and not step <= self._start < config.steps:
      log.say(
        'Nothing is profiled: config.profile.start=%d is not one of the steps from %d to %d that '
        'this run takes.',
        self._start,
        step,
        config.steps - 1,
      )

  def before(self, step: int, meter: Meter) -> None:
    """Begins if the next step is the first that is wanted; `step` of them have been dispatched."""
    if step == self._start < self._stop and hosts.primary():
      meter.flush()
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # calls of Python are many, and slow down what is measured
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
      self._active = True

  def after(self, step: int, meter: Meter) -> None:
    """Ends if that was the last step that is wanted."""
    if self._active and step == self._stop:
      meter.flush()
      self.close()
      meter.restart(step)

  def close(self) -> None:
    """Writes what was traced, if that has not been done."""
    if self._active:
      self._active = False
      jax.profiler.stop_trace()
      self._log.say(
        'Profile written to %s; XProf (xprof --logdir=...) and ui.perfetto.dev open it.',
        self._folder,
      )


def _first_state(program: Program) -> TrainState:
  config = program.config
  state = program.init(config.seed)
  if config.init_from is None:
    return state
  loaded = pretrained.load_params(program, pathlib.Path(config.init_from))
  if not loaded.params:
    raise ValueError(
      f'config.init_from={config.init_from} has no parameter in common with this model.'
    )
  logging.info(
    'From %s: took %d parameters.\nNew, from scratch:\n%s\nNot used:\n%s',
    config.init_from,
    len(loaded.params),
    _listed(loaded.new),
    _listed(loaded.unused),
  )
  return state.replace(params=tree.replace(state.params, loaded.params))


def _announce(run: Run, log: logs.Log) -> None:
  """Says what is about to run, and before the first step how long it must take at the least."""
  program, config = run.program, run.program.config
  devices = list(program.mesh.devices.flat)
  log.say(
    'Training on %d %s: %d steps of %d x %d tokens, %.3g model TFLOP a step.',
    len(devices),
    devices[0].device_kind,
    config.steps,
    config.batch_size,
    config.seq_len,
    program.flops / 1e12,
  )
  together = 1 if devices[0].platform == 'cpu' else len(devices)  # CPU devices share the cores
  seconds = program.flops / (chips.peak_flops(devices[0].device_kind) or _matmul_rate()) / together
  log.say(
    'At least, with nothing but matrix products at full speed: %s',
    _estimate(config, seconds, int(run.state.step)),
  )


def _estimate(config: Config, seconds_per_step: float, step: int) -> str:
  return logs.estimate(
    seconds_per_step, config.steps - step, TINY.get(config.model['name'], 'one of the tiny configs')
  )


def _matmul_rate(size: int = 1024, repeats: int = 5) -> float:
  """FLOP/s of a float32 matrix product on one device, as it is measured now."""
  x = jax.numpy.ones((size, size))
  product = jax.jit(jax.numpy.matmul)
  product(x, x).block_until_ready()
  began = time.perf_counter()
  for _ in range(repeats):
    product(x, x).block_until_ready()
  return repeats * 2 * size**3 / (time.perf_counter() - began)


def _listed(paths: list[str]) -> str:
  return '\n'.join(f'  {path}' for path in paths) or '  none'
