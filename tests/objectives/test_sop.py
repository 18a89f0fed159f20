import numpy as np
import pytest

from llm_jax.data.documents import Memory
from llm_jax.objectives import sop


def test_label_tells_whether_the_texts_are_swapped(small):
  documents = small.Documents([np.arange(100, 100 + n) for n in (200, 61)])
  rows = sop.Objective(small.Tokenizer()).rows(documents, 23)
  labels = []
  for seed in range(60):
    seen = []
    for i in range(len(rows)):
      row = rows.example(i, np.random.default_rng((seed, i)))
      used, kinds = row['tokens'][row['segments'] > 0], row['token_types'][row['segments'] > 0]
      first, second = used[kinds == 0][1:-1], used[kinds == 1][:-1]
      seen += [*first, *second]
      if row['sop_weight']:
        labels.append(int(row['sop_label']))
        assert (first[0] == second[-1] + 1) if labels[-1] else (second[0] == first[-1] + 1)
      else:
        assert len(first) == 1 and not len(second) and row['sop_label'] == 0
    assert sorted(seen) == sorted(np.concatenate(documents.texts))
  assert abs(np.mean(labels) - 0.5) < 5 * 0.5 / np.sqrt(len(labels))


def test_loss_equals_brute_force(small):
  objective, net = sop.Objective(small.Tokenizer()), small.network(sop=2)
  hidden = np.random.default_rng(2).normal(size=(3, 7, 6)).astype(np.float32)
  batch = {
    'sop_label': np.array([0, 1, 1], np.int32),
    'sop_weight': np.array([1, 1, 0], np.float32),
  }
  metrics = objective.loss(net, small.read(objective, hidden, batch), batch)
  logits = hidden[:, 0].astype(np.float64) @ net.matrices['sop']
  np.testing.assert_allclose(
    metrics['sop'][0], small.cross_entropy(logits, batch['sop_label'])[:2].sum(), rtol=1e-5
  )
  assert [float(x) for x in metrics['sop_accuracy']] == [
    (logits.argmax(-1) == batch['sop_label'])[:2].sum(),
    2,
  ]
  assert (
    objective.terms == {'sop': 1.0}
    and objective.targets(batch) is None
    and objective.summary({'sop': 1.0}) == {}
  )


def test_made_up_records_give_rows_like_real_ones(small):
  objective, rng = sop.Objective(small.Tokenizer()), np.random.default_rng(0)
  memory = Memory(objective.sample_records({}), objective.encode, small.Tokenizer())
  row = objective.rows(memory, 40).example(0, rng)
  real = objective.rows(small.random_documents([90, 7]), 40).example(0, rng)
  shapes = lambda example: {key: (a.shape, a.dtype) for key, a in example.items()}
  assert shapes(row) == shapes(real) and row['sop_weight'] == 1
  assert objective.flops(None, {}) == 0  # heads that read one position are left out


def test_refuses(small):
  with pytest.raises(ValueError, match="rows='sop'"):
    sop.Objective(small.Tokenizer()).transform(
      {'tokens': np.zeros(4, np.int32)}, np.random.default_rng(0)
    )
  with pytest.raises(ValueError, match='short_seq_rate=-1.0'):
    sop.Objective(small.Tokenizer(), short_seq_rate=-1.0)
