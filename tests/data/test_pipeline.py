import collections
import itertools
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.core import contracts
from llm_jax.data import cache, encoding, pack, pipeline


class Numbers:
  """Stands for a split: documents that are numbers from `first` on."""

  def __init__(self, first, count):
    self.first, self.count = first, count


class Rows:
  def __init__(self, documents, seq_len):
    self.documents, self.seq_len = documents, seq_len

  def __len__(self):
    return self.documents.count

  def example(self, index, rng):
    return {
      'tokens': np.full(self.seq_len, self.documents.first + index, np.int32),
      'drawn': rng.random(2),
    }


class Objective:
  """One row per document; draws something before and after."""

  def rows(self, documents, seq_len):
    return Rows(documents, seq_len)

  def transform(self, example, rng):
    return example | {'mask': rng.random(3).astype(np.float32)}


class Failing(Objective):
  def transform(self, example, rng):
    if example['tokens'][0] == 5:
      raise ZeroDivisionError('document five')
    return super().transform(example, rng)


def _train(counts=(23, 11), weights=(2.0, 1.0), seed=0, batch_size=4, objective=None):
  splits = [Numbers(1000 * i, n) for i, n in enumerate(counts)]
  objective = objective or Objective()
  rows = pipeline.training_rows(splits, objective, 3, batch_size)
  return pipeline.train_examples(rows, weights, objective, seed)


def _valid(counts=(7, 4), seed=0, limit=0):
  return pipeline.validation_examples(_valid_rows(counts), Objective(), seed, limit)


def _valid_rows(counts):
  splits = [Numbers(1000 * i, n) for i, n in enumerate(counts)]
  return pipeline.validation_rows(splits, Objective(), 3)


def test_indices_say_which_row_an_example_is():
  for limit in (0, 5):
    indices = pipeline.validation_indices(_valid_rows((7, 4)), 0, limit)
    examples = _valid(limit=limit)
    assert len(indices) == len(examples) == (limit or 11)
    ids = _ids(examples, range(len(examples)))
    assert [1000 * corpus + row for corpus, row in indices] == ids


def _ids(examples, indices):
  return [int(examples[i]['tokens'][0]) for i in indices]


def _equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])
    assert a[key].dtype == b[key].dtype


def _take(iterator, n):
  taken = list(itertools.islice(iterator, n))
  iterator.close()
  return taken


def test_every_epoch_holds_each_row_once_in_an_order_and_with_draws_of_its_own():
  examples = _train((50,), (1.0,))
  epochs = [_ids(examples, range(50 * e, 50 * e + 50)) for e in range(4)]
  assert all(sorted(e) == list(range(50)) for e in epochs)
  assert len({tuple(e) for e in epochs}) == 4 and epochs[0] != sorted(epochs[0])
  draws = collections.defaultdict(set)
  for i in range(200):
    draws[int(examples[i]['tokens'][0])].add(
      examples[i]['drawn'].tobytes() + examples[i]['mask'].tobytes()
    )
  assert all(len(seen) == 4 for seen in draws.values())
  assert len(examples) == sys.maxsize


def test_neighbouring_seeds_do_not_repeat_an_epoch_of_each_other_and_corpora_are_shuffled_apart():
  orders = [
    tuple(_ids(_train((50,), (1.0,), seed=s), range(50 * e, 50 * e + 50)))
    for s in range(4)
    for e in range(4)
  ]
  assert len(set(orders)) == 16
  both = _ids(_train((50, 50), (1.0, 1.0)), range(100))
  assert [i for i in both if i < 1000] != [i - 1000 for i in both if i >= 1000]


@settings(max_examples=40, deadline=None)
@given(i=st.integers(0, 10**12), seed=st.integers(0, 10**12))
def test_an_example_is_a_pure_function_of_seed_and_index(i, seed):
  one, other = _train(seed=seed), _train(seed=seed)
  other[i + 1], other[3]  # what was read before does not matter
  _equal(one[i], other[i])
  assert not np.array_equal(one[i]['drawn'], _train(seed=seed + 1)[i]['drawn'])


