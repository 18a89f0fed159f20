"""What a record becomes before it is part of a row: named arrays of integers, and other values.

An `encode` function (`contracts.Objective.encode` is one) turns a record into both. Several of
them, those of the parts of a mix, act as one `Encoder`. Arrays named `tokens` or `..._tokens` hold
ids of the vocabulary and are checked against it; all others hold any int32.
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_jax.core.contracts import Encoded, Objective, Record, Tokenizer

Encode = Callable[[Record, Tokenizer], Encoded]
TEXT = 'text'  # identity of the default


class Encoder:
  """Several `encode` functions as one, which checks what they give.

  Args:
    functions: plain functions; one that is given twice counts once. Two that give a value of the
      same name must give equal values.
  """

  def __init__(self, functions: Iterable[Encode]):
    self.functions = tuple(dict.fromkeys(functions))

  @functools.cached_property
  def identity(self) -> tuple[str, ...]:
    """What the results depend on besides record and tokenizer, as strings, sorted."""
    return tuple(sorted(map(identity, self.functions)))

  def __call__(self, record: Record, tokenizer: Tokenizer) -> Encoded:
    """The arrays and values of one record.

    Raises:
      TypeError, ValueError: a result that the contract does not allow, or two that differ.
    """
    merged: Encoded = {}
    for encode in self.functions:
      for name, value in encode(record, tokenizer).items():
        if value is None:
          continue
        _check(name, value)
        if name in merged and not _equal(merged[name], value):
          raise ValueError(
            f'two objectives encode a record to different {name!r}; give one of them another name.'
          )
        merged[name] = value
    return merged


class Columns(NamedTuple):
  """Several encoded records, by name.

  Attributes:
    arrays: integers of all records end to end, and [records] int64, how many each has.
    values: what is no array, per record; None where a record has none.
  """

  arrays: dict[str, tuple[np.ndarray, np.ndarray]]
  values: dict[str, list[Any]]


def columns(encoded: Sequence[Encoded], vocab_size: int | None, first: int = 0) -> Columns:
  """Encoded records by name.

  Args:
    encoded: one per record.
    vocab_size: ids must be below it; None to leave them unchecked.
    first: number of the first record, for messages.

  Raises:
    ValueError: an integer out of range, or one name for an array and for something else.
  """
  arrays, values = {}, {}
  for name in dict.fromkeys(name for record in encoded for name in record):
    column = [record.get(name) for record in encoded]
    kinds = {isinstance(value, np.ndarray) for value in column if value is not None}
    if len(kinds) > 1:
      raise ValueError(
        f'{name!r} is an array in some of the {_numbers(first, len(column))} and none in others; '
        '`encode` must give one or the other.'
      )
    if kinds == {True}:
      arrays[name] = _ragged(name, column, vocab_size, first)
    else:
      values[name] = column
  return Columns(arrays, values)


def identity(encode: Encode) -> str:
  """`TEXT` for the default; for any other function its name and a hash of its source code, and of
  the arguments that `functools.partial` gives it by name, which JSON must hold.

  Raises:
    ValueError: it is not a plain function, or its source code is not to be found.
  """
  if isinstance(encode, functools.partial) and not encode.args:
    given = json.dumps(encode.keywords, sort_keys=True)
    return f'{identity(encode.func)} {hashlib.sha256(given.encode()).hexdigest()}'
  if encode is Objective.encode:
    return TEXT
  if not inspect.isfunction(encode):
    raise ValueError(f'encode={encode!r} must be a plain function: make it a static method.')
  name = f'{encode.__module__}.{encode.__qualname__}'
  source = _source(encode)
  if source is None:
    raise ValueError(
      f'the source code of {name} is not to be found, and the token cache is named by it; define '
      'it in a file.'
    )
  return f'{name} {hashlib.sha256(source.encode()).hexdigest()}'


def holds_ids(name: str) -> bool:
  """Whether the array of this name holds ids of the vocabulary."""
  return name == 'tokens' or name.endswith('_tokens')


def counted(names: Iterable[str]) -> list[str]:
  """The arrays whose entries are counted as tokens: those of ids, or all where there are none."""
  names = sorted(names)
  return [name for name in names if holds_ids(name)] or names


def dtype(name: str, vocab_size: int | None) -> np.dtype:
  """The smallest type for ids, int32 for any other array."""
  if vocab_size is None or not holds_ids(name):
    return np.dtype(np.int32)
  return np.min_scalar_type(vocab_size - 1)


def spelled(record: Record) -> list[bytes]:
  """What a record is known by: its text and its pair, or its sorted JSON where it has no text."""
  text, pair = record.get('text'), record.get('pair') or ''
  if isinstance(text, str) and isinstance(pair, str):
    return [text.encode(), pair.encode()]
  return [json.dumps(record, sort_keys=True).encode()]


def digest(record: Record) -> bytes:
  """8 bytes that decide on which side of a split a record is: of what it is known by, or of its
  `context`, so that all questions about one text are on one side.
  """
  context = None if 'text' in record else record.get('context')
  parts = [context.encode()] if isinstance(context, str) else spelled(record)
  return hashlib.blake2b(b'\0'.join(parts), digest_size=8).digest()


def _source(function: Callable[..., Any]) -> str | None:
  if function.__code__.co_filename == '<string>':
    return None  # from `exec`; since Python 3.13 what `python -c` was given would be found for it
  try:
    return inspect.getsource(function)
  except OSError:
    return None


def _check(name: Any, value: Any) -> None:
  if not isinstance(name, str) or not name.isidentifier():
    raise ValueError(f'`encode` gives {name!r}; names must be letters, digits and underscores.')
  if not isinstance(value, np.ndarray):
    if holds_ids(name):
      raise TypeError(
        f'`encode` gives {name!r} as {type(value).__name__}; ids must be an array of integers.'
      )
    return
  if value.ndim != 1 or (value.size and value.dtype.kind not in 'iu'):
    raise TypeError(
      f'`encode` gives {name!r} as an array {list(value.shape)} of {value.dtype}; it must be '
      'integers with one axis, or a value that JSON holds (a list, say).'
    )


def _equal(a: Any, b: Any) -> bool:
  if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
    return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b)
  return a == b


def _ragged(
  name: str, column: Sequence[np.ndarray | None], vocab_size: int | None, first: int
) -> tuple[np.ndarray, np.ndarray]:
  lengths = np.asarray([0 if array is None else len(array) for array in column], np.int64)
  given = [np.zeros(0, np.int64), *(array for array in column if array is not None)]
  flat = np.concatenate(given, dtype=np.int64, casting='unsafe')
  if flat.size:
    _check_range(name, int(flat.min()), int(flat.max()), vocab_size, _numbers(first, len(column)))
  return flat.astype(dtype(name, vocab_size)), lengths


def _check_range(name: str, low: int, high: int, vocab_size: int | None, where: str) -> None:
  if vocab_size is not None and holds_ids(name):
    if not 0 <= low <= high < vocab_size:
      raise ValueError(
        f'the tokenizer gives ids {low} to {high} in {where}; they must be from 0 to '
        f'{vocab_size - 1}.'
      )
  elif not -(2**31) <= low <= high < 2**31:
    raise ValueError(f'{name!r} holds {low} to {high} in {where}; it must fit in 32 bits.')


def _numbers(first: int, count: int) -> str:
  return f'documents {first} to {first + count - 1}'
