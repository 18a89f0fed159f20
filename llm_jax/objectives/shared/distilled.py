"""Any objective that knows how, with a teacher beside it: another network, which stays as it is and
answers the same rows.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import contracts, plugins
from llm_jax.core.contracts import Batch, Documents, Example, Metrics, Net, Rows, Texts
from llm_jax.nn.linear import Linear
from llm_jax.objectives.shared import soft

HEAD, PROJECTION = 'teacher', 'distill'
SOFT, HIDDEN, RELATIONS = 'soft', 'hidden', 'relations'
ANSWERS = 'teacher_answers'  # of a batch: what the teacher has said of each text, [B, G, ...]


@dataclasses.dataclass(frozen=True)
class Options:
  """What is learned from a teacher: `config.distill`.

  Attributes:
    temperature: T, by which logits are divided.
    soft: coefficient of the divergence from the teacher's answers.
    hard: what the objective's own coefficients are multiplied by; 0: labels are not looked at.
    hidden: coefficient of the distance of hidden states: layer m of M from layer m N / M of the
      teacher's N, rounded up (TinyBERT's map).
    hidden_loss: one of `soft.HIDDEN_LOSSES`; where the student is narrower or wider than the
      teacher, its states are projected.
    relations: coefficient of the divergence of the relations of queries, keys and values in the
      student's last layer (MiniLM v2).
    relation_heads: into how many parts vectors are cut for that; None: as many as the teacher has
      heads.
    relation_layer: of the teacher, from 1 on; None: its last.
    weights: the form of the teacher's kernels, 'int8'; '' for as they are.
    param_dtype: of the teacher's parameters.
    cached: whether the teacher answers each text once, before training; its answers are kept, and
      it takes no memory and no time afterwards.

  Raises:
    ValueError: an option out of range.
  """

  temperature: float = 2.0
  soft: float = 1.0
  hard: float = 0.5
  hidden: float = 0.0
  hidden_loss: str = 'mse'
  relations: float = 0.0
  relation_heads: int | None = None
  relation_layer: int | None = None
  weights: str = ''
  param_dtype: str | None = None
  cached: bool = False

  def __post_init__(self) -> None:
    if not self.temperature > 0:
      raise ValueError(f'config.distill.temperature={self.temperature} must be above 0.')
    for name in ('soft', 'hard', 'hidden', 'relations'):
      if getattr(self, name) < 0:
        raise ValueError(f'config.distill.{name}={getattr(self, name)} must be at least 0.')
    if not self.soft + self.hidden + self.relations:
      raise ValueError(
        'config.distill.soft, hidden and relations are all 0: nothing is learned from '
        'config.teacher; give one of them a weight, or leave config.teacher out.'
      )
    if self.cached and self.looks_inside:
      raise ValueError(
        'config.distill.cached=True keeps answers alone, and config.distill.hidden or relations '
        'compare layers; choose one.'
      )
    if self.hidden_loss not in soft.HIDDEN_LOSSES:
      raise ValueError(
        f'config.distill.hidden_loss={self.hidden_loss!r} is not known'
        f'{plugins.nearest(self.hidden_loss, soft.HIDDEN_LOSSES)}; known: '
        f'{", ".join(soft.HIDDEN_LOSSES)}.'
      )

  @property
  def looks_inside(self) -> bool:
    """Whether layers are compared."""
    return bool(self.hidden or self.relations)


class Distilled:
  """Stands before the class of an objective: its loss, and what is learned from the teacher."""

  def heads(self, model: contracts.Model) -> dict[str, nn.Module]:
    """The objective's own, the teacher, and a projection where the widths differ."""
    found = super().heads(model)
    if self.distill.cached:
      return found
    found |= {HEAD: self.teacher}
    ours, theirs = model.options, self.teacher.model.options
    if self.distill.hidden and ours.dim != theirs.dim:
      found[PROJECTION] = Linear('...D,DF->...F', (ours.dim, theirs.dim), ours, bias=False)
    return found

  def check(self, model: contracts.Model) -> None:
    """As the objective's, and that layers can be compared."""
    super().check(model)
    if not self.distill.relations:
      return
    sizes = [network.options for network in (model, self.teacher.model)]
    count = self.distill.relation_heads or sizes[1].heads
    for options in sizes:
      for heads in {options.heads, options.kv_heads or options.heads}:
        if heads * options.head_dim % count:
          raise ValueError(
            f'config.distill.relation_heads={count} must divide the {heads * options.head_dim} '
            'numbers of the queries, keys and values of student and teacher.'
          )
    layer = self.distill.relation_layer
    if layer is not None and not 1 <= layer <= sizes[1].layers:
      raise ValueError(
        f'config.distill.relation_layer={layer} must be one of the {sizes[1].layers} layers of the '
        'teacher, from 1 on.'
      )

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """The objective's; with what the teacher says of their texts, where that is kept."""
    found = super().rows(documents, seq_len)
    return AnsweredRows(found, self.teacher_width) if self.distill.cached else found

  def loss(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> Metrics:
    """The objective's metrics, and (sum, weight) of each of what is learned from the teacher."""
    metrics = super().loss(net, hidden_BPD, batch)
    temperature = self.distill.temperature
    if self.distill.cached:
      said = self._in_order(batch[ANSWERS])
      return metrics | {SOFT: self.distilled(net, hidden_BPD, said, batch, temperature)}
    theirs, hidden = net.heads[HEAD].taught(batch, self.distill.looks_inside)
    if self.distill.soft:
      said = self._in_order(theirs.objective.answer(theirs, hidden, batch))
      metrics[SOFT] = self.distilled(net, hidden_BPD, said, batch, temperature)
    if self.distill.hidden:
      metrics[HIDDEN] = self._hidden(net, theirs, batch)
    if self.distill.relations:
      metrics[RELATIONS] = self._relations(net, theirs, batch)
    return metrics

  def trains(self, path: str) -> bool:
    """The teacher is not trained."""
    return not path.startswith(f'heads_{HEAD}/') and super().trains(path)

  def flops(self, model: contracts.Model, batch: Batch) -> float:
    """With a third of the teacher's forward pass, as a head is counted three times."""
    if self.distill.cached:
      return super().flops(model, batch)
    rows, length = batch['segments'].shape
    positions = jax.eval_shape(self.teacher.objective.positions, batch)
    read = length if positions is None else positions.shape[1]
    return super().flops(model, batch) + rows * self.teacher.model.flops(length, read) / 3

  def _in_order(self, said: Any) -> Any:
    return said if self.teacher_order is None else said[..., jnp.array(self.teacher_order)]

  def _hidden(self, net: Net, theirs: Net, batch: Batch) -> tuple[jax.Array, jax.Array]:
    if not net.seen:  # while parameters are made
      if PROJECTION in net.heads:
        net.heads[PROJECTION](jnp.zeros((1, net.model.options.dim)))
      return jnp.zeros(()), jnp.ones(())
    student, teacher = net.seen[HIDDEN], theirs.seen[HIDDEN]
    count, of = len(student), len(teacher)
    matched = [-(-(layer + 1) * of // count) - 1 for layer in range(count)]
    if PROJECTION in net.heads:
      student = net.heads[PROJECTION](student)
    kind = self.distill.hidden_loss
    return soft.hidden_apart(student, teacher[jnp.array(matched)], batch['segments'], kind)

  def _relations(self, net: Net, theirs: Net, batch: Batch) -> tuple[jax.Array, jax.Array]:
    if not net.seen:
      return jnp.zeros(()), jnp.ones(())
    layer = (self.distill.relation_layer or 0) - 1
    last, chosen = (
      {name: found.seen[name][i] for name in ('query', 'key', 'value')}
      for found, i in ((net, -1), (theirs, layer))
    )
    count = self.distill.relation_heads or self.teacher.model.options.heads
    return soft.relations_apart(last, chosen, batch['segments'], count)


class AnsweredRows:
  """Rows of texts, with what a teacher says of each.

  Args:
    rows: of the student's objective.
    width: how many numbers the teacher says of a text.

  Attributes:
    reference: [documents, width] float32; None for what is not known yet.
  """

  def __init__(self, rows: Texts, width: int):
    self.rows, self.width = rows, width
    self.reference: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.rows)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.rows, name)

  def example(self, index: int, rng: np.random.Generator) -> Example:
    """The row, and `ANSWERS`, 0 where there is no text."""
    found = self.rows.example(index, rng)
    texts = self.rows.texts(index)
    said = np.zeros((len(found['label_weight']), self.width), np.float32)
    if self.reference is not None:
      said[: len(texts)] = self.reference[texts]
    return found | {ANSWERS: said}


def beside(
  objective: contracts.Objective,
  teacher: Any,
  options: Options,
  order: Sequence[int] | None,
  width: int = 0,
) -> contracts.Objective:
  """The objective with a teacher.

  Args:
    objective: of the run.
    teacher: its network (`programs.network.Network`), with an objective of the same kind.
    options: what is learned from it.
    order: for each class of the student its number among the teacher's; None: the same ones.
    width: how many numbers the teacher says of a text, where its answers are kept.

  Raises:
    ValueError: the objective does not learn from answers of others, or not from kept ones.
  """
  if options.soft and not objective.distils:
    raise ValueError(
      f'the objective {plugins.said(objective)} has no answers that a student could learn; set '
      'config.distill.soft to 0, and hidden or relations above it.'
    )
  if options.cached and not objective.answers_texts:
    raise ValueError(
      'config.distill.cached=True keeps one answer for each text, and the objective '
      f'{plugins.said(objective)} has answers for each token, or masks other tokens each time; '
      'leave it out.'
    )
  made = copy.copy(objective)
  made.__class__ = _class(type(objective))
  own = {name: options.hard * weight for name, weight in objective.terms.items()}
  more = {SOFT: options.soft, HIDDEN: options.hidden, RELATIONS: options.relations}
  made.terms = own | {name: weight for name, weight in more.items() if weight}
  made.teacher, made.distill = teacher, options
  made.teacher_order, made.teacher_width = order, width
  if options.cached:
    made.needs_reference = True
  made.watches = options.looks_inside
  return made


@functools.cache
def _class(kind: type) -> type:
  return type(f'Distilled{kind.__name__}', (Distilled, kind), {'__module__': kind.__module__})
