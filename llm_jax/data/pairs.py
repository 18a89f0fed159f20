"""Rows of one or two texts, as BERT reads them, and the chunks of documents that such pairs are cut
from.

Devlin et al. 2019, "BERT", section 3.1 and appendix A.1: [CLS] A [SEP] B [SEP], token type 0 up to
the first [SEP], 1 after it. A Hugging Face folder may put other special tokens around texts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.core.contracts import Documents, Example, Tokenizer
from llm_jax.data import pack, prompted


class Chunks:
  """Documents cut one after the other in chunks of `size` tokens.

  The last chunk of a document is what is left of it; empty documents have none.

  Args:
    documents: the documents.
    size: tokens per chunk, at least 1.
    beside: the name of an array with an integer for each token.
  """

  def __init__(self, documents: Documents, size: int, beside: str | None = None):
    if size < 1:
      raise ValueError(
        f'chunks of {size} tokens: the row has no room for text beside its special tokens; use a '
        'longer seq_len.'
      )
    self.documents, self.size, self.beside = documents, size, beside
    self.lengths = documents.lengths('tokens')
    chunks = -(-self.lengths // size)  # of each document, rounded up
    self.first = np.append(0, np.cumsum(chunks))  # the first chunk of each document

  def __len__(self) -> int:
    return int(self.first[-1])

  def document(self, index: int) -> int:
    """The document that chunk `index` is cut from."""
    return int(np.searchsorted(self.first, index, side='right')) - 1

  def __getitem__(self, index: int) -> np.ndarray:
    """The tokens of a chunk, [n] with 1 <= n <= size; [n, 2] with what stands beside them."""
    document = self.document(index)
    start = (index - int(self.first[document])) * self.size
    stop = min(start + self.size, int(self.lengths[document]))
    tokens = self.documents.array('tokens', document, start, stop)
    if self.beside is None:
      return tokens
    return np.stack([tokens, self.documents.array(self.beside, document, start, stop)], axis=1)

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
    tokens: [n] ids, or [n, 2] with what stands beside them.
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


class Frame(NamedTuple):
  """The special tokens around texts.

  Attributes:
    before, after: ids around one text.
    first, between, last: ids before the first text of a pair, between the two, after the second.
    second_type: the token type of the second text and of what follows it.
    filler: the id that an empty text is, where nothing stands around it.
  """

  before: tuple[int, ...]
  after: tuple[int, ...]
  first: tuple[int, ...]
  between: tuple[int, ...]
  last: tuple[int, ...]
  second_type: int = 1
  filler: int = 0

  @property
  def single(self) -> int:
    """How many special tokens stand around one text."""
    return len(self.before) + len(self.after)

  @property
  def double(self) -> int:
    """How many stand around and between the texts of a pair."""
    return len(self.first) + len(self.between) + len(self.last)


def frame(tokenizer: Tokenizer, causal: bool = False, closed: bool = True) -> Frame:
  """The special tokens that a tokenizer's texts stand in: those of its Hugging Face folder, or of
  our own ones; before them the virtual tokens, if it has any.

  Args:
    tokenizer: the tokenizer.
    causal: BOS and EOS of our own tokenizers are at the ends, not [CLS] and [SEP].
    closed: of a causal model's own tokenizer, texts end with EOS.
  """
  prompt = prompted.prompt(tokenizer)
  if tokenizer.template is not None:
    found = Frame(*tokenizer.template, *tokenizer.pair_template, filler=tokenizer.bos_id)
    return found._replace(before=(*prompt, *found.before), first=(*prompt, *found.first))
  begin, end = (tokenizer.cls_id,), (tokenizer.sep_id,)
  if causal:
    begin, end = (tokenizer.bos_id,), (tokenizer.eos_id,) if closed else ()
  return Frame((*prompt, *begin), end, (*prompt, *begin), (tokenizer.sep_id,), end)


def row(first: np.ndarray, second: np.ndarray | None, seq_len: int, frame: Frame) -> Example:
  """The row of one text, or of one pair; arguments, result and errors as for `packed`."""
  return packed([(first, second)], seq_len, frame)


def packed(
  texts: Sequence[tuple[np.ndarray, np.ndarray | None]],
  seq_len: int,
  frame: Frame,
  slots: int = 0,
) -> Example:
  """Lays out texts one after another in a row padded with zeros, each a segment of its own with
  positions from 0.

  Args:
    texts: ids of a text and None, or of the two texts of a pair.
    seq_len: T, at least the sum over all texts of their ids and special tokens.
    frame: the special tokens.
    slots: G, at least as many as there are texts; 0 where nobody asks where each of them stands.

  Returns:
    tokens, segments, positions and token_types, each [T] int32; with slots also text_firsts and
    text_lasts, each [G] int32.

  Raises:
    ValueError: the texts are longer than the row.
  """
  pieces = [_piece(first, second, frame) for first, second in texts]
  lengths = [len(piece) for piece in pieces]
  example = pack.assemble(pieces, seq_len)
  example['token_types'] = np.zeros(seq_len, np.int32)
  for stop, (_, second) in zip(np.cumsum(lengths), texts, strict=True):
    if second is not None:
      start = stop - len(second) - len(frame.last)
      example['token_types'][start:stop] = frame.second_type
  if slots:
    example |= pack.text_bounds(lengths, slots)
  return example


def _piece(first: np.ndarray, second: np.ndarray | None, frame: Frame) -> np.ndarray:
  if second is None:
    ids = [*frame.before, *first, *frame.after]
  else:
    ids = [*frame.first, *first, *frame.between, *second, *frame.last]
  return np.array(ids or [frame.filler], np.int32)
