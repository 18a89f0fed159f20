"""Generation: what a cache holds against no cache, meshes, compilation, what is drawn, and wrong
calls.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.inference import decoding as generate
from llm_jax.models import decoder
from llm_jax.nn import layers
from llm_jax.parallel import sharding

TINY = dict(
  vocab_size=40,
  dim=16,
  heads=4,
  mlp_dim=24,
  layers=2,
  max_len=64,
  dropout=0.0,
  attention_dropout=0.0,
)
GPT = decoder.Model(**TINY)
LLAMA = decoder.Model(**decoder.VARIANTS['llama_2_7b'] | TINY | dict(kv_heads=2, window=5))
PROMPTS = [[3, 9, 4, 1, 5], [2], [7, 8, 9, 10, 11, 12, 13, 14, 15], [6, 30, 2]]
GREEDY = generate.Sampling(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope='module', autouse=True)
def little_care_in_compiling():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def predict(model, tokens_BT, **kwargs):
  x = model(tokens_BT, **kwargs)
  return (model.logits(x[0]), x[1]) if 'cache' in kwargs else model.logits(x)


def random_params(model):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(
    lambda: nn.unbox(model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32), method=predict))
  )
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), shapes)[
    'params'
  ]


@functools.cache
def ready(model):
  """A generator, and weights for it, that tests share: what one has compiled the next need not."""
  made = generate.Generator(model)
  return made, made.weights(random_params(model))


def run(model, prompts, sampling, eos=(), rows=None):
  made, weights = ready(model)
  return np.stack(list(made.tokens(weights, prompts, sampling, eos, rows)), axis=1).tolist()


@pytest.mark.parametrize('stacked', [True, False], ids=['stacked', 'apart'])
@pytest.mark.parametrize('model', [GPT, LLAMA], ids=['gpt', 'window'])
def test_a_cache_gives_what_the_whole_row_gives(model, stacked):
  """Rows of unequal lengths, prefilled past the window, then longer than the window again."""
  rng = np.random.default_rng(1)
  tokens, lengths = rng.integers(1, 40, (3, 20)), np.array([9, 2, 7])
  params = random_params(model)
  whole = jax.jit(lambda t: model.apply({'params': params}, t, method=predict))(tokens)
  cache = model.empty_cache(3, 32)
  if not stacked:
    params = params | {'stack': layers.apart(params['stack'])}
    cache = cache._replace(layers=layers.apart(cache.layers))
  assert jax.tree.leaves(cache.layers)[0].shape[-2] == (model.window or 32)
  step = jax.jit(
    lambda cache, t, s: model.apply(
      {'params': params}, t, segments_BT=s, cache=cache, method=predict
    )
  )
  segments = np.int32(np.arange(9)[None] < lengths[:, None])
  logits, cache = step(cache, np.where(segments > 0, tokens[:, :9], 39), segments)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(logits[row, :length], whole[row, :length], atol=2e-5)
  for i in range(11):
    logits, cache = step(cache, tokens[np.arange(3), lengths + i][:, None], None)
    np.testing.assert_allclose(logits[:, 0], whole[np.arange(3), lengths + i], atol=2e-5)
  np.testing.assert_array_equal(cache.lengths_B, lengths + 11)


def test_a_cache_in_which_a_place_is_wrong_is_seen():
  params = random_params(LLAMA)
  cache = LLAMA.empty_cache(1, 32)
  step = jax.jit(lambda cache, t: LLAMA.apply({'params': params}, t, cache=cache, method=predict))
  tokens = np.arange(1, 10)[None]
  _, cache = step(cache, tokens)
  before, _ = step(cache, tokens[:, :1])
  moved = jax.tree.map(
    lambda x: jnp.roll(x, 1, axis=-2) if x.ndim > 3 else x, cache
  )  # all keys and values, one slot further
  old, _ = step(moved, tokens[:, :1])  # the newest token overwrites another than the oldest
  late, _ = step(cache._replace(lengths_B=cache.lengths_B + 1), tokens[:, :1])
  assert min(np.abs(before - old).max(), np.abs(before - late).max()) > 1e-3


def test_a_window_larger_than_the_row_is_none():
  without = run(LLAMA.clone(window=None), PROMPTS, GREEDY)
  assert run(LLAMA.clone(window=64), PROMPTS, GREEDY) == without != run(LLAMA, PROMPTS, GREEDY)


def test_bfloat16_keeps_half_the_cache():
  model = LLAMA.clone(dtype='bfloat16')
  cache = model.empty_cache(2, 16)
  assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype('bfloat16')}
  made = generate.Generator(model)
  weights = made.weights(random_params(model))
  block = weights.params['stack']['group_0']['block']
  assert (
    block['mlp']['up']['flipped'].dtype == jnp.bfloat16
    and block['mlp_norm']['scale'].dtype == jnp.float32
  )
  first = next(made.tokens(weights, PROMPTS, GREEDY))
  logits = model.apply({'params': random_params(model)}, np.array([PROMPTS[2]]), method=predict)
  assert first[2] == np.argmax(logits[0, -1])


def compilations(function):
  seen = []
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: seen.append(name))
  try:
    function()
  finally:
    jax.monitoring.clear_event_listeners()
  return sum(name == '/jax/core/compile/backend_compile_duration' for name in seen)


def test_nothing_is_compiled_after_the_first_tokens():
  made, sampling = generate.Generator(GPT), generate.Sampling(max_new_tokens=14, seed=1)
  weights = ready(GPT)[1]
  tokens = made.tokens(weights, PROMPTS, sampling)
  assert compilations(lambda: next(tokens)) >= 2  # prefill, and the step that is on its way
  assert compilations(lambda: list(tokens)) == 0
  other = [prompt[:-1] + [20, 21] for prompt in PROMPTS[::-1]]
  assert (
    compilations(
      lambda: list(made.tokens(weights, other, dataclasses.replace(sampling, seed=2), eos_ids=[3]))
    )
    == 0
  )
  assert made.start._cache_size() == made.step._cache_size() == 1
  longer = [[1] * 30]
  assert compilations(lambda: list(made.tokens(weights, longer, sampling))) > 0


def test_the_cache_is_not_copied():
  made, weights = ready(GPT)
  fixed = dict(sampling=dataclasses.replace(GREEDY, max_new_tokens=1), eos_ids=())
  batch = dict(
    tokens_BT=np.ones((2, 16), np.int32),
    lengths_B=np.array([3, 4], np.int32),
    rows_B=np.arange(2, dtype=np.int32),
    seed=np.uint32(0),
    limit=np.int32(4),
  )
  state, _ = made.start(weights, **batch, slots=32, places=0, **fixed)
  stats = made.step.lower(weights, state=state, **fixed).compile().memory_analysis()
  cache = sum(x.nbytes for x in jax.tree.leaves(state.cache))
  assert stats.alias_size_in_bytes >= cache and stats.temp_size_in_bytes < cache
  after, _ = made.step(weights, state=state, **fixed)
  assert all(x.is_deleted() for x in jax.tree.leaves(state.cache))
  assert not any(x.is_deleted() for x in jax.tree.leaves((weights, after)))


def test_rows_end_with_their_last_token():
  endless = run(GPT, PROMPTS, GREEDY)
  eos = [endless[0][2], endless[2][5]]
  found = run(GPT, PROMPTS, GREEDY, eos)
  for row, whole in zip(found, endless, strict=True):
    ends = [i for i, token in enumerate(whole) if token in eos]
    kept = whole[: ends[0] + 1] if ends else whole
    assert row == (kept + [-1] * 12)[: len(row)]
  assert max(sum(token >= 0 for token in row) for row in found) == len(found[0])


def test_what_is_drawn_has_its_probability():
  """Chi-square over 4000 rows of one prompt, with and without top-k."""
  params = random_params(GPT)
  logits = np.asarray(GPT.apply({'params': params}, np.array([PROMPTS[0]]), method=predict))[
    0, -1
  ].astype(np.float64)
  made, weights = ready(GPT)

  def chi_square(sampling, temperature, rows=4000):
    drawn = next(made.tokens(weights, [PROMPTS[0]] * rows, sampling))
    kept = np.argsort(logits)[-(sampling.top_k or 40) :]
    p = np.zeros(40)
    p[kept] = np.exp(logits[kept] / temperature)
    p /= p.sum()
    counts = np.bincount(drawn, minlength=40)
    assert not counts[p == 0].any()
    often = rows * p > 5
    return np.sum((counts - rows * p)[often] ** 2 / (rows * p)[often]), often.sum() - 1

  for sampling in (
    generate.Sampling(max_new_tokens=1, temperature=2.0, seed=5),
    generate.Sampling(max_new_tokens=1, temperature=2.0, top_k=10, seed=5),
  ):
    found, freedom = chi_square(sampling, 2.0)
    assert found < freedom + 4 * np.sqrt(2 * freedom), (found, freedom)
    wrong, freedom = chi_square(sampling, 4.0)
    assert wrong > freedom + 8 * np.sqrt(2 * freedom), (wrong, freedom)


def test_seeds_reproduce_whatever_else_is_in_the_batch():
  sampling = generate.Sampling(max_new_tokens=14, seed=4)
  first = run(GPT, PROMPTS, sampling)
  assert first == run(GPT, PROMPTS, sampling)
  assert first[1:3] == run(GPT, PROMPTS[1:3], sampling, rows=[1, 2])
  assert first[1:3] != run(GPT, PROMPTS[1:3], sampling)
  assert first != run(GPT, PROMPTS, dataclasses.replace(sampling, seed=5))


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
    generate.Sampling(**options)


@pytest.mark.parametrize(
  'prompts, message',
  [
    ([], 'there must be at least one prompt'),
    ([[1], []], r'prompts of \[1, 0\] tokens'),
    (
      [[1] * 60],
      'a prompt of 60 tokens and max_new_tokens=12 are 72 places, and the model has max_len=64; '
      'shorten the prompt, '
      'or set max_new_tokens=4 or less',
    ),
    ([[1] * 64], 'max_len=64; shorten the prompt[.]'),
  ],
)
def test_wrong_prompts(prompts, message):
  with pytest.raises(ValueError, match=message):
    next(generate.Generator(GPT).tokens({}, prompts, GREEDY))


def test_lengths_are_few():
  rounded = {generate._rounded(n) for n in range(1, 4097)}
  assert len(rounded) < 50 and all(
    n <= generate._rounded(n) <= n + max(15, n // 8) for n in range(1, 4097)
  )
  assert [generate._rounded_rows(rows, 2) for rows in (1, 2, 3, 8, 9)] == [2, 2, 4, 8, 16]


MESHES = [dict(data=2, tensor=2), dict(fsdp=4), dict(fsdp=2, sequence=2), dict(data=1, tensor=4)]
CASES = [
  ('window', LLAMA, GREEDY),
  ('drawn', GPT, generate.Sampling(max_new_tokens=6, temperature=1.3, top_p=0.9, seed=2)),
  ('beams', GPT, generate.Sampling(max_new_tokens=6, temperature=0.0, beams=4)),
]


def measure():
  """Of each case, the tokens on one device and on each mesh of four, and how many compilations came
  after the first tokens.
  """
  jax.config.update('jax_disable_most_optimizations', True)
  for name, model, sampling in CASES:
    params = random_params(model)
    alone = run(model, PROMPTS[:3], sampling)
    for mesh in MESHES if name == 'window' else MESHES[:2]:
      layout = sharding.create_layout(**dict(data=1) | mesh)
      boxed = jax.eval_shape(
        lambda model=model: model.init(
          jax.random.key(0), jnp.ones((1, 4), jnp.int32), method=predict
        )
      )
      placed = jax.device_put(params, sharding.parameter_shardings(layout, boxed['params']))
      made = generate.Generator(model, layout)
      weights, columns = made.weights(placed), []
      tokens = made.tokens(weights, PROMPTS[:3], sampling)
      columns.append(next(tokens))
      again = (
        compilations(lambda tokens=tokens, columns=columns: columns.extend(tokens))
        if sampling.beams == 1
        else 0
      )
      whole = sum(x.nbytes for x in jax.tree.leaves(params))
      held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(weights))
      columns.extend(tokens)
      yield dict(
        case=f'{name} {mesh}',
        same=np.stack(columns, axis=1).tolist() == alone,
        compiled=again,
        share=held / whole,
      )


def test_meshes_give_what_one_device_gives():
  root = pathlib.Path(__file__).parents[2]
  env = os.environ | {
    'PYTHONPATH': str(root),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
  }
  done = subprocess.run(
    [sys.executable, __file__], capture_output=True, text=True, check=False, cwd=root, env=env
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  assert len(found) == 8
  wrong = [f for f in found if not f['same'] or f['compiled'] or f['share'] > 0.62]
  assert not wrong, '\n'.join(map(str, wrong))


if __name__ == '__main__':
  print(json.dumps(list(measure())))
