"""What is said of the steps of a run while it trains: their numbers, their speed, a profile."""

import math
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
from absl import logging

from llm_jax.core import metrics as metrics_lib
from llm_jax.core.config import Config
from llm_jax.core.contracts import Metrics
from llm_jax.parallel import chips, hosts
from llm_jax.parallel.cpu import memory as host_memory
from llm_jax.training import adversarial, logs
from llm_jax.training.program import Training

PROFILE = 'profile'
OF_A_STEP = {'gradient_norm', 'learning_rate', 'tokens'}  # what no line gives as a mean
MOMENT = 5  # seconds
STEPS_TO_ESTIMATE = 3  # after the first, which compiles
# What to try where a run would take days, by whether the model is causal.
TINY = {False: 'configs/bert_tiny.py', True: 'configs/gpt_tiny.py'}


class Meter:
  """Logs the numbers of a step once the next one is on its way, and the speed since it last did.

  Attributes:
    values: the numbers of the last step that was waited for.
    unlogged: (sum, weight) of each metric over the steps since the last line.
  """

  def __init__(
    self, program: Training, log: logs.Log, step: int, unlogged: Mapping[str, Sequence[float]]
  ):
    """Starts counting at `step`; the first step, which compiles, is not part of any speed.

    Args:
      program: what is run.
      log: of the run.
      step: that it goes on from.
      unlogged: as it was at that step.
    """
    self.values: dict[str, float] = {}
    self.unlogged = {name: tuple(pair) for name, pair in unlogged.items()}
    self._program, self._log, self._first = program, log, step + 1
    self._waiting: tuple[int, Metrics, float | None] | None = None
    self._estimated = False
    self._peak = _peak_flops(program)
    self.restart(step)

  def restart(self, step: int) -> None:
    """Leaves out of the speed whatever happened since the last step."""
    self._begin(step, time.perf_counter())

  def _begin(self, step: int, at: float) -> None:
    self._since, self._clock, self._tokens = step, at, 0.0

  def dispatched(self, step: int, metrics: Metrics) -> None:
    """Takes the numbers of the step just dispatched, and logs those of the one before."""
    over = time.perf_counter() if metrics['loss'][0].is_ready() else None  # as on a CPU
    self.flush()
    self._waiting = step, metrics, over

  def flush(self) -> None:
    """Waits for the last step, and logs it where it is time to.

    Raises:
      FloatingPointError: its loss is not finite.
    """
    if self._waiting is None:
      return
    (step, metrics, over), self._waiting = self._waiting, None
    fetched = jax.device_get(metrics)
    at = time.perf_counter() if over is None else over  # when the step was over
    self.values = values = metrics_lib.divide(fetched)
    if not math.isfinite(values['loss']):
      raise FloatingPointError(
        f'the loss of step {step} is {values["loss"]}: training cannot continue. The last '
        'checkpoint is as it was; a lower config.optimizer.learning_rate or more warmup is the '
        'usual way out.'
      )
    self._tokens += values.pop('tokens')
    self._add(fetched)
    if step == self._first:
      self._begin(step, at)
    config = self._program.config
    due = step % config.log_every == 0 or step == config.steps
    if due or (not self._estimated and step - self._since >= STEPS_TO_ESTIMATE):
      self._report(step, at, values, due)

  def _report(self, step: int, at: float, values: dict[str, float], due: bool) -> None:
    steps = step - self._since
    speed = self._speed(steps, at) if steps else {}
    if steps and not self._estimated:
      self._estimated = True
      _say_estimate(self._program, self._log, '%s', speed['seconds_per_step'], step)
    if not due:
      return
    means = metrics_lib.divide(self.unlogged)
    self.unlogged = {}
    self._log.write(step, 'train', values | means | speed)
    if steps:
      rate = speed['tokens_per_second']
      self._log.progress(step, means['loss'], rate, speed['seconds_per_step'])
    self._begin(step, at)

  def _add(self, metrics: Metrics) -> None:
    for name in metrics.keys() - OF_A_STEP:
      value, weight = self.unlogged.get(name, (0.0, 0.0))
      self.unlogged[name] = value + float(metrics[name][0]), weight + float(metrics[name][1])

  def _speed(self, steps: int, at: float) -> dict[str, float]:
    seconds = at - self._clock
    speed = {'tokens_per_second': self._tokens / seconds, 'seconds_per_step': seconds / steps}
    if self._peak and self._program.flops:
      speed['model_flops_utilization'] = self._program.flops * steps / seconds / self._peak
    return speed


class Peaks:
  """The most memory that this process has held when each phase of a run was first over."""

  def __init__(self) -> None:
    self._peaks: dict[str, int] = {}

  def over(self, phase: str) -> None:
    """Takes note of it; nothing where the system does not say."""
    held = host_memory.held('VmHWM')
    if held is not None:
      self._peaks.setdefault(phase, held)

  def say(self, log: logs.Log) -> None:
    """One line with all of them."""
    self.over('the end')
    if self._peaks:
      phases = ', '.join(f'{held / 2**30:.2f} by {name}' for name, held in self._peaks.items())
      log.say('The most memory that this process has held, GiB: %s.', phases)


class Profiler:
  """Traces the steps that config.profile asks for, whole, into `workdir/profile`.

  Process 0 does; its devices stand for all.
  """

  def __init__(self, config: Config, workdir: pathlib.Path, log: logs.Log, step: int):
    """Says if the steps that are wanted are none of those that come after `step`."""
    self._folder, self._log, self._active = workdir / PROFILE, log, False
    self._start = config.profile.start
    self._stop = config.profile.start + config.profile.steps
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


def announce(program: Training, log: logs.Log, step: int) -> None:
  """Says what is about to run, and before the first step how long it must take at the least."""
  config, devices = program.config, list(program.mesh.devices.flat)
  kind = devices[0].device_kind
  log.say(
    'Training on %d %s: %d steps of %d x %d tokens, %.3g model TFLOP per step.',
    len(devices),
    kind,
    config.steps,
    config.batch_size,
    config.seq_len,
    program.flops / 1e12,
  )
  if program.adversarial is not None:
    log.say('%s', adversarial.describe(program.adversarial))
  together = 1 if devices[0].platform == 'cpu' else len(devices)  # CPU devices share the cores
  seconds = program.flops / (chips.peak_flops(kind) or _matmul_rate()) / together
  message = 'At least, with nothing but matrix products at full speed: %s'
  _say_estimate(program, log, message, seconds, step)


def _say_estimate(
  program: Training, log: logs.Log, message: str, seconds_per_step: float, step: int
) -> None:
  """Says how long the rest of a run takes at this speed, unless it is over in a moment."""
  left = program.config.steps - step
  if left * seconds_per_step > MOMENT:
    log.say(message, logs.estimate(seconds_per_step, left, TINY[program.network.model.causal]))


def log_found(origin: str | None, loaded: int, new: list[str], unused: list[str]) -> None:
  """What a run that starts from other weights took, lacks and leaves."""
  logging.info(
    'From %s: took %d parameters.\nNew, from scratch:\n%s\nNot used:\n%s',
    origin,
    loaded,
    _listed(new),
    _listed(unused),
  )


def _peak_flops(program: Training) -> float | None:
  """Peak FLOP/s of all devices together; None where one is not known."""
  peaks = [chips.peak_flops(device.device_kind) for device in program.mesh.devices.flat]
  known = [peak for peak in peaks if peak]
  return sum(known) if len(known) == len(peaks) else None


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
