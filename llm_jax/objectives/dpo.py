"""Preferences: of two answers to one question one was chosen, and becomes likelier than the other.

DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7), IPO (Azar et al. 2023, arXiv:2310.12036,
equation 17), and without a reference SimPO (Meng et al. 2024, arXiv:2405.14734, equation 6) and
ORPO (Hong et al. 2024, arXiv:2403.07691, equations 4 to 7).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

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
  Rows,
  Tokenizer,
)
from llm_jax.data import chat_template, conversations, pack, prompted
from llm_jax.nn import vocabulary
from llm_jax.objectives.shared import next_tokens

LOSSES = {'dpo': 0.1, 'ipo': 0.1, 'simpo': 2.0, 'orpo': 0.1}  # and their usual beta
WITH_REFERENCE = ('dpo', 'ipo')
LONG = ('error', 'drop')
PACKINGS = ('best_fit', 'none')


class Objective(contracts.Objective):
  """The mean over the pairs of what one of the losses says of log-probabilities, which are sums
  over the tokens of an answer, its end included; for `ipo`, `simpo` and `orpo` their means.

  A row holds both answers of each of its pairs, with the question before either; they see nothing
  of each other.

  Args:
    tokenizer: makes the ids.
    loss: 'dpo', 'ipo', 'simpo' or 'orpo'.
    beta: how much the answers are pulled apart: beta of DPO and SimPO, tau of IPO, lambda of ORPO;
      None: 0.1, for SimPO 2.
    gamma: SimPO's margin.
    label_smoothing: the share of pairs that may be the wrong way round (DPO, SimPO).
    reference: a folder of the model that the answers' probabilities are compared with (DPO, IPO);
      None: that of `config.init_from`, which an adapter leaves as it is.
    template: as in `chat`.
    packing: 'best_fit' puts several pairs in a row; 'none': one.
    long: what a pair that is longer than a row is: an 'error', or left out ('drop') and counted.

  Raises:
    ValueError: an option that is not possible, or changes nothing.
  """

  shows_learned = True

  def __init__(
    self,
    tokenizer: Tokenizer,
    loss: str = 'dpo',
    beta: float | None = None,
    gamma: float | None = None,
    label_smoothing: float = 0.0,
    reference: str | None = None,
    template: str | None = None,
    packing: str = 'best_fit',
    long: str = 'error',
  ):
    for name, value, known in (
      ('loss', loss, LOSSES),
      ('packing', packing, PACKINGS),
      ('long', long, LONG),
    ):
      if value not in known:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(known)}.')
    _check(loss, beta, gamma, label_smoothing, reference)
    self.tokenizer, self.packing, self.long = tokenizer, packing, long
    self.kind, self.beta = loss, LOSSES[loss] if beta is None else beta
    self.gamma = 0.5 if gamma is None else gamma
    self.smoothing, self.reference = label_smoothing, reference
    self.needs_reference = loss in WITH_REFERENCE
    self.terms = {'preference': 1.0}
    if loss == 'orpo':
      self.terms = {'answer_nll': 1.0, 'preference': self.beta}
    self.template = chat_template.of(chat_template.text(template), tokenizer)
    self.ends = (self.template.end,)

  @classmethod
  def encoding(cls, options: Mapping[str, Any]) -> Callable[[Record, Tokenizer], Encoded]:
    """`encode` with the template."""
    return functools.partial(encode, template=chat_template.text(options.get('template')))

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Preferences."""
    del options
    return [{'prompt': 'some words', 'chosen': 'words', 'rejected': 'some'}] * 4

  def check(self, model: contracts.Model) -> None:
    """The model must be causal."""
    if not model.causal or model.reads_source():
      raise ValueError('objective dpo needs a decoder.')

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """Rows of whole pairs.

    Raises:
      ValueError: one that is longer than a row, where that is an error, naming it.
    """
    return _Rows(self, documents, seq_len)

  def of_reference(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """[B, G, 2]: log-probabilities of the chosen and the rejected answer of each pair."""
    return self._sums(net, hidden_BPD, batch)[0]

  def loss(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> Metrics:
    """Per pair the loss, and how often and by how much the chosen answer is ahead; `answer_nll` per
    token of the chosen answers.
    """
    sums_BG2, counts_BG2 = self._sums(net, hidden_BTD, batch)
    weight_BG = batch['pair_weight']
    scores_BG2 = sums_BG2
    if self.kind != 'dpo':
      scores_BG2 = sums_BG2 / jnp.maximum(counts_BG2, 1)
    if self.needs_reference:
      reference_BG2 = batch['reference'].astype(sums_BG2.dtype)
      if self.kind != 'dpo':
        reference_BG2 = reference_BG2 / jnp.maximum(counts_BG2, 1)
      scores_BG2 = scores_BG2 - reference_BG2
    pairs = jnp.sum(weight_BG)
    loss_BG = jnp.where(weight_BG > 0, losses(self, scores_BG2), 0.0)
    rewards_BG2 = jax.lax.stop_gradient(self.beta * scores_BG2)
    margin_BG = rewards_BG2[..., 0] - rewards_BG2[..., 1]
    mean = lambda x_BG: (jnp.sum(x_BG * weight_BG), pairs)
    return {
      'preference': (jnp.sum(loss_BG), pairs),
      'answer_nll': (
        -jnp.sum(sums_BG2[..., 0] * weight_BG),
        jnp.sum(counts_BG2[..., 0] * weight_BG),
      ),
      'reward_accuracy': mean((margin_BG > 0).astype(jnp.float32)),
      'reward_margin': mean(margin_BG),
      'reward_chosen': mean(rewards_BG2[..., 0]),
      'reward_rejected': mean(rewards_BG2[..., 1]),
    }

  def flops(self, model: contracts.Model, batch: Batch) -> float:
    """Of the vocabulary, at all positions."""
    return next_tokens.flops(model, batch)

  def _sums(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the answers of each pair, and how many tokens they have; [B, G, 2]."""
    model = net.model
    nll_BT = vocabulary.token_nll(hidden_BTD, model.table(), batch['targets'], model.table_bias())
    B, G = batch['pair_weight'].shape
    of_BTS = jax.nn.one_hot(batch['segments'] - 1, 2 * G, dtype=nll_BT.dtype)
    of_BTS *= batch['weights'].astype(nll_BT.dtype)[..., None]
    sums_BS = -jnp.einsum('BT,BTS->BS', nll_BT, of_BTS)
    return sums_BS.reshape(B, G, 2), jnp.sum(of_BTS, axis=1).reshape(B, G, 2)


def losses(objective: Objective, scores_BG2: jax.Array) -> jax.Array:
  """The loss of each pair, [B, G], from what the answers score."""
  chosen_BG, rejected_BG = scores_BG2[..., 0], scores_BG2[..., 1]
  ahead_BG = chosen_BG - rejected_BG
  if objective.kind == 'ipo':
    return (ahead_BG - 1 / (2 * objective.beta)) ** 2
  if objective.kind == 'orpo':
    odds_BG = ahead_BG - (_log_of_rest(chosen_BG) - _log_of_rest(rejected_BG))
    return -jax.nn.log_sigmoid(odds_BG)
  margin_BG = objective.beta * ahead_BG
  if objective.kind == 'simpo':
    margin_BG -= objective.gamma
  share = objective.smoothing
  return -(1 - share) * jax.nn.log_sigmoid(margin_BG) - share * jax.nn.log_sigmoid(-margin_BG)


def encode(record: Record, tokenizer: Tokenizer, template: str) -> Encoded:
  """`chosen_tokens` and `rejected_tokens`, each with the question before the answer, and
  `chosen_learned` and `rejected_learned`, 1 for the tokens of the answer.
  """
  before, *sides = conversations.preference(record)
  made, found = chat_template.of(template, tokenizer), {}
  spoken = sum(message['role'] == 'assistant' for message in before)
  for name, side in zip(('chosen', 'rejected'), sides, strict=True):
    encoded = made.encode([*before, *side])
    learned = encoded.learned_T.copy()
    learned[: encoded.ends_N[spoken - 1] if spoken else 0] = 0
    found |= {f'{name}_tokens': encoded.tokens_T, f'{name}_learned': learned}
  return found


class _Rows:
  """Rows of pairs.

  Attributes:
    reference: [documents, 2] float32, what the reference thinks of the answers; None for what is
      not known yet.
  """

  def __init__(self, objective: Objective, documents: Documents, seq_len: int):
    self.documents, self.seq_len, self.cut = documents, seq_len, 0
    self.reference: np.ndarray | None = None
    self.with_reference = objective.needs_reference
    self.prompt_ids = np.array(prompted.prompt(objective.tokenizer), np.int32)
    own = 2 * (len(self.prompt_ids) - 1)  # the last token of either answer is a target alone
    sizes = own + sum(documents.lengths(f'{name}_tokens') for name in ('chosen', 'rejected'))
    over = np.flatnonzero(sizes > seq_len)
    if len(over) and objective.long == 'error':
      raise ValueError(
        f'{documents.where(int(over[0]))}: both answers with the question before them have '
        f'{int(sizes[over[0]])} tokens, a row {seq_len}; {len(over)} of {len(sizes)} pairs are too '
        'long. Raise config.seq_len, or set config.objective.long=drop.'
      )
    if len(over):
      logging.warning(
        'dpo: %d of %d pairs are longer than a row and left out.', len(over), len(sizes)
      )
    self.kept = np.flatnonzero(sizes <= seq_len)
    most = 1 if objective.packing == 'none' else None
    self.plan = pack.best_fit(sizes[self.kept], seq_len, most=most)
    least = int(sizes[self.kept].min(initial=seq_len))
    self.slots = 1 if most else max(1, seq_len // max(least, 8))

  def __len__(self) -> int:
    return len(self.plan)

  def texts(self, index: int) -> list[int]:
    """The pairs of a row."""
    return [int(self.kept[number]) for number, _, _ in self.plan[index]]

  def example(self, index: int, rng: np.random.Generator) -> Example:
    numbers = self.texts(index)
    sides = [(number, side) for number in numbers for side in ('chosen', 'rejected')]
    tokens, learned = (
      [self.documents.array(f'{side}_{name}', number) for number, side in sides]
      for name in ('tokens', 'learned')
    )
    example = next_tokens.example(tokens, learned, self.prompt_ids, self.seq_len)
    weight_G = np.zeros(self.slots, np.float32)
    weight_G[: len(numbers)] = 1
    example['pair_weight'] = weight_G
    if self.with_reference:
      example['reference'] = np.zeros((self.slots, 2), np.float32)
      if self.reference is not None:
        example['reference'][: len(numbers)] = self.reference[numbers]
    return example


def _log_of_rest(score: jax.Array) -> jax.Array:
  """log(1 - exp(score)) of a log-probability, exact near 0 and far from it."""
  score = jnp.minimum(score, -1e-7)
  return jnp.where(score > -np.log(2.0), jnp.log(-jnp.expm1(score)), jnp.log1p(-jnp.exp(score)))


def _check(
  loss: str,
  beta: float | None,
  gamma: float | None,
  label_smoothing: float,
  reference: str | None,
) -> None:
  if beta is not None and beta <= 0:
    raise ValueError(f'objective.beta={beta} must be above 0.')
  if not 0 <= label_smoothing < 0.5:
    raise ValueError(
      f'objective.label_smoothing={label_smoothing} must be at least 0 and below 0.5.'
    )
  for name, given, those in (
    ('gamma', gamma is not None, ('simpo',)),
    ('label_smoothing', label_smoothing > 0, ('dpo', 'simpo')),
    ('reference', reference is not None, WITH_REFERENCE),
  ):
    if given and loss not in those:
      raise ValueError(
        f'objective.{name} is for {" and ".join(those)}, and the loss is {loss}; leave it out.'
      )
