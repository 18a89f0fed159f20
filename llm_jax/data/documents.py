"""Encoded records as `contracts.Documents`: arrays of different lengths laid end to end, and a few
records that are encoded in memory (texts to predict, made-up ones, tests).
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.contracts import Record, Tokenizer
from llm_jax.data import encoding


class Ragged(NamedTuple):
  """Arrays of different lengths, end to end.

  Attributes:
    entries: [sum of lengths] integers.
    offsets: [arrays + 1] int64, where each array begins in `entries`.
  """

  entries: np.ndarray
  offsets: np.ndarray

  def part(self, index: int, start: int, stop: int | None) -> np.ndarray:
    """[stop - start] int32: a part of one array, cut as a slice is."""
    entries, offsets = self
    whole = entries[offsets[index] : offsets[index + 1]]
    return whole[start:stop].astype(np.int32)


class Arrays(dict[str, Ragged]):
  """What `encode` gave as arrays, by name; a name that it did not give is a ValueError."""

  def __missing__(self, name: str) -> Ragged:
    raise ValueError(
      f'the documents have no array {name!r}, only {", ".join(sorted(self)) or "none"}; the '
      "objective's `encode` must give it."
    )


class Memory:
  """A few records, encoded; implements `contracts.Documents`.

  Args:
    records: what a source yields.
    encode: an objective's, or an `encoding.Encoder`.
    tokenizer: for `encode`; ids must be in its vocabulary.

  Raises:
    TypeError, ValueError: as `encoding.Encoder` and `encoding.columns`.
  """

  def __init__(
    self, records: Sequence[Record], encode: encoding.Encode, tokenizer: Tokenizer | None
  ):
    encoder = encoding.Encoder([encode])
    encoded = [_encoded(encoder, record, i, tokenizer) for i, record in enumerate(records)]
    columns = encoding.columns(encoded, getattr(tokenizer, 'vocab_size', None))
    self._arrays = Arrays()
    for name, (entries, lengths) in columns.arrays.items():
      self._arrays[name] = Ragged(entries, np.append(0, np.cumsum(lengths)))
    self._values = {name: _as_cached(values) for name, values in columns.values.items()}
    self.ids = np.arange(len(encoded))
    self.names = frozenset(self._arrays)

  def __len__(self) -> int:
    return len(self.ids)

  def lengths(self, name: str) -> np.ndarray:
    """See the contract."""
    return np.diff(self._arrays[name].offsets)

  def array(self, name: str, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """See the contract."""
    return self._arrays[name].part(index, start, stop)

  def values(self, name: str) -> Sequence[Any] | None:
    """See the contract."""
    return self._values.get(name)

  def where(self, index: int) -> str:
    """See the contract."""
    return f'document {index}'


def _encoded(
  encoder: encoding.Encoder, record: Record, index: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
  try:
    return encoder(record, tokenizer)
  except Exception as error:
    error.add_note(f'while tokenizing document {index}')
    raise


def _as_cached(values: list[Any]) -> list[Any]:
  """As they would come back from the token cache: tuples are lists there."""
  return [json.loads(json.dumps(value)) for value in values]