@pytest.mark.parametrize(
  'weights', [(0.7, 0.3), (1.0, 1.004), (1, 2, 3), (0.29, 0.01, 0.7), (5,), (1e-3, 1)]
)
def test_every_prefix_is_mixed_by_weight_and_every_corpus_is_read_in_order(weights):
  corpora = len(weights)
  total = 3000
  selected = pipeline._Interleaved(pipeline._shares(weights, corpora))
  counts, share = np.zeros(corpora, int), np.asarray(weights) / sum(weights)
  for i in range(total):
    corpus, index = selected[i]
    assert index == counts[corpus]
    counts[corpus] += 1
    assert np.abs(counts - (i + 1) * share).max() < corpora
  # Far out, the count a corpus has reached is still exact: no rounding of the weights.
  far = 10**15
  reached = {}
  for i in itertools.count(far):
    corpus, index = selected[i]
    reached.setdefault(corpus, index / i)
    if len(reached) == corpora:
      break
  np.testing.assert_allclose([reached[c] for c in range(corpora)], share, rtol=1e-9)


def test_a_mixture_covers_each_corpus_by_its_own_epochs():
  examples = _train((20, 10), (2.0, 1.0))
  seen = collections.Counter(_ids(examples, range(90)))
  assert set(seen) == {*range(20), *range(1000, 1010)} and set(seen.values()) == {3}


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 300), hosts=st.sampled_from([1, 2, 4]))
def test_batches_are_the_same_for_any_number_of_hosts_and_any_start(start, hosts):
  examples = _train()
  # dealt out, as a mesh may: a host's rows need not be neighbours
  shares = np.arange(8).reshape(-1, hosts).T
  parts = [_take(pipeline.batches(examples, 8, start, rows), 3) for rows in shares]
  for s in range(3):
    whole = {k: np.concatenate([part[s][k] for part in parts]) for k in parts[0][s]}
    expected = [examples[start + 8 * s + j] for j in shares.ravel()]
    _equal(whole, {k: np.stack([e[k] for e in expected]) for k in expected[0]})


def test_another_seed_gives_another_stream():
  a, b = (_take(pipeline.batches(_train(seed=s), 8), 2) for s in (0, 1))
  assert not np.array_equal(a[0]['tokens'], b[0]['tokens']) and not np.array_equal(
    a[0]['mask'], b[0]['mask']
  )
  same = _take(pipeline.batches(_train(seed=0), 8), 2)
  _equal(a[1], same[1])


def test_batches_are_made_ahead_and_the_thread_ends_with_the_iterator():
  made = threading.Semaphore(0)

  class Counting(Objective):
    def transform(self, example, rng):
      made.release()
      return super().transform(example, rng)

  stream = pipeline.batches(_train(objective=Counting()), 4)
  next(stream)
  for _ in range(4 * 4):  # the batch given and three more, without another call of next
    assert made.acquire(timeout=30)
  stream.close()
  assert not [t for t in threading.enumerate() if t.name.startswith('batches')]
  assert made.acquire(blocking=False) is False


