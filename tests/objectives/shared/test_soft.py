"""What a student learns of a teacher, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import vocabulary
from llm_jax.objectives.shared import soft


def drawn(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(teacher, student):
  return np.sum(teacher * (np.log(teacher) - np.log(student)), -1)


def test_softened_answers_are_apart_by_the_formula():
  s, t = drawn(2, 3, 5).astype(np.float64), drawn(2, 3, 5, seed=1).astype(np.float64)
  found = soft.divergence('multiclass', jnp.asarray(s), jnp.asarray(t), 3.0)
  np.testing.assert_allclose(found, 9 * kl(softmax(t / 3), softmax(s / 3)), rtol=1e-5)
  sigmoid = lambda x: 1 / (1 + np.exp(-x / 3))
  both = [np.stack([sigmoid(x), 1 - sigmoid(x)], -1) for x in (s, t)]
  for task in ('binary', 'multilabel'):
    found = soft.divergence(task, jnp.asarray(s), jnp.asarray(t), 3.0)
    np.testing.assert_allclose(found, 9 * kl(both[1], both[0]).mean(-1), rtol=1e-5)
  found = soft.divergence('regression', jnp.asarray(s[..., :1]), jnp.asarray(t[..., :1]), 3.0)
  np.testing.assert_allclose(found, (s - t)[..., 0] ** 2, rtol=1e-5)


@pytest.mark.parametrize('task', ['multiclass', 'multilabel', 'binary', 'regression'])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(task):
  logits = jnp.asarray(drawn(4, 1 if task == 'regression' else 5))
  total = lambda x: jnp.sum(soft.divergence(task, x, logits, 2.0))
  value, grad = jax.value_and_grad(total)(logits)
  assert abs(value) < 1e-6 and np.abs(grad).max() < 1e-6
  # Nothing of the loss goes to the teacher.
  other = jax.grad(lambda t: jnp.sum(soft.divergence(task, logits, t, 2.0)))(logits + 1)
  assert not np.any(other)


@pytest.mark.slow
def test_the_vocabulary_is_compared_in_chunks_with_the_gradient_of_the_whole(monkeypatch):
  ends = [
    vocabulary.End(
      *(jnp.asarray(x) for x in (drawn(2, 7, 6, seed=i), drawn(11 + i, 6), drawn(11 + i)))
    )
    for i in range(2)
  ]

  def whole(x):
    logits = [
      (end.x_BTD if i else x) @ end.table_VD[:11].T + end.bias_V[:11] for i, end in enumerate(ends)
    ]
    ours, theirs = (jax.nn.log_softmax(each / 2) for each in logits)
    return 4 * jnp.sum(jnp.exp(theirs) * (theirs - ours), -1)

  def chunked(x):
    return vocabulary.soft_divergence(ends[0]._replace(x_BTD=x), ends[1], 2.0)

  wanted, slope = whole(ends[0].x_BTD), jax.grad(lambda x: jnp.sum(whole(x)))(ends[0].x_BTD)
  for size in (vocabulary.CHUNK_BYTES, 400):
    monkeypatch.setattr(vocabulary, 'CHUNK_BYTES', size)
    np.testing.assert_allclose(chunked(ends[0].x_BTD), wanted, atol=1e-5)
    found = jax.grad(lambda x: jnp.sum(chunked(x)))(ends[0].x_BTD)
    np.testing.assert_allclose(found, slope, atol=1e-5)


def test_hidden_states_count_where_there_are_tokens():
  s, t = drawn(2, 1, 4, 6), drawn(2, 1, 4, 6, seed=1)
  segments = jnp.array([[1, 1, 2, 0]])
  total, weight = soft.hidden_apart(jnp.asarray(s), jnp.asarray(t), segments, 'mse')
  assert float(weight) == 3
  np.testing.assert_allclose(total, np.mean((s - t) ** 2, -1).mean(0)[0, :3].sum(), rtol=1e-5)
  total, _ = soft.hidden_apart(jnp.asarray(s), jnp.asarray(t), segments, 'cosine')
  cosine = np.sum(s * t, -1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
  np.testing.assert_allclose(total, (1 - cosine).mean(0)[0, :3].sum(), rtol=1e-5)


def test_relations_are_those_of_each_text_alone():
  """By loops: each token of a text relates to the tokens of its text."""
  names = 'query', 'key', 'value'
  ours = {name: drawn(1, 5, 2, 6, seed=i) for i, name in enumerate(names)}
  theirs = {name: drawn(1, 5, 4, 4, seed=9 + i) for i, name in enumerate(names)}
  segments = np.array([[1, 1, 1, 2, 2]])
  heads, wanted = 2, 0.0
  for name in names:
    for first, last in ((0, 3), (3, 5)):
      for head in range(heads):
        parts = []
        for x in (ours, theirs):
          part = x[name][0, first:last].reshape(last - first, heads, -1)[:, head]
          parts.append(softmax(part @ part.T / np.sqrt(part.shape[-1])))
        wanted += kl(parts[1], parts[0]).sum() / heads
  given = [{k: jnp.asarray(v) for k, v in x.items()} for x in (ours, theirs)]
  total, weight = soft.relations_apart(*given, jnp.asarray(segments), heads)
  assert float(weight) == 5
  np.testing.assert_allclose(total, wanted, rtol=1e-5)
  padded = jnp.array([[1, 1, 1, 2, 0]])
  less, weight = soft.relations_apart(*given, padded, heads)
  assert float(weight) == 4 and np.isfinite(less) and float(less) != pytest.approx(float(total))
  same, _ = soft.relations_apart(given[0], given[0], jnp.asarray(segments), heads)
  assert abs(float(same)) < 1e-6
