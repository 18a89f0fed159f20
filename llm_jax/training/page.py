"""report.html: one page about a run that has ended, with everything in it, for any browser.

The curves, the numbers, and for classifiers and regressors the confusion matrix, the answers that
are furthest from their labels, and report.txt; for decoders the last samples. Pictures are in the
page itself, and what comes from the data is escaped.
"""

import base64
import html
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from llm_jax.core import files, metrics
from llm_jax.core.contracts import Example, Predictor, Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.evaluators import classification
from llm_jax.objectives.shared.learned import Piece, as_html
from llm_jax.parallel import hosts
from llm_jax.programs.inference import Inference
from llm_jax.training import evaluation, logs

if TYPE_CHECKING:
  from matplotlib.figure import Figure

FILE = 'report.html'
REPORT, SAMPLES = 'report.txt', 'samples.txt'
WORST = 20  # answers that are shown
MOST_CLASSES = 30  # of the picture of the confusion matrix: the most frequent
MOST_CURVES = 12
SHOWN = 600  # characters of a text
_STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; max-width: 60em; margin: 2em auto; padding: 0 1em }
img { max-width: 100%; height: auto }
table { border-collapse: collapse }
td, th { padding: 0.25em 0.8em; border-bottom: 1px solid #ddd; text-align: left }
td { vertical-align: top; overflow-wrap: anywhere }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px }
"""


class Answer(NamedTuple):
  """What was said of one text.

  Attributes:
    text: as the model read it.
    label, answer: names of classes, or values.
    error: how far the answer is from the label: the probability of a wrong class, for multilabel
      the largest difference of a probability, in regression the difference; 0 where it is right.
  """

  text: str
  label: str
  answer: str
  error: float


class Answers(NamedTuple):
  """What was said of a validation set.

  Attributes:
    worst: the largest errors first.
    wrong: how many answers are wrong.
    texts: how many texts have a label.
    confusion_CC: how often a class (axis 0) was taken for another; None where a text has not one.
  """

  worst: list[Answer]
  wrong: int
  texts: int
  confusion_CC: np.ndarray | None


def write(
  workdir: pathlib.Path,
  step: int,
  values: Mapping[str, float],
  program: Inference,
  params: PyTree,
  tokenizer: Tokenizer,
  examples: Sequence[Example],
  learned: Sequence[Sequence[Piece]] = (),
) -> None:
  """Writes the page; all processes call it, one writes.

  Args:
    workdir: of the run.
    step: at which it stands.
    values: the numbers of the last evaluation.
    program: of the run.
    params: of its network.
    tokenizer: spells texts.
    examples: the validation set; may be empty.
    learned: documents in pieces that are learned or are not (`objectives.shared.learned`).
  """
  predictor = getattr(program.objective, 'predictor', None)
  found = None
  labelled = len(examples) > 0 and 'label' in examples[0]
  if labelled and getattr(predictor, 'task', None) in classification.TASKS:
    found = answers(program, params, tokenizer, examples)
  if hosts.primary():
    body = '\n'.join(_body(workdir, step, values, found, predictor))
    if learned:
      body += '\n<h2>What is learned</h2>' + as_html(learned)
    with files.whole_file(workdir / FILE) as file:
      file.write(_page(f'{workdir.name}, step {step}', body))


def answers(
  program: Inference, params: PyTree, tokenizer: Tokenizer, examples: Sequence[Example]
) -> Answers:
  """What a classifier or a regressor says of the labelled texts of a validation set."""
  predictor = program.objective.predictor
  predict = evaluation.predictions(program, params)
  key = 'values' if predictor.task == 'regression' else 'probabilities'
  keys = (*classification.KEYS, 'tokens', 'segments')
  worst: list[Answer] = []
  wrong = texts = 0
  confusion_CC = None
  if predictor.task in ('multiclass', 'binary'):
    confusion_CC = np.zeros((len(predictor.classes),) * 2, int)
  for batch in evaluation.batches(program, examples):
    rows = jax.device_get(predict(batch, keys))
    for row, slot in np.argwhere(rows['label_weight'] > 0):
      said, label = rows[key][row, slot], rows['label'][row, slot]
      texts += 1
      if confusion_CC is not None:
        confusion_CC[label, np.argmax(said)] += 1
      error = _error(said, label, predictor.task)
      wrong += error > 0
      if error > 0:
        ids = rows['tokens'][row][rows['segments'][row] == slot + 1]
        names = _names(label, said, predictor)
        worst.append(Answer(tokenizer.decode(ids), *names, error))
    worst = sorted(worst, key=lambda answer: -answer.error)[:WORST]
  return Answers(worst, wrong, texts, confusion_CC)


def _error(said: np.ndarray, label: np.ndarray, task: str) -> float:
  if task == 'regression':
    return abs(float(said) - float(label))
  if task == 'multilabel':
    differs = (said > 0.5) != (label > 0.5)
    return float(np.max(np.abs(said - label)[differs], initial=0))
  answer = int(np.argmax(said))
  return 0.0 if answer == label else float(said[answer])


def _names(label: np.ndarray, said: np.ndarray, predictor: Predictor) -> tuple[str, str]:
  """The label and the answer, spelled."""
  if predictor.task == 'regression':
    return f'{label:.4g}', f'{said:.4g}'
  if predictor.task == 'multilabel':
    chosen = (np.flatnonzero(x > 0.5) for x in (label, said))
    return tuple(', '.join(predictor.classes[i] for i in numbers) or 'none' for numbers in chosen)
  return predictor.classes[int(label)], predictor.classes[int(np.argmax(said))]


def _body(
  workdir: pathlib.Path,
  step: int,
  values: Mapping[str, float],
  found: Answers | None,
  predictor: Predictor | None,
) -> Iterator[str]:
  yield f'<h1>{html.escape(workdir.name)}</h1>\n<p>after step {step}</p>'
  yield '<h2>Loss</h2>' + _picture(logs.loss_figure(workdir), 'loss over steps')
  curves = _curves(logs.read(workdir))
  if curves is not None:
    yield '<h2>Validation</h2>' + _picture(curves, 'validation numbers over steps')
  if values:
    rows = metrics.shown(values).items()
    yield '<h2>Numbers</h2>' + _table(('', 'last evaluation'), rows)
  if found is not None and found.confusion_CC is not None:
    picture = _confusion(found.confusion_CC, predictor.classes)
    yield '<h2>Confusion matrix</h2>' + _picture(picture, 'labels against answers')
  if found is not None:
    yield from _worst(found, predictor.task)
  for name, title in ((REPORT, 'Report'), (SAMPLES, 'Samples')):
    path = workdir / name
    if path.is_file():
      yield f'<h2>{title}</h2><pre>{html.escape(_last(path))}</pre>'


def _last(path: pathlib.Path) -> str:
  """A report as a whole; of samples those of the last evaluation."""
  text = path.read_text(encoding='utf-8')
  start = text.rfind('\nstep ') + 1 if path.name == SAMPLES else 0
  return text[start:]


def _worst(found: Answers, task: str) -> Iterator[str]:
  title = 'Largest errors' if task == 'regression' else 'Most confident wrong answers'
  yield f'<h2>{title}</h2><p>{found.wrong} of {found.texts} answers differ from their labels.</p>'
  rows = [
    (f'{answer.error:.4f}', answer.label, answer.answer, _shortened(answer.text, SHOWN))
    for answer in found.worst
  ]
  if rows:
    how = 'difference' if task in ('regression', 'multilabel') else 'probability'
    yield _table((how, 'label', 'answer', 'text'), rows)


def _shortened(text: str, most: int) -> str:
  return text if len(text) <= most else f'{text[:most]} ...'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = ['<tr>' + ''.join(f'<th>{html.escape(name)}</th>' for name in header) + '</tr>']
  for row in rows:
    cells = ''.join(f'<td>{html.escape(cell)}</td>' for cell in row)
    lines.append(f'<tr>{cells}</tr>')
  return '<table>\n' + '\n'.join(lines) + '\n</table>'


def _curves(lines: Sequence[Mapping[str, Any]]) -> 'Figure | None':
  """Every number of the validation set but the loss over steps; None where there is no line."""
  from matplotlib.figure import Figure

  points: dict[str, list[tuple[int, float]]] = {}
  for line in lines:
    if line['split'] == 'validation':
      for name, value in line.items():
        if name not in ('step', 'split', 'loss') and isinstance(value, int | float):
          points.setdefault(name, []).append((line['step'], value))
  drawn = list(points.items())[:MOST_CURVES]
  drawn = [(name, curve) for name, curve in drawn if len(curve) > 1]
  if not drawn:
    return None
  rows = -(-len(drawn) // 3)
  figure = Figure(figsize=(9, 2.4 * rows), dpi=100, layout='constrained')
  for axes, (name, curve) in zip(figure.subplots(rows, 3).flat, drawn, strict=False):
    axes.plot(*zip(*curve, strict=True), color='#c8553d', marker='o', markersize=3)
    axes.set_title(name, fontsize=10, parse_math=False)  # no dollar sign begins a formula
    axes.grid(alpha=0.25)
  for axes in figure.axes[len(drawn) :]:
    axes.set_axis_off()
  return figure


def _confusion(confusion_CC: np.ndarray, classes: Sequence[str]) -> 'Figure':
  """Shares of each label's texts, and their counts where they can be read."""
  from matplotlib.figure import Figure

  chosen = np.sort(np.argsort(-confusion_CC.sum(1), kind='stable')[:MOST_CLASSES])
  counts = confusion_CC[np.ix_(chosen, chosen)]
  names = [_shortened(classes[i], 20) for i in chosen]
  shares = counts / np.maximum(confusion_CC[chosen].sum(1, keepdims=True), 1)
  side = 2.5 + 0.35 * len(chosen)
  figure = Figure(figsize=(side + 1, side), dpi=100, layout='constrained')
  axes = figure.add_subplot()
  image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
  axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
  axes.set_yticks(range(len(names)), names, parse_math=False)
  left_out = f' (the {len(chosen)} most frequent of {len(classes)})'
  axes.set(xlabel='answer', ylabel='label' + left_out * (len(chosen) < len(classes)))
  for (row, column), count in np.ndenumerate(counts):
    if count:
      colour = 'white' if shares[row, column] > 0.5 else 'black'
      axes.text(column, row, str(count), ha='center', va='center', color=colour, fontsize=8)
  figure.colorbar(image, shrink=0.7, label='share of the label')
  return figure


def _picture(figure: 'Figure', says: str) -> str:
  data = io.BytesIO()
  figure.savefig(data, format='png')
  code = base64.b64encode(data.getvalue()).decode()
  return f'<p><img alt="{html.escape(says)}" src="data:image/png;base64,{code}"></p>'


def _page(title: str, body: str) -> str:
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
    f'<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n'
    f'<body>\n{body}\n</body>\n</html>\n'
  )