def test_an_exception_in_a_transform_reaches_the_reader_in_its_turn():
  examples = _train((20,), (1.0,), objective=Failing())
  good = _train((20,), (1.0,))
  bad = _ids(good, range(20)).index(5)
  stream = pipeline.batches(examples, 4)
  for _ in range(bad // 4):
    next(stream)
  with pytest.raises(ZeroDivisionError, match='document five'):
    next(stream)
  assert not [t for t in threading.enumerate() if t.name.startswith('batches')]


def test_batches_are_put_by_the_thread_that_makes_them_and_its_errors_come_in_their_turn():
  where = []

  def put(batch):
    where.append(threading.current_thread().name)
    if len(where) == 3:
      raise ZeroDivisionError('batch two')
    return batch['tokens'][:, 0].sum()

  stream, plain = pipeline.batches(_train(), 4, put=put), pipeline.batches(_train(), 4)
  assert [next(stream) for _ in range(2)] == [
    batch['tokens'][:, 0].sum() for batch in _take(plain, 2)
  ]
  with pytest.raises(ZeroDivisionError, match='batch two'):
    next(stream)
  assert all(name.startswith('batches') for name in where)
  assert not [t for t in threading.enumerate() if t.name.startswith('batches')]


def test_rows_with_different_arrays_are_refused():

  class Uneven(Objective):
    def transform(self, example, rng):
      return example | ({'label': np.int32(1)} if example['tokens'][0] < 1000 else {})

  with pytest.raises(ValueError, match="different arrays, .*'label'"):
    next(pipeline.batches(_train(objective=Uneven()), 8))


def test_validation_is_fixed_whatever_the_limit():
  every = _valid()
  assert _ids(every, range(len(every))) == [*range(7), *range(1000, 1004)]
  by_id = {int(e['tokens'][0]): e for e in (every[i] for i in range(11))}
  for limit in (1, 5, 10, 11, 50):
    some, again = _valid(limit=limit), _valid(limit=limit)
    assert len(some) == min(limit, 11) == len(set(_ids(some, range(len(some)))))
    for i in range(len(some)):
      _equal(some[i], again[i])
      _equal(some[i], by_id[int(some[i]['tokens'][0])])
  assert _ids(_valid((0, 3, 0, 2)), range(5)) == [
    1000,
    1001,
    1002,
    3000,
    3001,
  ]  # a corpus may hold nothing out
  choices = {tuple(_ids(_valid(limit=5, seed=s), range(5))) for s in range(8)}
  assert len(choices) > 4


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_the_last_validation_batch_is_filled_with_zero_rows(hosts):
  examples = _valid()
  parts = [
    list(pipeline.padded_batches(examples, 4, rows)) for rows in np.arange(4).reshape(hosts, -1)
  ]
  assert [len(p) for p in parts] == [3] * hosts
  rows = [
    {k: b[k][j] for k in b}
    for s in range(3)
    for part in parts
    for b in [part[s]]
    for j in range(4 // hosts)
  ]
  assert len(rows) == 12
  for i, row in enumerate(rows):
    _equal(row, examples[i] if i < 11 else {k: np.zeros_like(v) for k, v in examples[0].items()})


class Text(list):
  fingerprint = 'some text'

  def __getitem__(self, index):
    return {'text': super().__getitem__(index)}


class Bytes:
  vocab_size, fingerprint = 256, 'bytes'

  def encode(self, text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


class WindowRows(Rows):
  def __init__(self, documents, seq_len):
    super().__init__(documents, seq_len)
    self.plan = pack.windows(documents.lengths('tokens'), seq_len)

  def __len__(self):
    return len(self.plan)

  def example(self, index, rng):
    pieces = [self.documents.array('tokens', *piece) for piece in self.plan[index]]
    return pack.assemble(pieces, self.seq_len) | {'row': np.int64(index)}


class Windows(Objective):
  def rows(self, documents, seq_len):
    return WindowRows(documents, seq_len)


def test_one_epoch_of_windows_over_a_cache_spells_the_corpus(tmp_path):
  texts = Text(f'{i} times {"na" * (i % 19)} batman' for i in range(40))
  encoder = encoding.Encoder([contracts.Objective.encode])
  train, _ = cache.build(texts, Bytes(), encoder, str(tmp_path)).split(0.0)
  rows = len(pack.windows(train.lengths('tokens'), 16))
  laid_out = pipeline.training_rows([train], Windows(), 16, 8)
  whole = list(pipeline.padded_batches(pipeline.validation_examples(laid_out, Windows(), 0), 8))
  examples = pipeline.train_examples(laid_out, [1.0], Windows(), 0)
  shuffled = _take(pipeline.batches(examples, 1), rows)
  order = np.argsort([int(b['row'][0]) for b in shuffled])
  for found in (
    np.concatenate([b['tokens'] for b in whole]),
    np.concatenate([shuffled[i]['tokens'] for i in order]),
  ):
    assert bytes(found[found > 0].astype(np.uint8)).decode() == ''.join(
      t['text'] for t in (texts[i] for i in range(40))
    )


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: pipeline.batches(_train(), 0), 'batch_size=0'),
    (
      lambda: pipeline.batches(_train(), 4, rows=[2, 4]),
      r'rows=\[2, 4\] must be some of the rows 0 to 3',
    ),
    (lambda: pipeline.batches(_train(), 4, start=-1), 'start=-1'),
    (
      lambda: pipeline.padded_batches(_valid(), 3, rows=[]),
      r'rows=\[\] must be some of the rows 0 to 2',
    ),
    (lambda: _train(batch_size=35), r'23 \+ 11 rows .* batch_size=35'),
    (lambda: _train((23, 0)), r'23 \+ 0 rows .* every corpus needs one'),
    (lambda: _train(weights=(1.0,)), r'1 weights \[1.0\] for 2 corpora'),
    (lambda: _train(weights=(1.0, 0.0)), r'weights=\[1.0, 0.0\] must be positive'),
    (lambda: _train(seed=-1), 'seed=-1'),
    (lambda: _valid((0, 0)), 'no row of seq_len=3'),
    (lambda: _valid(limit=-1), 'limit=-1'),
  ],
)
def test_what_cannot_work_is_refused_at_the_call(call, message):
  with pytest.raises(ValueError, match=message):
    call()
