"""Classification and regression of one text or a pair of texts, as BERT is fine-tuned.

Devlin et al. 2019, "BERT", section 4.1: [CLS] text [SEP] (or [CLS] A [SEP] B [SEP]), a pooler on
the first place, a linear layer. Radford et al. 2018, "GPT", section 3.2 for causal models: BOS text
EOS, a linear layer on the last place.

Short texts share a row (Krell et al. 2021, arXiv:2107.02027, pack BERT's pretraining so): each
stands between special tokens of its own, with positions from 0, in a segment that no other text
sees, and has a slot of the row for its label. Loss and gradient are those of the same texts a row
each; only the number of rows is another.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from llm_jax.core.contracts import Batch, Documents, Pairs, Rows, Texts, Tokenizer
from llm_jax.data import pack, pairs
from llm_jax.nn import heads

TASKS = ('multiclass', 'binary', 'multilabel', 'regression')
PACKINGS = ('best_fit', 'none')
PLACES_A_TEXT = (
  4  # slots are enough for texts of so many places on average, special tokens included
)
MOST_TEXTS = (
  128  # of a row, so that what is kept for each slot stays small beside what is kept for each place
)


class Objective:
  """Classification or regression of documents; only what is too long for a row loses its end, the
  longer text of a pair first.

  A batch has `config.batch_size` rows, not texts. Where k texts share a row on average (the log
  says how many), an optimizer step learns from k times as many texts as it would without packing,
  and an epoch has k times fewer steps: to keep the number of texts a step, divide batch_size by k;
  or keep the rows, and take fewer steps. Which texts share a row, and so a step, is fixed for the
  run by their lengths, among equal lengths by chance.

  Args:
    tokenizer: makes the ids.
    classes: names of the classes in the order of their numbers; None for regression.
    task: 'multiclass' (one of the classes), 'binary' (the second of two classes or not, one logit),
      'multilabel' (any of them), 'regression' (a number).
    dropout: rate before the last linear layer.
    pool: 'cls' reads the first place through a pooler, as BERT does; 'mean' the mean of all places,
      for encoders that were trained by masked LM alone (arXiv:1908.10084, section 3); 'last' the
      last place, for decoders.
    unlabelled: a document without a label is an 'error', or counts for nothing ('ignore').
    packing: 'best_fit' puts several texts in a row, the longest first, each where least room is
      left; at most a text for each 4 places, and 128. 'none': a text a row.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    classes: tuple[str, ...] | None = None,
    task: str = 'multiclass',
    dropout: float = 0.1,
    pool: str = 'cls',
    unlabelled: str = 'error',
    packing: str = 'best_fit',
  ):
    for name, value, allowed in (
      ('task', task, TASKS),
      ('pool', pool, heads.POOLS),
      ('packing', packing, PACKINGS),
      ('unlabelled', unlabelled, ('error', 'ignore')),
    ):
      if value not in allowed:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(allowed)}.')
    if not 0 <= dropout < 1:
      raise ValueError(f'objective.dropout={dropout} must be at least 0 and below 1.')
    _check_classes(classes, task)
    self.tokenizer, self.classes, self.task = tokenizer, classes, task
    self.dropout, self.pool, self.unlabelled, self.packing = dropout, pool, unlabelled, packing
    self.number = {name: i for i, name in enumerate(classes or ())}
    self.terms, self.predictor = {'classify': 1.0}, self

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """The documents in as few rows as they need; ValueError for a label that cannot be, naming the
    document.

    Logs how many texts a row holds, the share of places that are used, and how much is cut off.
    """
    self._check_labels(documents)
    rows = _Rows(self, documents, seq_len)
    rows.log()
    return rows

  def transform(
    self, example: dict[str, np.ndarray], rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Nothing to add: the label comes with the row."""
    if 'label' not in example:
      raise ValueError(
        'objective classify labels only rows that it lays out itself; in a mix, set '
        "rows='classify'."
      )
    return example

  def encode(self, documents: Documents, seq_len: int) -> Texts:
    """The rows of documents to predict: no label is looked at, all weights are 0."""
    return _Rows(self, documents, seq_len, labelled=False)

  def slots(self, seq_len: int) -> int:
    """G: the most texts of a row. Of seq_len alone, so that every corpus, host and split has arrays
    of the same shape.
    """
    return 1 if self.packing == 'none' else max(1, min(MOST_TEXTS, seq_len // PLACES_A_TEXT))

  def lay_out(
    self, texts: Sequence[tuple[np.ndarray, np.ndarray | None]], labels: Sequence[Any], seq_len: int
  ) -> dict[str, np.ndarray]:
    """A row.

    Args:
      texts: ids of each text, and of the second of a pair or None, which fit in the row together.
      labels: one a text; None for no label.
      seq_len: T.
    """
    tokenizer, slots = self.tokenizer, self.slots(seq_len)
    begin, end = (
      (tokenizer.bos_id, tokenizer.eos_id)
      if self.pool == 'last'
      else (tokenizer.cls_id, tokenizer.sep_id)
    )
    row = pairs.packed(texts, seq_len, begin, tokenizer.sep_id, end, slots)
    shape = (slots, len(self.classes)) if self.task == 'multilabel' else (slots,)
    kind = np.int32 if self.task in ('multiclass', 'binary') else np.float32
    row |= {'label': np.zeros(shape, kind), 'label_weight': np.zeros(slots, np.float32)}
    for slot, label in enumerate(labels):
      if label is not None:
        row['label'][slot], row['label_weight'][slot] = self.target(label), 1
    return row

  def target(self, label: Any) -> Any:
    """A label as a number, or for multilabel as [C] zeros and ones; ValueError saying what is wrong
    with it.
    """
    if self.task == 'regression':
      return _number(label)
    if self.task != 'multilabel':
      return self._class(label)
    if not isinstance(label, list | tuple):
      raise ValueError('must be a list of classes (an empty one where none applies)')
    chosen = np.zeros(len(self.classes), np.float32)
    chosen[[self._class(name) for name in label]] = 1
    return chosen

  def heads(self, model: Any) -> dict[str, Any]:
    """The last linear layer, after BERT's pooler where the first place is read."""
    if model.causal and self.pool == 'cls':
      raise ValueError(
        "objective.pool='cls' reads the first place, which in a causal model has seen nothing; "
        "use 'last' or 'mean'."
      )
    outputs = len(self.classes) if self.task in ('multiclass', 'multilabel') else 1
    pooler = {'pooler': heads.Pooler(model.options)} if self.pool == 'cls' else {}
    return pooler | {
      'classifier': heads.ClassifierHead(
        model.options, outputs, self.dropout, bias=self.pool != 'last'
      )
    }

  def places(self, batch: Batch) -> jax.Array | None:
    """What the pooling reads: a place a text, [B, G], or all."""
    return heads.pool_places(batch, self.pool)

  def logits(self, net: Any, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """B G C logits (C = 1 for binary and regression), at least float32; anything finite where a row
    has no text g.
    """
    x_BGD = heads.pool(hidden_BPD, batch, self.pool)
    if self.pool == 'cls':
      x_BGD = net.heads['pooler'](x_BGD)
    logits_BGC = net.heads['classifier'](x_BGD)
    return logits_BGC.astype(jnp.promote_types(logits_BGC.dtype, jnp.float32))

  def loss(self, net: Any, hidden_BPD: jax.Array, batch: Batch) -> Pairs:
    """Softmax or sigmoid cross-entropy (multilabel: mean over the classes) and accuracy, or the
    squared error.
    """
    logits_BGC = self.logits(net, hidden_BPD, batch)
    label, weight_BG = batch['label'], batch['label_weight']
    if self.task == 'regression':
      loss_BG, right_BG = jnp.square(logits_BGC[..., 0] - label), None
    elif self.task == 'multiclass':
      loss_BG = optax.softmax_cross_entropy_with_integer_labels(logits_BGC, label)
      right_BG = jnp.argmax(logits_BGC, -1) == label
    else:
      label_BGC = label if self.task == 'multilabel' else label[..., None]
      loss_BG = jnp.mean(optax.sigmoid_binary_cross_entropy(logits_BGC, label_BGC), -1)
      right_BG = jnp.mean((logits_BGC > 0) == (label_BGC > 0.5), -1)
    weight = jnp.sum(weight_BG)
    accuracy = (
      {} if right_BG is None else {'classify_accuracy': (jnp.sum(right_BG * weight_BG), weight)}
    )
    return {'classify': (jnp.sum(loss_BG * weight_BG), weight)} | accuracy

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """Nothing beyond the loss and the accuracy."""
    return {}

  def targets(self, batch: Batch) -> None:
    """None: no tokens are predicted."""
    return None

  def predict(self, net: Any, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`probabilities` [B, G, C] of the classes (binary: C = 2), or `values` [B, G] in regression."""
    logits_BGC = self.logits(net, hidden_BPD, batch)
    if self.task == 'regression':
      return {'values': logits_BGC[..., 0]}
    if self.task == 'multiclass':
      return {'probabilities': jax.nn.softmax(logits_BGC)}
    if self.task == 'binary':
      return {'probabilities': jax.nn.sigmoid(jnp.concatenate([-logits_BGC, logits_BGC], -1))}
    return {'probabilities': jax.nn.sigmoid(logits_BGC)}

  def describe(self, text: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `predict` says of one text, for JSON.

    Returns:
      label, probability and probabilities by class; for multilabel the labels of probability above
      one half and probabilities; for regression the value.
    """
    if self.task == 'regression':
      return {'value': float(text['values'])}
    probabilities = {
      name: float(p) for name, p in zip(self.classes, text['probabilities'], strict=True)
    }
    if self.task == 'multilabel':
      return {
        'label': [name for name, p in probabilities.items() if p > 0.5],
        'probabilities': probabilities,
      }
    best = max(probabilities, key=probabilities.__getitem__)
    return {'label': best, 'probability': probabilities[best], 'probabilities': probabilities}

  def _class(self, label: Any) -> int:
    if isinstance(label, list | tuple) or str(label) not in self.number:
      raise ValueError(
        f'must be one of the {len(self.classes)} classes of the training set: '
        f'{_shortened(self.classes)}'
      )
    return self.number[str(label)]

  def _check_labels(self, documents: Documents) -> None:
    if documents.labels is None:
      if self.unlabelled == 'error':
        raise ValueError(
          'objective classify needs labels and this corpus has none; name its field by '
          'config.data.label, '
          "or set objective.unlabelled='ignore' where another objective learns from it."
        )
      logging.info(
        'classify: none of %d documents has a label; they count for nothing here.', len(documents)
      )
      return
    missing = 0
    for number, label in zip(documents.ids, documents.labels, strict=True):
      missing += label is None
      if label is None and self.unlabelled == 'error':
        raise ValueError(
          f"document {number} has no label; give it one, or set objective.unlabelled='ignore'."
        )
      try:
        label is None or self.target(label)
      except ValueError as error:
        raise ValueError(f'document {number} has the label {label!r}; it {error}.') from None
    if missing:
      logging.info(
        'classify: %d of %d documents have no label and count for nothing here.',
        missing,
        len(documents),
      )


class _Rows:
  """Documents in rows.

  Attributes:
    first: [documents] int64, how many tokens of each text are kept; second: likewise of the second
      texts, or None.
    cut: how many documents are longer than a row.
    plan: which documents share a row.
  """

  def __init__(
    self, objective: Objective, documents: Documents, seq_len: int, labelled: bool = True
  ):
    self.objective, self.documents, self.seq_len = objective, documents, seq_len
    self.labels = documents.labels if labelled else None
    given, second = _counts(documents)
    self.first, self.second = fit(np.asarray(documents.lengths, np.int64), second, seq_len)
    self.sizes = self.first + (0 if second is None else self.second)
    self.lost = given - self.sizes
    self.cut = int(np.count_nonzero(self.lost))
    self.sizes += seq_len - _room(second is not None, seq_len)
    self.plan = _plan(self.sizes, seq_len, objective.slots(seq_len))

  def __len__(self) -> int:
    return len(self.plan)

  def texts(self, index: int) -> list[int]:
    return [document for document, _, _ in self.plan[index]]

  def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    texts = self.texts(index)
    labels = [None if self.labels is None else self.labels[text] for text in texts]
    return self.objective.lay_out([self._ids(text) for text in texts], labels, self.seq_len)

  def _ids(self, text: int) -> tuple[np.ndarray, np.ndarray | None]:
    return (
      self.documents.text(text, 0, int(self.first[text])),
      None if self.second is None else self.documents.pair(text)[: self.second[text]],
    )

  def log(self) -> None:
    texts, rows, places = len(self.sizes), len(self), self.seq_len
    if self.cut:
      logging.warning(
        'classify: %d of %d documents are longer than seq_len=%d allows and lose %d of %d tokens.',
        self.cut,
        texts,
        places,
        self.lost.sum(),
        _counts(self.documents)[0].sum(),
      )
    if not texts or self.objective.packing == 'none':
      return
    slots, used = self.objective.slots(places), 100 * self.sizes.sum() / places
    logging.info(
      'classify: %d texts in %d rows of %d places, %.1f%% of which are used (one text a row: '
      '%.1f%%). With %.2f texts '
      'a row, a step of batch_size rows learns from so many times more texts.',
      texts,
      rows,
      places,
      used / rows,
      used / texts,
      texts / rows,
    )
    if np.mean(np.diff(self.plan.offsets) == slots) > 0.5 and slots > 1:
      logging.warning(
        'classify: a row of %d places takes at most %d texts, and most rows have so many; a '
        'shorter seq_len wastes '
        'less.',
        places,
        slots,
      )


def _counts(documents: Documents) -> tuple[np.ndarray, np.ndarray | None]:
  """[documents] int64: the tokens of each, and those of its second text, or None."""
  lengths, second = np.asarray(documents.lengths, np.int64), documents.pair_lengths
  return (
    (lengths, None)
    if second is None
    else (lengths + np.asarray(second, np.int64), np.asarray(second, np.int64))
  )


def _plan(sizes: np.ndarray, seq_len: int, slots: int) -> pack.Plan:
  """Which texts share a row. Texts of one length come in an order drawn once: neighbours of a
  sorted corpus are much alike.
  """
  if slots == 1:
    return pack.one_per_row(sizes, seq_len)
  order = np.random.default_rng(0).permutation(len(sizes))
  plan = pack.best_fit(sizes[order], seq_len, most=slots)
  return dataclasses.replace(plan, document=order[plan.document])


def collect_classes(labels: Iterable[Any]) -> tuple[str, ...]:
  """The distinct classes among labels (a list of classes counts for each of them), numbers by
  value, the rest by letter.

  Raises:
    ValueError: there is no label, or labels are fractional numbers.
  """
  labels = [label for label in labels if label is not None]
  if not labels:
    raise ValueError(
      'objective classify needs labels and this corpus has none; name their field by '
      'config.data.label.'
    )
  if any(isinstance(label, float) for label in labels):
    raise ValueError(
      f'labels are numbers such as {labels[0]!r}; set config.objective.task=regression, or give '
      'classes as words '
      'or whole numbers.'
    )
  found = {
    str(name)
    for label in labels
    for name in (label if isinstance(label, list | tuple) else [label])
  }
  try:
    return tuple(sorted(found, key=lambda name: (float(name), name)))
  except ValueError:
    return tuple(sorted(found))


def fit(first: Any, second: Any, seq_len: int) -> tuple[Any, Any]:
  """How many tokens of each text are kept so that a row holds them with its special tokens; the
  longer text loses first.

  Args:
    first: tokens of a text, or of each text of an array.
    second: likewise of the second text of a pair; None where there is none.
    seq_len: T.

  Returns:
    What is kept of `first`, and of `second` or None.
  """
  room = _room(second is not None, seq_len)
  if second is None:
    return np.minimum(first, room), None
  half = room // 2 + room % 2 * (first > second)
  kept = np.minimum(first, np.maximum(room - second, half))
  return kept, np.minimum(second, room - kept)


def _room(paired: bool, seq_len: int) -> int:
  special = 3 if paired else 2
  if seq_len <= special:
    raise ValueError(f'seq_len={seq_len} must be more than the {special} special tokens of a row.')
  return seq_len - special


def _number(label: Any) -> float:
  try:
    value = math.nan if isinstance(label, bool) else float(label)
  except (TypeError, ValueError):
    value = math.nan
  if not math.isfinite(value):
    raise ValueError('must be a finite number')
  return value


def _check_classes(classes: tuple[str, ...] | None, task: str) -> None:
  if task == 'regression':
    if classes is not None:
      raise ValueError(
        f'objective.classes={_shortened(classes)} has no meaning with task=regression; leave it '
        'unset.'
      )
    return
  given, least = classes or (), 1 if task == 'multilabel' else 2
  if len(given) < least or (task == 'binary' and len(given) > 2) or len(set(given)) < len(given):
    wanted = f'{"exactly" if task == "binary" else "at least"} {least} different classes'
    raise ValueError(
      f'objective classify with task={task} needs {wanted}, not {_shortened(given) or "none"}; '
      'look at the labels of the training set, or choose another task.'
    )


def _shortened(names: Sequence[str]) -> str:
  return ', '.join(names[:20]) + (f', ... ({len(names) - 20} more)' if len(names) > 20 else '')
