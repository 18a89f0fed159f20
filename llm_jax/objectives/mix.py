"""Several objectives in one run: one row layout, one pass through the model, a weighted sum of
losses.

The BERT loss is `mlm` and `nsp` over rows of `nsp`; `mlm` and `classify` over rows of `classify` is
supervised and self-supervised training in one, where unlabelled documents count for `mlm` only.

The sum may move during training, from one objective to another, or each batch may be one
objective's alone, in turn: then only that one is computed.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import contracts
from llm_jax.core.contracts import Batch, Documents, Example, Metrics, Net, Number, Rows
from llm_jax.nn.rows import at


class Objective(contracts.Objective):
  """Several objectives over the same rows.

  Documents hold what the `encode` functions of all parts give, and made-up records what their
  `sample_records` give: the program puts these together.

  Args:
    parts: name -> objective, ready made; their losses must have different names.
    rows: the part that lays out the rows; the others add their arrays to them.
    weights: name -> factor of that part's loss, above 0, one for each part; or two of them, at the
      first step and at the last: the factor goes from one to the other in a straight line. A
      validation set is scored by those of the last step, so that its losses can be compared.
    alternate: each batch is learned from by one part alone, in the order of `parts`.
  """

  def __init__(self, parts: dict, rows: str, weights: dict, alternate: bool = False):
    _check(parts, rows, weights)
    self.parts: dict[str, contracts.Objective] = dict(parts)
    self.lays_out = parts[rows]
    self.weights = {name: _ends(weights[name]) for name in parts}
    self.terms = self.terms_at(1.0)
    self.turns = tuple(parts.values()) if alternate else ()
    predictors = [part.predictor for part in parts.values() if part.predictor is not None]
    self.predictor = predictors[0] if predictors else None
    evaluators = itertools.chain.from_iterable(part.evaluators for part in parts.values())
    self.evaluators = tuple(dict.fromkeys(evaluators))
    self.compares = any(part.compares for part in self.parts.values())
    pools = (part.embedding_pool for part in self.parts.values())
    self.embedding_pool = next((pool for pool in pools if pool is not None), None)

  def check(self, model: contracts.Model) -> None:
    """What each part needs."""
    for part in self.parts.values():
      part.check(model)

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """The rows of the part that lays them out."""
    return self.lays_out.rows(documents, seq_len)

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """The transforms of all parts, one after the other."""
    for part in self.parts.values():
      example = part.transform(example, rng)
    return example

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """The heads of all parts; a name that two parts share is one head."""
    found: dict[str, Any] = {}
    for part in self.parts.values():
      found |= part.heads(model)
    return found

  def positions(self, batch: Batch) -> jax.Array | None:
    """Those of all parts, one after the other; None where a part reads all."""
    found = [part.positions(batch) for part in self.parts.values()]
    return None if any(x is None for x in found) else jnp.concatenate(found, axis=1)

  def loss(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> Metrics:
    """The metrics of all parts, each from the hidden states at its own positions."""
    metrics: Metrics = {}
    for _, part, hidden in self._read(hidden_BPD, batch):
      metrics |= part.loss(net, hidden, batch)
    return metrics

  def represent(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, Any]:
    """What each part that compares wants, by its name."""
    return {
      name: part.represent(net, hidden, batch)
      for name, part, hidden in self._read(hidden_BPD, batch)
      if part.compares
    }

  def compare(self, found: Mapping[str, Any], batch: Batch) -> Metrics:
    """The metrics of the parts that compare."""
    metrics: Metrics = {}
    for name, arrays in found.items():
      metrics |= self.parts[name].compare(arrays, batch)
    return metrics

  def _read(
    self, hidden_BPD: jax.Array, batch: Batch
  ) -> Iterator[tuple[str, contracts.Objective, jax.Array]]:
    """The parts with the hidden states at their positions."""
    all_are_read = self.positions(batch) is None
    start = 0
    for name, part in self.parts.items():
      positions = part.positions(batch)
      if all_are_read:
        yield name, part, at(hidden_BPD, positions)
      else:
        stop = start + positions.shape[1]
        yield name, part, hidden_BPD[:, start:stop]
        start = stop

  def no_gradient(self, path: str) -> str | None:
    """The reason of the part that has one."""
    reasons = [part.no_gradient(path) for part in self.parts.values()]
    return next((reason for reason in reasons if reason), None)

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """The summaries of all parts."""
    found: dict[str, float] = {}
    for part in self.parts.values():
      found |= part.summary(means)
    return found

  def terms_at(self, done: Number) -> dict[str, Number]:
    """Those of each part, by its weight."""
    found: dict[str, Number] = {}
    for name, part in self.parts.items():
      first, last = self.weights[name]
      weight = last if first == last else first + (last - first) * done
      found |= {term: weight * number for term, number in part.terms_at(done).items()}
    return found

  def targets(self, batch: Batch) -> tuple[np.ndarray, np.ndarray] | None:
    """The targets of the first part that predicts tokens, or None."""
    found = (part.targets(batch) for part in self.parts.values())
    return next((targets for targets in found if targets is not None), None)

  def flops(self, model: contracts.Model, batch: Batch) -> float:
    """The sum over the parts."""
    return float(sum(part.flops(model, batch) for part in self.parts.values()))


def _check(parts: dict, rows: str, weights: dict) -> None:
  if rows not in parts:
    raise ValueError(f'objective.rows={rows!r} must be one of the parts: {", ".join(parts)}.')
  if weights.keys() != parts.keys():
    raise ValueError(
      f'objective.weights has {", ".join(sorted(weights))}; it must have one for each part: '
      f'{", ".join(sorted(parts))}.'
    )
  for name, weight in weights.items():
    if not _possible(weight):
      raise ValueError(
        f'objective.weights.{name}={weight!r} must be a number above 0, or two numbers from 0 '
        'on, at the first step and at the last, one of them above 0; leave out a part that is not '
        'wanted.'
      )
  terms: set[str] = set()
  for name, part in parts.items():
    if twice := sorted(terms & part.terms.keys()):
      raise ValueError(
        f'objective.parts.{name} has a loss that another part has: {", ".join(twice)}; keep one of '
        'them.'
      )
    terms |= part.terms.keys()


def _possible(weight: Any) -> bool:
  """Whether a weight is one, or two, and does something."""
  ends = weight if isinstance(weight, list | tuple) and len(weight) == 2 else (weight,)
  numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in ends)
  return numbers and all(0 <= x < float('inf') for x in ends) and any(x > 0 for x in ends)


def _ends(weight: Any) -> tuple[float, float]:
  """A weight at the first step and at the last."""
  return tuple(weight) if isinstance(weight, list | tuple) else (weight, weight)
