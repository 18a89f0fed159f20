import collections
import math
import shutil
import subprocess
import types

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.evaluators import loss

TERMS = {'a': 1.0, 'b': 0.5}
OBJECTIVE = types.SimpleNamespace(
  summary=lambda means: {'double': 2 * means['a']},
  targets=lambda batch: None if 'ids' not in batch else (batch['ids'], batch['weights']),
)


def test_sums_are_divided_once():
  rng = np.random.default_rng(0)
  parts = [
    {name: rng.integers(1, 9, 2).astype(np.float32) for name in ('a', 'b', 'c')} for _ in range(5)
  ]
  found = loss.evaluate(
    lambda i: {k: tuple(jnp.asarray(x) for x in v) for k, v in parts[i].items()},
    range(5),
    TERMS,
  )
  whole = {k: sum(p[k][0] for p in parts) / sum(p[k][1] for p in parts) for k in ('a', 'b', 'c')}
  mean_of_means = np.mean([p['a'][0] / p['a'][1] for p in parts])
  assert found == pytest.approx(whole | {'loss': whole['a'] + 0.5 * whole['b']}, rel=1e-12)
  assert abs(found['a'] - mean_of_means) > 1e-3
  assert all(type(v) is float for v in found.values())


def test_as_a_plug_in():
  """It asks for a fresh iterator over the batches, and reports nothing."""
  validation = contracts.Validation(
    objective=OBJECTIVE,
    terms=TERMS | {'c': 2.0},  # c is of the model
    tokenizer=None,
    batches=lambda: iter(range(1, 3)),
    losses=lambda i: {
      'a': (jnp.float32(i), jnp.float32(2)),
      'b': (jnp.float32(2), jnp.float32(i)),
      'c': (jnp.float32(3), jnp.float32(4)),
    },
    predict=None,
  )
  for _ in range(2):
    numbers, report = loss.Evaluator().evaluate(validation)
    assert numbers == pytest.approx(
      {'loss': 3 / 4 + 2 / 3 + 1.5, 'a': 3 / 4, 'b': 4 / 3, 'c': 3 / 4, 'double': 1.5}
    )
    assert report == ''


def test_sums_are_kept_in_float64():
  """2^24 + 1 is no float32: added there, ones would be lost."""
  step = lambda i: {k: (jnp.float32(2**24 if i == 0 else 1), jnp.float32(1)) for k in 'ab'}
  found = loss.evaluate(step, range(4), TERMS)
  assert found['a'] == (2**24 + 3) / 4


def test_a_term_that_nothing_counts_for():
  step = lambda _: {'a': (jnp.float32(3), jnp.float32(2)), 'b': (jnp.float32(0), jnp.float32(0))}
  found = loss.evaluate(step, range(2), TERMS)
  assert math.isnan(found['b']) and found['loss'] == 1.5


def test_no_batch():
  with pytest.raises(ValueError, match='no batch'):
    loss.evaluate(lambda b: {}, [], TERMS)


def test_unigram_loss_is_the_entropy_of_the_counted_targets():
  rng = np.random.default_rng(0)
  batches = [
    {'ids': rng.integers(0, top, (4, 9)), 'weights': rng.integers(0, 2, (4, 9))}
    for top in (5, 40, 12)
  ]
  counted = [int(i) for b in batches for i in b['ids'][b['weights'] > 0]]
  n = len(counted)
  brute = -sum(k / n * math.log(k / n) for k in collections.Counter(counted).values())
  assert loss.unigram_loss(batches, OBJECTIVE) == pytest.approx(brute, rel=1e-12)
  even = {'ids': np.arange(8)[None], 'weights': np.ones((1, 8))}
  assert loss.unigram_loss([even], OBJECTIVE) == pytest.approx(math.log(8))
  assert loss.unigram_loss([{}], OBJECTIVE) is None
  with pytest.raises(ValueError, match='no target'):
    loss.unigram_loss([{'ids': np.ones((1, 3), int), 'weights': np.zeros((1, 3))}], OBJECTIVE)


def test_xz_is_that_of_the_command_line():
  text = bytes(np.random.default_rng(0).choice(np.frombuffer(b'etaoin shrdlu', np.uint8), 20_000))
  found = loss.xz_bits_per_byte(text)
  assert math.log2(12) * 0.9 < found < 5 and loss.xz_bits_per_byte(b'a' * 10_000) < 0.2
  if shutil.which('xz'):
    assert found == 8 * len(
      subprocess.run(['xz', '-9', '-c'], input=text, capture_output=True, check=True).stdout
    ) / len(text)
  with pytest.raises(ValueError, match='empty'):
    loss.xz_bits_per_byte(b'')
