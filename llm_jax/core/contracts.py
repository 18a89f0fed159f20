"""The few agreements that the parts of the program share: what a batch holds, what an objective, a
tokenizer, a source must do.

A batch is a dictionary of arrays whose leading axis is the row. Letters: B rows, T tokens of a row,
  M masked positions,
C classes, G the most texts of a row, where what is learned belongs to texts. Every array has one
static shape for the whole run; rows that only fill up a batch are all zeros.

| key | shape, type | meaning |
|---|---|---|
| tokens | B T int32 | input ids; anything where segments is 0 |
| segments | B T int32 | 0 padding, then 1, 2, ...: one number a document; attention never crosses from one to another |
| positions | B T int32 | place within the segment, from 0 |
| token_types | B T int32 | 0 first text, 1 second text of a pair (only from objectives with pairs) |
| mask_positions, mask_targets, mask_weights | B M int32, int32, float32 | masked LM: places in the row, true ids there, 1 or 0 |
| targets, weights | B T int32, float32 | causal LM: the next id at each place, 1 where it counts |
| bytes | B float32 | causal LM: UTF-8 bytes that the counted targets spell |
| nsp_label, nsp_weight; sop_label, sop_weight | B int32, float32 | 1 when the pair is not what it should be |
| text_firsts, text_lasts | B G int32 | first and last place of text g, which is segment g + 1; 0 where the row has fewer texts |
| label, label_weight | B G int32, or B G C float32, or B G float32; B G float32 | classification; weight 0: no text or no label |
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Batch = Mapping[str, Any]
Pairs = dict[
  str, tuple[Any, Any]
]  # name -> (sum, weight); divided once, at the end, by the global weight


class Tokenizer(Protocol):
  """Text to ids and back.

  Ids of special tokens are attributes: pad_id (0 where the tokenizer was trained here), unk_id,
    cls_id, sep_id, mask_id, bos_id,
  eos_id. Our own tokenizers have all seven. A Hugging Face folder may lack some: then cls is bos,
    else eos; sep is eos; bos is
  cls, else eos; eos is sep; pad is eos, else 0 (padding is known by segment 0, not by its id); unk
  is pad; mask_id alone is None, and masked language modelling refuses such a tokenizer.
  """

  vocab_size: int  # 1 + the highest id
  pad_id: int
  unk_id: int
  cls_id: int
  sep_id: int
  mask_id: int | None
  bos_id: int
  eos_id: int
  template: tuple[tuple[int, ...], tuple[int, ...]] | None
  # ids that a Hugging Face folder puts before and after one text; None for our own: [CLS] ... [SEP]
  # (encoder), BOS ... (decoder)
  fingerprint: str  # changes whenever any id of any text could change
  token_bytes: (
    np.ndarray
  )  # [vocab_size] int32: UTF-8 bytes that each id spells, 0 for special tokens
  word_start: np.ndarray  # [vocab_size] bool: the id begins a word (whole-word masking)
  special: np.ndarray  # [vocab_size] bool: the id is a special token

  def encode(self, text: str, special: bool = False) -> np.ndarray: ...

  # [n] int32, none around it; '[MASK]' in the text is text like any other, with special=True its
  # special token

  def offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]: ...

  # what encode gives, and [n, 2] int64: where the characters of each id begin and end in the text

  def decode(self, ids: Sequence[int]) -> str: ...  # special tokens left out

  def save(self, directory: str) -> None: ...

  def export(
    self, directory: str, *, causal: bool, max_len: int, token_types: bool
  ) -> None: ...  # for AutoTokenizer


class Source(Protocol):
  """Documents by index: {'text': str} and, where the source has them, 'pair': str and 'label': str,
  float or list of str.
  """

  fingerprint: str  # changes whenever the documents could

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


class Documents(Protocol):
  """One split (training or validation) of one tokenized corpus, by index; ids without special
  tokens.
  """

  ids: np.ndarray  # [documents] int64: the index of each document in its source, for messages
  lengths: np.ndarray  # [documents] int64: tokens of each text
  pair_lengths: np.ndarray | None  # likewise for the second texts, None where there are none
  labels: Sequence[Any] | None  # one a document, None where the corpus has none

  def __len__(self) -> int: ...

  def text(
    self, index: int, start: int = 0, stop: int | None = None
  ) -> np.ndarray: ...  # [stop - start] int32

  def pair(self, index: int) -> np.ndarray: ...  # [n] int32


class Rows(Protocol):
  """The rows that an objective lays documents out in: how many there are, and the example of each."""

  def __len__(self) -> int: ...

  def example(
    self, index: int, rng: np.random.Generator
  ) -> dict[str, np.ndarray]: ...  # one row: batch keys without B


class Texts(Rows, Protocol):
  """Rows that hold several texts each, all of them whole or cut to a row, none twice."""

  cut: int  # how many texts are longer than a row and lose their ends

  def texts(
    self, index: int
  ) -> list[int]: ...  # the documents in one row, in the order in which they stand


class Objective(Protocol):
  """What is learned. Host half: rows and examples in NumPy. Device half: heads and loss in JAX,
  pure.
  """

  def rows(self, documents: Documents, seq_len: int) -> Rows: ...

  def transform(
    self, example: dict[str, np.ndarray], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Adds this objective's arrays to a row that any objective laid out (masking, say); called
    after `Rows.example`.
    """
    ...

  def heads(self, model: Any) -> dict[str, Any]:
    """Linen modules by name, to be created beside the model as `heads_<name>`; equal names of two
    objectives are one head.
    """
    ...

  terms: dict[str, float]  # name of each pair that is a loss -> its coefficient in the total
  predictor: 'Predictor | None'  # what gives labels to rows: itself, a part of it, or nothing

  def places(self, batch: Batch) -> Any | None:
    """The places of each row whose hidden states are read, [B, P] int32, any of them more than
    once; None for all of them.
    """
    ...

  def loss(self, net: Any, hidden_BPD: Any, batch: Batch) -> Pairs:
    """(sum, weight) for each term in `terms`, and for any further metric; weights depend on the
    batch alone, never on parameters.

    `hidden_BPD` are the hidden states at `places`, in their order. `net` is the bound network:
    `net.model.table()` is the projection on the vocabulary, [V, D], for `vocabulary.cross_entropy`;
    `net.heads[name](...)` calls a head.
    """
    ...

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """Further numbers from the divided ones: perplexity from the mean loss, say."""
    ...

  def targets(self, batch: Batch) -> tuple[Any, Any] | None:
    """Ids that a batch asks for, and their weights; None where no tokens are predicted."""
    ...


class Predictor(Protocol):
  """An objective that gives labels to texts."""

  def encode(self, documents: Documents, seq_len: int) -> Texts:
    """Rows of texts without labels; the shapes of an example depend on `seq_len` alone."""
    ...

  def places(self, batch: Batch) -> Any | None:
    """As an objective's."""
    ...

  def predict(self, net: Any, hidden_BPD: Any, batch: Batch) -> dict[str, Any]:
    """Arrays [B, G, ...]: what is said of text g of each row."""
    ...

  def describe(self, text: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `predict` says of one text, as JSON can hold it."""
    ...
