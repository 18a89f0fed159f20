"""Multiple choice: which of several candidates goes with a text (Devlin et al. 2019, "BERT",
section 4.4: SWAG).

Each candidate is read as a pair with the text, and gets a score; the softmax is over the
candidates of one text. All of them stand in one row, several texts share a row, and loss and
gradient are those of the same texts with a row each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.contracts import Batch, Documents, Encoded, Metrics, Net, Record, Tokenizer
from llm_jax.objectives.shared import candidates
from llm_jax.objectives.shared.candidates import Candidates
from llm_jax.objectives.shared.uncertainty import MEASURES, uncertainty


class Objective(Candidates):
  """The right one of several candidates.

  A record has a `text`, `choices`, a list of texts, and a `label`, the number of the right one from
  0, or the right one itself.

  Args:
    tokenizer: makes the ids.
    dropout: rate before the last linear layer.
    pool: 'cls' reads the first token through a pooler, as BERT does; 'mean' the mean of all tokens;
      'last' the last token, for decoders.
    transform: what stands between pool and last layer: 'pooler', BERT's; 'norm', ModernBERT's;
      'none'. None: a pooler where the first token is read.
    unlabelled: a document without a label is an 'error', or counts for nothing ('ignore').
    packing: 'best_fit' puts several texts with their candidates in a row; 'none': one text.
  """

  name, head = 'choice', 'choice'
  terms = {'choice': 1.0}
  text_fields = ('text', 'pair', 'choices')
  measures = MEASURES

  def __init__(
    self,
    tokenizer: Tokenizer,
    dropout: float = 0.1,
    pool: str = 'cls',
    transform: str | None = None,
    unlabelled: str = 'error',
    packing: str = 'best_fit',
  ):
    if unlabelled not in ('error', 'ignore'):
      raise ValueError(f'objective.unlabelled={unlabelled!r} must be one of error, ignore.')
    super().__init__(tokenizer, dropout, pool, transform, packing)
    self.unlabelled = unlabelled

  @staticmethod
  def encode(record: Record, tokenizer: Tokenizer) -> Encoded:
    """As `candidates.encode`; the label is the number of the right candidate."""
    encoded = candidates.encode(record, tokenizer, 'choices')
    label = encoded.pop('label', None)
    if label is not None:
      encoded['choice'] = _number(label, record['choices'])
    return encoded

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two candidates."""
    del options
    return [{'text': 'some', 'choices': ['words', 'more'], 'label': '0'}] * 4

  def numbers(self, documents: Documents, index: int) -> Sequence[float] | None:
    """One for the right candidate, zero for the others."""
    labels = documents.values('choice')
    right = None if labels is None else labels[index]
    if right is None:
      if self.unlabelled == 'error':
        raise ValueError('no label; give one, or set --config.objective.unlabelled=ignore.')
      return None
    return [float(i == right) for i in range(len(documents.array('candidate_sizes', index)))]

  def loss(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> Metrics:
    """Cross-entropy of the choice, and accuracy, per text."""
    score_BG = self.scores(net, hidden_BPD, batch)
    right_BG = batch['label'] * batch['label_weight']
    weight = jnp.sum(right_BG)
    loss_BG = -candidates.log_probabilities(score_BG, batch)
    others_BGG = jnp.where(candidates.same_group(batch), score_BG[:, None], -jnp.inf)
    best_BG = score_BG >= jnp.max(others_BGG, axis=-1)
    return {
      'choice': (jnp.sum(loss_BG * right_BG), weight),
      'choice_accuracy': (jnp.sum(best_BG * right_BG), weight),
    }

  def joined(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`choice`, the number of the best candidate, its `probability`, and `probabilities`, with
    their `entropy` and `margin`.
    """
    return _answer(candidates.softmax([part['score'] for part in parts]))

  def combined(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer by the means of the probabilities."""
    return _answer(np.mean([answer['probabilities'] for answer in answers], axis=0).tolist())


def _answer(probabilities: list[float]) -> dict[str, Any]:
  best = int(np.argmax(probabilities))
  answer = {'choice': best, 'probability': probabilities[best], 'probabilities': probabilities}
  return answer | uncertainty(probabilities)


def _number(label: Any, choices: Sequence[str]) -> int:
  """The number of the right candidate.

  Raises:
    ValueError: a label that is none of them, or may be two.
  """
  text = str(label)
  found = {i for i, choice in enumerate(choices) if choice == text}
  if text.isdecimal() and int(text) < len(choices):
    found.add(int(text))
  if len(found) != 1:
    problem = 'may be several' if found else 'is none'
    raise ValueError(
      f'the label {label!r} {problem} of the {len(choices)} choices; give the number of the right '
      'one, from 0, or its text.'
    )
  return found.pop()
