"""Prompts that are read piece by piece: the same numbers as at once, whatever the cache held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.generation.sampling import Sampling, words


@pytest.mark.parametrize('dtype', [None, 'int8'])
@pytest.mark.parametrize('name', ['learned', 'window'])
def test_pieces_give_what_the_whole_row_gives(tiny, name, dtype):
  model = tiny.MODELS[name].clone(cache_dtype=dtype)
  params, rng = tiny.random_params(model), np.random.default_rng(1)
  tokens, lengths = rng.integers(1, 40, (3, 40)), np.array([33, 20, 27])
  real = np.int32(np.arange(40)[None] < lengths[:, None])

  @jax.jit
  def logits(batch, cache=None):
    given = {} if cache is None else {'cache': cache}
    return model.apply({'params': params}, batch, method=tiny.logits, **given)

  whole = logits({'tokens': tokens, 'segments': real})
  cache = model.empty_cache(3, 48)
  for begun in range(0, 40, 8):
    here = slice(begun, begun + 8)
    cached = np.minimum(lengths, begun)[:, None].repeat(8, axis=1)
    piece = {'tokens': tokens[:, here], 'segments': real[:, here], 'cached': cached}
    found, cache = logits(piece, cache)
    # What earlier pieces left in 8 bits is read in 8 bits.
    kept = real[:, here, None] > 0
    tolerance = 2e-6 if dtype is None else 0.02
    np.testing.assert_allclose(found * kept, whole[:, here] * kept, atol=tolerance)
  np.testing.assert_array_equal(cache.lengths_B, lengths)


def read(made, weights, prompt, cache=None, begun=0, size=16):
  """The caches after each piece of a prompt, by how much of it is read, and the logits."""
  cache, kept = made.opened(64) if cache is None else cache, {}
  while begun < len(prompt):
    piece = prompt[begun : begun + size]
    cache, logits_1V = made.read(weights, cache, piece, begun)
    begun += len(piece)
    kept[begun] = cache
  return kept, logits_1V


@pytest.mark.slow
@pytest.mark.parametrize('name', ['learned', 'rotary', 'window'])
def test_a_prompt_in_pieces_goes_on_as_at_once_and_from_any_cache_to_the_bit(tiny, name):
  made, weights = tiny.ready(tiny.MODELS[name])
  rng = np.random.default_rng(2)
  prompt, sampling = rng.integers(1, 40, 37).tolist(), Sampling(max_new_tokens=9, seed=3)

  def written(kept, logits_1V):
    state = made.empty(rows=3, slots=64, logits=True)
    any_BW = np.full((3, words(40)), 2**32 - 1, np.uint32)
    given = prompt, sampling, 5
    state, first = made.enter(state, 1, kept[37], logits_1V, *given, allowed_W=any_BW[0])
    found, probabilities = [int(first)], []
    for _ in range(8):
      state, ids_B = made.step(weights, state, any_BW)
      found.append(int(ids_B[1]))
      probabilities.append(np.asarray(made.likely(state, 1)[0])[1])
    return found, np.stack(probabilities)

  kept, logits_1V = read(made, weights, prompt)
  found, wanted = written(kept, logits_1V)
  assert found == tiny.run(tiny.MODELS[name], [prompt], sampling, rows=[5])[0]
  others = {'its own': (kept[32], 32)}
  if name != 'window':  # whose cache has lost what came before
    longer, _ = read(made, weights, [*prompt[:33], *rng.integers(1, 40, 20).tolist()])
    others |= {'a longer one': (longer[53], 32), 'its whole one': (kept[37], 16)}
  assert made.forgets(64) == (name == 'window')
  for cache, begun in others.values():
    again, logits = read(made, weights, prompt, cache, begun)
    np.testing.assert_array_equal(logits, logits_1V)
    np.testing.assert_array_equal(written(again, logits)[1], wanted)
  wrong, logits = read(made, weights, prompt, made.opened(64), 32)
  assert np.abs(logits - logits_1V).max() > 1e-3  # a cache that lacks the beginning


def test_few_programs_read_all_lengths(tiny):
  made, weights = tiny.generator(tiny.GPT), tiny.ready(tiny.GPT)[1]
  cache = made.opened(64)
  for length in (1, 5, 16, 17, 32, 33, 64):
    made.read(weights, cache, [3] * length, 0)
  assert made.piece_lengths(64) == [16, 32, 64] and made._piece._cache_size() == 3
  for length in (0, 129):
    with pytest.raises(ValueError, match=f'a piece of {length} tokens must have 1 to 128'):
      made.read(weights, cache, [3] * length, 0)


def test_models_that_see_all_of_a_prompt_at_once_read_it_at_once(tiny):
  assert tiny.ready(tiny.GPT)[0].reads_pieces
  made, weights = tiny.ready(tiny.MODELS['both'])
  assert not made.reads_pieces
  with pytest.raises(ValueError, match='a piece'):
    made.read(weights, None, [3], 0)


def test_padding_past_the_last_position_leaves_no_trace(tiny):
  model, params = tiny.GPT, tiny.random_params(tiny.GPT)
  tokens = np.random.default_rng(0).integers(1, 40, (1, 64))
  run = lambda batch, **given: model.apply({'params': params}, batch, method=tiny.logits, **given)
  _, cache = run({'tokens': tokens[:, :60]}, cache=model.empty_cache(1, 64))
  piece = {'tokens': np.pad(tokens[:, 60:], [(0, 0), (0, 12)]), 'cached': np.full((1, 16), 60)}
  piece['segments'] = np.int32(np.arange(16)[None] < 4)
  found, cache = run(piece, cache=cache)
  np.testing.assert_allclose(found[:, :4], run({'tokens': tokens})[:, 60:], atol=2e-6)
  assert bool(jnp.isfinite(jax.tree.leaves(cache.layers)[0]).all())
