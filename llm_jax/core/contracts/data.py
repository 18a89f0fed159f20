"""Text and records: tokenizers, sources, documents, rows."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from llm_jax.core.contracts.values import Example


class Tokenizer(Protocol):
  """Text to ids and back.

  Ids of special tokens are attributes: pad_id (0 where the tokenizer was trained here), unk_id,
  cls_id, sep_id, mask_id, bos_id, eos_id. Our own tokenizers have all seven. A Hugging Face folder
  may lack some: then cls is bos, else eos; sep is eos; bos is cls, else eos; eos is sep; pad is
  eos, else 0 (padding is known by segment 0, not by its id); unk is pad; mask_id alone is None,
  and masked language modelling refuses such a tokenizer.

  Attributes:
    vocab_size: 1 + the highest id.
    eos_ids: where a text that is generated ends: eos_id, and others that a folder names.
    template: ids that a Hugging Face folder puts before and after one text; None for our own,
      which an encoder reads as [CLS] ... [SEP] and a decoder as BOS ....
    pair_template: likewise the ids before the first text of a pair, between the two and after the
      second, and the token type of the second; None for our own.
    fingerprint: changes whenever any id of any text could change.
    token_bytes: [vocab_size] int32, UTF-8 bytes that each id spells, 0 for special tokens.
    word_start: [vocab_size] bool, whether the id begins a word (whole-word masking).
    special: [vocab_size] bool, whether the id is a special token.
    special_texts: their texts, as chat templates name them: `bos_token`, `eos_token` and so on.
    sentinels: ids of special tokens that stand for what was taken out of a text, in their order;
      none where the vocabulary has none.

  One that reads and writes by other rules has a tokenizer `target` for what is written (Marian).

  One that an adapter gave virtual tokens (`data.prompted`) has them as `prompt`, ids that stand
  before each text, and its arrays go on to the last of them.
  """

  vocab_size: int
  pad_id: int
  unk_id: int
  cls_id: int
  sep_id: int
  mask_id: int | None
  bos_id: int
  eos_id: int
  eos_ids: tuple[int, ...]
  template: tuple[tuple[int, ...], tuple[int, ...]] | None
  pair_template: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] | None
  fingerprint: str
  token_bytes: np.ndarray
  word_start: np.ndarray
  special: np.ndarray
  special_texts: Mapping[str, str]
  sentinels: tuple[int, ...]

  def encode(self, text: str, special: bool = False) -> np.ndarray:
    """The ids of a text, [n] int32, none around it.

    '[MASK]' in the text is text like any other, with `special` it is its special token.
    """
    ...

  def offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What `encode` gives, and [n, 2] int64: where the characters of each id begin and end."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; special tokens are left out."""
    ...

  def special_text(self, number: int) -> str:
    """The text of a special token, '' where its id has none."""
    ...

  def spelling(self, number: int) -> bytes:
    """What an id spells within a text, in UTF-8, of a character perhaps a part; b'' for a special
    token.
    """
    ...

  def save(self, directory: str) -> None:
    """Writes what the module's `load(directory)` reads."""
    ...

  def export(
    self, directory: str, *, causal: bool, max_len: int, token_types: bool, closed: bool = False
  ) -> None:
    """Writes what transformers' `AutoTokenizer` opens.

    Args:
      directory: is made where it is not there.
      causal: texts stand after BOS, else between [CLS] and [SEP].
      max_len: the longest row that the model takes.
      token_types: whether the model reads token types.
      closed: a causal model's texts end with EOS, as its classifier reads them; where the model is
        not causal, they have EOS after them and nothing before, as an encoder-decoder's.
    """
    ...


class Source(Protocol):
  """Records by index.

  A record that a language model learns from has a `text` (str). Where the source has them, `pair`
  is a second text, and `label` a str, a float, or a list of str. Further fields are the business
  of the objective, whose `encode` reads them.

  A source may have a `where(index)`, which says where a record stands ('data.jsonl:17'), for
  messages.

  Attributes:
    fingerprint: changes whenever the records could.
  """

  fingerprint: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


class Documents(Protocol):
  """Encoded records by index: one split (training or validation) of one corpus, or a few texts.

  Attributes:
    ids: [documents] int64, the index of each document in its source.
    names: what an objective's `encode` gave as arrays of integers.
  """

  ids: np.ndarray
  names: frozenset[str]

  def __len__(self) -> int: ...

  def lengths(self, name: str) -> np.ndarray:
    """[documents] int64: how long the array `name` of each document is."""
    ...

  def array(self, name: str, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """[stop - start] int32: a part of the array `name` of one document, cut as a slice is."""
    ...

  def values(self, name: str) -> Sequence[Any] | None:
    """What `encode` gave under `name` that is no array, one per document; None where none has."""
    ...

  def where(self, index: int) -> str:
    """Where a document comes from, for messages: 'data.jsonl:17'."""
    ...


class Rows(Protocol):
  """The rows that an objective lays documents out in: how many there are, and what each holds."""

  def __len__(self) -> int: ...

  def example(self, index: int, rng: np.random.Generator) -> Example: ...


class Texts(Rows, Protocol):
  """Rows that hold several texts each, all of them whole or cut to a row. A text that is read in
  several parts (windows) is named once for each.

  Attributes:
    cut: how many texts are longer than a row and lose their ends.
  """

  cut: int

  def texts(self, index: int) -> list[int]:
    """The documents of one row, in the order in which they stand in it."""
    ...
