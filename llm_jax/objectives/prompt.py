"""Classification by words of the vocabulary: a template makes a text a phrase with a gap, and the
language model says how likely each class's words are in it.

For masked models Schick and Schütze 2021, "PET", arXiv:2001.07676, trained as Gao et al. 2021,
"LM-BFF", arXiv:2012.15723, do: cross-entropy over the classes' words. For causal models the words
continue the phrase, as in Brown et al. 2020, "GPT-3", arXiv:2005.14165. Contextual calibration is
that of Zhao et al. 2021, arXiv:2102.09690. No head is new, so a model answers without training.

Of a word with ids t_1 ... t_n the log-probability is the sum of those of its ids. A masked model
predicts all of them at once: the gap is as many masks as the longest word has ids, t_i is read at
the i-th, and masks beyond the n-th count for nothing (Schick and Schütze 2021, arXiv:2009.07118,
section 3.1, PET with multiple masks in training). A causal model predicts t_i behind t_1 ... t_i-1.

Letters beside those of `contracts`: S segments of a text, W words, M ids of the longest word, K the
most words of a class.
"""

from collections.abc import Callable, Mapping, Sequence
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
  Rows,
  Texts,
  Tokenizer,
)
from llm_jax.data.documents import Memory
from llm_jax.nn import heads
from llm_jax.objectives.shared import demonstrations as shots
from llm_jax.objectives.shared import labels as labels_lib
from llm_jax.objectives.shared import templates
from llm_jax.objectives.shared import verbalizers as verbalizers_lib
from llm_jax.objectives.shared.demonstrations import Demonstrations
from llm_jax.objectives.shared.prompts import PromptRows, Prompts, check_pairs
from llm_jax.objectives.shared.templates import Template, continued
from llm_jax.objectives.shared.uncertainty import MEASURES, uncertainty
from llm_jax.objectives.shared.verbalizers import Words
from llm_jax.parallel import sharding

NAME = 'prompt'
SCORES = ('sum', 'mean')
PACKINGS = ('best_fit', 'none')
CONTENT_FREE = ('N/A', '[MASK]', '')  # arXiv:2102.09690, section 5


