import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.objectives import clm
from llm_jax.objectives.shared import infilling


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


FIM = byte.create(added=infilling.KNOWN[0])
PRE, SUF, MID = (FIM.encode(text, special=True)[0] for text in infilling.KNOWN[0])


def written(texts):
  return Memory([{'text': text} for text in texts], clm.Objective.encode, FIM)


def restored(ids):
  """The text of a piece, whichever way round it stands; and that way."""
  at = {mark: ids.index(mark) for mark in (PRE, SUF, MID) if mark in ids}
  if not at:
    return FIM.decode(ids), 'as it is'
  assert list(at) == [PRE, SUF, MID] and at[PRE] == 0 and sum(i in at for i in ids) == 3
  suffix, rest = ids[at[SUF] + 1 : at[MID]], ids[at[MID] + 1 :]
  if at[SUF] == 1:
    return bytes(np.array([*rest, *suffix], np.uint8) - 7).decode(), 'spm'
  return bytes(np.array([*ids[1 : at[SUF]], *rest, *suffix], np.uint8) - 7).decode(), 'psm'


@settings(max_examples=60, deadline=None)
@given(
  texts=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=6),
  rate=st.sampled_from([0.5, 1.0]),
  seed=st.integers(0, 99),
)
def test_a_text_that_was_turned_round_comes_back_byte_for_byte(texts, rate, seed):
  rows = clm.Objective(FIM, packing='best_fit', fim_rate=rate).rows(written(texts), 200)
  found = []
  for i in range(len(rows)):
    row = rows.example(i, np.random.default_rng((seed, i)))
    for k in range(1, row['segments'].max() + 1):
      inside = row['segments'] == k
      ids = [*row['tokens'][inside].tolist(), int(row['targets'][inside][-1])]
      assert ids[0] == FIM.bos_id and ids[-1] == FIM.eos_id
      text, way = restored(ids[1:-1])
      found.append(text)
      assert rate < 1 or way != 'as it is' or len(text.encode()) > 150
    assert row['bytes'] == sum(len(t.encode()) for t in found[-row['segments'].max() :])
  assert sorted(found) == sorted(texts)


def test_at_rate_zero_it_is_plain_and_else_both_ways_come():
  texts = ['some words of a text'] * 40
  plain = clm.Objective(byte.create()).rows(written(texts), 64)
  none = clm.Objective(FIM, fim_rate=0.0).rows(written(texts), 64)
  assert list(plain.plan) == list(none.plan)
  for i in range(len(plain)):
    ours, theirs = (rows.example(i, np.random.default_rng(0)) for rows in (none, plain))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
      np.testing.assert_array_equal(array, theirs[name])
  rows = clm.Objective(FIM, packing='none', fim_rate=0.8, fim_spm=0.25).rows(written(texts), 64)
  drawn = [rows.example(i, np.random.default_rng(i)) for i in range(len(rows))]
  ways = collections.Counter(
    restored(e['targets'][e['weights'] > 0].tolist()[:-1])[1] for e in drawn
  )
  assert 2 <= ways['as it is'] <= 16 and 2 <= ways['spm'] <= 16 and ways['psm'] > 14


def test_pieces_that_are_cut_inside_a_character_stay_as_they_are():
  rows = clm.Objective(FIM, fim_rate=1.0).rows(written(['\U0001f600' * 30]), 24)
  found = b''
  for i in range(len(rows)):
    row = rows.example(i, np.random.default_rng(i))
    ids = row['targets'][row['weights'] > 0]
    if not np.isin(ids, (PRE, SUF, MID)).any():
      found += bytes((ids[ids < PRE] - 7)[ids[ids < PRE] >= 7].tolist())
  assert found and found in ('\U0001f600' * 30).encode()


@pytest.mark.parametrize(
  ('tokenizer', 'options', 'said'),
  [
    (byte.create(), dict(fim_rate=0.5), 'no special tokens for prefix, suffix and middle; add'),
    (FIM, dict(fim_rate=1.5), 'objective.fim_rate=1.5 must be at least 0 and at most 1'),
    (FIM, dict(fim_rate=0.5, fim_spm=-1.0), 'objective.fim_spm=-1.0 must be'),
  ],
)
def test_what_cannot_be_turned_round(tokenizer, options, said):
  with pytest.raises(ValueError, match=said):
    clm.Objective(tokenizer, **options)
