"""Rows of one or two texts, as BERT reads them, and the chunks of documents that such pairs are cut
from.

Devlin et al. 2019, "BERT", section 3.1 and appendix A.1: [CLS] A [SEP] B [SEP], token type 0 up to
the first [SEP], 1 after it.
"""

from collections.abc import Sequence

import numpy as np

from llm_jax.core.contracts import Documents, Example
from llm_jax.data import pack


class Chunks:
  """Documents cut one after the other in chunks of `size` tokens.

  The last chunk of a document is what is left of it; empty documents have none.

  Args:
    documents: the documents.
    size: tokens per chunk, at least 1.
  """

  def __init__(self, documents: Documents, size: int):
    if size < 1:
      raise ValueError(
        f'chunks of {size} tokens: the row has no room for text beside its special tokens; use a '
        'longer seq_len.'
      )
    self.documents, self.size = documents, size
    self.lengths = documents.lengths('tokens')
    chunks = -(-self.lengths // size)  # of each document, rounded up
    self.first = np.append(0, np.cumsum(chunks))  # the first chunk of each document

  def __len__(self) -> int:
    return int(self.first[-1])

  def document(self, index: int) -> int:
    """The document that chunk `index` is cut from."""
    return int(np.searchsorted(self.first, index, side='right')) - 1

  def __getitem__(self, index: int) -> np.ndarray:
    """The tokens of a chunk, [n] with 1 <= n <= size."""
    document = self.document(index)
    start = (index - int(self.first[document])) * self.size
    stop = min(start + self.size, int(self.lengths[document]))
    return self.documents.array('tokens', document, start, stop)

  def other(self, index: int, rng: np.random.Generator) -> int:
    """A chunk drawn evenly from all chunks of documents other than the one of chunk `index`."""
    document = self.document(index)
    low, high = int(self.first[document]), int(self.first[document + 1])
    drawn = int(rng.integers(len(self) - (high - low)))
    return drawn if drawn < low else drawn + high - low


def split(
  tokens: np.ndarray, short_rate: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts a chunk in two texts at a random position.

  Each has at least one token; of a chunk of one token the second text is empty.

  Args:
    tokens: [n] ids.
    short_rate: how often the chunk is first shortened to a random length from 2 on (BERT's
      short_seq_prob).
    rng: where the randomness comes from.
  """
  if len(tokens) < 2:
    return tokens, tokens[:0]
  if rng.random() < short_rate:
    tokens = tokens[: rng.integers(2, len(tokens) + 1)]
  cut = rng.integers(1, len(tokens))
  return tokens[:cut], tokens[cut:]


def row(
  first: np.ndarray, second: np.ndarray | None, seq_len: int, begin: int, between: int, end: int
) -> Example:
  """The row of one text, or of one pair; arguments, result and errors as for `packed`."""
  return packed([(first, second)], seq_len, begin, between, end)


def packed(
  texts: Sequence[tuple[np.ndarray, np.ndarray | None]],
  seq_len: int,
  begin: int,
  between: int,
  end: int,
  slots: int = 0,
) -> Example:
  """Lays out texts one after another in a row padded with zeros, each a segment of its own with
  positions from 0.

  Args:
    texts: ids of a text and None, which becomes `begin first end`; or of a pair, `begin first
      between second end`.
    seq_len: T, at least the sum over all texts of n + 2 for one of n ids, or n + m + 3 for a pair.
    begin: id before a text.
    between: id between the two texts of a pair, of the first one's token type.
    end: id after a text or a pair.
    slots: G, at least as many as there are texts; 0 where nobody asks where each of them stands.

  Returns:
    tokens, segments, positions and token_types, each [T] int32; with slots also text_firsts and
    text_lasts, each [G] int32.

  Raises:
    ValueError: the texts are longer than the row.
  """
  pieces = [_piece(first, second, begin, between, end) for first, second in texts]
  lengths = [len(piece) for piece in pieces]
  example = pack.assemble(pieces, seq_len)
  example['token_types'] = np.zeros(seq_len, np.int32)
  for stop, (_, second) in zip(np.cumsum(lengths), texts, strict=True):
    if second is not None:
      example['token_types'][stop - len(second) - 1 : stop] = 1
  if slots:
    example |= pack.text_bounds(lengths, slots)
  return example


def _piece(
  first: np.ndarray, second: np.ndarray | None, begin: int, between: int, end: int
) -> np.ndarray:
  if second is None:
    return np.concatenate([[begin], first, [end]])
  return np.concatenate([[begin], first, [between], second, [end]])
