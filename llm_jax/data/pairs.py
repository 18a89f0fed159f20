"""Rows of one or two texts, as BERT reads them, and the chunks of documents that such pairs are made of.

Devlin et al. 2019, "BERT", section 3.1 and appendix A.1: [CLS] A [SEP] B [SEP], token type 0 up to the first [SEP], 1 after it.
"""

import numpy as np

from llm_jax.contracts import Documents


class Chunks:
  """Documents cut one after the other in chunks of `size` tokens; the last chunk of a document is what is left.

  Args:
    documents: the documents; empty ones have no chunk.
    size: tokens a chunk, at least 1.
  """

  def __init__(self, documents: Documents, size: int):
    if size < 1:
      raise ValueError(f'chunks of {size} tokens: the row has no place for text beside its special tokens; use a longer seq_len.')
    self.documents, self.size = documents, size
    self.first = np.concatenate([[0], np.cumsum(-(-np.asarray(documents.lengths) // size))])  # first chunk of each document

  def __len__(self) -> int:
    return int(self.first[-1])

  def document(self, index: int) -> int:
    """The document that chunk `index` is cut from."""
    return int(np.searchsorted(self.first, index, side='right')) - 1

  def __getitem__(self, index: int) -> np.ndarray:
    """The tokens of a chunk, [n] with 1 <= n <= size."""
    document = self.document(index)
    start = (index - int(self.first[document])) * self.size
    return self.documents.text(document, start, min(start + self.size, int(self.documents.lengths[document])))

  def other(self, index: int, rng: np.random.Generator) -> int:
    """A chunk drawn evenly from all chunks of the other documents than the one of chunk `index`."""
    document = self.document(index)
    low, high = int(self.first[document]), int(self.first[document + 1])
    drawn = int(rng.integers(len(self) - (high - low)))
    return drawn if drawn < low else drawn + high - low


def split(tokens: np.ndarray, short_rate: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Cuts a chunk in two texts at a random place, each with at least one token (the second is empty for a chunk of one).

  Args:
    tokens: [n] ids.
    short_rate: how often the chunk is first shortened to a random length from 2 on (BERT's short_seq_prob).
    rng: where the randomness comes from.
  """
  if len(tokens) < 2:
    return tokens, tokens[:0]
  if rng.random() < short_rate:
    tokens = tokens[:rng.integers(2, len(tokens) + 1)]
  cut = rng.integers(1, len(tokens))
  return tokens[:cut], tokens[cut:]


def row(first: np.ndarray, second: np.ndarray | None, seq_len: int, begin: int, between: int, end: int) -> dict[str, np.ndarray]:
  """Lays out `begin first end`, or `begin first between second end`, as one segment in a row padded with zeros.

  Args:
    first: [n] ids.
    second: [m] ids, or None for a row of one text.
    seq_len: T, at least n + 2, or n + m + 3.
    begin: id before the first text.
    between: id between the two texts, of the first one's token type.
    end: id after the last text.

  Returns:
    tokens, segments, positions and token_types, each [T] int32.
  """
  parts = [[begin], first, [end]] if second is None else [[begin], first, [between], second, [end]]
  ids = np.concatenate(parts)
  if len(ids) > seq_len:
    raise ValueError(f'{len(ids)} tokens do not fit in a row of {seq_len}; cut the texts first.')
  example = {key: np.zeros(seq_len, np.int32) for key in ('tokens', 'segments', 'positions', 'token_types')}
  example['tokens'][:len(ids)] = ids
  example['segments'][:len(ids)] = 1
  example['positions'][:len(ids)] = np.arange(len(ids))
  if second is not None:
    example['token_types'][len(first) + 2:len(ids)] = 1
  return example
