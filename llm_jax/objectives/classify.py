"""Classification and regression of one text or a pair of texts, as BERT is fine-tuned.

Devlin et al. 2019, "BERT", section 4.1: [CLS] text [SEP] (or [CLS] A [SEP] B [SEP]), a pooler on the first place, a linear
layer. Radford et al. 2018, "GPT", section 3.2 for causal models: BOS text EOS, a linear layer on the last place.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from llm_jax import heads
from llm_jax.contracts import Batch, Documents, Pairs, Rows, Tokenizer
from llm_jax.data import pairs

TASKS = ('multiclass', 'binary', 'multilabel', 'regression')
POOLS = ('cls', 'mean', 'last')


class Objective:
  """Classification or regression, a document a row; too long texts lose their ends, the longer text of a pair first.

  Args:
    tokenizer: makes the ids.
    classes: names of the classes in the order of their numbers; None for regression.
    task: 'multiclass' (one of the classes), 'binary' (the second of two classes or not, one logit), 'multilabel' (any of
      them), 'regression' (a number).
    dropout: rate before the last linear layer.
    pool: 'cls' reads the first place through a pooler, as BERT does; 'mean' the mean of all places, for encoders that were
      trained by masked LM alone (arXiv:1908.10084, section 3); 'last' the last place, for decoders.
    unlabelled: a document without a label is an 'error', or counts for nothing ('ignore').
  """

  def __init__(self, tokenizer: Tokenizer, classes: tuple[str, ...] | None = None, task: str = 'multiclass', dropout: float = 0.1,
               pool: str = 'cls', unlabelled: str = 'error'):
    for name, value, allowed in (('task', task, TASKS), ('pool', pool, POOLS), ('unlabelled', unlabelled, ('error', 'ignore'))):
      if value not in allowed:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(allowed)}.')
    if not 0 <= dropout < 1:
      raise ValueError(f'objective.dropout={dropout} must be at least 0 and below 1.')
    _check_classes(classes, task)
    self.tokenizer, self.classes, self.task = tokenizer, classes, task
    self.dropout, self.pool, self.unlabelled = dropout, pool, unlabelled
    self.number = {name: i for i, name in enumerate(classes or ())}
    self.terms, self.predictor = {'classify': 1.0}, self

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """One document a row; ValueError for a label that cannot be, naming the document; logs how much is cut off."""
    return _Rows(self, documents, seq_len)

  def transform(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Nothing to add: the label comes with the row."""
    if 'label' not in example:
      raise ValueError("objective classify labels only rows that it lays out itself; in a mix, set rows='classify'.")
    return example

  def encode(self, first: np.ndarray, second: np.ndarray | None, seq_len: int) -> tuple[dict[str, np.ndarray], int]:
    """A text, or a pair, as a row without a label (label_weight 0), for prediction.

    Args:
      first: [n] ids.
      second: [m] ids, or None.
      seq_len: T.

    Returns:
      The row, and how many ids did not fit in it.
    """
    given = len(first) + (0 if second is None else len(second))
    n, m = fit(len(first), None if second is None else len(second), seq_len)
    row = self.lay_out(first[:n], None if second is None else second[:m], seq_len)
    return row | self.label_arrays(None), given - n - (m or 0)

  def lay_out(self, first: np.ndarray, second: np.ndarray | None, seq_len: int) -> dict[str, np.ndarray]:
    """The row of texts that fit."""
    tokenizer = self.tokenizer
    begin, end = (tokenizer.bos_id, tokenizer.eos_id) if self.pool == 'last' else (tokenizer.cls_id, tokenizer.sep_id)
    return pairs.row(first, second, seq_len, begin, tokenizer.sep_id, end)

  def label_arrays(self, label: Any) -> dict[str, np.ndarray]:
    """`label` and `label_weight` of a label, or of None; ValueError saying what is wrong with it."""
    weight = np.float32(label is not None)
    if self.task == 'regression':
      return {'label': np.float32(0 if label is None else _number(label)), 'label_weight': weight}
    if self.task == 'multilabel':
      if label is not None and not isinstance(label, list | tuple):
        raise ValueError('must be a list of classes (an empty one where none applies)')
      chosen = np.zeros(len(self.classes), np.float32)
      chosen[[self._class(name) for name in label or ()]] = 1
      return {'label': chosen, 'label_weight': weight}
    return {'label': np.int32(0 if label is None else self._class(label)), 'label_weight': weight}

  def heads(self, model: Any) -> dict[str, Any]:
    """The last linear layer, after BERT's pooler where the first place is read."""
    if model.causal and self.pool == 'cls':
      raise ValueError("objective.pool='cls' reads the first place, which in a causal model has seen nothing; "
                       "use 'last' or 'mean'.")
    outputs = len(self.classes) if self.task in ('multiclass', 'multilabel') else 1
    pooler = {'pooler': heads.Pooler(model.options)} if self.pool == 'cls' else {}
    return pooler | {'classifier': heads.ClassifierHead(model.options, outputs, self.dropout, bias=self.pool != 'last')}

  def logits(self, net: Any, hidden_BTD: jax.Array, batch: Batch) -> jax.Array:
    """B C logits (C = 1 for binary and regression), at least float32."""
    if self.pool == 'cls':
      x_BD = net.heads['pooler'](hidden_BTD)
    elif self.pool == 'mean':
      there_BT1 = (batch['segments'] > 0)[..., None].astype(hidden_BTD.dtype)
      x_BD = jnp.sum(hidden_BTD * there_BT1, axis=1) / jnp.maximum(jnp.sum(there_BT1, axis=1), 1)
    else:
      last_B = jnp.maximum(jnp.sum(batch['segments'] > 0, axis=-1) - 1, 0)
      x_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    logits_BC = net.heads['classifier'](x_BD)
    return logits_BC.astype(jnp.promote_types(logits_BC.dtype, jnp.float32))

  def loss(self, net: Any, hidden_BTD: Any, batch: Batch) -> Pairs:
    """Softmax or sigmoid cross-entropy (multilabel: mean over the classes) and accuracy, or the squared error."""
    logits_BC = self.logits(net, hidden_BTD, batch)
    label, weight_B = batch['label'], batch['label_weight']
    if self.task == 'regression':
      loss_B, right_B = jnp.square(logits_BC[:, 0] - label), None
    elif self.task == 'multiclass':
      loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, label)
      right_B = jnp.argmax(logits_BC, -1) == label
    else:
      label_BC = label if self.task == 'multilabel' else label[:, None]
      loss_B = jnp.mean(optax.sigmoid_binary_cross_entropy(logits_BC, label_BC), -1)
      right_B = jnp.mean((logits_BC > 0) == (label_BC > 0.5), -1)
    weight = jnp.sum(weight_B)
    accuracy = {} if right_B is None else {'classify_accuracy': (jnp.sum(right_B * weight_B), weight)}
    return {'classify': (jnp.sum(loss_B * weight_B), weight)} | accuracy

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """Nothing beyond the loss and the accuracy."""
    return {}

  def targets(self, batch: Batch) -> None:
    """None: no tokens are predicted."""
    return None

  def predict(self, net: Any, hidden_BTD: Any, batch: Batch) -> dict[str, jax.Array]:
    """`probabilities` [B, C] of the classes (binary: C = 2), or `values` [B] in regression."""
    logits_BC = self.logits(net, hidden_BTD, batch)
    if self.task == 'regression':
      return {'values': logits_BC[:, 0]}
    if self.task == 'multiclass':
      return {'probabilities': jax.nn.softmax(logits_BC)}
    if self.task == 'binary':
      return {'probabilities': jax.nn.sigmoid(jnp.concatenate([-logits_BC, logits_BC], -1))}
    return {'probabilities': jax.nn.sigmoid(logits_BC)}

  def describe(self, row: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One row of `predict` for JSON.

    Returns:
      label, probability and probabilities by class; for multilabel the labels of probability above one half and
      probabilities; for regression the value.
    """
    if self.task == 'regression':
      return {'value': float(row['values'])}
    probabilities = {name: float(p) for name, p in zip(self.classes, row['probabilities'], strict=True)}
    if self.task == 'multilabel':
      return {'label': [name for name, p in probabilities.items() if p > 0.5], 'probabilities': probabilities}
    best = max(probabilities, key=probabilities.__getitem__)
    return {'label': best, 'probability': probabilities[best], 'probabilities': probabilities}

  def _class(self, label: Any) -> int:
    if isinstance(label, list | tuple) or str(label) not in self.number:
      raise ValueError(f'must be one of the {len(self.classes)} classes of the training set: {_shortened(self.classes)}')
    return self.number[str(label)]


class _Rows:

  def __init__(self, objective: Objective, documents: Documents, seq_len: int):
    self.objective, self.documents, self.seq_len = objective, documents, seq_len
    self._check_labels()
    self._log_cuts()

  def __len__(self) -> int:
    return len(self.documents)

  def example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    documents = self.documents
    paired = documents.pair_lengths is not None
    n, m = fit(int(documents.lengths[index]), int(documents.pair_lengths[index]) if paired else None, self.seq_len)
    row = self.objective.lay_out(documents.text(index, 0, n), documents.pair(index)[:m] if paired else None, self.seq_len)
    return row | self.objective.label_arrays(self._label(index))

  def _label(self, index: int) -> Any:
    return None if self.documents.labels is None else self.documents.labels[index]

  def _check_labels(self) -> None:
    if self.documents.labels is None and self.objective.unlabelled == 'error':
      raise ValueError("objective classify needs labels and this corpus has none; name its field by config.data.label, "
                       "or set objective.unlabelled='ignore' where another objective learns from it.")
    missing = 0
    for index in range(len(self.documents)):
      label = self._label(index)
      missing += label is None
      if label is None and self.objective.unlabelled == 'error':
        raise ValueError(f"document {self.documents.ids[index]} has no label; give it one, or set objective.unlabelled='ignore'.")
      try:
        self.objective.label_arrays(label)
      except ValueError as error:
        raise ValueError(f'document {self.documents.ids[index]} has the label {label!r}; it {error}.') from None
    if missing:
      logging.info('classify: %d of %d documents have no label and count for nothing here.', missing, len(self.documents))

  def _log_cuts(self) -> None:
    lengths, second = np.asarray(self.documents.lengths), self.documents.pair_lengths
    lengths = lengths if second is None else lengths + np.asarray(second)
    over = np.maximum(lengths - _room(second is not None, self.seq_len), 0)
    if over.any():
      logging.warning('classify: %d of %d documents are longer than seq_len=%d allows and lose %d of %d tokens.',
                      np.count_nonzero(over), len(over), self.seq_len, over.sum(), lengths.sum())


def collect_classes(labels: Iterable[Any]) -> tuple[str, ...]:
  """The distinct classes among labels (a list of classes counts for each of them), numbers by value, the rest by letter.

  Raises:
    ValueError: there is no label, or labels are fractional numbers.
  """
  labels = [label for label in labels if label is not None]
  if not labels:
    raise ValueError('objective classify needs labels and this corpus has none; name their field by config.data.label.')
  if any(isinstance(label, float) for label in labels):
    raise ValueError(f'labels are numbers such as {labels[0]!r}; set config.objective.task=regression, or give classes as words '
                     'or whole numbers.')
  found = {str(name) for label in labels for name in (label if isinstance(label, list | tuple) else [label])}
  try:
    return tuple(sorted(found, key=lambda name: (float(name), name)))
  except ValueError:
    return tuple(sorted(found))


def fit(first: int, second: int | None, seq_len: int) -> tuple[int, int | None]:
  """How many tokens of each text are kept so that the row holds them with its special tokens; the longer text loses first."""
  room = _room(second is not None, seq_len)
  if second is None:
    return min(first, room), None
  short = min(first, second, room // 2)
  return (short, min(second, room - short)) if first <= second else (min(first, room - short), short)


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
      raise ValueError(f'objective.classes={_shortened(classes)} has no meaning with task=regression; leave it unset.')
    return
  given, least = classes or (), 1 if task == 'multilabel' else 2
  if len(given) < least or (task == 'binary' and len(given) > 2) or len(set(given)) < len(given):
    wanted = f'{"exactly" if task == "binary" else "at least"} {least} different classes'
    raise ValueError(f'objective classify with task={task} needs {wanted}, not {_shortened(given) or "none"}; '
                     'look at the labels of the training set, or choose another task.')


def _shortened(names: Sequence[str]) -> str:
  return ', '.join(names[:20]) + (f', ... ({len(names) - 20} more)' if len(names) > 20 else '')
