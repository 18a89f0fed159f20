"""Token labelling: a tag for each word of a text (named entities, parts of speech), as BERT is
fine-tuned for it (Devlin et al. 2019, section 5.3).

A text is tokenized as it runs, and each word is read at its first token. The tags of a text are
chosen each for itself (softmax), or together by a linear-chain CRF (Huang et al. 2015,
arXiv:1508.01991) or a structured hinge loss (Tsochantaridis et al. 2005).

Short texts share a row, as those of `classify` do; loss and gradient are those of the same texts
with a row each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from llm_jax.core import contracts
from llm_jax.core.contracts import (
  Batch,
  Documents,
  Encoded,
  Example,
  Metrics,
  Net,
  Record,
  Tokenizer,
)
from llm_jax.data import pairs
from llm_jax.data import words as words_lib
from llm_jax.nn import crf, heads
from llm_jax.objectives.shared import label_losses, soft
from llm_jax.objectives.shared import tags as tags_lib
from llm_jax.objectives.shared.text_rows import TextRows
from llm_jax.objectives.shared.uncertainty import MEASURES

LOSSES = ('softmax', 'crf', 'hinge')
PACKINGS = ('best_fit', 'none')


class Objective(contracts.Objective, contracts.Predictor):
  """A tag for each word of a record.

  A record has `words` and their `tags`, or a `text` and `spans` of its characters ([[start, end,
  label], ...], which become tags in IOB2). A word that no token spells, or whose tokens are cut off
  at the end of a row, is not learned from; it is counted and logged, and answered with the tag
  `unread`.

  A batch has, beside tokens, `chain` [B, T] int32 (`nn.crf`), `tag` [B, T] int32 and `tag_weight`
  [B, T] float32.

  Args:
    tokenizer: makes the ids.
    tags: names of the tags in the order of their numbers; None for those of the training documents.
    scheme: how tags spell entities: 'IOB1', 'IOB2', 'IOBES', 'BILOU', or 'none'; None for what
      their names show. With 'crf' and 'hinge', moves that it does not allow have probability 0.
    loss: 'softmax', 'crf' or 'hinge'.
    words: how words make a text and a text is split, one of `data.words.WORDS`: 'space',
      'punctuation', 'character', 'jieba'.
    label_all: all tokens of a word learn its tag, not only the first; with 'softmax'.
    unread: the tag that a word without a token gets; None for O, or else the most frequent one.
    dropout: rate before the last linear layer.
    transform: what stands between model and last layer: 'norm', ModernBERT's linear map, activation
      and norm; 'none'. None: what the folder has that the run starts from, or else none.
    unlabelled: a document without tags is an 'error', or counts for nothing ('ignore').
    predicate: tags say what the words are to one of them, the predicate (roles, arguments of an
      event): a record has the number of that word as `predicate`, or [first, stop] of several, or
      of a text [start, end] of its characters. It is read between signs, as spans of `relation`.
    packing: 'best_fit' puts several texts in a row; 'none': one text per row.
  """

  terms = {'tag': 1.0}
  evaluators = ('loss', 'entities')
  derived = ('tags', 'scheme', 'unread')

  def __init__(
    self,
    tokenizer: Tokenizer,
    tags: tuple[str, ...] | None = None,
    scheme: str | None = None,
    loss: str = 'softmax',
    words: str = 'space',
    label_all: bool = False,
    unread: str | None = None,
    dropout: float = 0.1,
    transform: str | None = None,
    unlabelled: str = 'error',
    packing: str = 'best_fit',
    predicate: bool = False,
  ):
    transform = transform or 'none'
    for name, value, known in (
      ('loss', loss, LOSSES),
      ('transform', transform, ('norm', 'none')),
      ('unlabelled', unlabelled, ('error', 'ignore')),
      ('packing', packing, PACKINGS),
    ):
      if value not in known:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(known)}.')
    if not 0 <= dropout < 1:
      raise ValueError(f'objective.dropout={dropout} must be at least 0 and below 1.')
    if label_all and loss != 'softmax':
      raise ValueError(
        f"objective.label_all needs loss='softmax': with {loss!r} the chain goes from word to word."
      )
    words_lib.check(words)
    self.classes = self.tags = _checked(tags)
    self.scheme = scheme or tags_lib.scheme_of(self.tags)
    tags_lib.check_scheme(self.scheme, self.tags)
    self.unread = unread or (tags_lib.OUTSIDE if tags_lib.OUTSIDE in self.tags else self.tags[0])
    if self.unread not in self.tags:
      raise ValueError(f'objective.unread={unread!r} must be one of the tags: {self.tags}.')
    self.kind, self.label_all, self.dropout = loss, label_all, dropout
    self.unlabelled, self.packing, self.transform_name = unlabelled, packing, transform
    self.predicate = predicate
    self.diverges = self.distils = loss == 'softmax'
    self.measures = () if loss == 'hinge' else MEASURES
    self.frame = pairs.frame(tokenizer)
    self.predictor = self

  @staticmethod
  def encode(record: Record, tokenizer: Tokenizer) -> Encoded:
    """See `encoding`."""
    return words_lib.encode_by_spaces(record, tokenizer)

  @classmethod
  def encoding(cls, options: Mapping[str, Any]) -> Callable[[Record, Tokenizer], Encoded]:
    """The function of the options `words` and `predicate`."""
    name = options.get('words') or 'space'
    words_lib.check(name)
    return (words_lib.MARKED if options.get('predicate') else words_lib.WORDS)[name]

  @classmethod
  def derive(cls, options: Mapping[str, Any], documents: Sequence[Documents]) -> dict[str, Any]:
    """The tags of the training documents, the scheme that their names show, and the tag of words
    without a token.

    Raises:
      ValueError: no document has a tag, or tags are wrong.
    """
    wanted = [name for name in cls.derived if not options.get(name)]
    if not wanted:
      return {}
    counts = tags_lib.found(documents) if not options.get('tags') or 'unread' in wanted else {}
    tags = tuple(options.get('tags') or counts)
    if not tags:
      raise ValueError(
        'objective tag needs tags and this corpus has none; '
        "config.data.fields=('words','tags') names the fields of a source."
      )
    most = max(tags, key=lambda tag: (counts.get(tag, 0), tag))
    all_of_them = {
      'tags': tags,
      'scheme': tags_lib.scheme_of(tags),
      'unread': tags_lib.OUTSIDE if tags_lib.OUTSIDE in tags else most,
    }
    logging.info('%d tags, scheme %s: %s', len(tags), all_of_them['scheme'], ', '.join(tags[:50]))
    return {name: all_of_them[name] for name in wanted}

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Words with tags that fit; the first is the predicate, where there is one."""
    record = tags_lib.samples(options.get('tags'), options.get('scheme'))
    return [record | {'predicate': 0} if options.get('predicate') else record] * 4

  def check(self, model: contracts.Model) -> None:
    """A causal model has not seen a word at its first token."""
    if model.causal:
      raise ValueError(
        'objective tag reads a word at its first token, where a causal model has not seen the '
        'rest; use an encoder.'
      )

  def rows(self, documents: Documents, seq_len: int) -> '_Rows':
    """The documents in as few rows as they need.

    Logs how full the rows are, what is cut off, and how many words have no token.

    Raises:
      ValueError: tags that cannot be, or a predicate that a row does not hold, naming the document.
    """
    numbers = tags_lib.numbered(
      documents,
      self.tags,
      self.scheme,
      required=self.unlabelled == 'error',
      # An order that cannot be has probability 0, and so no loss that can be learned from.
      strict=self.kind != 'softmax',
    )
    rows = _Rows(self, documents, seq_len, numbers)
    if rows.torn:
      raise ValueError(f'{documents.where(rows.torn[0])}: {rows.fault(rows.torn[0])}')
    rows.log_cut()
    rows.log_unread()
    if self.packing != 'none':
      rows.log_packing()
    return rows

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """Nothing to add: the tags come with the row."""
    if 'tag' not in example:
      raise ValueError(
        "objective tag labels only rows that it lays out itself; in a mix, set rows='tag'."
      )
    return example

  def layout(self, documents: Documents, seq_len: int) -> '_Rows':
    """The rows of documents to predict: no tag is looked at, all weights are 0. One whose predicate
    a row does not hold is answered all the same, and said.
    """
    rows = _Rows(self, documents, seq_len, [None] * len(documents))
    if rows.torn:
      logging.warning(
        'tag: %d of %d texts are answered without their predicate, the first: %s: %s',
        len(rows.torn),
        len(documents),
        documents.where(rows.torn[0]),
        rows.fault(rows.torn[0]),
      )
    return rows

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """A linear layer, and the scores of moves from tag to tag."""
    found: dict[str, nn.Module] = {
      'tagger': heads.ClassifierHead(model.options, len(self.tags), self.dropout)
    }
    if self.transform_name != 'none':
      name, module = heads.TRANSFORMS[self.transform_name]
      found[name] = module(model.options)
    if self.kind != 'softmax':
      found['moves'] = crf.Transitions(model.options, len(self.tags))
    return found

  def logits(self, net: Net, hidden_BTD: jax.Array) -> jax.Array:
    """[B, T, C], at least float32."""
    if self.transform_name != 'none':
      hidden_BTD = net.heads[heads.TRANSFORMS[self.transform_name][0]](hidden_BTD)
    logits_BTC = net.heads['tagger'](hidden_BTD)
    return logits_BTC.astype(jnp.promote_types(logits_BTC.dtype, jnp.float32))

  def moves(self, net: Net, after_unread: bool) -> crf.Moves:
    """The learned scores, with what the scheme forbids.

    Args:
      net: has the scores.
      after_unread: words without a position have the tag `unread`, as in answers; in training their
        tags may be any.
    """
    first_C, next_CC, last_C = net.heads['moves']()
    rules = tags_lib.rules(self.scheme, self.tags)
    barred = lambda scores, fine: scores + jnp.where(jnp.asarray(fine), 0, crf.FORBIDDEN)
    late_C, gap_CC, cut_C = first_C, next_CC, last_C
    if after_unread:
      middle = self.tags.index(self.unread)
      to_C, from_C = rules.next_CC[middle], rules.next_CC[:, middle]
      late_C, cut_C = barred(first_C, to_C), barred(last_C, from_C)
      gap_CC = barred(next_CC, from_C[:, None] & to_C[None])
    return crf.Moves(
      barred(first_C, rules.first_C),
      late_C,
      barred(next_CC, rules.next_CC),
      gap_CC,
      barred(last_C, rules.last_C),
      cut_C,
    )

  def loss(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> Metrics:
    """The mean over the words: cross-entropy and accuracy, the negative log-likelihood of a text's
    tags, or by how much the best tags, with one added for each wrong one, score above the right
    ones.
    """
    logits_BTC = self.logits(net, hidden_BTD)
    tag_BT, weight_BT = batch['tag'], batch['tag_weight']
    weight = jnp.sum(weight_BT)
    if self.kind == 'softmax':
      loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTC, tag_BT)
      first_BT = weight_BT * (batch['chain'] > 0)
      right_BT = jnp.argmax(logits_BTC, -1) == tag_BT
      return {
        'tag': (jnp.sum(loss_BT * weight_BT), weight),
        'tag_accuracy': (jnp.sum(right_BT * first_BT), jnp.sum(first_BT)),
      }
    chain_BT = jnp.where(weight_BT > 0, batch['chain'], 0)
    moves = self.moves(net, after_unread=False)
    right_B = crf.score(logits_BTC, tag_BT, chain_BT, moves)
    if self.kind == 'crf':
      all_B = crf.log_partition(logits_BTC, chain_BT, moves)
    else:
      wrong_BTC = 1 - jax.nn.one_hot(tag_BT, len(self.tags), dtype=logits_BTC.dtype)
      all_B = crf.best_score(logits_BTC + wrong_BTC, chain_BT, moves)
    return {'tag': (jnp.sum(all_B - right_B), weight)}

  def answer(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> jax.Array:
    """The logits, [B, T, C]."""
    return self.logits(net, hidden_BTD)

  def divergence(self, a: jax.Array, b: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """With 'softmax': the divergence of Kullback and Leibler in both directions, over the words."""
    apart_BT = 2 * label_losses.disagreement('multiclass', a, b)
    weight_BT = batch['tag_weight']
    return jnp.sum(apart_BT * weight_BT), jnp.sum(weight_BT)

  def distilled(
    self,
    net: Net,
    hidden_BTD: jax.Array,
    taught: jax.Array,
    batch: Batch,
    temperature: float,
  ) -> tuple[jax.Array, jax.Array]:
    """With 'softmax': over the words that have a tag."""
    ours_BTC = self.logits(net, hidden_BTD)
    apart_BT = soft.divergence('multiclass', ours_BTC, taught, temperature)
    weight_BT = batch['tag_weight']
    return jnp.sum(apart_BT * weight_BT), jnp.sum(weight_BT)

  def predict(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`tags` [B, T] int32, what a word that is read at a position gets; and, but for 'hinge', the
    `probability` [B, T] of it, and of all tags there the `entropy` in nats, and the `margin` of the
    most likely before the second.
    """
    logits_BTC = self.logits(net, hidden_BTD)
    if self.kind == 'softmax':
      tags_BT, probability_BTC = jnp.argmax(logits_BTC, -1), jax.nn.softmax(logits_BTC)
    else:
      moves = self.moves(net, after_unread=True)
      tags_BT = crf.viterbi(logits_BTC, batch['chain'], moves)
      if self.kind == 'hinge':
        return {'tags': tags_BT}
      probability_BTC = crf.marginals(logits_BTC, batch['chain'], moves)
    probability_BT = jnp.take_along_axis(probability_BTC, tags_BT[..., None], -1)[..., 0]
    best_BT2, _ = jax.lax.top_k(jnp.pad(probability_BTC, ((0, 0), (0, 0), (0, 1))), 2)
    return {
      'tags': tags_BT.astype(jnp.int32),
      'probability': probability_BT,
      'entropy': jnp.sum(jax.scipy.special.entr(probability_BTC), -1),
      'margin': best_BT2[..., 0] - best_BT2[..., 1],
    }

  def answers(
    self, row: Mapping[str, np.ndarray], rows: '_Rows', index: int
  ) -> Iterator[dict[str, Any]]:
    """For each text of a row `words` and `tags`; `probabilities` of the tags, and their geometric
    mean as the `probability` of the text (Shen et al. 2017, arXiv:1707.05928, section 4.1, MNLP),
    the mean of their `entropy` (Settles and Craven 2008, "An Analysis of Active Learning Strategies
    for Sequence Labeling Tasks", equation 4, token entropy) and the smallest `margin`;
    `entities` where the tags have a scheme; and the numbers of the words that no token spells as
    `unread`, if any.

    An entity has `label`, `text`, `start` and `end` (characters of the text, or of the words as
    they are joined) and `words` (the first, and one past the last).
    """
    for text, positions, read in rows.word_positions(index):
      words = rows.documents.values('words')[text]
      tags = [self.unread] * len(words)
      for position, word in zip(positions, read, strict=True):
        tags[word] = self.tags[int(row['tags'][position])]
      answer: dict[str, Any] = {'words': words, 'tags': tags}
      if 'probability' in row:
        probabilities: list[float | None] = [None] * len(words)
        for position, word in zip(positions, read, strict=True):
          probabilities[word] = float(row['probability'][position])
        answer['probabilities'] = probabilities
        answer['probability'] = _geometric_mean(row['probability'][positions])
        if len(read):
          answer['entropy'] = float(np.mean(row['entropy'][positions]))
          answer['margin'] = float(np.min(row['margin'][positions]))
      if self.scheme != tags_lib.NO_SCHEME:
        answer['entities'] = list(_entities(tags, words, rows.begins(text)))
      if len(read) < len(words):
        answer['unread'] = sorted(set(range(len(words))).difference(read.tolist()))
      yield answer


class _Rows(TextRows):
  """Rows of words with tags.

  Args:
    objective: lays them out.
    documents: the texts.
    seq_len: T.
    numbers: of the tags of each text; None where they are asked for, or where it has none.

  Attributes:
    torn: the texts whose predicate is cut off.
  """

  def __init__(
    self,
    objective: Objective,
    documents: Documents,
    seq_len: int,
    numbers: Sequence[np.ndarray | None],
  ):
    slots = seq_len if objective.packing == 'best_fit' else 1  # no text is shorter than a token
    super().__init__(documents, seq_len, slots, objective.frame, 'tag')
    self.objective, self.numbers = objective, numbers
    self._counts = documents.lengths('word_begins')
    self.torn = [text for text in np.flatnonzero(self.lost).tolist() if self._lacks_predicate(text)]

  def fault(self, text: int) -> str:
    """What is wrong with a text that is torn."""
    last = int(self.documents.array('mark', text)[1])
    return (
      f'the predicate ends at token {last + 1}, and seq_len={self.seq_len} leaves room for '
      f'{self.first[text]}; raise config.seq_len, or leave the record out.'
    )

  def _lacks_predicate(self, text: int) -> bool:
    if not self.objective.predicate:
      return False
    return bool(self.documents.array('mark', text)[1] >= self.first[text])

  def tags(self, text: int) -> list[str] | None:
    """The tags that a text was given, of all its words."""
    numbers = self.numbers[text]
    return None if numbers is None else [self.objective.tags[number] for number in numbers]

  def begins(self, text: int) -> list[int]:
    """The first character of each word of a text."""
    return self.documents.array('word_begins', text).tolist()

  def word_positions(self, index: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each text of a row, the indices in the row at which its words are read, and which words these
    are.
    """
    offset = len(self.frame.before)
    for text in self.texts(index):
      firsts, read = self._read(text)
      yield text, offset + firsts, read
      offset += int(self.sizes[text])

  def example(self, index: int, rng: np.random.Generator) -> Example:
    del rng
    texts = [self.ids(text) for text in self.texts(index)]
    row = pairs.packed(texts, self.seq_len, self.frame)
    row['chain'] = np.zeros(self.seq_len, np.int32)
    row['tag'] = np.zeros(self.seq_len, np.int32)
    row['tag_weight'] = np.zeros(self.seq_len, np.float32)
    offset = len(self.frame.before)
    for text, positions, read in self.word_positions(index):
      row['chain'][positions] = _chain(read, int(self._counts[text]))
      numbers = self.numbers[text]
      if numbers is not None:
        if self.objective.label_all:
          words = self._words(text)
          positions = offset + np.flatnonzero(words >= 0)
          read = words[words >= 0]
        row['tag'][positions] = numbers[read]
        row['tag_weight'][positions] = 1
      offset += int(self.sizes[text])
    return row

  def log_unread(self) -> None:
    """Warns of words that no token spells, or whose tokens are cut off."""
    missing = total = 0
    first = ''
    for text, count in enumerate(self._counts.tolist()):
      read = self._read(text)[1]
      total += count
      missing += count - len(read)
      if len(read) < count and not first:
        word = min(set(range(count)).difference(read.tolist()))
        shown = self.documents.values('words')[text][word]
        first = f'word {word} ({shown!r}) of {self.documents.where(text)}'
    if missing:
      logging.warning(
        'tag: %d of %d words have no token of their own in their row, the first: %s. They are not '
        'learned from, and are answered by %r.',
        missing,
        total,
        first,
        self.objective.unread,
      )

  def _words(self, text: int) -> np.ndarray:
    """The word of each token that is kept."""
    return self.documents.array('token_words', text, 0, int(self.first[text]))

  def _read(self, text: int) -> tuple[np.ndarray, np.ndarray]:
    """The index of the first token of each word that has one, and which words these are."""
    words = self._words(text)
    read, firsts = np.unique(words, return_index=True)
    inside = read != words_lib.NO_WORD
    return firsts[inside], read[inside]


def _chain(read: np.ndarray, words: int) -> np.ndarray:
  """The bits of `nn.crf` for those words of a text that are read."""
  if not len(read):
    return np.zeros(0, np.int32)
  missing = np.diff(read, prepend=-1) > 1
  bits = crf.WORD + crf.GAP * missing
  bits[0] += crf.FIRST
  bits[-1] += crf.LAST * (read[-1] == words - 1)
  return bits


def _entities(
  tags: Sequence[str], words: Sequence[str], begins: Sequence[int]
) -> Iterator[dict[str, Any]]:
  for label, first, stop in tags_lib.entities(tags):
    start, end = begins[first], begins[stop - 1] + len(words[stop - 1])
    text = ''
    for word, begin in zip(words[first:stop], begins[first:stop], strict=True):
      text = text.ljust(begin - start) + word  # between words there is white space, if anything
    yield {'label': label, 'text': text, 'start': start, 'end': end, 'words': [first, stop]}


def _geometric_mean(values: np.ndarray) -> float | None:
  """None of no numbers."""
  if not len(values):
    return None
  with np.errstate(divide='ignore'):
    return float(np.exp(np.mean(np.log(np.asarray(values, np.float64)))))


def _checked(tags: tuple[str, ...] | None) -> tuple[str, ...]:
  if not tags or len(set(tags)) < len(tags) or not all(isinstance(tag, str) for tag in tags):
    raise ValueError(
      f'objective.tags={tags} must be names, each once; leave it unset for the tags of the '
      'training documents.'
    )
  return tuple(tags)
