"""What a predictor answers to the texts of a validation set, as `--mode=predict` would."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from llm_jax.core.contracts import Texts, Validation


class Answered(NamedTuple):
  """One text.

  Attributes:
    rows: in which it is laid out.
    text: its number there.
    answer: what the predictor says of it.
    position: row and slot of its first part, as in `Validation.slices`.
    parts: how many parts of it were seen.
  """

  rows: Texts
  text: int
  answer: dict[str, Any]
  position: tuple[int, int]
  parts: int


def answered(validation: Validation) -> Iterator[Answered]:
  """The texts in the order of their first parts."""
  predictor, number = validation.objective.predictor, 0
  found: dict[tuple[int, int], list[dict[str, Any]]] = {}
  positions: dict[tuple[int, int], tuple[Texts, tuple[int, int]]] = {}
  for batch in validation.batches():
    said = jax.device_get(validation.predict(batch, ()))
    size = len(next(iter(said.values())))
    for row in range(min(size, len(validation.rows) - number)):
      rows, index = validation.rows[number + row]
      arrays = {name: values[row] for name, values in said.items()}
      answers = predictor.answers(arrays, rows, index)
      for slot, (text, answer) in enumerate(zip(rows.texts(index), answers, strict=True)):
        key = id(rows), text
        found.setdefault(key, []).append(answer)
        positions.setdefault(key, (rows, (number + row, slot)))
    number += size
  for key, parts in found.items():
    rows, position = positions[key]
    yield Answered(rows, key[1], predictor.joined(parts), position, len(parts))
