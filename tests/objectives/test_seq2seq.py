"""From text to text: rows of pairs, gradients of packed ones in float64, and what is refused."""

import collections
import functools

import jax
import numpy as np
import pytest
from exact import TOKENIZER, assert_same, filled, network_of, shape
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.documents import Memory
from llm_jax.models import decoder, encoder_decoder
from llm_jax.objectives import seq2seq
from llm_jax.programs import network as networks
from llm_jax.training import step

BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def documents(texts):
  records = [{'text': text, 'target': target} for text, target in texts]
  return Memory(records, seq2seq.Objective.encode, TOKENIZER)


def examples(rows):
  return [rows.example(i, np.random.default_rng(0)) for i in range(len(rows))]


def pieces(example, prefix=''):
  """The tokens of each document of a row, by its number."""
  segments = example[f'{prefix}segments']
  return [example[f'{prefix}tokens'][segments == k] for k in range(1, segments.max() + 1)]


@settings(max_examples=40, deadline=None)
@given(
  lengths=st.lists(st.tuples(st.integers(1, 19), st.integers(1, 11)), min_size=1, max_size=12),
  packing=st.sampled_from(['best_fit', 'none']),
)
def test_every_pair_stands_once_in_rows_beside_each_other(lengths, packing):
  texts = [('s' * n + str(i), 't' * m + str(i)) for i, (n, m) in enumerate(lengths)]
  objective = seq2seq.Objective(TOKENIZER, source_len=24, packing=packing)
  rows = objective.rows(documents(texts), 16)
  found = collections.Counter()
  for example in examples(rows):
    assert example['source_tokens'].shape == (24,) and example['tokens'].shape == (16,)
    wanted = [example['targets'][example['segments'] == k + 1] for k in range(99)]
    for source, read, target in zip(
      pieces(example, 'source_'), pieces(example), wanted, strict=False
    ):
      assert source[-1] == target[-1] == EOS and read[0] == BOS
      assert read[1:].tolist() == target[:-1].tolist()
      found[TOKENIZER.decode(source), TOKENIZER.decode(target)] += 1
    np.testing.assert_array_equal(example['weights'], example['segments'] > 0)
    for prefix in ('', 'source_'):
      positions = [example[f'{prefix}positions'][example[f'{prefix}segments'] == 1]]
      np.testing.assert_array_equal(positions[0], np.arange(len(positions[0])))
  assert found == collections.Counter(texts)
  if packing == 'none':
    assert len(rows) == len(texts)


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['transformer_tiny', 't5_small', 'bart_base'])
def test_packed_pairs_learn_as_if_alone(variant):
  """One row or several, one micro-batch or two: loss and gradient to 1e-10."""
  texts = [('ab' * n, 'xyz'[:n]) for n in (1, 3, 2, 4, 1)]
  with jax.enable_x64(True):
    options = encoder_decoder.VARIANTS[variant] | shape(24)
    model = encoder_decoder.Model(vocab_size=TOKENIZER.vocab_size, **options | dict(head_dim=4))
    found = []
    for packing in ('none', 'best_fit'):
      objective = seq2seq.Objective(TOKENIZER, packing=packing, label_smoothing=0.1)
      made = examples(objective.rows(documents(texts), 16))
      batch = filled(made, 6)
      network, params = network_of(model, objective, batch)
      for count in (1, 2):
        found.append(step.gradient(params, batch, None, network=network, micro_batches=count))
    assert len(made) < 5
    grads, metrics = found[0]
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    for other, said in found[1:]:
      assert_same(other, grads)
      assert_same(said, metrics)


def test_vectors_of_two_rows_are_not_moved():
  objective = seq2seq.Objective(TOKENIZER)
  batch = filled(examples(objective.rows(documents([('ab', 'c')]), 8)), 1)
  options = encoder_decoder.VARIANTS['t5_small'] | shape(8, dtype='float32', param_dtype='float32')
  model = encoder_decoder.Model(vocab_size=TOKENIZER.vocab_size, **options | dict(head_dim=4))
  network, params = network_of(model, objective, batch)
  moved = functools.partial(networks.apply, delta_BTD=np.zeros((1, 8, 8), np.float32))
  with pytest.raises(ValueError, match='this model embeds 2: model/decoder_embedder, model/embedd'):
    jax.eval_shape(lambda: moved(network, params, batch))


def test_what_is_too_long_is_named_cut_or_left_out():
  texts = [('abc', 'd'), ('a' * 40, 'd'), ('abc', 'd' * 30)]
  with pytest.raises(
    ValueError,
    match='document 1: the source has 41 tokens, its row 24; 2 of 3 pairs are too long. Raise '
    'config.objective.source_len, or set config.objective.long=cut or drop',
  ):
    seq2seq.Objective(TOKENIZER, source_len=24).rows(documents(texts), 16)
  with pytest.raises(ValueError, match='document 2: the target has 31 tokens.*config.seq_len'):
    seq2seq.Objective(TOKENIZER, source_len=48).rows(documents(texts), 16)
  (example,) = examples(seq2seq.Objective(TOKENIZER, long='drop').rows(documents(texts), 16))
  assert [TOKENIZER.decode(x) for x in pieces(example, 'source_')] == ['abc']
  cut = examples(seq2seq.Objective(TOKENIZER, long='cut', source_len=24).rows(documents(texts), 16))
  found = [TOKENIZER.decode(x) for e in cut for x in pieces(e, 'source_')]
  assert sorted(found) == ['a' * 23, 'abc', 'abc']
  assert all(x[-1] == EOS for e in cut for x in pieces(e, 'source_'))


@pytest.mark.parametrize(
  ('record', 'said'),
  [
    ({'text': 'a'}, 'a record has no target, only text; config.data.target names its field'),
    ({'text': 'a', 'target': ' '}, 'no target'),
    ({'text': '', 'target': 'b'}, 'a record has no text, only target'),
  ],
)
def test_a_record_without_one_of_both_is_refused(record, said):
  with pytest.raises(ValueError, match=said):
    seq2seq.Objective.encode(record, TOKENIZER)


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    (dict(packing='windows'), "objective.packing='windows' must be one of best_fit, none"),
    (dict(long='split'), "objective.long='split' must be one of error, cut, drop"),
    (dict(source_len=1), 'objective.source_len=1 must be at least 2'),
    (dict(start=5000), 'objective.start=5000 is no id of the vocabulary'),
    (dict(label_smoothing=1.0), 'label_smoothing'),
  ],
)
def test_options_that_cannot_be(options, said):
  with pytest.raises(ValueError, match=said):
    seq2seq.Objective(TOKENIZER, **options)


def test_a_model_must_read_sources():
  objective = seq2seq.Objective(TOKENIZER, source_len=64)
  plain = dict(dim=8, layers=1, heads=1, mlp_dim=8, vocab_size=300, max_len=32)
  with pytest.raises(ValueError, match='needs a model that reads two rows .encoder_decoder.'):
    objective.check(decoder.Model(**plain))
  with pytest.raises(ValueError, match='source_len=64 is more than config.model.max_len=32'):
    objective.check(encoder_decoder.Model(**plain))
