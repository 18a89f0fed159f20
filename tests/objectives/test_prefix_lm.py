"""Prefix LM: what is open and what is learned, gradients of packed rows in float64, and a decoder
that reads prompts so when it writes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import TOKENIZER, assert_same, filled, network_of, shape
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.core import params as params_lib
from llm_jax.data.documents import Memory
from llm_jax.generation.decoding import Generator
from llm_jax.generation.sampling import Sampling
from llm_jax.models import decoder, encoder_decoder
from llm_jax.objectives import prefix_lm
from llm_jax.training import step

BOS, EOS, SEP = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.sep_id


def documents(records):
  pair = lambda text, target: {'text': text, 'target': target}
  made = [{'text': r} if isinstance(r, str) else pair(*r) for r in records]
  return Memory(made, prefix_lm.Objective.encode, TOKENIZER)


def examples(rows, seed=0):
  return [rows.example(i, np.random.default_rng((seed, i))) for i in range(len(rows))]


def parts(example):
  """Of each document its prefix and what is learned."""
  for segment in range(1, example['segments'].max() + 1):
    inside = example['segments'] == segment
    tokens, open_ = example['tokens'][inside], example['prefix'][inside]
    count = int(open_.sum())
    assert (open_[:count] == 1).all() and (open_[count:] == 0).all()
    learned = example['weights'][inside] > 0
    np.testing.assert_array_equal(learned, np.arange(len(tokens)) >= count - 1)
    np.testing.assert_array_equal(tokens[1:], example['targets'][inside][:-1])
    yield tokens[:count].tolist(), example['targets'][inside][learned].tolist()


@settings(max_examples=40, deadline=None)
@given(
  records=st.lists(
    st.one_of(
      st.text('ab', min_size=1, max_size=40),
      st.tuples(st.text('ab', max_size=8), st.text('xy', min_size=1, max_size=8)),
    ),
    min_size=1,
    max_size=8,
  ),
  packing=st.sampled_from(['best_fit', 'none']),
)
def test_all_is_read_or_learned(records, packing):
  rows = prefix_lm.Objective(TOKENIZER, packing=packing).rows(documents(records), 24)
  made = [part for example in examples(rows) for part in parts(example)]
  pairs = sorted(r for r in records if not isinstance(r, str))
  found = sorted(
    (TOKENIZER.decode(p), TOKENIZER.decode(t)) for p, t in made if p[-1] == SEP and p[0] == BOS
  )
  assert found == pairs
  whole = sorted(len(r) for r in records if isinstance(r, str))
  texts = [[*p, *t] for p, t in made if p[-1] != SEP]
  assert sum(len(ids) - 2 for ids in texts) == sum(whole)  # BOS, and EOS or the next token
  assert sum(ids[-1] == EOS for ids in texts) == len(whole)


@pytest.mark.slow
def test_packed_documents_learn_as_if_alone():
  records = [('ab', 'xyz'), ('abc', 'y'), ('b', 'zz')]
  with jax.enable_x64(True):
    # In one layer what the tokens of a prefix see of each other reaches nothing that is learned.
    model = decoder.Model(vocab_size=TOKENIZER.vocab_size, **shape(32, layers=2))
    results = []
    for packing in ('none', 'best_fit'):
      objective = prefix_lm.Objective(TOKENIZER, packing=packing)
      made = examples(objective.rows(documents(records), 32))
      batch = filled(made, 4)
      network, params = network_of(model, objective, batch)
      for count in (1, 2):
        results.append(step.gradient(params, batch, None, network=network, micro_batches=count))
    assert len(made) < 3
    grads, metrics = results[0]
    for other, said in results[1:]:
      assert_same(other, grads)
      assert_same(said, metrics)
    shut = batch | {'prefix': np.zeros_like(batch['prefix'])}
    closed, _ = step.gradient(params, shut, None, network=network, micro_batches=1)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), closed, grads)
    assert max(jax.tree.leaves(apart)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('attention', ['xla', 'blockwise', 'ring'])
def test_a_prefix_sees_all_of_itself_and_nothing_behind(attention):
  """By what changes where a token changes; and each implementation as the first."""
  options = shape(16, dtype='float32', param_dtype='float32') | dict(layers=2, unroll=1)
  model = decoder.Model(vocab_size=30, attention=attention, **options)
  tokens = np.random.default_rng(0).integers(1, 30, (1, 12))
  segments = np.array([[1] * 8 + [2] * 4])
  open_ = np.array([[1] * 5 + [0] * 3 + [1, 1, 0, 0]])
  batch = {'tokens': tokens, 'segments': segments, 'prefix': open_}
  params = model.init(jax.random.key(0), batch)
  run = lambda tokens: np.asarray(model.apply(params, batch | {'tokens': tokens}).hidden[0])
  for index, seen in ((4, range(8)), (6, (6, 7)), (9, range(8, 12)), (10, (10, 11))):
    other = tokens.copy()
    other[0, index] = 1 + tokens[0, index] % 29
    changed = np.flatnonzero(np.abs(run(other) - run(tokens)).max(axis=1) > 1e-7)
    assert changed.tolist() == list(seen)
  plain = model.clone(attention='xla').apply(params, batch).hidden
  np.testing.assert_allclose(run(tokens), plain[0], atol=2e-6)


@pytest.mark.slow
def test_a_prompt_is_read_so_when_a_decoder_writes():
  """Greedy tokens one at a time by the cache, and by the whole row each time."""
  options = shape(32, dtype='float32', param_dtype='float32') | dict(layers=2, dim=16)
  model = decoder.Model(vocab_size=40, **options)
  init = lambda: model.init(jax.random.key(0), {'tokens': jnp.ones((1, 4), jnp.int32)})
  boxed, rng = jax.eval_shape(init)['params'], np.random.default_rng(0)
  draw = lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype)
  params = jax.tree.map(draw, nn.unbox(boxed))
  greedy, prompts = Sampling(max_new_tokens=8, temperature=0), ([3, 9, 4, 1, 5], [7, 8])
  found = {}
  for opens in (True, False):
    made = Generator(model, params_lib.infos(boxed), opens=opens)
    columns = made.tokens(made.weights(params), prompts, greedy)
    found[opens] = np.stack(list(columns), axis=1).tolist()
  assert found[True] != found[False]
  said = lambda model, batch: model.logits(model(batch).hidden)
  for prompt, wanted in zip(prompts, found[True], strict=True):
    row = list(prompt)
    for _ in range(8):
      open_ = np.int32(np.arange(len(row)) < len(prompt))[None]
      batch = {'tokens': np.array([row]), 'prefix': open_}
      logits = model.apply({'params': params}, batch, method=said)
      row.append(int(jnp.argmax(logits[0, -1])))
    assert row[len(prompt) :] == wanted


def test_what_is_refused():
  with pytest.raises(ValueError, match='document 1: text and target have 32 tokens, a row 24; 1'):
    prefix_lm.Objective(TOKENIZER).rows(documents(['a', ('a' * 20, 'b' * 10)]), 24)
  dropping = prefix_lm.Objective(TOKENIZER, long='drop')
  rows = dropping.rows(documents(['a', ('a' * 20, 'b' * 10)]), 24)
  assert len(rows) == 1 and rows.prompt(0) is None
  with pytest.raises(ValueError, match="objective.long='cut' must be one of error, drop"):
    prefix_lm.Objective(TOKENIZER, long='cut')
  sizes = dict(dim=8, layers=1, heads=1, mlp_dim=8, vocab_size=300, max_len=32)
  for model, said in (
    (encoder_decoder.Model(**sizes), 'objective prefix_lm needs a decoder'),
    (decoder.Model(**sizes, window=4), 'without a window; this one has window=4'),
  ):
    with pytest.raises(ValueError, match=said):
      prefix_lm.Objective(TOKENIZER).check(model)
  with pytest.raises(ValueError, match='a record has no text, only pair'):
    prefix_lm.Objective.encode({'pair': 'x'}, TOKENIZER)
