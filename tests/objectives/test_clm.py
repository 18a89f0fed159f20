import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.documents import Memory
from llm_jax.objectives import clm


@settings(max_examples=40, deadline=None)
@given(
  lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
  seq_len=st.integers(1, 24),
  packing=st.sampled_from(['windows', 'best_fit', 'none']),
)
def test_every_token_is_predicted_once_from_the_one_before(small, lengths, seq_len, packing):
  tokenizer = small.Tokenizer()
  documents = small.Documents([1000 * (d + 1) + np.arange(n) for d, n in enumerate(lengths)])
  tokenizer.token_bytes = np.zeros(20_000, np.int32)
  tokenizer.token_bytes[1000:] = 3
  rows = clm.Objective(tokenizer, packing=packing).rows(documents, seq_len)
  found, spelt = collections.Counter(), 0
  for i in range(len(rows)):
    row = rows.example(i, np.random.default_rng(0))
    inside = row['segments'] > 0
    np.testing.assert_array_equal(row['weights'], inside.astype(np.float32))
    found.update(zip(row['tokens'][inside].tolist(), row['targets'][inside].tolist(), strict=True))
    spelt += row['bytes']
    for k in range(1, row['segments'].max() + 1):
      position = row['segments'] == k
      np.testing.assert_array_equal(row['tokens'][position][1:], row['targets'][position][:-1])
      np.testing.assert_array_equal(row['positions'][position], np.arange(position.sum()))
  wanted = collections.Counter()
  for text in documents.texts:
    whole = [5, *text.tolist(), 6]
    wanted.update(zip(whole[:-1], whole[1:], strict=True) if len(text) else [])
  assert found == wanted
  assert spelt == 3 * sum(lengths)


def test_loss_equals_brute_force(small):
  tokenizer = small.Tokenizer()
  objective, net = clm.Objective(tokenizer), small.network()
  documents = small.random_documents([9, 4, 13, 2])
  rows = objective.rows(documents, 12)
  examples = [
    objective.transform(rows.example(i, np.random.default_rng(0)), np.random.default_rng(0))
    for i in range(len(rows))
  ]
  batch = small.stack([*examples, {k: np.zeros_like(v) for k, v in examples[0].items()}])
  hidden = np.random.default_rng(3).normal(size=(len(examples) + 1, 12, 6)).astype(np.float32)
  metrics = objective.loss(net, jnp.asarray(hidden), batch)
  logits, counted = hidden.astype(np.float64) @ net.w_DV, batch['weights'] > 0
  nll = small.cross_entropy(logits, batch['targets'])[counted].sum()
  tokens, letters = 28 + 4, tokenizer.token_bytes[np.concatenate(documents.texts)].sum()
  np.testing.assert_allclose(metrics['clm'][0], nll, rtol=1e-5)
  np.testing.assert_allclose(metrics['bits_per_byte'][0], nll / np.log(2), rtol=1e-5)
  assert float(metrics['clm'][1]) == tokens and float(metrics['bits_per_byte'][1]) == letters
  assert [float(x) for x in metrics['clm_accuracy']] == [
    (logits.argmax(-1) == batch['targets'])[counted].sum(),
    tokens,
  ]
  assert objective.terms == {'clm': 1.0} and objective.summary({'clm_nll': np.log(3)})[
    'perplexity'
  ] == pytest.approx(3)
  ids, weights = objective.targets(batch)
  assert np.bincount(ids[weights > 0])[6] == 4  # one EOS a document


@pytest.mark.parametrize(
  'given, computed',
  [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32), (jnp.float64, jnp.float64)],
)
def test_the_loss_is_in_float32_at_least(small, given, computed):
  batch = {
    'targets': np.ones((1, 4), np.int32),
    'weights': np.ones((1, 4), np.float32),
    'bytes': np.ones(1, np.float32),
  }
  net = small.network()
  net.model.table = lambda: jnp.eye(50, dtype=given)
  with jax.enable_x64(True):
    metrics = clm.Objective(small.Tokenizer()).loss(net, jnp.zeros((1, 4, 50), given), batch)
    assert metrics['clm'][0].dtype == computed
    np.testing.assert_allclose(
      metrics['clm'][0], 4 * np.log(50), rtol=1e-15 if computed == jnp.float64 else 1e-6
    )


def test_made_up_records_give_rows_like_real_ones(small):
  objective = clm.Objective(small.Tokenizer())
  records = clm.Objective.sample_records({})
  rng = np.random.default_rng(0)
  template = objective.rows(Memory(records, objective.encode, small.Tokenizer()), 100)
  row, real = template.example(0, rng), objective.rows(small.random_documents([9]), 100)
  shapes = lambda example: {key: (a.shape, a.dtype) for key, a in example.items()}
  assert shapes(row) == shapes(real.example(0, rng))
  model = small.network(dim=6, vocab_size=50).model
  assert objective.flops(model, {'targets': row['targets'][None]}) == 100 * 2 * 50 * 6


def test_refuses(small):
  with pytest.raises(ValueError, match="packing='x'.*windows, best_fit, none"):
    clm.Objective(small.Tokenizer(), packing='x')
  with pytest.raises(ValueError, match="rows='clm'"):
    clm.Objective(small.Tokenizer()).transform(
      {'tokens': np.zeros(4, np.int32)}, np.random.default_rng(0)
    )
