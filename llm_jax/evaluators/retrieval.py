"""How well texts find their pairs by their vectors: recall, nDCG and reciprocal rank.

All pairs and negatives of the validation set are searched for each text, whatever batch they stand
in; equal texts are one.
"""

from collections.abc import Iterator

import jax
import numpy as np

from llm_jax.core.contracts import Validation
from llm_jax.evaluators import _ranks

KEYS = ('group', 'member', 'text_key')
BLOCK = 1024  # texts that are compared at once


class Evaluator:
  """Scores of an objective whose predictor gives vectors of groups of texts.

  Args:
    cutoffs: ranks at which recall and nDCG are taken.

  Raises:
    ImportError: pytrec_eval is not installed.
  """

  def __init__(self, cutoffs: tuple[int, ...] = (1, 10, 100)):
    self.cutoffs = _ranks.checked(cutoffs)

  def evaluate(self, validation: Validation) -> tuple[dict[str, float], str]:
    """Means over the texts that have a pair: `recall_<k>`, `ndcg_<k>` and `mrr`, the mean of one
    divided by the rank of the first pair.

    Raises:
      ValueError: an objective without such vectors, or no text with a pair.
    """
    queries, documents, relevant = {}, {}, {}
    for vectors, group, member, keys in _texts(validation):
      for number in np.unique(group[group > 0]):
        slots = np.flatnonzero(group == number)
        slots = slots[np.argsort(member[slots])]
        anchor, *others = [(keys[slot].tobytes(), vectors[slot]) for slot in slots]
        documents.update(others)
        if others:
          queries.update([anchor])
          relevant.setdefault(anchor[0], set()).add(others[0][0])
    if not queries:
      raise ValueError(
        "the evaluator 'retrieval' found no text with a pair; config.data.pair names its field."
      )
    numbers = scores(queries, documents, relevant, self.cutoffs)
    title = f'{len(queries)} texts look for their pairs among {len(documents)}:'
    return numbers, _ranks.report(title, numbers)


def scores(
  queries: dict[bytes, np.ndarray],
  documents: dict[bytes, np.ndarray],
  relevant: dict[bytes, set[bytes]],
  cutoffs: tuple[int, ...],
) -> dict[str, float]:
  """Scores by name.

  Args:
    queries: vectors [D] by key.
    documents: likewise, those that are searched.
    relevant: for each query the keys of the documents that it should find.
    cutoffs: ranks.
  """
  names = list(documents)
  matrix_ND = np.stack(list(documents.values()))
  depth = min(max(cutoffs), len(names))
  found: dict[str, dict[str, float]] = {}
  keys = list(queries)
  for start in range(0, len(keys), BLOCK):
    block = keys[start : start + BLOCK]
    alike = np.stack([queries[key] for key in block]) @ matrix_ND.T
    best = np.argpartition(-alike, depth - 1, axis=1)[:, :depth]
    for row, key in enumerate(block):
      found[key.hex()] = {names[j].hex(): float(alike[row, j]) for j in best[row]}
  wanted = {key.hex(): {name.hex(): 1 for name in names} for key, names in relevant.items()}
  return _ranks.scores(wanted, found, cutoffs)


def _texts(validation: Validation) -> Iterator[tuple[np.ndarray, ...]]:
  """Of each row of all hosts' its vectors [G, D], groups and members [G], and keys [G, 2]."""
  for batch in validation.batches():
    if not set(KEYS) <= set(batch):
      raise ValueError(
        "the evaluator 'retrieval' scores vectors of texts and their pairs, and the objective "
        'gives none; name other evaluators in config.evaluators.'
      )
    found = jax.device_get(validation.predict(batch, KEYS))
    yield from zip(found['vectors'], *(found[key] for key in KEYS), strict=True)
