"""How tokens are chosen: what may be drawn against a sort in NumPy, the probability of what is
drawn against chi-square, rows that differ, and wrong numbers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.generation import sampling as lib
from llm_jax.generation.sampling import Sampling

V = 60


def kept(logits_V, top_k, top_p, min_p):
  """Which tokens may be drawn: top-k and top-p by a stable sort of one row, then min-p."""
  order = np.argsort(logits_V, kind='stable')
  scores = logits_V.astype(np.float64)
  if 0 < top_k < V:
    scores[logits_V < logits_V[order[V - top_k]]] = -np.inf
  p = np.exp(scores - scores.max())
  p /= p.sum()
  if top_p < 1:
    removed = np.cumsum(p[order]) <= 1 - top_p
    removed[-1] = False
    scores[order[removed]] = -np.inf
  p = np.exp(scores - scores.max())
  return np.isfinite(scores) & (p >= min_p)


@pytest.mark.parametrize('steps', [100, 4], ids=['distinct', 'ties'])
def test_rows_of_one_batch_are_processed_each_by_its_own_numbers(steps):
  rng = np.random.default_rng(0)
  logits = (np.round(rng.normal(size=(16, V)) * steps) / steps).astype(np.float32)
  samplings = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in zip(
      [1.0, 0.7, 2.0, 1.3] * 4,
      [0, 1, 7, 200, 59, 60, 61, 0] * 2,
      [1.0, 0.9, 0.31, 0.05, 0.999, 1.0, 0.77, 0.5] * 2,
      [0.0] * 8 + [0.03, 0.4, 1.0, 0.0] * 2,
      strict=True,
    )
  ]
  numbers = lib.numbers(samplings, range(16), [1] * 16)
  rows = jnp.asarray(logits), np.zeros((16, 4), np.int32), np.ones(16, np.int32)
  found = np.asarray(jax.jit(lib.processed)(*rows, numbers))
  for row, sampling in enumerate(samplings):
    scaled = (logits[row] / np.float32(sampling.temperature)).astype(np.float32)
    expected = kept(scaled, sampling.top_k, sampling.top_p, sampling.min_p)
    np.testing.assert_array_equal(np.isfinite(found[row]), expected, str(sampling))
    np.testing.assert_allclose(found[row][expected], scaled[expected], rtol=1e-6)
  assert len({np.isfinite(row).sum() for row in found}) > 6


def test_sorting_by_integers_is_sorting():
  rng = np.random.default_rng(0)
  rows = np.concatenate([rng.normal(size=50), [0.0, -0.0, np.inf, -np.inf, 1e-40, -1e-40, 3, 3]])
  rows = rng.permuted(np.stack([rows] * 3), axis=1).astype(np.float32)
  np.testing.assert_array_equal(lib._ascending(jnp.asarray(rows)), np.sort(rows, axis=1))


def test_a_penalty_is_for_what_its_own_row_has_seen():
  logits = np.array([[2.0, -1.0, 0.5]] * 3, np.float32)
  history, lengths = np.array([[0, 1, 2]] * 2 + [[2, 0, 1]]), np.array([2, 2, 1])
  samplings = [Sampling(repetition_penalty=p) for p in (1.0, 2.0, 2.0)]
  numbers = lib.numbers(samplings, range(3), [1] * 3)
  found = lib.processed(jnp.asarray(logits), history, lengths, numbers)
  np.testing.assert_allclose(found, [[2.0, -1.0, 0.5], [1.0, -2.0, 0.5], [2.0, -1.0, 0.25]])


MIXED = [
  Sampling(max_new_tokens=9, temperature=0.0),
  Sampling(max_new_tokens=12, temperature=1.5, top_k=8, seed=3),
  Sampling(max_new_tokens=5, temperature=0.0, repetition_penalty=3.0),
  Sampling(max_new_tokens=12, temperature=0.8, top_p=0.8, min_p=0.01, seed=4),
]


@pytest.mark.slow
def test_rows_of_one_batch_may_be_sampled_differently(tiny):
  together = tiny.run(tiny.GPT, tiny.PROMPTS, MIXED)
  for row, (prompt, sampling) in enumerate(zip(tiny.PROMPTS, MIXED, strict=True)):
    alone = tiny.run(tiny.GPT, [prompt], sampling, rows=[row])[0]
    assert together[row] == alone + [-1] * (12 - sampling.max_new_tokens)
  assert together[0][:9] != tiny.run(tiny.GPT, tiny.PROMPTS[:1], MIXED[1])[0][:9]


def test_other_numbers_compile_nothing(tiny):
  made, weights = tiny.generator(tiny.GPT), tiny.ready(tiny.GPT)[1]
  changed = (
    dict(temperature=0.0),
    dict(temperature=0.0, repetition_penalty=1.7),
    dict(temperature=0.4),
    dict(top_k=3),
    dict(top_p=0.6),
    dict(min_p=0.2),
    dict(repetition_penalty=1.2),
    dict(seed=7),
    dict(max_new_tokens=13, temperature=1.9, top_k=9, top_p=0.5, min_p=0.1, seed=9),
  )
  base = Sampling(max_new_tokens=12)
  samplings = [base] + [dataclasses.replace(base, **options) for options in changed]

  def tokens(sampling):
    return np.stack(list(made.tokens(weights, tiny.PROMPTS, sampling)), axis=1).tolist()

  assert tiny.compilations(lambda: tokens(base)) >= 2
  found = []
  assert tiny.compilations(lambda: found.extend(map(tokens, samplings))) == 0
  assert tiny.compilations(lambda: tokens([*samplings[:3], samplings[5]])) == 0
  assert len(set(map(str, found))) == len(found)  # each of the numbers has been heeded
  assert made._start._cache_size() == made._next._cache_size() == 1


@pytest.mark.slow
def test_what_is_drawn_has_its_probability(tiny):
  """Chi-square over 4000 rows of one prompt, with and without top-k."""
  prompt, params = tiny.PROMPTS[0], tiny.random_params(tiny.GPT)
  batch = {'tokens': np.array([prompt])}
  whole = tiny.GPT.apply({'params': params}, batch, method=tiny.logits)
  logits = np.asarray(whole)[0, -1].astype(np.float64)
  made, weights = tiny.ready(tiny.GPT)

  def chi_square(sampling, temperature, rows=4000):
    drawn = next(made.tokens(weights, [prompt] * rows, sampling))
    inside = np.argsort(logits)[-(sampling.top_k or 40) :]
    p = np.zeros(40)
    p[inside] = np.exp(logits[inside] / temperature)
    p /= p.sum()
    counts = np.bincount(drawn, minlength=40)
    assert not counts[p == 0].any()
    often = rows * p > 5
    return np.sum((counts - rows * p)[often] ** 2 / (rows * p)[often]), often.sum() - 1

  for sampling in (
    Sampling(max_new_tokens=1, temperature=2.0, seed=5),
    Sampling(max_new_tokens=1, temperature=2.0, top_k=10, seed=5),
  ):
    found, freedom = chi_square(sampling, 2.0)
    assert found < freedom + 4 * np.sqrt(2 * freedom), (found, freedom)
    wrong, freedom = chi_square(sampling, 4.0)
    assert wrong > freedom + 8 * np.sqrt(2 * freedom), (wrong, freedom)


def test_seeds_reproduce_whatever_else_is_in_the_batch(tiny):
  sampling = Sampling(max_new_tokens=14, seed=4)
  first = tiny.run(tiny.GPT, tiny.PROMPTS, sampling)
  assert first == tiny.run(tiny.GPT, tiny.PROMPTS, sampling)
  assert first[1:3] == tiny.run(tiny.GPT, tiny.PROMPTS[1:3], sampling, rows=[1, 2])
  assert first[1:3] != tiny.run(tiny.GPT, tiny.PROMPTS[1:3], sampling)
  assert first != tiny.run(tiny.GPT, tiny.PROMPTS, dataclasses.replace(sampling, seed=5))


# By the revision in which all numbers were compiled in (6ec0a05); prompts 0 and 1.
BEFORE = [
  (
    'window',
    dict(temperature=0.0),
    [[35, 24, 34, 24, 32, 32, 32, 3], [3, 32, 3, 32, 3, 32, 3, 32]],
  ),
  (
    'window',
    dict(temperature=0.0, repetition_penalty=1.6),
    [[35, 24, 34, 32, 12, 32, 18, 36], [3, 32, 7, 12, 1, 9, 25, 35]],
  ),
  (
    'learned',
    dict(temperature=1.3, seed=3),
    [[8, 30, 36, 32, 34, 24, 10, 29], [5, 39, 19, 11, 11, 7, 7, 22]],
  ),
  (
    'learned',
    dict(temperature=2.0, top_k=9, seed=4),
    [[4, 4, 27, 36, 11, 22, 11, 22], [27, 11, 39, 37, 29, 22, 7, 11]],
  ),
  (
    'window',
    dict(temperature=1.5, top_p=0.7, seed=5),
    [[24, 13, 37, 2, 0, 8, 39, 3], [32, 23, 20, 20, 16, 28, 39, 36]],
  ),
  (
    'window',
    dict(temperature=1.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=6),
    [[30, 2, 1, 7, 9, 18, 32, 0], [14, 18, 33, 26, 31, 28, 14, 4]],
  ),
  (
    'window',
    dict(temperature=0.0, beams=3, length_penalty=0.6, repetition_penalty=1.1),
    [[35, 24, 34, 24, 32, 12, 12, 32], [3, 12, 36, 10, 7, 9, 25, 24]],
  ),
]


@pytest.mark.parametrize('model, options, expected', BEFORE)
def test_the_tokens_of_a_seed_never_change(tiny, model, options, expected):
  sampling = Sampling(max_new_tokens=8, **options)
  assert tiny.run(tiny.MODELS[model], tiny.PROMPTS[:2], sampling) == expected


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(max_new_tokens=0), 'max_new_tokens=0 must be at least 1'),
    (dict(temperature=-1.0), 'temperature=-1.0 must be at least 0'),
    (dict(top_p=0.0), 'top_p=0.0 must be above 0 and at most 1'),
    (dict(min_p=1.5), 'min_p=1.5 must be'),
    (dict(top_k=-1), 'top_k=-1 must be at least 1, or 0'),
    (dict(repetition_penalty=0.0), 'repetition_penalty=0.0 must be above 0'),
    (dict(beams=0), 'beams=0 must be'),
    (dict(beams=4), 'beams=4 follows the most likely texts and draws nothing; set temperature=0'),
    (dict(temperature=0.0, top_k=5), 'top_k=5 changes nothing where temperature=0'),
    (dict(length_penalty=0.5), 'length_penalty=0.5 is for beam search'),
    (dict(seed=-1), 'seed=-1 must be'),
  ],
)
def test_wrong_sampling(options, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**options)
