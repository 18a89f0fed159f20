"""Relation classification: what two marked spans of a text are to each other.

The spans stand between signs, and the text's representation is the states at the two opening signs,
side by side (Baldini Soares et al. 2019, "Matching the Blanks", arXiv:1906.03158, section 3.2,
"entity markers" and "entity start"). The signs are those of Zhou and Chen 2022, arXiv:2102.01373,
section 3.1: `@ head @ ... # tail #`, or with types `@ * person * head @ ... # ^ city ^ tail #`,
which the vocabulary of a pretrained model has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from llm_jax.core import contracts
from llm_jax.core.contracts import Batch, Documents, Encoded, Example, Net, Record, Tokenizer
from llm_jax.data import marks as marks_lib
from llm_jax.nn import heads
from llm_jax.objectives import classify
from llm_jax.objectives.classify import LabelRows

FIELDS = {'head': ('@', '*'), 'tail': ('#', '^')}
"""The fields with the spans: the sign around each, and that around its type."""
MARKERS = ('plain', 'typed')
POOLS = ('markers', 'closing', 'cls')


class Objective(classify.Objective):
  """The relation of two spans of a text, one of some classes.

  A record has a `text`; `head` and `tail`, each [start, end] of its characters, one of which may
  hold the other; a `label`; and with typed markers `head_type` and `tail_type`. Of a text that is
  longer than a row those tokens are read that hold both spans in their middle.

  A batch has, beside what `classify` lays out, `markers` [B, G, 2] int32, the indices in the row at
  which head and tail are read.

  Args:
    tokenizer: makes the ids.
    classes: names of the classes in the order of their numbers; None for those of the training
      documents.
    markers: 'plain' signs, or 'typed' ones, which say of what type each span is.
    pool: 'markers', the states at the opening signs, side by side; 'closing', those at the closing
      signs, for decoders; 'cls', the first token of the text through a pooler.
    dropout: rate before the last linear layer.
    unlabelled: a document without a label is an 'error', or counts for nothing ('ignore').
    packing: 'best_fit' puts several texts in a row; 'none': one text per row.
    class_weights: how much a text of each class counts, in the order of the classes. None: all
      alike, unless `balance`.
    balance: rare classes count more, as in `classify`.
    label_smoothing: the share of a label's probability that is spread over all classes.
  """

  name = 'relation'
  terms = {'relation': 1.0}

  def __init__(
    self,
    tokenizer: Tokenizer,
    classes: tuple[str, ...] | None = None,
    markers: str = 'plain',
    pool: str = 'markers',
    dropout: float = 0.1,
    unlabelled: str = 'error',
    packing: str = 'best_fit',
    class_weights: tuple[float, ...] | None = None,
    balance: bool = False,
    label_smoothing: float = 0.0,
  ):
    for name, value, known in (('markers', markers, MARKERS), ('pool', pool, POOLS)):
      if value not in known:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(known)}.')
    super().__init__(
      tokenizer,
      classes,
      dropout=dropout,
      pool='last' if pool == 'closing' else 'cls',  # which says what stands around a text
      unlabelled=unlabelled,
      packing=packing,
      class_weights=class_weights,
      balance=balance,
      label_smoothing=label_smoothing,
    )
    self.pool = pool

  @staticmethod
  def encode(record: Record, tokenizer: Tokenizer) -> Encoded:
    """`tokens` of the text with its signs; `markers`, the numbers of the tokens at which head and
    tail open and at which they close; and the label as it is.

    Raises:
      ValueError: no text, or spans that cannot be marked.
    """
    return _encoded(record, tokenizer, typed=False)  # rule 1, rule 1 of `data.marks`

  @staticmethod
  def encode_typed(record: Record, tokenizer: Tokenizer) -> Encoded:
    """The same with typed markers."""
    return _encoded(record, tokenizer, typed=True)  # rule 1, rule 1 of `data.marks`

  @classmethod
  def encoding(cls, options: Mapping[str, Any]) -> Callable[[Record, Tokenizer], Encoded]:
    """The function of the option `markers`."""
    return cls.encode_typed if options.get('markers') == 'typed' else cls.encode

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As those of `classify`, with two spans."""
    spans = {'head': [0, 4], 'tail': [5, 10], 'head_type': 'one', 'tail_type': 'other'}
    return [record | spans for record in super().sample_records(options)]

  def check(self, model: contracts.Model) -> None:
    """A causal model has seen a span where it closes, not where it opens."""
    if model.causal != (self.pool == 'closing'):
      raise ValueError(
        f'objective.pool={self.pool!r} does not suit this model: '
        + (
          "a causal model has not seen a span where it opens; use 'closing'."
          if model.causal
          else "an encoder is read by 'markers' or 'cls'."
        )
      )

  def rows(self, documents: Documents, seq_len: int) -> '_Rows':
    """The documents in as few rows as they need.

    Logs how many texts a row holds, how much of the rows is used, and how much is cut off.

    Raises:
      ValueError: a label that is none of the classes, or spans that are farther apart than a row is
        long, naming the document.
    """
    rows = super().rows(documents, seq_len)
    if len(rows.torn):
      raise ValueError(f'{documents.where(rows.torn[0])}: {rows.fault(rows.torn[0])}')
    return rows

  def layout(self, documents: Documents, seq_len: int) -> '_Rows':
    """The rows of documents to predict: no label is looked at. One whose spans are farther apart
    than a row is long has no answer but `error`.
    """
    rows = super().layout(documents, seq_len)
    if len(rows.torn):
      logging.warning(
        'relation: %d of %d texts have no answer but `error`, the first: %s: %s',
        len(rows.torn),
        len(documents),
        documents.where(rows.torn[0]),
        rows.fault(rows.torn[0]),
      )
    return rows

  def plan(self, documents: Documents, seq_len: int, labels: Sequence[Any] | None) -> '_Rows':
    """Rows with the indices of markers."""
    return _Rows(self, documents, seq_len, labels)

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """A linear layer on two states side by side; for the first token as those of `classify`."""
    if self.pool == 'cls':
      return super().heads(model)
    head = heads.ClassifierHead(model.options, len(self.classes), self.dropout, states=2)
    return {'relation': head}

  def positions(self, batch: Batch) -> jax.Array | None:
    """Head and tail of each text, [B, 2 G]; or its first token, [B, G]."""
    if self.pool == 'cls':
      return super().positions(batch)
    return batch['markers'].reshape(len(batch['markers']), -1)

  def logits(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """B G C logits, at least float32; anything finite where a row has no text g."""
    if self.pool == 'cls':
      return super().logits(net, hidden_BPD, batch)
    rows, slots, spans = batch['markers'].shape
    x_BGD = hidden_BPD.reshape(rows, slots, spans * hidden_BPD.shape[-1])
    logits_BGC = net.heads['relation'](x_BGD)
    return logits_BGC.astype(jnp.promote_types(logits_BGC.dtype, jnp.float32))

  def combined(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As those of `classify`, or the `error` that one of the answers is."""
    torn = (answer for answer in answers if 'error' in answer)
    return next(torn, None) or super().combined(answers)

  def answers(
    self, row: Mapping[str, np.ndarray], rows: '_Rows', index: int
  ) -> Iterator[dict[str, Any]]:
    """As those of `classify`; `error` where a row does not hold both spans."""
    said = super().answers(row, rows, index)
    for text, answer in zip(rows.texts(index), said, strict=True):
      yield {'error': rows.fault(text)} if text in rows.torn else answer


class _Rows(LabelRows):
  """Rows of texts with two spans.

  Attributes:
    starts: [documents] int64, which token of each text is the first that is kept.
    torn: the documents whose spans are too far apart for one row.
  """

  def __init__(
    self, objective: Objective, documents: Documents, seq_len: int, labels: Sequence[Any] | None
  ):
    super().__init__(objective, documents, seq_len, labels)
    self.objective: Objective = objective
    markers = [documents.array('markers', index) for index in range(len(documents))]
    self._markers = np.array(markers, np.int64).reshape(-1, 4)
    self._from, self._to = self._markers.min(axis=1), self._markers.max(axis=1) + 1
    middle = (self._from + self._to - self.first) // 2
    self.starts = np.clip(middle, 0, self.given - self.first)
    self.torn = np.flatnonzero(self._to - self._from > self.first).tolist()

  def fault(self, text: int) -> str:
    """What is wrong with a document that is torn."""
    return (
      f'head and tail with their signs span {self._to[text] - self._from[text]} tokens, '
      f'and seq_len={self.seq_len} leaves room for {self.first[text]}; raise config.seq_len, or '
      'leave the record out.'
    )

  def ids(self, text: int) -> tuple[np.ndarray, None]:
    """The tokens that are kept of a text, None for a second one."""
    start = int(self.starts[text])
    return self.documents.array('tokens', text, start, start + int(self.first[text])), None

  def example(self, index: int, rng: np.random.Generator) -> Example:
    """A row, with the indices of its markers; 0 where a span is not kept."""
    row = super().example(index, rng)
    row['markers'] = np.zeros((self.slots, 2), np.int32)
    read = slice(2, 4) if self.objective.pool == 'closing' else slice(0, 2)
    for slot, text in enumerate(self.texts(index)):
      if text not in self.torn:
        first = int(row['text_firsts'][slot]) + len(self.frame.before)
        row['markers'][slot] = first - self.starts[text] + self._markers[text, read]
    return row


def _encoded(record: Record, tokenizer: Tokenizer, typed: bool) -> Encoded:
  text = record.get('text')
  if not isinstance(text, str):
    raise ValueError(
      f"field 'text' is {text!r}; a record needs a text, head and tail; it has "
      f'{", ".join(record) or "nothing"}.'
    )
  spans = {field: marks_lib.span(record.get(field), field, text) for field in FIELDS}
  if spans['head'] == spans['tail']:
    raise ValueError(
      f"fields 'head' and 'tail' are both {list(spans['head'])}; they must be different spans."
    )
  marks = [marks_lib.Mark(*spans[field], *_signs(record, field, typed)) for field in FIELDS]
  marked = marks_lib.insert(text, marks)
  tokens, token_spans = tokenizer.offsets(marked.text)
  opens = [marks_lib.token_of(token_spans, character) for character in marked.opens]
  closes = [marks_lib.token_of(token_spans, character, last=True) for character in marked.closes]
  encoded: Encoded = {'tokens': tokens, 'markers': np.array([*opens, *closes], np.int32)}
  if record.get('label') is not None:
    encoded['label'] = record['label']
  return encoded


def _signs(record: Record, field: str, typed: bool) -> tuple[str, str]:
  """What stands before a span and after it."""
  sign, around = FIELDS[field]
  if not typed:
    return f'{sign} ', f' {sign}'
  kind = record.get(f'{field}_type')
  if not isinstance(kind, str) or not kind.strip():
    raise ValueError(
      f"field '{field}_type' is {kind!r}; objective.markers='typed' needs the type of each span, a "
      f'word (config.data.fields names fields of a source).'
    )
  spelled = ' '.join(kind.replace('_', ' ').lower().split())
  return f'{sign} {around} {spelled} {around} ', f' {sign}'
