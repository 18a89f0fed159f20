"""The records of a run: metrics.jsonl, TensorBoard events, Weights & Biases, a progress bar or
plain lines, and loss.png at the end.

`metrics.jsonl` has one JSON object per line: `step`, `split`, then numbers by name; a number that
is not finite is null. Only the primary process writes. A resumed run drops the lines after the step
that it goes on from and writes them again, so its file ends like that of a run that was never
interrupted, timings aside. For that, everything up to a step must be written before its checkpoint.
"""

import json
import logging as levels
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import logging
from tqdm import tqdm

from llm_jax.core import files, tree
from llm_jax.core.tree import PyTree

if TYPE_CHECKING:
  from matplotlib.figure import Figure

METRICS = 'metrics.jsonl'
PLOT = 'loss.png'
DAY = 86400
_STYLES: dict[str, dict[str, Any]] = {
  'train': {'color': '#9db8d9', 'linewidth': 1.2},
  'validation': {'color': '#c8553d', 'linewidth': 2, 'marker': 'o', 'markersize': 4},
}
_UNIGRAM_STYLE: dict[str, Any] = {'color': '#555555', 'linestyle': '--', 'linewidth': 1}


class Log:
  """The records of one run."""

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    primary: bool,
    steps: int,
    resume_step: int = 0,
    tensorboard: bool = True,
    wandb: str | None = None,
    config: Mapping[str, Any] | None = None,
  ):
    """Opens the records, and drops what was written after `resume_step`.

    Args:
      workdir: the run's folder.
      primary: whether this process is the one that writes; the others' calls do nothing.
      steps: length of the whole run.
      resume_step: the step that the run goes on from.
      tensorboard: whether to write TensorBoard events, to `workdir/tensorboard`.
      wandb: a Weights & Biases project.
      config: the resolved config, for Weights & Biases.

    Raises:
      ValueError: a project is named, but the package wandb is not installed.
    """
    self._workdir = pathlib.Path(workdir)
    self._primary = primary
    self._steps = steps
    self._file = self._board = self._wandb = self._bar = None
    if not primary:
      return
    path = self._workdir / METRICS
    _drop_after(path, resume_step)
    self._file = open(path, 'a')
    if tensorboard:
      self._board = _start_board(self._workdir / 'tensorboard', resume_step)
    if wandb is not None:
      self._wandb = _start_wandb(self._workdir, wandb, config)
    if sys.stderr.isatty():
      self._bar = _start_bar(steps, resume_step)

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Records numbers of one step: a line of metrics.jsonl, on disk when this returns, and a point
    in each chart.

    Args:
      step: optimizer steps taken.
      split: 'train' or 'validation'.
      values: numbers by name; strings beside them stand in metrics.jsonl alone.
    """
    if not self._primary:
      return
    strings = {name: value for name, value in values.items() if isinstance(value, str)}
    numbers = {name: float(value) for name, value in values.items() if name not in strings}
    line: dict[str, Any] = {'step': step, 'split': split} | strings
    for name, value in numbers.items():
      line[name] = value if math.isfinite(value) else None
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    if self._board is not None:
      for name, value in numbers.items():
        self._board.add_scalar(f'{split}/{name}', value, step)
    if self._wandb is not None:
      self._wandb.log({f'{split}/{name}': value for name, value in numbers.items()}, step=step)

  def progress(
    self, step: int, loss: float, tokens_per_second: float, seconds_per_step: float
  ) -> None:
    """Shows how far the run is: a line of the log, on a terminal above the bar.

    Args:
      step: optimizer steps taken.
      loss: mean since the last line.
      tokens_per_second: likewise.
      seconds_per_step: likewise.
    """
    self.say(
      'step %d/%d  loss %.4f  %s tokens/s  %s left',
      step,
      self._steps,
      loss,
      f'{tokens_per_second:,.0f}',
      duration(seconds_per_step * (self._steps - step)),
    )
    if self._bar is not None:
      self._bar.set_postfix_str(f'loss {loss:.4f}', refresh=False)
      self._bar.update(step - self._bar.n)

  def text(self, step: int, name: str, text: str) -> None:
    """Puts a text, such as a report, into TensorBoard."""
    if self._board is not None:
      lines = text.splitlines()
      self._board.add_text(name, '\n'.join(f'    {line}' for line in lines), step)  # as it stands

  def say(self, message: str, *args: Any) -> None:
    """A line of the log (with `logging`'s arguments) that does not tear the progress bar."""
    if self._primary:
      with tqdm.external_write_mode(file=sys.stderr):
        logging.info(message, *args)

  def close(self) -> None:
    """Draws loss.png and closes everything."""
    if not self._primary:
      return
    self._file.close()
    if self._bar is not None:
      self._bar.close()
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()
    plot(self._workdir)


def show() -> None:
  """Makes the log's lines visible, on standard error or under the cell of a notebook; of Orbax only
  warnings and errors.
  """
  logging.use_absl_handler()
  logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
  handler = logging.get_absl_handler()
  handler.setFormatter(levels.Formatter('%(levelname).1s %(asctime)s %(message)s', '%H:%M:%S'))
  handler.addFilter(_of_the_run)


def read(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a run's metrics.jsonl."""
  return [json.loads(line) for line in (pathlib.Path(workdir) / METRICS).read_text().splitlines()]


def plot(workdir: str | pathlib.Path) -> None:
  """Draws loss.png."""
  loss_figure(workdir).savefig(pathlib.Path(workdir) / PLOT)


def loss_figure(workdir: str | pathlib.Path) -> 'Figure':
  """Training and validation loss over steps, and the unigram loss where it was measured."""
  import matplotlib
  from matplotlib.figure import Figure

  lines = [line for line in read(workdir) if line.get('loss') is not None]
  frameless = {'axes.spines.top': False, 'axes.spines.right': False}
  with matplotlib.rc_context({'font.size': 11} | frameless):
    figure = Figure(figsize=(8, 4.5), dpi=150, layout='constrained')
    axes = figure.add_subplot()
    for split, style in _STYLES.items():
      points = [(line['step'], line['loss']) for line in lines if line['split'] == split]
      if points:
        axes.plot(*zip(*points, strict=True), label=split, **style)
    unigram = [line['unigram_loss'] for line in lines if line.get('unigram_loss') is not None]
    if unigram:
      axes.axhline(unigram[-1], label='unigram entropy', **_UNIGRAM_STYLE)
    axes.set(xlabel='step', ylabel='loss')
    axes.margins(x=0.02)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(frameon=False)
  return figure


def parameter_overview(params: PyTree) -> str:
  """A table of (abstract) parameters: path, shape, type, count, and sharding where they have one;
  the sum below.
  """
  rows: list[tuple[str, ...]] = [('parameter', 'shape', 'type', 'count', 'sharding')]
  total = 0
  for path, leaf in tree.flatten(params).items():
    count = math.prod(leaf.shape)
    shape = ' x '.join(map(str, leaf.shape)) or 'scalar'
    rows.append((path, shape, str(leaf.dtype), f'{count:,}', _spec(leaf)))
    total += count
  if not any(row[-1] for row in rows[1:]):
    rows = [row[:-1] for row in rows]
  header, *lines = aligned(rows, right='count')
  return '\n'.join([header, '-' * len(header), *lines, f'{total:,} parameters'])


def duration(seconds: float) -> str:
  """A length of time in its two largest units: '3 days 4 h', '4 h 5 min', '5 min 6 s', '6 s'."""
  seconds = round(seconds)
  days = seconds // DAY
  hours = seconds // 3600 % 24
  minutes = seconds // 60 % 60
  if days:
    return f'{days} day{"s" * (days > 1)} {hours} h'
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {seconds % 60} s' if minutes else f'{seconds} s'


def estimate(seconds_per_step: float, steps_left: int, tiny: str) -> str:
  """What the rest of a run will take, and, where that is over a day, what to run instead.

  Args:
    seconds_per_step: as measured.
    steps_left: optimizer steps to go.
    tiny: the small config of the same kind, 'configs/bert_tiny.py'.
  """
  seconds = seconds_per_step * steps_left
  message = (
    f'{steps_left:,} steps of {seconds_per_step:.3g} s will take about {duration(seconds)} on this '
    'machine.'
  )
  if seconds > DAY:
    message += (
      f' THAT IS DAYS: for a run of minutes use --config={tiny}, or set fewer --config.steps.'
    )
  return message


def _of_the_run(record: levels.LogRecord) -> bool:
  return record.levelno >= levels.WARNING or 'orbax' not in record.pathname


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Rewrites metrics.jsonl without the lines after `step`, and without a last line that was cut
  short.
  """
  if not path.exists():
    return
  *lines, cut_short = path.read_text().split('\n')  # '' where the last line is whole
  kept = [line for line in lines if json.loads(line)['step'] <= step]
  dropped = len(lines) - len(kept) + bool(cut_short)
  if dropped:
    logging.info(
      '%s: dropped %d lines of steps after %d, which will be run again.', path, dropped, step
    )
  with files.whole_file(path) as file:
    file.writelines(f'{line}\n' for line in kept)


def _start_board(folder: pathlib.Path, resume_step: int) -> Any:
  import tensorboardX  # takes seconds to import

  return tensorboardX.SummaryWriter(str(folder), purge_step=resume_step + 1)


def _start_bar(steps: int, resume_step: int) -> tqdm:
  bar = '{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed} gone, {remaining} left{postfix}]'
  return tqdm(total=steps, initial=resume_step, unit='step', dynamic_ncols=True, bar_format=bar)


def _start_wandb(workdir: pathlib.Path, project: str, config: Mapping[str, Any] | None) -> Any:
  try:
    import wandb
  except ImportError as error:
    raise ValueError(
      f'config.logging.wandb={project!r} needs the package wandb: pip install llm_jax[wandb], '
      f'or unset it.'
    ) from error
  name = workdir / 'wandb_id'
  if not name.exists():
    name.write_text(wandb.util.generate_id())
  return wandb.init(
    project=project, id=name.read_text(), resume='allow', dir=str(workdir), config=config
  )


def _spec(leaf: Any) -> str:
  """How a parameter is sharded: '-, fsdp', 'replicated', or '' where that is not known."""
  spec = getattr(getattr(leaf, 'sharding', None), 'spec', None)
  if spec is None:
    return ''
  axes = ['-' if axis is None else str(axis) for axis in spec]
  return ', '.join(axes) or 'replicated'


def aligned(rows: Sequence[Sequence[str]], right: str) -> list[str]:
  """The rows of a table as lines; the first row is the header, `right` its right-aligned column."""
  header = rows[0]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = zip(header, row, widths, strict=True)
    padded = [
      cell.rjust(width) if name == right else cell.ljust(width) for name, cell, width in cells
    ]
    lines.append('  '.join(padded))
  return lines
