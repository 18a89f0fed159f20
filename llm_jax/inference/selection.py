"""The records of a file that are most worth a label: those whose answers are least sure
(uncertainty sampling, Lewis and Gale 1994, arXiv:cmp-lg/9407020; Settles 2009, "Active Learning
Literature Survey", section 3.1).
"""

import dataclasses
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import logging

from llm_jax.core import plugins
from llm_jax.core.contracts import Predictor

# By what records are chosen -> the field of an answer, and whether its low values come first.
MEASURES = {
  'entropy': ('entropy', False),
  'margin': ('margin', True),
  'confidence': ('probability', True),
}


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which records are chosen.

  Attributes:
    count: how many.
    by: one of `MEASURES`: the highest entropy, the smallest margin between the best class and the
      second, or the lowest probability of the best.

  Raises:
    ValueError: a value that is not possible.
  """

  count: int
  by: str = 'entropy'

  def __post_init__(self) -> None:
    if self.count < 1:
      raise ValueError(f'--select={self.count} must be at least 1, the number of records.')
    if self.by not in MEASURES:
      near = plugins.nearest(self.by, MEASURES)
      raise ValueError(f'--by={self.by} must be one of {", ".join(MEASURES)}{near}.')

  def check(self, predictor: Predictor | None, objective: str, records: int) -> None:
    """Raises ValueError where there is nothing to choose by, or not so many records.

    Args:
      predictor: gives the answers.
      objective: its name, for messages.
      records: how many there are.
    """
    known = getattr(predictor, 'measures', ())
    possible = [by for by, (field, _) in MEASURES.items() if field in known]
    if self.by not in possible:
      way_out = f'choose by {" or ".join(possible)}' if possible else 'leave --select out'
      raise ValueError(
        f'--by={self.by}: the answers of this objective, {objective}, have no '
        f'{MEASURES[self.by][0]}; {way_out}.'
      )
    if self.count > records:
      raise ValueError(
        f'--select={self.count} is more than the {records} records of --input; choose at most '
        f'{records}, or leave --select out for the answers to all.'
      )

  def __call__(self, answers: Iterable[Mapping[str, Any]]) -> list[int]:
    """The numbers of the chosen records, the least sure first, equal ones in their order.

    Args:
      answers: of all records; one without the number (with `error`, say) is not chosen.
    """
    chosen = heapq.nsmallest(self.count, self._ranked(answers))
    if len(chosen) < self.count:
      logging.warning(
        'Only %d records have an answer to choose by; --select asks for %d.',
        len(chosen),
        self.count,
      )
    if chosen:
      first, last = (abs(chosen[end][0]) for end in (0, -1))
      logging.info('%d records chosen by %s, %.4g to %.4g.', len(chosen), self.by, first, last)
    return [number for _, number in chosen]

  def _ranked(self, answers: Iterable[Mapping[str, Any]]) -> Iterator[tuple[float, int]]:
    field, low_first = MEASURES[self.by]
    for number, answer in enumerate(answers):
      value = answer.get(field)
      if 'error' not in answer and value is not None and math.isfinite(value):
        yield (value if low_first else -value), number
