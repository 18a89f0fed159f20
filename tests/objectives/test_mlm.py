import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.objectives import mlm


def masked(small, objective, tokens, seed=0):
  """Original row, its masked example, and the masked positions."""
  example = {
    'tokens': np.asarray(tokens, np.int32),
    'segments': (np.asarray(tokens) > 0).astype(np.int32),
  }
  before = example['tokens'].copy()
  out = objective.transform(example, np.random.default_rng(seed))
  np.testing.assert_array_equal(example['tokens'], before)  # the caller's row is not written to
  return out, out['mask_positions'][out['mask_weights'] > 0]


def text_row(rng, n, vocab_size=50):
  return np.concatenate([[2], rng.integers(7, vocab_size, n), [3]])


@pytest.mark.parametrize('masking', mlm.MASKINGS)
def test_masks_15_percent_and_80_10_10(small, masking):
  tokenizer = small.Tokenizer(vocab_size=1007, word=3)
  objective = mlm.Objective(tokenizer, masking=masking)
  rng = np.random.default_rng(0)
  ordinary = chosen = hidden = kept = changed = 0
  for seed in range(60):
    tokens = text_row(rng, 510, 1007)
    out, positions = masked(small, objective, tokens, seed)
    new, old = out['tokens'][positions], tokens[positions]
    ordinary, chosen = ordinary + 510, chosen + len(positions)
    hidden += np.sum(new == tokenizer.mask_id)
    kept += np.sum(new == old)
    changed += np.sum((new != old) & (new != tokenizer.mask_id))
    assert not tokenizer.special[new[new != tokenizer.mask_id]].any()
    untouched = np.setdiff1d(np.arange(512), positions)
    np.testing.assert_array_equal(out['tokens'][untouched], tokens[untouched])
    np.testing.assert_array_equal(out['mask_targets'][: len(positions)], old)
  slack = 0 if masking == 'token' else 9 * 60  # less than one word of at most ten tokens per row
  assert round(0.15 * 510) * 60 - slack <= chosen <= round(0.15 * 510) * 60
  # Five standard deviations of the binomial; a span is one draw for its tokens, about 3.8 words of
  # 3: so fewer draws.
  draws = chosen if masking != 'span' else chosen / 20
  for share, found in ((0.8, hidden), (0.1 + 0.1 / 1000, kept), (0.1 - 0.1 / 1000, changed)):
    assert abs(found / chosen - share) < 5 * np.sqrt(share * (1 - share) / draws)


def test_other_shares_move_the_counts(small):
  tokens = text_row(np.random.default_rng(0), 510)
  all_hidden, positions = masked(
    small, mlm.Objective(small.Tokenizer(), mask_token_rate=1.0, random_token_rate=0.0), tokens
  )
  assert (all_hidden['tokens'][positions] == 4).all()
  keep = mlm.Objective(small.Tokenizer(), mask_token_rate=0.0, random_token_rate=0.0, mask_rate=0.4)
  all_kept, positions = masked(small, keep, tokens)
  assert len(positions) == 204
  np.testing.assert_array_equal(all_kept['tokens'], tokens)


@settings(max_examples=60, deadline=None)
@given(
  tokens=st.lists(st.integers(0, 49), min_size=1, max_size=80),
  rate=st.floats(0.01, 1.0),
  masking=st.sampled_from(mlm.MASKINGS),
  seed=st.integers(0, 99),
)
def test_any_row(small, tokens, rate, masking, seed):
  tokenizer = small.Tokenizer(word=4)
  objective = mlm.Objective(tokenizer, mask_rate=rate, masking=masking)
  out, positions = masked(small, objective, tokens, seed)
  n = sum(t >= 7 for t in tokens)
  room = len(out['mask_positions'])
  assert room == int(np.ceil(rate * len(tokens) - 1e-9))
  wanted = min(max(1, round(rate * n)), n)
  assert (len(positions) == wanted) if masking == 'token' else (len(positions) <= room)
  assert (np.diff(positions) > 0).all() and (np.asarray(tokens, int)[positions] >= 7).all()
  start, length = mlm.words(np.asarray(tokens) >= 7, tokenizer.word_start[tokens])
  assert length.sum() == n
  if masking != 'token':  # no word by half, and as much as fits
    taken = [np.isin(np.arange(s, s + k), positions) for s, k in zip(start, length, strict=True)]
    assert all(t.all() or not t.any() for t in taken)
    left = [len(t) for t in taken if not t.any()]
    assert not left or len(positions) >= wanted or min(left) > wanted - len(positions)
    assert len(positions) or not n or length.min() > room


