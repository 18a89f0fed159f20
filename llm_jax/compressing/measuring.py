"""A model and a smaller one side by side: scores with their interval, bytes, and speed, for which
the two run in turn.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from llm_jax.compressing.making import Made
from llm_jax.core.contracts import Metrics
from llm_jax.core.tree import PyTree
from llm_jax.generation import completion
from llm_jax.generation.sampling import Sampling
from llm_jax.parallel import hosts
from llm_jax.parallel.sharding import row_shards
from llm_jax.programs import assemble, inference
from llm_jax.training import corpora, evaluation, held_out
from llm_jax.training.corpora import Splits

ACCURACY, LOSS = '_accuracy', 'loss'
ROWS, ALONE, TOKENS = 'rows per second', 'rows per second, one at a time', 'new tokens per second'
DRAWS, INTERVAL = 2000, 0.95  # of the bootstrap, and how much of it lies inside
REPEATS, NEW_TOKENS = 7, 32


class Work(NamedTuple):
  """What a model is timed by.

  Attributes:
    run: does it once, and returns arrays.
    units: how much is done by that.
  """

  run: Callable[[], Any]
  units: int


@dataclasses.dataclass(frozen=True)
class Numbers:
  """What was measured of a model.

  Attributes:
    values: numbers of the validation set; empty where there is none.
    batches: (sum, weight) of what is scored, of each batch of the validation set.
    score: its name: the accuracy of answers, or the loss.
    memory: bytes of the parameters, as they are held.
    work: by the name of its speed: `ROWS` in full batches, `ALONE` in batches of one row a device,
      and where the model writes `TOKENS`, of one prompt alone.
  """

  values: Mapping[str, float]
  batches: np.ndarray
  score: str
  memory: int
  work: Mapping[str, Work]

  @property
  def mean(self) -> float:
    """The score over the whole validation set."""
    return _mean(self.batches)

  @property
  def higher_is_better(self) -> bool:
    """Whether the score is an accuracy."""
    return self.score != LOSS


def measure(made: Made, splits: Splits | None) -> Numbers:
  """The numbers of a model.

  Args:
    made: the model.
    splits: its texts, encoded by its own tokenizer; None where there are none.
  """
  config, program, params = made.config, made.program, made.params
  values, pairs, name = {}, np.zeros((0, 2)), LOSS
  if splits is not None and splits.validation:
    objective = assemble.create_objective(config, made.tokenizer)
    chosen = splits.validation
    held = held_out.lay_out(config, 'validation', chosen, objective, config.evaluation.rows)
    program = inference.build(config, objective, held.examples[0])
    values = evaluation.scores(program, params, made.tokenizer, held, None)
    step = hosts.compiled(program.eval_step)
    found = [step(params, program.put(b)) for b in evaluation.batches(program, held.examples)]
    name = _score(found[0], objective.predictor is not None)
    pairs = np.array([_pair(metrics, name, program.network.terms) for metrics in found])
  return Numbers(
    values=values,
    batches=pairs,
    score=name,
    memory=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    work={
      ROWS: _batch(program, params, program.config.batch_size),
      ALONE: _batch(program, params, row_shards(program.mesh)),
    }
    | _completion(made),
  )


def texts(config: Any, tokenizer: Any) -> Splits | None:
  """The documents of a config's data; None where it names none."""
  if not config.data.get('source') and not config.data.get('parts'):
    return None
  return corpora.documents(assemble.without_copies(config), tokenizer)


def loss_of_score(before: Numbers, after: Numbers, seed: int = 0) -> tuple[float, float, float]:
  """How much worse the smaller model scores, and an interval of it: both on the same batches, drawn
  with replacement (the paired bootstrap).

  Returns:
    The loss, above 0 where it is worse, and the ends of the interval.
  """
  sign = 1.0 if before.higher_is_better else -1.0
  rng, count = np.random.default_rng(seed), len(before.batches)
  draws = rng.integers(0, count, (DRAWS, count))
  both = [numbers.batches[draws].sum(1) for numbers in (before, after)]
  losses = sign * (both[0][:, 0] / both[0][:, 1] - both[1][:, 0] / both[1][:, 1])
  low, high = np.quantile(losses, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
  return sign * (before.mean - after.mean), float(low), float(high)


def bytes_of(folder: pathlib.Path, params: PyTree = None) -> int:
  """Of all files in a folder; with parameters, of them and of the tokenizer and the config of a run
  that they are of.
  """
  if params is not None:
    names = [folder / 'config.json', *(folder / 'tokenizer').rglob('*')]
    beside = sum(path.stat().st_size for path in names if path.is_file())
    return beside + sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())


