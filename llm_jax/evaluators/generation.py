"""Any new text against the one that is wanted: exact match, F1 of the words, edit distance; of
Python code whether it can be parsed.
"""

import ast
import collections
import dataclasses
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

from llm_jax.evaluators import _written
from llm_jax.evaluators._written import Written

PARSED = {  # what is parsed of a text
  'answer': lambda text: textwrap.dedent(text.found),
  'whole': lambda text: text.asked + text.found,
}


@dataclasses.dataclass(frozen=True)
class Evaluator(_written.Evaluator):
  """Means over the texts, from 0 to 1: `exact_match`, of text but for white space around it;
  `token_f1`, of words between white space; `edit_distance`, of characters, divided by the longer
  text; and `parses`, where that is asked for.

  Attributes:
    parse: what of a text must be Python: the 'answer', or the 'whole', what was asked and the
      answer; None to parse nothing.

  Raises:
    ValueError: nothing that could be parsed.
    ImportError: rapidfuzz is not installed; now, and not after the first steps.
  """

  parse: str | None = None

  def __post_init__(self) -> None:
    _distance()
    if self.parse not in (None, *PARSED):
      raise ValueError(
        f'evaluators.generation.parse={self.parse!r} must be one of {", ".join(PARSED)}.'
      )

  def scores(self, texts: Sequence[Written]) -> dict[str, Any]:
    """Means."""
    pairs = [(text.found.strip(), text.wanted.strip()) for text in texts]
    numbers = {
      'exact_match': _mean([float(found == wanted) for found, wanted in pairs]),
      'token_f1': _mean([token_f1(found, wanted) for found, wanted in pairs]),
      'edit_distance': _mean([_distance()(found, wanted) for found, wanted in pairs]),
    }
    if self.parse is not None:
      numbers['parses'] = _mean([float(parses(PARSED[self.parse](text))) for text in texts])
    return numbers

  def score(self, text: Written) -> float:
    """How much of one text is as it should be."""
    return 1.0 - float(_distance()(text.found.strip(), text.wanted.strip()))


def token_f1(found: str, wanted: str) -> float:
  """F1 of the words of two texts; 1 where both have none.

  Example:
    >>> token_f1('a b b', 'b c')
    0.4
  """
  ours, theirs = found.split(), wanted.split()
  if not ours or not theirs:
    return float(ours == theirs)
  common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
  return 2 * common / (len(ours) + len(theirs))


def parses(code: str) -> bool:
  """Whether a text is Python."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of escapes in strings, say
    try:
      ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
      return False
  return True


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)


def _distance() -> Any:
  try:
    from rapidfuzz.distance import Levenshtein
  except ImportError as error:
    raise ImportError(
      "the evaluator 'generation' needs the package rapidfuzz: pip install llm_jax[text]."
    ) from error
  return Levenshtein.normalized_distance