def test_words_by_hand():
  #            CLS  a     b          SEP CLS  (no start)  d     PAD
  ordinary = [0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0]
  starts = [0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
  start, length = mlm.words(np.array(ordinary, bool), np.array(starts, bool))
  assert start.tolist() == [1, 3, 8, 10] and length.tolist() == [2, 3, 2, 1]
  start, length = mlm.words(
    np.ones(25, bool), np.eye(1, 25, 12, dtype=bool)[0]
  )  # a run of 12 and one of 13: too long for words
  assert length.tolist() == [1] * 25


def test_word_masking_differs_from_token_masking(small):
  """Negative control: with four-token words, masking by token does cut words."""
  tokens = np.concatenate([[2], np.tile([8, 9, 10, 11], 50), [3]])
  whole = lambda positions: set(np.bincount((positions - 1) // 4, minlength=50).tolist()) <= {0, 4}
  assert whole(masked(small, mlm.Objective(small.Tokenizer(word=4), masking='word'), tokens)[1])
  assert not whole(masked(small, mlm.Objective(small.Tokenizer(word=4)), tokens)[1])


def test_span_lengths_are_those_of_spanbert(small):
  """Mean of the geometric distribution with p = 0.2 truncated at 10, the paper's 3.8; few, far
  apart spans in a long row.
  """
  k = np.arange(1, 11)
  p = 0.2 * 0.8 ** (k - 1)
  mean = (k * p).sum() / p.sum()
  assert abs(mean - 3.8) < 0.01
  lengths = []
  for masking in ('span', 'word'):
    objective = mlm.Objective(small.Tokenizer(), mask_rate=0.02, masking=masking)
    positions = [masked(small, objective, np.full(20_000, 9), seed)[1] for seed in range(5)]
    lengths.append(np.mean([len(x) / (1 + np.count_nonzero(np.diff(x) > 1)) for x in positions]))
  deviation = np.sqrt((k**2 * p).sum() / p.sum() - mean**2)
  assert abs(lengths[0] - mean) < 4 * deviation / np.sqrt(5 * 400 / mean) and lengths[1] < 1.1


def test_a_span_is_replaced_as_a_whole(small):
  tokens = np.full(4000, 9)
  out, positions = masked(
    small, mlm.Objective(small.Tokenizer(), mask_rate=0.02, masking='span'), tokens
  )
  runs = np.split(out['tokens'][positions], np.flatnonzero(np.diff(positions) > 1) + 1)
  assert sum(len(r) > 1 for r in runs) > 10
  mixed = sum(0 < np.sum(r == 4) < len(r) for r in runs)
  assert mixed <= 2  # only spans that happen to touch


def test_a_span_ends_with_its_segment(small):
  """Segments of one word: no two words may share a span, while in one segment (the control) they
  do.
  """
  objective = mlm.Objective(small.Tokenizer(), mask_rate=0.5, masking='span')
  spans = lambda tokens: len(
    set(objective.choose(tokens >= 7, tokens >= 7, 300, np.random.default_rng(0))[1].tolist())
  )
  assert spans(np.tile([2, 9, 3], 200)) == 100
  assert spans(np.full(200, 9)) < 70


def test_rows_hold_every_token_once_between_cls_and_sep(small):
  documents = small.random_documents([5, 0, 31, 12, 1, 64])
  for packing in ('windows', 'best_fit', 'none'):
    rows = mlm.Objective(small.Tokenizer(), packing=packing).rows(documents, 16)
    found = []
    for i in range(len(rows)):
      row = rows.example(i, np.random.default_rng(0))
      for segment in range(1, row['segments'].max() + 1):
        piece = row['tokens'][row['segments'] == segment]
        assert piece[0] == 2 and piece[-1] == 3 and (piece[1:-1] >= 7).all()
        np.testing.assert_array_equal(
          row['positions'][row['segments'] == segment], np.arange(len(piece))
        )
        found.append(piece[1:-1])
    assert sorted(np.concatenate(found)) == sorted(np.concatenate(documents.texts))


def test_loss_equals_brute_force(small):
  objective = mlm.Objective(small.Tokenizer())
  rng = np.random.default_rng(1)
  rows = [
    masked(small, objective, np.pad(text_row(rng, n), (0, 38 - n)), n)[0] for n in (38, 20, 3)
  ]
  batch = small.stack([*rows, {k: np.zeros_like(v) for k, v in rows[0].items()}])
  hidden = rng.normal(size=(4, 40, 6)).astype(np.float32)
  net = small.network()
  metrics = objective.loss(net, small.read(objective, hidden, batch), batch)
  nll, right, weight = 0.0, 0, 0
  for b, p, t, w in zip(
    np.arange(4), batch['mask_positions'], batch['mask_targets'], batch['mask_weights'], strict=True
  ):
    for position, target in zip(p[w > 0], t[w > 0], strict=True):
      logits = 2 * hidden[b, position].astype(np.float64) @ net.w_DV
      nll, right, weight = (
        nll + small.cross_entropy(logits, target),
        right + (logits.argmax() == target),
        weight + 1,
      )
  np.testing.assert_allclose(metrics['mlm'][0], nll, rtol=1e-5)
  assert float(metrics['mlm'][1]) == weight == round(0.15 * 38) + round(0.15 * 20) + 1
  assert [float(x) for x in metrics['mlm_accuracy']] == [right, weight]
  assert objective.terms == {'mlm': 1.0} and objective.summary({'mlm_nll': np.log(7)})[
    'perplexity'
  ] == pytest.approx(7)
  ids, weights = objective.targets(batch)
  assert (ids[weights > 0] >= 7).all()


@pytest.mark.parametrize(
  'options, message',
  [
    ({'mask_rate': 0.0}, 'mask_rate=0.0'),
    ({'mask_rate': 1.5}, 'mask_rate=1.5'),
    ({'masking': 'words'}, "masking='words'.*token, word, span"),
    ({'mask_token_rate': 0.95}, 'mask_token_rate=0.95'),
    ({'random_token_rate': -0.1}, 'random_token_rate=-0.1'),
    ({'packing': 'first'}, "packing='first'.*windows, best_fit, none"),
    ({'label_smoothing': 1.0}, 'label_smoothing=1.0 must be'),
    ({'z_loss': -0.1}, 'z_loss=-0.1 must be'),
  ],
)
def test_refuses(small, options, message):
  with pytest.raises(ValueError, match=message):
    mlm.Objective(small.Tokenizer(), **options)