def report(before: Numbers, after: Numbers, sizes: tuple[int | None, int | None]) -> dict[str, Any]:
  """What is said of the two, for people and for files.

  Args:
    before: of the parent.
    after: of the smaller model.
    sizes: bytes on disk of the one and the other.
  """
  rows: dict[str, Any] = {
    'bytes on disk': sizes,
    'bytes in memory': (before.memory, after.memory),
  }
  for name in before.work:
    rows[name] = speeds(before.work[name], after.work[name])
  shared = before.values.keys() & after.values.keys()
  rows |= {name: (before.values[name], after.values[name]) for name in sorted(shared)}
  if len(before.batches):
    rows[before.score] = before.mean, after.mean
  found = {'numbers': {name: list(pair) for name, pair in rows.items()}}
  if len(before.batches):
    found['score_lost'] = dict(
      zip(('mean', 'low', 'high'), loss_of_score(before, after), strict=True)
    )
  return found


def table(said: Mapping[str, Any]) -> str:
  """The report as lines of text: before, after, and their ratio."""
  lines = [f'{"":32}{"before":>14}{"after":>14}{"ratio":>9}']
  for name, (before, after) in said['numbers'].items():
    if before is None or after is None:
      lines.append(f'{name:32}{"-" if before is None else before:>14}{after:>14,}{"":>9}')
      continue
    shown = [f'{x:>14,}' if isinstance(x, int) else f'{x:>14.4f}' for x in (before, after)]
    ratio = f'{after / before:.3f}' if before else '-'
    lines.append(f'{name:32}{"".join(shown)}{ratio:>9}')
  if 'score_lost' in said:
    lost = said['score_lost']
    lines.append(
      f'lost: {lost["mean"]:.4f}, {INTERVAL:.0%} within {lost["low"]:.4f} and {lost["high"]:.4f}'
    )
  return '\n'.join(lines)


def as_json(said: Mapping[str, Any]) -> str:
  """The report as JSON."""
  return json.dumps(said, indent=2)


def _score(metrics: Metrics, answers: bool) -> str:
  found = [name for name in metrics if name.endswith(ACCURACY)]
  return found[0] if answers and found else LOSS


def _pair(metrics: Metrics, name: str, terms: Mapping[str, float]) -> tuple[float, float]:
  if name != LOSS:
    return tuple(float(x) for x in metrics[name])
  # Of terms of several weights, the weight of the first is that of all.
  first = next(iter(terms))
  weight = float(metrics[first][1])
  means = {term: float(metrics[term][0]) / max(float(metrics[term][1]), 1e-9) for term in terms}
  return weight * sum(terms[term] * mean for term, mean in means.items()), weight


def _mean(batches: np.ndarray) -> float:
  total, weight = batches.sum(0)
  return float(total / weight)


def speeds(*works: Work) -> tuple[float, ...]:
  """Units per second of each, by the median of `REPEATS` runs; they run in turn, so that what else
  the machine does falls on all.
  """
  for work in works:
    jax.block_until_ready(work.run())
  seconds: list[list[float]] = [[] for _ in works]
  for _ in range(REPEATS):
    for work, found in zip(works, seconds, strict=True):
      began = time.perf_counter()
      jax.block_until_ready(work.run())
      found.append(time.perf_counter() - began)
  return tuple(
    work.units / statistics.median(found) for work, found in zip(works, seconds, strict=True)
  )


def _batch(program: inference.Inference, params: PyTree, count: int) -> Work:
  rows = len(hosts.rows(program.mesh, count))
  ones = lambda leaf: np.ones((rows, *leaf.shape[1:]), leaf.dtype)
  batch = program.put({key: ones(leaf) for key, leaf in program.batch.items()})
  predictor = getattr(program.objective, 'predictor', None)
  step = hosts.compiled(program.eval_step if predictor is None else program.predict_step)
  return Work(lambda: step(params, batch), count)


def _completion(made: Made) -> dict[str, Work]:
  model = made.program.network.model
  if not model.causal or model.reads_source():
    return {}
  completer = completion.of(made.program, made.tokenizer, rows=1)
  weights = completer.generator.weights(made.params['model'])
  prompt = [made.tokenizer.bos_id]
  new = min(NEW_TOKENS, completer.generator.room(prompt))
  sampling = Sampling(max_new_tokens=new, min_new_tokens=new, temperature=0.0)
  return {TOKENS: Work(lambda: completer.from_ids(weights, [prompt], sampling), new)}


def check_tolerance(tolerance: float | None, splits: Splits | None) -> None:
  """Raises ValueError where there is a tolerance, and nothing to measure it by."""
  if tolerance is not None and (splits is None or not splits.validation):
    raise ValueError(
      f'config.compress.tolerance={tolerance} needs a validation set; give config.data.validation '
      'or config.validation.'
    )


def within(said: Mapping[str, Any], tolerance: float | None) -> None:
  """Raises ValueError where the smaller model is worse by more than a tolerance."""
  if tolerance is None:
    return
  lost = said['score_lost']['mean']
  if lost > tolerance:
    raise ValueError(
      f'the smaller model is worse by {lost:.4f}, and config.compress.tolerance={tolerance}; '
      f'nothing is written.\n{table(said)}'
    )
