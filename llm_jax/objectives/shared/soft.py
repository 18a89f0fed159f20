"""How far a student's answers are from a teacher's (Hinton et al. 2015, arXiv:1503.02531), and what
their layers pass on.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llm_jax.core.contracts import Number

HIDDEN_LOSSES = ('mse', 'cosine')


def divergence(task: str, student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
  """T^2 KL(teacher || student) of softened answers (section 2: gradients of soft and hard targets
  then stay in proportion), without the last axis; in regression the squared difference.

  Args:
    task: 'multiclass', 'multilabel' (the mean over the classes), 'binary' or 'regression'.
    student: logits [..., C].
    teacher: likewise; nothing learns from it.
    temperature: T, by which both are divided.
  """
  teacher = jax.lax.stop_gradient(teacher)
  if task == 'regression':
    return jnp.square(student - teacher)[..., 0]
  if task == 'multiclass':
    logs = [jax.nn.log_softmax(logits / temperature) for logits in (student, teacher)]
    return temperature**2 * jnp.sum(jnp.exp(logs[1]) * (logs[1] - logs[0]), axis=-1)
  both = [
    (jax.nn.log_sigmoid(x / temperature), jax.nn.log_sigmoid(-x / temperature))
    for x in (student, teacher)
  ]
  apart = sum(jnp.exp(theirs) * (theirs - ours) for ours, theirs in zip(*both, strict=True))
  return temperature**2 * jnp.mean(apart, axis=-1)


def hidden_apart(
  student_LBTD: jax.Array,
  teacher_LBTD: jax.Array,
  segments_BT: jax.Array,
  kind: str,
) -> tuple[Number, Number]:
  """(sum, weight) over tokens of how far hidden states are apart, on average over the student's
  layers: their mean squared difference (TinyBERT, arXiv:1909.10351, equation 8), or 1 - their
  cosine (DistilBERT, arXiv:1910.01108, section 3).

  Args:
    student_LBTD: of the student's layers, as wide as the teacher's.
    teacher_LBTD: of as many layers of the teacher.
    segments_BT: 0 for padding.
    kind: one of `HIDDEN_LOSSES`.
  """
  dtype = jnp.promote_types(student_LBTD.dtype, jnp.float32)
  x, y = student_LBTD.astype(dtype), jax.lax.stop_gradient(teacher_LBTD).astype(dtype)
  if kind == 'mse':
    apart_LBT = jnp.mean(jnp.square(x - y), axis=-1)
  else:
    lengths = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    apart_LBT = 1 - jnp.sum(x * y, axis=-1) / jnp.maximum(lengths, 1e-8)
  real_BT = (segments_BT > 0).astype(dtype)
  return jnp.sum(jnp.mean(apart_LBT, axis=0) * real_BT), jnp.sum(real_BT)


def relations_apart(
  student: Mapping[str, jax.Array],
  teacher: Mapping[str, jax.Array],
  segments_BT: jax.Array,
  heads: int,
) -> tuple[Number, Number]:
  """(sum, weight) over tokens of KL(teacher || student) of how the queries of a text relate to each
  other, its keys, and its values: softmax(A A^T / sqrt(d)) for each of `heads` parts of a vector of
  d numbers (MiniLM v2, arXiv:2012.15828, equations 5 to 8).

  Args:
    student: `query`, `key` and `value` of one layer, [B, T, N, H] each.
    teacher: likewise, of a layer of any width.
    segments_BT: the text of each token; tokens of one text relate.
    heads: how many parts a vector is cut into; divides N H of both.
  """
  real_BT = segments_BT > 0
  same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & real_BT[:, None, :]
  total = jnp.zeros((), jnp.float32)
  for name in ('query', 'key', 'value'):
    ours = _related(student[name], same_BTS, heads)
    theirs = jax.lax.stop_gradient(_related(teacher[name], same_BTS, heads))
    terms_BATS = jnp.where(same_BTS[:, None], jnp.exp(theirs) * (theirs - ours), 0)
    apart_BT = jnp.mean(jnp.sum(terms_BATS, axis=-1), axis=1)
    total += jnp.sum(apart_BT * real_BT)
  return total, jnp.sum(real_BT.astype(jnp.float32))


def _related(x_BTNH: jax.Array, same_BTS: jax.Array, heads: int) -> jax.Array:
  """Logarithms of relations, [B, A, T, S]."""
  B, T = x_BTNH.shape[:2]
  x_BTAE = x_BTNH.astype(jnp.float32).reshape(B, T, heads, -1)
  scores = jnp.einsum('BTAE,BSAE->BATS', x_BTAE, x_BTAE) / jnp.sqrt(x_BTAE.shape[-1])
  return jax.nn.log_softmax(jnp.where(same_BTS[:, None], scores, -1e9), axis=-1)
