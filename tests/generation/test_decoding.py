"""Generation: what a cache holds against no cache, rows that join a running batch against the same
rows alone, meshes, compilation, and wrong calls.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.generation import decoding
from llm_jax.generation.sampling import Sampling
from llm_jax.nn.stack import unstacked


@pytest.mark.parametrize('stacked', [True, False], ids=['stacked', 'unstacked'])
@pytest.mark.parametrize('name', ['learned', 'window'])
def test_a_cache_gives_what_the_whole_row_gives(tiny, name, stacked):
  """Rows of unequal lengths, prefilled past the window, then longer than the window again."""
  model = tiny.MODELS[name]
  rng = np.random.default_rng(1)
  tokens, lengths = rng.integers(1, 40, (3, 20)), np.array([9, 2, 7])
  params = tiny.random_params(model)

  def logits(params, batch, **kwargs):
    return model.apply({'params': params}, batch, method=tiny.logits, **kwargs)

  whole = jax.jit(logits)(params, {'tokens': tokens})
  cache = model.empty_cache(3, 32)
  if not stacked:
    params = params | {'stack': unstacked(params['stack'])}
    cache = cache._replace(layers=unstacked(cache.layers))
  assert jax.tree.leaves(cache.layers)[0].shape[-2] == (model.window or 32)
  step = jax.jit(lambda cache, batch: logits(params, batch, cache=cache))
  segments = np.int32(np.arange(9)[None] < lengths[:, None])
  first = {'tokens': np.where(segments > 0, tokens[:, :9], 39), 'segments': segments}
  logits_BTV, cache = step(cache, first)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(logits_BTV[row, :length], whole[row, :length], atol=2e-5)
  for i in range(11):
    logits_BTV, cache = step(cache, {'tokens': tokens[np.arange(3), lengths + i][:, None]})
    np.testing.assert_allclose(logits_BTV[:, 0], whole[np.arange(3), lengths + i], atol=2e-5)
  np.testing.assert_array_equal(cache.lengths_B, lengths + 11)


def test_a_cache_in_which_a_slot_is_wrong_is_seen(tiny):
  model, params = tiny.LLAMA, tiny.random_params(tiny.LLAMA)
  cache = model.empty_cache(1, 32)

  @jax.jit
  def step(cache, tokens):
    batch = {'tokens': tokens}
    return model.apply({'params': params}, batch, cache=cache, method=tiny.logits)

  tokens = np.arange(1, 10)[None]
  _, cache = step(cache, tokens)
  before, _ = step(cache, tokens[:, :1])
  # All keys and values, one slot further: the newest token overwrites another than the oldest.
  moved = jax.tree.map(lambda x: jnp.roll(x, 1, axis=-2) if x.ndim > 3 else x, cache)
  old, _ = step(moved, tokens[:, :1])
  late, _ = step(cache._replace(lengths_B=cache.lengths_B + 1), tokens[:, :1])
  assert min(np.abs(before - old).max(), np.abs(before - late).max()) > 1e-3


@pytest.mark.slow
def test_a_window_larger_than_the_row_is_none(tiny):
  without = tiny.run(tiny.MODELS['rotary'], tiny.PROMPTS, tiny.GREEDY)
  wide = tiny.run(tiny.LLAMA.clone(window=64), tiny.PROMPTS, tiny.GREEDY)
  assert wide == without != tiny.run(tiny.LLAMA, tiny.PROMPTS, tiny.GREEDY)


def plan(prompts):
  """Rows that join at different times, greedy and drawn; the third goes where the first was."""
  drawn = Sampling(max_new_tokens=10, temperature=1.4, top_k=12, top_p=0.95, seed=8)
  penalized = Sampling(max_new_tokens=14, temperature=0.0, repetition_penalty=1.4)
  return [
    (0, 2, prompts[2], Sampling(max_new_tokens=5, temperature=0.0), 0),
    (1, 0, prompts[0], drawn, 1),
    (6, 2, prompts[1], dataclasses.replace(drawn, temperature=0.9, min_p=0.01), 2),
    (6, 3, prompts[3], penalized, 3),
  ]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['learned', 'rotary', 'window'])
def test_a_row_that_joins_gets_what_it_gets_alone(tiny, name):
  model = tiny.MODELS[name]
  made, weights = tiny.ready(model)
  _, found = tiny.join(made, weights, made.empty(rows=4, slots=32), plan(tiny.PROMPTS))
  for tokens, (_, _, prompt, sampling, number) in zip(found, plan(tiny.PROMPTS), strict=True):
    assert tokens == tiny.run(model, [prompt], sampling, rows=[number])[0]
  other = [(*entry[:4], entry[4] + 7) for entry in plan(tiny.PROMPTS)]
  _, changed = tiny.join(made, weights, made.empty(rows=4, slots=32), other)
  same = [a == b for a, b in zip(found, changed, strict=True)]
  assert same == [True, False, False, True]  # only what is drawn depends on the number


@pytest.mark.slow
def test_a_row_that_joins_leaves_the_others_bit_for_bit(tiny):
  made, weights = tiny.ready(tiny.LLAMA)
  state, _ = tiny.join(made, weights, made.empty(rows=4, slots=32), plan(tiny.PROMPTS))
  before = jax.tree.map(np.array, state)
  state, _ = made.admit(weights, state, 1, tiny.PROMPTS[2], Sampling(max_new_tokens=4, seed=3), 5)
  after, others = jax.tree.map(np.array, state), np.array([0, 2, 3])
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[others], b[others]), before, after)
  changed = jax.tree.map(lambda a, b: not np.array_equal(a[1], b[1]), before, after)
  assert all(jax.tree.leaves(changed.cache)) and changed.ids_B and changed.lengths_B
  assert after.lengths_B[1] == len(tiny.PROMPTS[2]) and after.numbers.seed_B[1] == 3


@pytest.mark.slow
def test_rows_that_join_compile_one_program_per_bucket(tiny):
  made, weights = tiny.generator(tiny.GPT), tiny.ready(tiny.GPT)[1]
  states = [made.empty(rows=4, slots=48)]

  def admit(row, prompt, **options):
    state, _ = made.admit(weights, states.pop(), row, prompt, Sampling(**options), number=row)
    states.append(made.step(weights, state)[0])

  assert tiny.compilations(lambda: admit(0, [1, 2, 3], max_new_tokens=9)) >= 2
  assert tiny.compilations(lambda: admit(3, [4] * 16, max_new_tokens=5, temperature=0.3)) == 0
  assert tiny.compilations(lambda: admit(0, [7], max_new_tokens=30, top_k=5, seed=2)) == 0
  assert tiny.compilations(lambda: admit(1, [7] * 17, max_new_tokens=2)) > 0
  assert made._join._cache_size() == 2 and made._next._cache_size() == 1


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_tokens(tiny):
  made, sampling = tiny.generator(tiny.GPT), Sampling(max_new_tokens=14, seed=1)
  weights = tiny.ready(tiny.GPT)[1]
  tokens = made.tokens(weights, tiny.PROMPTS, sampling)
  assert tiny.compilations(lambda: next(tokens)) >= 2  # prefill, and the step that is on its way
  assert tiny.compilations(lambda: list(tokens)) == 0
  other = [prompt[:-1] + [20, 21] for prompt in tiny.PROMPTS[::-1]]
  again = made.tokens(weights, other, dataclasses.replace(sampling, seed=2), eos_ids=[3])
  assert tiny.compilations(lambda: list(again)) == 0
  assert made._start._cache_size() == made._next._cache_size() == 1
  longer = [[1] * 30]
  assert tiny.compilations(lambda: list(made.tokens(weights, longer, sampling))) > 0


def test_the_cache_is_not_copied(tiny):
  made, weights = tiny.ready(tiny.GPT)
  state, _ = made.admit(weights, made.empty(rows=2, slots=32), 1, [3, 4, 5], tiny.GREEDY)
  stats = made._next.lower(weights, state=state).compile().memory_analysis()
  cache = sum(x.nbytes for x in jax.tree.leaves(state.cache))
  assert stats.alias_size_in_bytes >= cache and stats.temp_size_in_bytes < cache
  after, _ = made.step(weights, state)
  assert all(x.is_deleted() for x in jax.tree.leaves(state.cache))
  assert not any(x.is_deleted() for x in jax.tree.leaves((weights, after)))
  joined, _ = made.admit(weights, after, 0, [6], tiny.GREEDY)
  assert all(x.is_deleted() for x in jax.tree.leaves(after.cache))
  assert not any(x.is_deleted() for x in jax.tree.leaves((weights, joined)))


def test_rows_end_with_their_last_token(tiny):
  endless = tiny.run(tiny.GPT, tiny.PROMPTS, tiny.GREEDY)
  eos = [endless[0][2], endless[2][5]]
  found = tiny.run(tiny.GPT, tiny.PROMPTS, tiny.GREEDY, eos)
  for row, whole in zip(found, endless, strict=True):
    ends = [i for i, token in enumerate(whole) if token in eos]
    kept = whole[: ends[0] + 1] if ends else whole
    assert row == (kept + [-1] * 12)[: len(row)]
  assert max(sum(token >= 0 for token in row) for row in found) == len(found[0])


@pytest.mark.parametrize(
  'prompts, message',
  [
    ([], 'there must be at least one prompt'),
    ([[1], []], r'prompts of \[1, 0\] tokens'),
    (
      [[1] * 60],
      'a prompt of 60 tokens and max_new_tokens=12 are 72 positions, and the model has max_len=64; '
      'shorten the prompt, or set max_new_tokens=4 or less',
    ),
    ([[1] * 64], 'max_len=64; shorten the prompt[.]'),
  ],
)
def test_wrong_prompts(tiny, prompts, message):
  with pytest.raises(ValueError, match=message):
    next(tiny.generator(tiny.GPT).tokens({}, prompts, tiny.GREEDY))


def test_wrong_samplings_of_a_batch(tiny):
  made, beams = tiny.generator(tiny.GPT), dataclasses.replace(tiny.GREEDY, beams=2)
  with pytest.raises(ValueError, match='1 samplings for 2 prompts'):
    next(made.tokens({}, [[1], [2]], [tiny.GREEDY]))
  with pytest.raises(ValueError, match='one sampling for all prompts'):
    next(made.tokens({}, [[1], [2]], [tiny.GREEDY, beams]))


@pytest.mark.parametrize(
  'row, prompt, options, message',
  [
    (4, [1], {}, 'row=4 must be one of the 4 rows of the batch, 0 to 3'),
    (0, [], {}, 'one token in each'),
    (0, [1], dict(beams=2), 'beams=2: beam search runs whole batches'),
    (0, [1] * 30, {}, 'are 42 positions, and the rows of this batch have slots=32; shorten'),
    (0, [1] * 60, {}, 'the model has max_len=64; shorten'),
  ],
)
def test_wrong_admissions(tiny, row, prompt, options, message):
  made = tiny.ready(tiny.GPT)[0]
  state = made.empty(rows=4, slots=32)
  with pytest.raises(ValueError, match=message):
    made.admit({}, state, row, prompt, dataclasses.replace(tiny.GREEDY, **options))


def test_an_empty_batch_longer_than_the_model_takes(tiny):
  with pytest.raises(ValueError, match='slots=65 must be at least 1, and at most max_len=64'):
    tiny.generator(tiny.GPT).empty(rows=1, slots=65)


def test_lengths_are_few():
  rounded = {decoding._rounded(n) for n in range(1, 4097)}
  assert len(rounded) < 50
  assert all(n <= decoding._rounded(n) <= n + max(15, n // 8) for n in range(1, 4097))
  assert [decoding._rounded_rows(rows, 2) for rows in (1, 2, 3, 8, 9)] == [2, 2, 4, 8, 16]


MESHES = [dict(data=2, tensor=2), dict(fsdp=4), dict(fsdp=2, sequence=2), dict(data=1, tensor=4)]
CASES = [  # and on which meshes
  ('window', Sampling(max_new_tokens=12, temperature=0.0), MESHES),
  ('learned', Sampling(max_new_tokens=6, temperature=1.3, top_p=0.9, seed=2), MESHES[:1]),
  ('learned', Sampling(max_new_tokens=6, temperature=0.0, beams=4), MESHES[1:2]),
  (
    'both',
    Sampling(max_new_tokens=6, temperature=0.0, beams=3, no_repeat_ngram_size=1),
    MESHES[:1],
  ),
]


def measure():
  """Of each case, the tokens on one device and on each mesh of four, and how many compilations came
  after the first tokens.
  """
  import conftest  # that of the room

  jax.config.update('jax_disable_most_optimizations', True)
  for name, sampling, meshes in CASES:
    for mesh in meshes:
      yield measured(conftest, name, sampling, mesh)
  yield joined(conftest, MESHES[0])


def placed(tiny, model, mesh):
  """A generator on a mesh, its weights, and the share of them that one device holds."""
  from llm_jax.core import params as params_lib
  from llm_jax.parallel import sharding

  layout = sharding.create_layout(**dict(data=1) | mesh)
  params, infos = tiny.random_params(model), params_lib.infos(tiny.boxed_params(model))
  made = tiny.generator(model, layout)
  weights = made.weights(
    jax.device_put(params, sharding.parameter_shardings(layout, params, infos))
  )
  held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(weights))
  return made, weights, held / sum(x.nbytes for x in jax.tree.leaves(params))


def measured(tiny, name, sampling, mesh):
  model, prompts = tiny.MODELS[name], tiny.PROMPTS[:3]
  made, weights, share = placed(tiny, model, mesh)
  tokens, compiled = made.tokens(weights, prompts, sampling), 0
  columns = [next(tokens)]
  if sampling.beams == 1:
    compiled = tiny.compilations(lambda: columns.extend(tokens))
  else:
    columns.extend(tokens)
  same = np.stack(columns, axis=1).tolist() == tiny.run(model, prompts, sampling)
  return dict(case=f'{name} {sampling} {mesh}', same=same, compiled=compiled, share=share)


def joined(tiny, mesh):
  """Rows that join one another on a mesh, also read in pieces; the second time all is compiled."""
  made, weights, share = placed(tiny, tiny.LLAMA, mesh)
  found = []

  def join():
    for pieces in (False, True):
      state = made.empty(rows=4, slots=32)
      found.append(tiny.join(made, weights, state, plan(tiny.PROMPTS), pieces)[1])

  join()
  compiled = tiny.compilations(join)
  alone = [
    tiny.run(tiny.LLAMA, [prompt], sampling, rows=[number])[0]
    for _, _, prompt, sampling, number in plan(tiny.PROMPTS)
  ]
  return dict(case=f'join {mesh}', same=found == [alone] * 4, compiled=compiled, share=share)


@pytest.mark.slow
def test_meshes_give_what_one_device_gives():
  room, root = pathlib.Path(__file__).parent, pathlib.Path(__file__).parents[2]
  env = os.environ | {
    'PYTHONPATH': f'{room}{os.pathsep}{root}',
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
