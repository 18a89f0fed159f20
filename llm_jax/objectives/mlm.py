"""Masked language modelling: some tokens of a row are hidden and predicted from both sides.

Devlin et al. 2019, "BERT", section 3.1 (15 % of the tokens; 80 % of them become [MASK], 10 % a
random token, 10 % stay) and its later whole-word variant; Joshi et al. 2020, "SpanBERT", section
3.1 (spans of whole words, replaced as a whole). The projection on the vocabulary is computed at the
masked positions only.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import contracts
from llm_jax.core.contracts import Batch, Documents, Example, Metrics, Net, Rows, Tokenizer
from llm_jax.data import pack, prompted, segmenters
from llm_jax.data.encoding import Encode
from llm_jax.data.segmenters import WORD_STARTS
from llm_jax.nn import heads, vocabulary

MASKINGS = ('token', 'word', 'span')
# tokens; a longer run without a word start (a URL, Chinese) counts as so many words of one token
LONGEST_WORD = 10
LONGEST_SPAN = 10  # words, as in SpanBERT
SPAN_P = 0.2  # parameter of the geometric distribution of span lengths, as in SpanBERT


class Objective(contracts.Objective):
  """Masked language modelling.

  Exactly round(mask_rate * n) of the n ordinary tokens of a row are masked, and at least one. Words
  are never masked by half: where only longer words are left, the masked tokens may be fewer by less
  than a word, and a row whose words are all longer than M = ceil(mask_rate * seq_len) has none.

  Args:
    tokenizer: gives the special ids and where words start.
    mask_rate: share of the ordinary tokens that is predicted, in (0, 1].
    masking: 'token', 'word' (all tokens of a word) or 'span' (runs of words, lengths geometric up
      to 10 with mean 3.8).
    mask_token_rate: share of the predicted tokens that is replaced by the mask token.
    random_token_rate: share of them that is replaced by a random ordinary token; the rest stays.
      Drawn for each token, with 'span' for each span.
    packing: how documents fill rows: 'windows', 'best_fit' or 'none'. Each piece of a document
      stands as [CLS] piece [SEP].
    words: 'jieba', where words begin is what this segmenter says; None: what the tokenizer says.
    label_smoothing, z_loss: as in `vocabulary.cross_entropy`.
  """

  terms = {'mlm': 1.0}

  def __init__(
    self,
    tokenizer: Tokenizer,
    mask_rate: float = 0.15,
    masking: str = 'token',
    mask_token_rate: float = 0.8,
    random_token_rate: float = 0.1,
    packing: str = 'best_fit',
    words: str | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
  ):
    if not 0 < mask_rate <= 1:
      raise ValueError(
        f'objective.mask_rate={mask_rate} must be above 0 and at most 1; BERT has 0.15.'
      )
    if masking not in MASKINGS:
      raise ValueError(f'objective.masking={masking!r} must be one of {", ".join(MASKINGS)}.')
    if min(mask_token_rate, random_token_rate) < 0 or mask_token_rate + random_token_rate > 1:
      raise ValueError(
        f'objective.mask_token_rate={mask_token_rate} and random_token_rate={random_token_rate} '
        'are shares: none below 0, together at most 1; BERT has 0.8 and 0.1.'
      )
    if packing not in pack.PACKINGS:
      raise ValueError(f'objective.packing={packing!r} must be one of {", ".join(pack.PACKINGS)}.')
    if tokenizer.mask_id is None:
      raise ValueError(
        "objective.name='mlm' needs a mask token, which this tokenizer lacks; take the folder of "
        "an encoder, or objective.name='clm'."
      )
    segmenters.check(words)
    if words is not None and masking == 'token':
      raise ValueError(
        f'objective.words={words!r} says what a word is, and masking by token masks none as a '
        "whole; set objective.masking='word' or 'span'."
      )
    vocabulary.check_loss(label_smoothing, z_loss)
    self.tokenizer, self.packing, self.words = tokenizer, packing, words
    self.mask_rate, self.masking = mask_rate, masking
    self.mask_token_rate, self.random_token_rate = mask_token_rate, random_token_rate
    self.smoothed = dict(label_smoothing=label_smoothing, z_loss=z_loss)
    self.special = np.asarray(tokenizer.special)
    self.ordinary = np.flatnonzero(~self.special).astype(np.int32)

  @classmethod
  def encoding(cls, options: Mapping[str, Any]) -> Encode:
    """With where words begin, if a segmenter says so."""
    return segmenters.encode_with_jieba if options.get('words') == 'jieba' else cls.encode

  def check(self, model: contracts.Model) -> None:
    """The model must see both sides."""
    if model.causal:
      raise ValueError(
        'objective mlm needs a model that sees both sides of a token (encoder); for a causal one '
        'choose objective clm.'
      )

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """Rows of pieces of documents, each as [CLS] piece [SEP]."""
    return _Rows(self, documents, seq_len)

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """Masks a row: replaces tokens, adds mask_positions (rising), mask_targets, mask_weights, each
    [M].
    """
    tokens = example['tokens']
    word_start = None
    if self.words is not None:
      example, word_start = _without_starts(example)
    elif self.masking != 'token':
      word_start = np.asarray(self.tokenizer.word_start)[tokens]
    ordinary = ~self.special[tokens] & (example['segments'] > 0)
    room = math.ceil(self.mask_rate * len(tokens) - 1e-9)
    positions, group = self.choose(word_start, ordinary, room, rng)
    draw = rng.random(len(tokens))[group]
    masked = tokens.copy()
    hidden = positions[draw < self.mask_token_rate]
    randomised = positions[draw >= 1 - self.random_token_rate]
    masked[hidden] = self.tokenizer.mask_id
    masked[randomised] = self.ordinary[rng.integers(len(self.ordinary), size=len(randomised))]
    # Not np.pad, which takes longer than all else here.
    positions_M, targets_M = np.zeros((2, room), np.int32)
    weights_M = np.zeros(room, np.float32)
    positions_M[: len(positions)] = positions
    targets_M[: len(positions)] = tokens[positions]
    weights_M[: len(positions)] = 1.0
    return example | {
      'tokens': masked,
      'mask_positions': positions_M,
      'mask_targets': targets_M,
      'mask_weights': weights_M,
    }

  def choose(
    self, word_start: np.ndarray | None, ordinary: np.ndarray, room: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the positions to predict in a row.

    Args:
      word_start: [T] bool, True where a token begins a word; not read in masking by token.
      ordinary: [T] bool, True where a token may be chosen.
      room: M, the most positions there may be.
      rng: where the randomness comes from.

    Returns:
      Indices into the row, rising, and for each the number of the group that is replaced alike,
      below T.
    """
    count = min(max(1, round(self.mask_rate * int(np.count_nonzero(ordinary)))), room)
    if self.masking == 'token':
      positions = np.sort(rng.permutation(np.flatnonzero(ordinary))[:count])
      return positions, np.arange(len(positions))
    most = LONGEST_WORD if self.words is None else len(ordinary)
    start, length = words(ordinary, word_start, most)
    if len(length) and length.min() > count:
      count = min(int(length.min()), room)  # no word fits: the shortest, if the row has room for it
    longest = 1 if self.masking == 'word' else LONGEST_SPAN
    spans = _choose_spans(start, length, count, longest, rng)
    if not spans:
      nothing = np.zeros(0, np.int64)
      return nothing, nothing
    taken, numbers = np.transpose(spans)
    positions = np.concatenate([np.arange(start[w], start[w] + length[w]) for w in taken])
    group = np.repeat(numbers, length[taken])
    order = np.argsort(positions)
    if self.masking == 'word':
      return positions[order], np.arange(len(positions))
    return positions[order], group[order]

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """The transform before the vocabulary projection, and its bias."""
    return {'mlm': heads.MLMHead(model.options, model.vocab_size)}

  def positions(self, batch: Batch) -> jax.Array:
    """The masked ones, [B, M]."""
    return batch['mask_positions']

  def loss(self, net: Net, hidden_BMD: jax.Array, batch: Batch) -> Metrics:
    """Cross-entropy in nats and accuracy at the masked positions."""
    x_BMD, bias_V = net.heads['mlm'](hidden_BMD)
    weights_BM = batch['mask_weights']
    sums = vocabulary.cross_entropy(
      x_BMD, net.model.table(), batch['mask_targets'], weights_BM, bias_V, **self.smoothed
    )
    return vocabulary.metrics('mlm', sums, jnp.sum(weights_BM))

  distils = True

  def answer(self, net: Net, hidden_BMD: jax.Array, batch: Batch) -> vocabulary.End:
    """What logits of the vocabulary are made of, at the masked positions."""
    del batch
    x_BMD, bias_V = net.heads['mlm'](hidden_BMD)
    return vocabulary.End(x_BMD, net.model.table(), bias_V)

  def distilled(
    self,
    net: Net,
    hidden_BMD: jax.Array,
    taught: vocabulary.End,
    batch: Batch,
    temperature: float,
  ) -> tuple[jax.Array, jax.Array]:
    """Over the masked positions."""
    ours = self.answer(net, hidden_BMD, batch)
    apart_BM = vocabulary.soft_divergence(ours, taught, temperature)
    weights_BM = batch['mask_weights']
    return jnp.sum(apart_BM * weights_BM), jnp.sum(weights_BM)

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """Perplexity of a masked token."""
    return {'perplexity': float(np.exp(means['mlm_nll']))}

  def targets(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The ids that a batch asks for and their weights, each [B, M]."""
    return batch['mask_targets'], batch['mask_weights']

  def flops(self, model: contracts.Model, batch: Batch) -> float:
    """Of the head's dense layer and the vocabulary, at the masked positions."""
    rows, masked = batch['mask_positions'].shape
    dim = model.options.dim
    return 2.0 * rows * masked * (dim * dim + model.vocab_size * dim)


class _Rows:
  def __init__(self, objective: Objective, documents: Documents, seq_len: int):
    self.documents, self.seq_len = documents, seq_len
    tokenizer = objective.tokenizer
    begin = *prompted.prompt(tokenizer), tokenizer.cls_id
    self.edges = np.array(begin, np.int32), np.array([tokenizer.sep_id], np.int32)
    pack_in = pack.PACKINGS[objective.packing]
    self.plan = pack_in(documents.lengths('tokens'), seq_len, overhead=len(begin) + 1)
    self.segmented = objective.words is not None

  def __len__(self) -> int:
    return len(self.plan)

  def example(self, index: int, rng: np.random.Generator) -> Example:
    begin, end = self.edges
    row = self._row('tokens', index, begin, end)
    if self.segmented:
      none = map(np.zeros_like, self.edges)
      row[WORD_STARTS] = self._row(WORD_STARTS, index, *none)['tokens']
    return row

  def _row(self, name: str, index: int, begin: np.ndarray, end: np.ndarray) -> Example:
    pieces = []
    for piece in self.plan[index]:
      pieces.append(np.concatenate([begin, self.documents.array(name, *piece), end]))
    return pack.assemble(pieces, self.seq_len)


def _without_starts(example: Example) -> tuple[Example, np.ndarray]:
  """A row without the array that says where words begin, and that array, [T] bool."""
  if WORD_STARTS not in example:
    raise ValueError(
      'objective.words needs rows that mlm, nsp or sop lays out; in a mix, config.objective.rows '
      'says which does.'
    )
  rest = {name: array for name, array in example.items() if name != WORD_STARTS}
  return rest, example[WORD_STARTS] > 0


def words(
  ordinary: np.ndarray, word_start: np.ndarray, longest: int = LONGEST_WORD
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the words of a row.

  A word begins where a token says so and after every special token, and ends before the next one; a
  run of more than `longest` tokens is taken token by token.

  Args:
    ordinary: [T] bool, True for tokens of text, False for special ones and padding.
    word_start: [T] bool, True where the token begins a word.
    longest: tokens that a word may have.

  Returns:
    Index of each word's first token, and its number of tokens.
  """
  begin = ordinary & (word_start | ~np.concatenate([[False], ordinary[:-1]]))
  number = np.cumsum(begin) - 1
  length = np.bincount(number[ordinary], minlength=np.count_nonzero(begin))
  if len(length):
    begin |= ordinary & (length[number] > longest)
    length = np.bincount((np.cumsum(begin) - 1)[ordinary])
  return np.flatnonzero(begin), length


def _choose_spans(
  start: np.ndarray, length: np.ndarray, count: int, longest: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
  """Words to mask, `count` tokens or a little less in all: pairs of word and number of its span.

  Every word is tried as a start in random order, so that the end is reached even where nearly all
  is masked. A span ends early at a special token, at a word already taken, and at one that is too
  long for what is left.
  """
  chosen: dict[int, int] = {}
  odds = np.cumsum((1 - SPAN_P) ** np.arange(longest))
  # The distribution is truncated, not clipped: its mean is 3.8.
  sizes = 1 + np.searchsorted(odds[:-1] / odds[-1], rng.random(len(start)))
  for span, first in enumerate(rng.permutation(len(start))):
    for word in range(first, min(first + sizes[span], len(start))):
      beyond = word > first and start[word] != start[word - 1] + length[word - 1]
      if beyond or word in chosen or length[word] > count:
        break
      chosen[word] = span
      count -= length[word]
    if not count:
      break
  return list(chosen.items())
