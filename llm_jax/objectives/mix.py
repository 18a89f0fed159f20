"""Several objectives in one run: one row layout, one pass through the model, a weighted sum of
losses.

The BERT loss is `mlm` and `nsp` over rows of `nsp`; `mlm` and `classify` over rows of `classify` is
supervised and self-supervised training in one, where unlabelled documents count for `mlm` only.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.contracts import Batch, Documents, Pairs, Rows
from llm_jax.core.contracts import Objective as Part
from llm_jax.nn.layers import at


class Objective:
  """Several objectives over the same rows.

  Args:
    parts: name -> objective, ready made; their losses must have different names.
    rows: the part that lays out the rows; the others add their arrays to them.
    weights: name -> factor of that part's loss, above 0, one for each part.
  """

  def __init__(self, parts: dict, rows: str, weights: dict):
    if rows not in parts:
      raise ValueError(f'objective.rows={rows!r} must be one of the parts: {", ".join(parts)}.')
    if weights.keys() != parts.keys():
      raise ValueError(
        f'objective.weights has {", ".join(sorted(weights))}; it must have one for each part: '
        f'{", ".join(sorted(parts))}.'
      )
    for name, weight in weights.items():
      if (
        not isinstance(weight, int | float)
        or isinstance(weight, bool)
        or not 0 < weight < float('inf')
      ):
        raise ValueError(
          f'objective.weights.{name}={weight!r} must be a number above 0; leave out a part that is '
          'not wanted.'
        )
    self.parts: dict[str, Part] = dict(parts)
    self.layout, self.weights = parts[rows], dict(weights)
    self.terms: dict[str, float] = {}
    for name, part in parts.items():
      twice = sorted(self.terms.keys() & part.terms.keys())
      if twice:
        raise ValueError(
          f'objective.parts.{name} has a loss that another part has: {", ".join(twice)}; keep one '
          'of them.'
        )
      self.terms |= {term: weights[name] * coefficient for term, coefficient in part.terms.items()}
    self.predictor = next(
      (part.predictor for part in parts.values() if part.predictor is not None), None
    )

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """The rows of the part that lays them out."""
    return self.layout.rows(documents, seq_len)

  def transform(
    self, example: dict[str, np.ndarray], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """The transforms of all parts, one after the other."""
    for part in self.parts.values():
      example = part.transform(example, rng)
    return example

  def heads(self, model: Any) -> dict[str, Any]:
    """The heads of all parts; a name that two parts share is one head."""
    return {name: head for part in self.parts.values() for name, head in part.heads(model).items()}

  def places(self, batch: Batch) -> jax.Array | None:
    """Those of all parts, one after the other; None where a part reads all."""
    places = [part.places(batch) for part in self.parts.values()]
    return None if any(x is None for x in places) else jnp.concatenate(places, axis=1)

  def loss(self, net: Any, hidden_BPD: jax.Array, batch: Batch) -> Pairs:
    """The pairs of all parts, each from the hidden states at its own places."""
    pairs, start, everywhere = {}, 0, self.places(batch) is None
    for part in self.parts.values():
      places = part.places(batch)
      if everywhere:
        hidden = at(hidden_BPD, places)
      else:
        hidden, start = hidden_BPD[:, start : start + places.shape[1]], start + places.shape[1]
      pairs |= part.loss(net, hidden, batch)
    return pairs

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """The summaries of all parts."""
    return {
      name: value for part in self.parts.values() for name, value in part.summary(means).items()
    }

  def targets(self, batch: Batch) -> tuple[np.ndarray, np.ndarray] | None:
    """The targets of the first part that predicts tokens, or None."""
    found = (part.targets(batch) for part in self.parts.values())
    return next((targets for targets in found if targets is not None), None)
