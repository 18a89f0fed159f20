"""Answers to questions as spans of a text, as BERT is fine-tuned for SQuAD (Devlin et al. 2019,
sections 4.2 and 4.3): a score for each token to be the first of the answer, another to be the last.

A context that is longer than a row is read in windows that overlap. The first token of a window
([CLS]) stands for "no answer here": it is the target of a window without the answer, and of all
windows of a question that has none. Short windows share a row; loss and gradient are those of the
same windows with a row each.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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
from llm_jax.nn import heads
from llm_jax.objectives.shared import spans as spans_lib
from llm_jax.objectives.shared.spans import CANDIDATE, END, START, Windows
from llm_jax.objectives.shared.uncertainty import MEASURES, uncertainty

PACKINGS = ('best_fit', 'none')
LEAST_WINDOW = 16  # slots are enough for windows of so many tokens on average
_FAR = -1e30  # below every logit
THRESHOLD = 'best_f1_threshold'  # the number of an evaluation that `calibrate` takes


class Objective(contracts.Objective, contracts.Predictor):
  """The span of a context that answers a question.

  A record has `question` and `context`, and `answers`: each with `text` and `answer_start`, its
  first character; empty where the context has no answer. The first answer is learned.

  A batch has, beside tokens, `span` [B, T] int32, bits: 1 where an answer may begin or end, 2 and 4
  where it does; and `span_weight` [B, G] float32.

  Args:
    tokenizer: makes the ids.
    stride: tokens from the beginning of a window to that of the next, if the windows have as many.
    max_question: tokens of a question; more are cut off, and counted.
    max_answer: the most tokens of an answer.
    n_best: how many answers are given to a question.
    no_answer: whether a question may have none; None for what the training documents show.
    threshold: by how much "no answer" must score above the best answer to be said; None for what
      the validation set found with these parameters, or 0.
    dropout: rate before the last linear layer.
    unlabelled: a document without `answers` is an 'error', or counts for nothing ('ignore').
    packing: 'best_fit' puts several windows in a row; 'none': one window per row.

  Raises:
    ValueError: a value that is not possible.
  """

  terms = {'qa': 1.0}
  evaluators = ('loss', 'squad')
  derived = ('no_answer',)
  measures = MEASURES

  def __init__(
    self,
    tokenizer: Tokenizer,
    stride: int = 128,
    max_question: int = 64,
    max_answer: int = 30,
    n_best: int = 20,
    no_answer: bool | None = None,
    threshold: float | None = None,
    dropout: float = 0.0,
    unlabelled: str = 'error',
    packing: str = 'best_fit',
  ):
    for name, value, known in (
      ('unlabelled', unlabelled, ('error', 'ignore')),
      ('packing', packing, PACKINGS),
    ):
      if value not in known:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(known)}.')
    for name, count in (
      ('stride', stride),
      ('max_question', max_question),
      ('max_answer', max_answer),
      ('n_best', n_best),
    ):
      if count < 1:
        raise ValueError(f'objective.{name}={count} must be at least 1.')
    if not 0 <= dropout < 1:
      raise ValueError(f'objective.dropout={dropout} must be at least 0 and below 1.')
    if threshold is not None and not math.isfinite(threshold):
      raise ValueError(f'objective.threshold={threshold} must be a finite number.')
    self.stride, self.max_question = stride, max_question
    self.max_answer, self.n_best, self.no_answer = max_answer, n_best, bool(no_answer)
    self.given_threshold, self.threshold = threshold, threshold or 0.0
    self.dropout, self.unlabelled, self.packing = dropout, unlabelled, packing
    self.frame = pairs.frame(tokenizer)
    self.predictor = self

  @staticmethod
  def encode(record: Record, tokenizer: Tokenizer) -> Encoded:
    """`tokens` of the context with `token_begins` and `token_ends`, `question_tokens`, the
    `context`, `answers` as [[text, first character], ...], and how many of them have `moved`.

    Raises:
      ValueError: a field is missing, or an answer is not in its context.
    """
    for name in ('question', 'context'):
      if not isinstance(record.get(name), str):
        raise ValueError(
          f'field {name!r} is {record.get(name)!r}; a record needs a question and a context, both '
          f'strings; it has {", ".join(record) or "nothing"}.'
        )
    question, context = record['question'], record['context']
    tokens, spans = tokenizer.offsets(context)
    spans = np.asarray(spans, np.int64).reshape(-1, 2)
    encoded: Encoded = {  # rule 1 of `spans_lib.read`
      'tokens': tokens,
      'token_begins': spans[:, 0],
      'token_ends': spans[:, 1],
      'question_tokens': tokenizer.encode(question),
      'context': context,
    }
    if record.get('answers') is not None:
      answers, moved = spans_lib.read(record['answers'], context)
      encoded |= {'answers': answers} | ({'moved': moved} if moved else {})
    return encoded

  @classmethod
  def derive(cls, options: Mapping[str, Any], documents: Sequence[Documents]) -> dict[str, Any]:
    """Whether a question of the training documents has no answer.

    Raises:
      ValueError: no document has `answers`.
    """
    if options.get('no_answer') is not None:
      return {}
    columns = (corpus.values('answers') or () for corpus in documents)
    given = [answers for column in columns for answers in column if answers is not None]
    if not given:
      raise ValueError(
        'objective qa needs answers and this corpus has none; config.data.source=squad reads files '
        "of SQuAD, and config.data.fields=('question','context','answers') names fields of others."
      )
    without = sum(not answers for answers in given)
    logging.info('qa: %d of %d questions have no answer.', without, len(given))
    return {'no_answer': without > 0}

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A question with its answer, and one without where there may be such."""
    record = {'question': 'what?', 'context': 'some words'}
    answers = [{'text': 'words', 'answer_start': 5}]
    records = [record | {'answers': answers}] * 4
    return records[:3] + [record | {'answers': []}] if options.get('no_answer') else records

  def check(self, model: contracts.Model) -> None:
    """A causal model has not seen the rest of an answer at its first token."""
    if model.causal:
      raise ValueError(
        'objective qa reads a span at its first and its last token, where a causal model has not '
        'seen the rest; use an encoder.'
      )

  def rows(self, documents: Documents, seq_len: int) -> Windows:
    """The windows of the documents in as few rows as they need.

    Logs how many windows there are, what is cut off, and which answers no tokens spell.

    Raises:
      ValueError: a document without answers, or a row that has no room for a context.
    """
    answers = documents.values('answers') or [None] * len(documents)
    if self.unlabelled == 'error':
      for document, given in enumerate(answers):
        if given is None:
          raise ValueError(
            f'{documents.where(document)}: no answers; give them ([] for none), or set '
            "config.objective.unlabelled='ignore'."
          )
    rows = self._windows(documents, seq_len, answers)
    rows.log()
    return rows

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """Nothing to add: the answers come with the row."""
    if 'span' not in example:
      raise ValueError(
        "objective qa labels only rows that it lays out itself; in a mix, set rows='qa'."
      )
    return example

  def layout(self, documents: Documents, seq_len: int) -> Windows:
    """The rows of questions to answer: no answer is looked at, all weights are 0."""
    return self._windows(documents, seq_len, [None] * len(documents))

  def slots(self, seq_len: int) -> int:
    """G: the most windows of a row."""
    return 1 if self.packing == 'none' else max(1, seq_len // LEAST_WINDOW)

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """A linear layer to the two scores."""
    return {'spans': heads.ClassifierHead(model.options, 2, self.dropout)}

  def loss(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> Metrics:
    """The mean of the cross-entropies of first and last token, each over the tokens of a window
    where an answer may stand; and how often both have the highest score.
    """
    logits_BT2 = self._logits(net, hidden_BTD)
    texts = 1 + jnp.arange(batch['span_weight'].shape[1])
    inside_BTG = batch['segments'][..., None] == texts[None, None]
    losses, right = [], []
    for side, bit in enumerate((START, END)):
      loss_BG, right_BG = _cross_entropy(logits_BT2[..., side], batch['span'], bit, inside_BTG)
      losses.append(loss_BG)
      right.append(right_BG)
    weight_BG = batch['span_weight']
    total, weight = jnp.sum((losses[0] + losses[1]) / 2 * weight_BG), jnp.sum(weight_BG)
    return {
      'qa': (total, weight),
      'qa_span_accuracy': (jnp.sum(right[0] * right[1] * weight_BG), weight),
    }

  def no_gradient(self, path: str) -> str | None:
    """The bias of a score, which Hugging Face's folders have, adds the same to all tokens."""
    return 'softmax hides it' if path == 'heads_spans/dense/bias' else None

  def predict(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """`starts` and `ends` [B, T]: the scores of each token."""
    logits_BT2 = self._logits(net, hidden_BTD)
    return {'starts': logits_BT2[..., 0], 'ends': logits_BT2[..., 1]}

  def answers(
    self, row: Mapping[str, np.ndarray], rows: Windows, index: int
  ) -> Iterator[dict[str, Any]]:
    """What each window of a row says: `nothing`, the score of no answer, and `spans`, the best ones
    as [score, first character, one past the last, text]; `joined` makes an answer of them.
    """
    for window in rows.windows(index):
      starts, ends = row['starts'], row['ends']
      null = float(starts[window.first]) + float(ends[window.first])
      tokens = slice(window.context, window.context + window.stop - window.start)
      found = best_spans(starts[tokens], ends[tokens], self.max_answer, self.n_best)
      begins, stops, context = rows.characters(window.text)
      spans = []
      for score, first, last in found:
        begin, stop = int(begins[window.start + first]), int(stops[window.start + last])
        text = context[begin:stop].lstrip()  # tokens may begin with a space
        begin, text = stop - len(text), text.rstrip()
        if text:
          spans.append([score, begin, begin + len(text), text])
      yield {'nothing': null, 'spans': spans}

  def joined(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer of a question from those of its windows.

    Returns:
      `answer`, a text, '' for none; its `start` and `end` in the context and its `probability`;
      the `entropy` and `margin` of all probabilities;
      `no_answer_probability` and `no_answer_score`, by how much no answer scores above the best
      one; and `answers`, the best ones, with text, start, end and probability. Probabilities are
      among these answers and none (`run_squad.py` of BERT).
    """
    scores: dict[tuple[int, int], tuple[float, str]] = {}
    for part in parts:
      for score, start, end, text in part['spans']:
        if (start, end) not in scores or score > scores[start, end][0]:
          scores[start, end] = score, text
    ranked = sorted(scores.items(), key=lambda item: (-item[1][0], item[0]))[: self.n_best]
    nothing = min(float(part['nothing']) for part in parts)
    values = np.array([nothing, *(score for _, (score, _) in ranked)])
    if not self.no_answer and ranked:
      values[0] = -np.inf
    probabilities = np.exp(values - values.max())
    probabilities = (probabilities / probabilities.sum()).tolist()
    found = [
      {'text': text, 'start': start, 'end': end, 'probability': probability}
      for ((start, end), (_, text)), probability in zip(ranked, probabilities[1:], strict=True)
    ]
    difference = nothing - ranked[0][1][0] if ranked else math.inf
    answer: dict[str, Any] = {'answer': '', 'probability': probabilities[0]}
    if found and (difference <= self.threshold or not self.no_answer):
      best = dict(found[0])
      answer = {'answer': best.pop('text')} | best
    if self.no_answer:
      answer['no_answer_probability'] = probabilities[0]
      answer['no_answer_score'] = difference if ranked else None
    return answer | uncertainty(probabilities) | {'answers': found}

  def calibrate(self, values: Mapping[str, float]) -> None:
    """Takes the threshold that the evaluator 'squad' found, where the config gives none."""
    if self.given_threshold is None and THRESHOLD in values:
      self.threshold = float(values[THRESHOLD])

  def _windows(
    self, documents: Documents, seq_len: int, answers: Sequence[Sequence[spans_lib.Answer] | None]
  ) -> Windows:
    return Windows(
      documents,
      seq_len,
      answers,
      frame=self.frame,
      stride=self.stride,
      max_question=self.max_question,
      slots=self.slots(seq_len),
    )

  def _logits(self, net: Net, hidden_BTD: jax.Array) -> jax.Array:
    logits_BT2 = net.heads['spans'](hidden_BTD)
    return logits_BT2.astype(jnp.promote_types(logits_BT2.dtype, jnp.float32))


def best_spans(
  starts: np.ndarray, ends: np.ndarray, most: int, count: int
) -> list[tuple[float, int, int]]:
  """The spans with the highest sums of two scores, as (sum, first token, last token), best first.

  Args:
    starts, ends: [n] scores of the tokens.
    most: tokens of a span.
    count: how many spans.

  Example:
    >>> best_spans(np.array([0.0, 3.0, 1.0]), np.array([5.0, 0.0, 2.0]), most=2, count=2)
    [(5.0, 0, 0), (5.0, 1, 2)]
  """
  n, width = len(starts), min(most, len(starts))
  if not n:
    return []
  padded = np.append(np.asarray(ends, np.float64), np.full(width - 1, -np.inf))
  sums = np.asarray(starts, np.float64)[:, None] + np.lib.stride_tricks.sliding_window_view(
    padded, width
  )
  flat = sums.ravel()
  order = np.argsort(-flat, kind='stable')[:count]
  found = [(float(flat[i]), int(i // width), int(i // width + i % width)) for i in order]
  return [span for span in found if math.isfinite(span[0])]


def _cross_entropy(
  logits_BT: jax.Array, span_BT: jax.Array, bit: int, inside_BTG: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """[B, G]: the cross-entropy of a window's target among its candidates, and whether the target
  scores highest; anything finite where a row has no window g.
  """
  among_BTG = inside_BTG & (span_BT & CANDIDATE > 0)[..., None]
  scores_BTG = jnp.where(among_BTG, logits_BT[..., None], _FAR)
  most_BG = jax.lax.stop_gradient(jnp.max(scores_BTG, axis=1))
  # The highest adds exp(0), so the sum is below one only where there is no window.
  total_BG = jnp.sum(jnp.where(among_BTG, jnp.exp(scores_BTG - most_BG[:, None]), 0), axis=1)
  target_BTG = inside_BTG & (span_BT & bit > 0)[..., None]
  target_BG = jnp.sum(jnp.where(target_BTG, logits_BT[..., None], 0), axis=1)
  loss_BG = jnp.log(jnp.maximum(total_BG, 1)) + most_BG - target_BG
  there_BG = jnp.any(target_BTG, axis=1)
  return jnp.where(there_BG, loss_BG, 0), there_BG & (target_BG >= most_BG)
