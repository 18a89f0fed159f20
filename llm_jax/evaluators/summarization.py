"""Summaries by the package rouge-score: ROUGE-1, 2, L and Lsum (Lin 2004, "ROUGE: A Package for
Automatic Evaluation of Summaries"), F1, of text as it is.

ROUGE-Lsum takes each line of a text for a sentence; where texts have no line breaks it is ROUGE-L.
"""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from llm_jax.evaluators import _written
from llm_jax.evaluators._written import Written

KINDS = ('rouge1', 'rouge2', 'rougeL', 'rougeLsum')


@dataclasses.dataclass(frozen=True)
class Evaluator(_written.Evaluator):
  """Means over the texts, from 0 to 1.

  Attributes:
    stemmer: whether words are compared by their stems (Porter, English), as in most papers.

  Raises:
    ImportError: rouge-score is not installed; now, and not after the first steps.
  """

  stemmer: bool = True

  def __post_init__(self) -> None:
    _rouge_scorer()

  @functools.cached_property
  def scorer(self) -> Any:
    """That of rouge-score."""
    return _rouge_scorer().RougeScorer(list(KINDS), use_stemmer=self.stemmer)

  def scores(self, texts: Sequence[Written]) -> dict[str, Any]:
    """Means of F1."""
    found = [self.scorer.score(text.wanted, text.found) for text in texts]
    numbers: dict[str, Any] = {
      kind: sum(each[kind].fmeasure for each in found) / len(found) for kind in KINDS
    }
    version = importlib.metadata.version('rouge-score')
    stemmer = 'porter' if self.stemmer else 'none'
    numbers['rouge_signature'] = f'f1|mean|stemmer:{stemmer}|rouge-score:{version}'
    return numbers

  def score(self, text: Written) -> float:
    """ROUGE-L of one text."""
    return float(self.scorer.score(text.wanted, text.found)['rougeL'].fmeasure)


def _rouge_scorer() -> Any:
  try:
    from rouge_score import rouge_scorer
  except ImportError as error:
    raise ImportError(
      "the evaluator 'summarization' needs the package rouge-score: pip install llm_jax[text]."
    ) from error
  return rouge_scorer
