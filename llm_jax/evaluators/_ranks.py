"""Scores of rankings by the package pytrec_eval (Van Gysel and de Rijke 2018, arXiv:1805.01597), as
trec_eval has them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def checked(cutoffs: Sequence[int]) -> tuple[int, ...]:
  """The ranks at which scores are taken.

  Raises:
    ValueError: none, or one below 1.
    ImportError: pytrec_eval is not installed; now, and not after the first steps.
  """
  if not cutoffs or any(k < 1 for k in cutoffs):
    raise ValueError(f'cutoffs={cutoffs} of an evaluator must be numbers above 0.')
  _pytrec_eval()
  return tuple(cutoffs)


def scores(
  wanted: Mapping[str, Mapping[str, int]],
  found: Mapping[str, Mapping[str, float]],
  cutoffs: Sequence[int],
) -> dict[str, float]:
  """Means over the queries: `recall_<k>`, `ndcg_<k>`, and `mrr`, one divided by the rank of the
  first relevant document.

  Args:
    wanted: relevance of documents by query; what is not named has none.
    found: scores of documents by query.
    cutoffs: ranks.
  """
  listed = ','.join(map(str, cutoffs))
  measures = {f'recall.{listed}', f'ndcg_cut.{listed}', 'recip_rank'}
  judged = (
    _pytrec_eval()
    .RelevanceEvaluator({key: dict(values) for key, values in wanted.items()}, measures)
    .evaluate({key: dict(values) for key, values in found.items()})
  )
  mean = lambda name: float(np.mean([values[name] for values in judged.values()]))
  numbers = {f'recall_{k}': mean(f'recall_{k}') for k in cutoffs}
  numbers |= {f'ndcg_{k}': mean(f'ndcg_cut_{k}') for k in cutoffs}
  return numbers | {'mrr': mean('recip_rank')}


def report(title: str, numbers: Mapping[str, float]) -> str:
  """Scores for people."""
  return '\n'.join([title, *(f'{name:>12} {value:.4f}' for name, value in numbers.items())])


def _pytrec_eval() -> Any:
  try:
    import pytrec_eval
  except ImportError as error:
    raise ImportError(
      "this evaluator needs the package pytrec_eval: pip install 'llm_jax[retrieval]', or name "
      'other evaluators in config.evaluators.'
    ) from error
  return pytrec_eval
