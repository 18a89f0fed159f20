import numpy as np
import pytest

from llm_jax.data.documents import Memory
from llm_jax.objectives import nsp


def numbered(small, lengths):
  """Documents whose token k is 1000 * (document + 1) + k, so that each token tells where it comes
  from.
  """
  return small.Documents([1000 * (d + 1) + np.arange(n) for d, n in enumerate(lengths)])


def texts(row):
  """The two texts of a row, by its token types."""
  ids = row['tokens'][row['segments'] > 0]
  kinds = row['token_types'][row['segments'] > 0]
  first, second = ids[kinds == 0], ids[kinds == 1]
  assert first[0] == 2 and first[-1] == 3 and second[-1] == 3
  return first[1:-1], second[:-1]


def test_label_0_is_consecutive_and_label_1_is_another_document(small):
  documents = numbered(small, [200, 90, 62, 45, 100, 20, 0, 300])
  rows = nsp.Objective(small.Tokenizer()).rows(documents, 23)
  labels, room = [], 0
  for seed in range(40):
    for i in range(len(rows)):
      row = rows.example(i, np.random.default_rng((seed, i)))
      first, second = texts(row)
      assert len(first) and len(second) and row['nsp_weight'] == 1
      labels.append(int(row['nsp_label']))
      if labels[-1]:
        assert second[0] // 1000 != first[0] // 1000
        room += len(first) + len(second) == 20
      else:
        assert second[0] == first[-1] + 1
      np.testing.assert_array_equal(np.diff(second), 1)
      np.testing.assert_array_equal(
        row['positions'][row['segments'] > 0], np.arange(len(first) + len(second) + 3)
      )
      assert set(row['segments'].tolist()) <= {0, 1}
  n = len(labels)
  assert abs(np.mean(labels) - 0.5) < 5 * 0.5 / np.sqrt(n)
  assert room > 0.6 * sum(labels)  # drawn texts are as long as the true ones, most of the time


def test_chunks_cover_every_token_once_and_draw_evenly(small):
  documents = numbered(small, [41, 0, 20, 21])
  chunks = nsp.pairs.Chunks(documents, 20)
  assert len(chunks) == 3 + 1 + 2
  np.testing.assert_array_equal(
    np.concatenate([chunks[i] for i in range(6)]), np.concatenate(documents.texts)
  )
  rng = np.random.default_rng(0)
  drawn = np.bincount(
    [chunks.other(3, rng) for _ in range(5000)], minlength=6
  )  # chunk 3 is the whole third document
  assert drawn[3] == 0 and abs(drawn[[0, 1, 2, 4, 5]] - 1000).max() < 5 * np.sqrt(800)


def test_a_chunk_of_one_token_counts_for_nothing(small):
  rows = nsp.Objective(small.Tokenizer()).rows(numbered(small, [21, 9]), 23)
  row = rows.example(1, np.random.default_rng(0))
  assert (
    row['tokens'][:5].tolist() == [2, 1020, 3, 3, 0]
    and row['nsp_weight'] == 0
    and row['nsp_label'] == 0
  )
  assert rows.example(0, np.random.default_rng(0))['nsp_weight'] == 1


def test_short_seq_rate(small):
  documents = numbered(small, [20] * 10)
  used = lambda rate: np.mean(
    [
      np.sum(
        nsp.Objective(small.Tokenizer(), short_seq_rate=rate)
        .rows(documents, 23)
        .example(i % 10, np.random.default_rng(i))['segments']
      )
      for i in range(400)
    ]
  )
  assert used(0.0) == 23
  assert abs(used(1.0) - (3 + 11)) < 1.5  # lengths even from 2 to 20, mean 11


def test_loss_equals_brute_force(small):
  objective, net = nsp.Objective(small.Tokenizer()), small.network(nsp=2)
  hidden = np.random.default_rng(2).normal(size=(4, 7, 6)).astype(np.float32)
  batch = {
    'nsp_label': np.array([0, 1, 1, 0], np.int32),
    'nsp_weight': np.array([1, 1, 0, 1], np.float32),
  }
  metrics = objective.loss(net, small.read(objective, hidden, batch), batch)
  logits = hidden[:, 0].astype(np.float64) @ net.matrices['nsp']
  np.testing.assert_allclose(
    metrics['nsp'][0], small.cross_entropy(logits, batch['nsp_label'])[[0, 1, 3]].sum(), rtol=1e-5
  )
  assert [float(x) for x in metrics['nsp_accuracy']] == [
    (logits.argmax(-1) == batch['nsp_label'])[[0, 1, 3]].sum(),
    3,
  ]
  assert (
    objective.terms == {'nsp': 1.0}
    and objective.targets(batch) is None
    and objective.summary({'nsp': 1.0}) == {}
  )


def test_made_up_records_give_rows_like_real_ones(small):
  objective, rng = nsp.Objective(small.Tokenizer()), np.random.default_rng(0)
  memory = Memory(objective.sample_records({}), objective.encode, small.Tokenizer())
  row = objective.rows(memory, 40).example(0, rng)
  real = objective.rows(small.random_documents([90, 7]), 40).example(0, rng)
  shapes = lambda example: {key: (a.shape, a.dtype) for key, a in example.items()}
  assert shapes(row) == shapes(real) and row['nsp_weight'] == 1
  assert objective.flops(None, {}) == 0  # heads that read one position are left out


def test_refuses(small):
  objective = nsp.Objective(small.Tokenizer())
  with pytest.raises(ValueError, match='1 document.s. with text'):
    objective.rows(numbered(small, [50, 0]), 23)
  with pytest.raises(ValueError, match='longer seq_len'):
    objective.rows(numbered(small, [50, 50]), 3)
  with pytest.raises(ValueError, match="rows='nsp'"):
    objective.transform({'tokens': np.zeros(4, np.int32)}, np.random.default_rng(0))
  with pytest.raises(ValueError, match='short_seq_rate=2.0'):
    nsp.Objective(small.Tokenizer(), short_seq_rate=2.0)