class Objective(contracts.Objective, contracts.Predictor):
  """Which class's words fill the gap of the template best?

  The probability of a class is the softmax over the classes of the log of the mean probability of
  its words (Hu et al. 2022, "KPT", arXiv:2108.02035); of one word with one id, that is the
  softmax over the words' logits (LM-BFF, equation 1).

  Several texts share a row. For a causal model, a text stands once for each continuation that words
  of several ids are read behind ('very good' and 'very bad' share one), all of them in one row;
  where every word has one id, it stands once.

  Args:
    tokenizer: makes the ids.
    causal: whether the model is a causal one; the program says so.
    template: what a text is put in, with {text}, {mask} and, for pairs, {pair}; for a causal model
      {mask} is last. A space before a field belongs to what is put there. What is too long for a
      row loses text, of a pair the longer one first.
    verbalizers: class -> its word, or a list of its words; None or empty where each class's name is
      its word.
    classes: their names in the order of their numbers; None for those of `verbalizers`, or else of
      the training documents.
    score: 'sum', the log-probability of a word; 'mean', divided by its number of ids, so that long
      words do not lose by their length (GPT-3, section 2.4).
    calibrate: the probabilities are divided by those of texts that say nothing, averaged over
      'N/A', a mask and the empty text, and scaled to sum to 1, in the loss too.
    demonstrations: how many texts of each class stand before a text, in the same template, the
      first of their class's words in the gap; never the text itself.
    shown: these texts, (class, text) or (class, text, pair) each; None for training documents, one
      more of each class, which stands in where a text is among them.
    seed: of their choice.
    separator: text after each of them.
    unlabelled: a document without a label is an 'error', or counts for nothing ('ignore').
    packing: 'best_fit' puts several texts in a row; 'none': one.
  """

  terms = {NAME: 1.0}
  evaluators = ('loss', 'classification')
  derived = ('classes', 'shown')
  task = 'multiclass'
  from_training = ('shown',)
  measures = MEASURES
  explainable = False

  def __init__(
    self,
    tokenizer: Tokenizer,
    causal: bool = False,
    template: str = templates.DEFAULT,
    verbalizers: dict | None = None,
    classes: tuple[str, ...] | None = None,
    score: str = 'sum',
    calibrate: bool = False,
    demonstrations: int = 0,
    shown: tuple | None = None,
    seed: int = 0,
    separator: str = '\n',
    unlabelled: str = 'error',
    packing: str = 'best_fit',
  ):
    for name, value, allowed in (
      ('score', score, SCORES),
      ('packing', packing, PACKINGS),
      ('unlabelled', unlabelled, ('error', 'ignore')),
    ):
      if value not in allowed:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(allowed)}.')
    self.classes = verbalizers_lib.classes_of(classes, verbalizers)
    self.labels = labels_lib.Labels(self.classes, self.task, NAME)
    self.tokenizer, self.causal, self.template = tokenizer, causal, Template(template, tokenizer)
    self.template.check(causal)
    self.words = Words(self.classes, verbalizers or {}, self.template, tokenizer)
    self.prompts = Prompts(
      self.template,
      self.words,
      tokenizer,
      causal,
      self._shown(demonstrations, shown, continued(tokenizer, separator)),
    )
    self.score, self.calibrated = score, calibrate
    self.unlabelled, self.packing, self.predictor = unlabelled, packing, self
    self._said = False

  def _shown(
    self, count: int, shown: Sequence[Any] | None, separator: np.ndarray
  ) -> Demonstrations | None:
    if count < 0 or (shown and not count):
      raise ValueError(
        f'objective.demonstrations={count} must be how many texts of each class are shown before a '
        'text, 0 for none' + (', and objective.shown has some.' if shown else '.')
      )
    if not count:
      return None
    if not shown:
      raise ValueError(
        f'objective.demonstrations={count} of each class are taken from training documents, and '
        'none are read here; use the workdir of a run, or give texts in objective.shown.'
      )
    first = (self.words.ids[number] for number in self.words.firsts)
    answers = dict(zip(self.classes, first, strict=True))
    return Demonstrations(shown, count, self.template, answers, separator)

  @classmethod
  def encoding(cls, options: Mapping[str, Any]) -> Callable[[Record, Tokenizer], Encoded]:
    """Texts as they stand in the template, behind a space or not."""
    return templates.encoding(options.get('template') or templates.DEFAULT)

  @classmethod
  def derive(cls, options: Mapping[str, Any], documents: Sequence[Documents]) -> dict[str, Any]:
    """The classes, those of the training documents where the config names none; and what is shown.

    Raises:
      ValueError: no document has a label, a label that is no class, or a class with too few
        documents to be shown.
    """
    classes = options.get('classes') or tuple(options.get('verbalizers') or ())
    classes = tuple(classes) or labels_lib.collect_classes(documents, NAME)
    found: dict[str, Any] = {'classes': classes}
    count = options.get('demonstrations') or 0
    if count > 0 and not options.get('shown'):
      for split in documents:
        check_pairs(options.get('template') or templates.DEFAULT, split)
        verbalizers_lib.check_labels(split, classes)
      found['shown'] = shots.choose(documents, classes, count, options.get('seed') or 0)
    return found

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As many different texts of each class as are shown, and one more."""
    classes = options.get('classes') or tuple(options.get('verbalizers') or ()) or ('0', '1')
    pieces = templates.parse(options.get('template') or templates.DEFAULT)
    pair = {'pair': 'more'} if any(piece.field == 'pair' for piece in pieces) else {}
    count = max(2, 1 + (options.get('demonstrations') or 0))
    return [{'text': f'words {i}', 'label': n} | pair for i in range(count) for n in classes]

  def check(self, model: contracts.Model) -> None:
    """The model must be of the kind that the texts are laid out for."""
    if model.causal != self.causal:
      raise ValueError(f'objective prompt: causal={self.causal}, and the model is of another kind.')

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """The documents in as few rows as they need.

    Logs the words for the classes, how many texts a row holds, and how much is cut off.

    Raises:
      ValueError: a label that is no class, naming the document; no room for a text.
    """
    rows = _Rows(self, documents, seq_len, documents.values('label'))
    verbalizers_lib.check_labels(documents, self.classes)
    self.labels.check(documents, required=self.unlabelled == 'error')
    self._log_words()
    rows.log_cut()
    if self.packing != 'none':
      rows.log_packing()
    return rows

  def _log_words(self) -> None:
    """Once."""
    if self._said:
      return
    self._said = True
    copies = len(self.prompts.fillings)
    behind = f', each text {copies} times, behind so many beginnings of them' if copies > 1 else ''
    logging.info('prompt: words (tokens) of %s%s.', self.words.described(), behind)
    if unknown := self.words.partly_unknown():
      logging.warning('prompt: the tokenizer does not know a part of %s.', ', '.join(unknown))

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """Nothing to add: the label comes with the row."""
    if 'reads' not in example:
      raise ValueError(
        "objective prompt reads only rows that it lays out itself; in a mix, set rows='prompt'."
      )
    return example

  def layout(self, documents: Documents, seq_len: int) -> Texts:
    """The rows of documents to predict: no label is looked at, all weights are 0."""
    self._log_words()
    return _Rows(self, documents, seq_len, None)

  def slots(self, seq_len: int) -> int:
    """G: the most texts of a row."""
    return 1 if self.packing == 'none' else self.prompts.slots(seq_len)

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """The masked-LM head of `mlm`; a causal model has none."""
    return {} if self.causal else {'mlm': heads.MLMHead(model.options, model.vocab_size)}

  def positions(self, batch: Batch) -> jax.Array:
    """Where the ids of words are read, [B, G * S * M]."""
    steps_M = jnp.arange(self.words.longest)
    at_BGSM = batch['reads'][..., None] + steps_M[None, None, None]
    # Behind a short continuation at the end of a row there is nothing to read, nor is it counted.
    last = batch['tokens'].shape[1] - 1
    return jnp.minimum(at_BGSM, last).reshape(len(at_BGSM), -1)

  def scores(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """[B, G, C], at least float32: the log of the mean probability of each class's words, but for
    what is the same for all; anything finite where a row has no text g.
    """
    words = self.words
    logits_BGWM = self._logits(net, hidden_BPD, batch['reads'].shape)
    score_BGW = jnp.sum(jnp.where(words.inside_WM[None, None], logits_BGWM, 0), axis=-1)
    if self.score == 'mean':
      score_BGW /= jnp.asarray(words.inside_WM.sum(-1), score_BGW.dtype)[None, None]
    counted_CK = words.counted_CK[None, None]
    score_BGCK = jnp.where(counted_CK, score_BGW[..., words.words_CK], -jnp.inf)
    count_C = jnp.asarray(words.counted_CK.sum(-1), score_BGW.dtype)
    return jax.nn.logsumexp(score_BGCK, axis=-1) - jnp.log(count_C)[None, None]

  def _logits(self, net: Net, hidden_BPD: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """[B, G, W, M]: of the ids of all words, where they are read; log-probabilities, but where all
    words have one id, whose softmax does not depend on the others.
    """
    words, bias_V = self.words, None
    if not self.causal:
      hidden_BPD, bias_V = net.heads['mlm'](hidden_BPD)
    table_VD = net.model.table()
    hidden_BPD = sharding.constrain(hidden_BPD, 'batch', None, None)
    x_BGSMD = hidden_BPD.reshape(*shape, words.longest, -1)
    wide = jnp.promote_types(x_BGSMD.dtype, jnp.float32)
    rows_WMD = table_VD[words.targets_WM].astype(x_BGSMD.dtype)
    rows_WMD = sharding.constrain(rows_WMD, None, None, None)
    product = 'BGSMD,WMD->BGSWM'
    logits_BGSWM = jnp.einsum(product, x_BGSMD, rows_WMD, preferred_element_type=wide)
    segment_W, numbers_W = self.prompts.segment_W, np.arange(len(words.ids))
    logits_BGWM = logits_BGSWM[:, :, segment_W, numbers_W]
    if bias_V is not None:
      logits_BGWM += bias_V[words.targets_WM].astype(wide)[None, None]
    if words.longest == 1:
      return logits_BGWM
    return logits_BGWM - _log_totals(x_BGSMD, table_VD, bias_V)[:, :, segment_W]

  def log_probabilities(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """[B, G, C]: of the classes, calibrated if they are to be."""
    score_BGC = self.scores(net, hidden_BPD, batch)
    if self.calibrated:
      score_BGC -= self._of_nothing(net, batch['tokens'].shape[1], score_BGC.dtype)[None, None]
    return jax.nn.log_softmax(score_BGC)

  def _of_nothing(self, net: Net, seq_len: int, dtype: Any) -> jax.Array:
    """[C]: the log of the mean probability of each class over texts that say nothing, which run in
    rows of their own, the same for every part of a batch.
    """
    batch, rows_E, slots_E = self._content_free(seq_len)
    hidden_RPD = net.forward(batch, self.positions(batch)).hidden
    log_p_RGC = jax.nn.log_softmax(self.scores(net, hidden_RPD, batch))
    log_p_EC = log_p_RGC[rows_E, slots_E].astype(dtype)
    return jax.nn.logsumexp(log_p_EC, axis=0) - np.log(len(rows_E))

  def _content_free(self, seq_len: int) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Texts that say nothing, in rows of `seq_len` tokens that the mesh can share out, and the row
    and slot of each text.
    """
    records = [self._says_nothing(text) for text in CONTENT_FREE]
    memory = Memory(records, lambda record, _: dict(record), None)
    rows = PromptRows(self.prompts, memory, seq_len, self.slots(seq_len))
    layout = sharding.current()
    shards = 1 if layout is None else sharding.row_shards(layout.mesh)
    examples = [rows.example(i) for i in range(len(rows))]
    empty = {key: np.zeros_like(value) for key, value in examples[0].items()}
    examples += [empty] * (-len(rows) % shards)
    batch = {key: jnp.asarray(np.stack([e[key] for e in examples])) for key in empty}
    where = [(row, slot) for row in range(len(rows)) for slot in range(len(rows.texts(row)))]
    rows_E, slots_E = np.transpose(where)
    return batch, rows_E, slots_E

  def _says_nothing(self, text: str) -> dict[str, np.ndarray]:
    fields = ('text', 'pair') if self.template.paired else ('text',)
    record = {templates.ARRAYS[field]: self.template.text(field, text) for field in fields}
    if text == '[MASK]' and not self.causal:
      return {name: np.array([self.tokenizer.mask_id], np.int32) for name in record}
    return record

  def loss(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> Metrics:
    """Cross-entropy over the classes, and accuracy, per text."""
    log_p_BGC = self.log_probabilities(net, hidden_BPD, batch)
    label_BG, weight_BG = batch['label'], batch['label_weight']
    loss_BG = optax.softmax_cross_entropy_with_integer_labels(log_p_BGC, label_BG)
    right_BG = jnp.argmax(log_p_BGC, -1) == label_BG
    weight = jnp.sum(weight_BG)
    return {
      NAME: (jnp.sum(loss_BG * weight_BG), weight),
      f'{NAME}_accuracy': (jnp.sum(right_BG * weight_BG), weight),
    }

  def flops(self, model: contracts.Model, batch: Batch) -> float:
    """Of the masked-LM head and the vocabulary, where words are read; of what says nothing too."""
    (rows, length), (_, slots, segments) = batch['tokens'].shape, batch['reads'].shape
    read, dim = slots * segments * self.words.longest, model.options.dim
    columns = model.vocab_size if self.words.longest > 1 else len(self.words.ids)
    each = 2.0 * read * dim * (columns + (0 if self.causal else dim))
    if not self.calibrated:
      return rows * each
    more = len(self._content_free(length)[0]['tokens'])
    return (rows + more) * each + more * model.flops(length, read)

  def predict(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`probabilities` [B, G, C] of the classes."""
    return {'probabilities': jnp.exp(self.log_probabilities(net, hidden_BPD, batch))}

  def describe(self, text: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """label, probability, and probabilities by class, with `entropy` and `margin`."""
    values = map(float, text['probabilities'])
    probabilities = dict(zip(self.classes, values, strict=True))
    best = max(probabilities, key=probabilities.__getitem__)
    known = {'label': best, 'probability': probabilities[best], 'probabilities': probabilities}
    return known | uncertainty(text['probabilities'])

  def combined(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer by the means of the probabilities."""
    each = [list(answer['probabilities'].values()) for answer in answers]
    return self.describe({'probabilities': np.mean(each, axis=0)})


class _Rows(PromptRows):
  """Rows with labels; None for documents to predict, which have none."""

  def __init__(
    self, objective: Objective, documents: Documents, seq_len: int, labels: Sequence[Any] | None
  ):
    super().__init__(objective.prompts, documents, seq_len, objective.slots(seq_len))
    self._labels, self._target = labels, objective.labels.target

  def example(self, index: int, rng: np.random.Generator | None = None) -> Example:
    row = super().example(index, rng)
    row['label'] = np.zeros(self.slots, np.int32)
    row['label_weight'] = np.zeros(self.slots, np.float32)
    for slot, document in enumerate(self.texts(index)):
      label = None if self._labels is None else self._labels[document]
      if label is not None:
        row['label'][slot], row['label_weight'][slot] = self._target(label), 1
    return row


def _log_totals(x_BGSMD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None) -> jax.Array:
  """[B, G, S, M]: the log of the sum of exponentials of the logits over the vocabulary, for a text
  of each row at a time, and again in the backward pass, so that logits are never whole.
  """
  wide = jnp.promote_types(x_BGSMD.dtype, jnp.float32)
  W_VD = sharding.constrain(table_VD.astype(x_BGSMD.dtype), 'vocab', None)

  @jax.checkpoint
  def of_slot(x_BSMD: jax.Array) -> jax.Array:
    logits_BSMV = jnp.einsum('BSMD,VD->BSMV', x_BSMD, W_VD, preferred_element_type=wide)
    if bias_V is not None:
      logits_BSMV += bias_V.astype(wide)[None, None, None]
    return jax.nn.logsumexp(sharding.constrain(logits_BSMV, 'batch', None, None, None), axis=-1)

  return jnp.moveaxis(jax.lax.map(of_slot, jnp.moveaxis(x_BGSMD, 1, 0)), 0, 1)
