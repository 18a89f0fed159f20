"""Translations by the package sacrebleu (Post 2018, arXiv:1804.08771): BLEU (Papineni et al. 2002),
chrF2 (Popovic 2015) and TER (Snover et al. 2006), of text as it is, detokenized.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from llm_jax.evaluators import _written
from llm_jax.evaluators._written import Written


@dataclasses.dataclass(frozen=True)
class Evaluator(_written.Evaluator):
  """`bleu`, `chrf`, `ter`, from 0 to 100, with the signatures that belong beside them.

  Attributes:
    tokenize: how BLEU cuts texts into words: '13a', sacrebleu's default, or 'zh', 'ja-mecab',
      'intl', 'char' and the others that it has.

  Raises:
    ValueError: a tokenization that sacrebleu does not have.
    ImportError: sacrebleu is not installed; now, and not after the first steps.
  """

  tokenize: str | None = None

  def __post_init__(self) -> None:
    known = _sacrebleu().BLEU.TOKENIZERS
    if self.tokenize not in (None, *known):
      raise ValueError(
        f'evaluators.translation.tokenize={self.tokenize!r} must be one of {", ".join(known)}.'
      )

  @functools.cached_property
  def metrics(self) -> dict[str, Any]:
    """Those of sacrebleu by name."""
    made = _sacrebleu()
    return {'bleu': made.BLEU(tokenize=self.tokenize), 'chrf': made.CHRF(), 'ter': made.TER()}

  def scores(self, texts: Sequence[Written]) -> dict[str, Any]:
    """Of the whole corpus."""
    found, wanted = [text.found for text in texts], [[text.wanted for text in texts]]
    numbers: dict[str, Any] = {}
    for name, metric in self.metrics.items():
      numbers[name] = float(metric.corpus_score(found, wanted).score)
    for name, metric in self.metrics.items():
      numbers[f'{name}_signature'] = str(metric.get_signature())
    return numbers

  def score(self, text: Written) -> float:
    """chrF of one text."""
    return float(self.metrics['chrf'].sentence_score(text.found, [text.wanted]).score)


def _sacrebleu() -> Any:
  try:
    from sacrebleu import metrics
  except ImportError as error:
    raise ImportError(
      "the evaluator 'translation' needs the package sacrebleu: pip install llm_jax[text]."
    ) from error
  return metrics
