import numpy as np
import pytest
from absl import logging

from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.models import decoder, encoder
from llm_jax.objectives import contrast, mix, mlm

RNG = np.random.default_rng(0)
TOKENIZER = byte.create()


def memory(*records):
  return Memory(records, contrast.Objective.encode, TOKENIZER)


def pair(text, other, **further):
  return {'text': text, 'pair': other} | further


def batch_of(objective, *records, seq_len=64):
  rows = objective.rows(memory(*records), seq_len)
  examples = [rows.example(i, RNG) for i in range(len(rows))]
  return rows, {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def compared(objective, batch, seed=0, dim=6):
  """Random vectors, and what the objective says of them."""
  shape = (*batch['group'].shape, dim)
  x = np.random.default_rng(seed).normal(size=shape)
  found = objective.compare({'vectors': x.astype(np.float32)}, batch)
  return x, {name: (float(total), float(weight)) for name, (total, weight) in found.items()}


def places(rows, batch):
  """(document, member) -> (row, slot)."""
  found = {}
  for row in range(len(rows)):
    for slot, document in enumerate(rows.texts(row)):
      found[document, int(batch['member'][row, slot])] = row, slot
  return found


def by_hand(x, at, query, candidates, temperature=0.05):
  """The cross-entropy of the first candidate, in float64."""
  unit = lambda key: x[at[key]] / np.linalg.norm(x[at[key]])
  logits = np.array([unit(query) @ unit(key) / temperature for key in candidates])
  return np.log(np.exp(logits).sum()) - logits[0], logits[0] >= logits.max()


THREE = (
  pair('ab', 'cd', negatives=['ef', 'gh']),
  pair('ij', 'kl', negatives='mn'),
  pair('op', 'qr'),
)


def test_a_text_picks_its_pair_among_all_of_the_batch():
  objective = contrast.Objective(TOKENIZER)
  rows, batch = batch_of(objective, *THREE, seq_len=24)
  assert len(rows) > 1  # so that others stand in other rows
  x, found = compared(objective, batch)
  at, total, right = places(rows, batch), 0, 0
  everyone = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]
  for document in range(3):
    others = [key for key in everyone if key != (document, 1)]
    loss, first = by_hand(x, at, (document, 0), [(document, 1), *others])
    total, right = total + loss, right + first
  assert found['contrast'] == (pytest.approx(total, rel=1e-5), 3)
  assert found['contrast_accuracy'] == (right, 3)


def test_both_directions_and_the_first_numbers_of_vectors():
  objective = contrast.Objective(TOKENIZER, symmetric=True, dims=(2, 3), temperature=0.5)
  rows, batch = batch_of(objective, *THREE)
  x, found = compared(objective, batch)
  at, losses = places(rows, batch), []
  everyone = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]
  for size in (2, 3, 6):
    for document in range(3):
      others = [key for key in everyone if key != (document, 1)]
      there, _ = by_hand(x[..., :size], at, (document, 0), [(document, 1), *others], 0.5)
      texts = [(other, 0) for other in range(3) if other != document]
      back, _ = by_hand(x[..., :size], at, (document, 1), [(document, 0), *texts], 0.5)
      losses.append((there + back) / 2)
  assert found['contrast'] == (pytest.approx(3 * np.mean(losses), rel=1e-5), 3)


def test_equal_texts_are_no_negatives_of_one_another():
  objective = contrast.Objective(TOKENIZER)
  records = (
    pair('ab', 'cd'),
    pair('ab', 'xy'),  # the same text: its pair is one of the first's too
    pair('ij', 'cd'),  # the same pair
    pair('op', 'ab'),  # a pair that is the first's own text
    pair('qr', 'st', negatives=['cd']),
  )
  rows, batch = batch_of(objective, *records)
  x, found = compared(objective, batch, seed=3)
  at = places(rows, batch)
  candidates = {
    0: [(0, 1), (4, 1)],
    1: [(1, 1), (4, 1), (4, 2)],
    2: [(2, 1), (1, 1), (3, 1), (4, 1)],
    3: [(3, 1), (0, 1), (1, 1), (2, 1), (4, 1), (4, 2)],
    4: [(4, 1), (0, 1), (1, 1), (2, 1), (3, 1), (4, 2)],
  }
  total = sum(by_hand(x, at, (i, 0), chosen)[0] for i, chosen in candidates.items())
  assert found['contrast'] == (pytest.approx(total, rel=1e-5), 5)
  keys = batch['text_key']
  unmarked = batch | {'text_key': np.arange(keys.size).reshape(keys.shape)}
  assert compared(objective, unmarked, seed=3)[1]['contrast'][0] > total + 0.01


def test_a_text_alone_is_compared_with_itself():
  objective = contrast.Objective(TOKENIZER)
  rows, batch = batch_of(objective, {'text': 'ab'}, {'text': 'cde'})
  assert sorted(rows.texts(0)) == [0, 0, 1, 1]
  assert (batch['text_key'][0, 0] == batch['text_key'][0, 1]).all()
  x, found = compared(objective, batch)
  at = places(rows, batch)
  total = sum(by_hand(x, at, (i, 0), [(i, 1), (1 - i, 1)])[0] for i in range(2))
  assert found['contrast'] == (pytest.approx(total, rel=1e-5), 2)
  assert objective.layout(memory({'text': 'ab'}), 64).texts(0) == [0]
  mixed = memory({'text': 'ab'}, pair('cd', 'e', negatives='f'), pair('gh', ''))
  assert sorted(objective.layout(mixed, 64).texts(0)) == [0, 1, 1, 2]  # to be answered


def test_cosines_learn_how_alike_texts_are():
  objective = contrast.Objective(TOKENIZER, loss='cosine')
  rows, batch = batch_of(objective, pair('ab', 'cd', label=0.25), pair('ef', 'gh', label='1'))
  x, found = compared(objective, batch)
  at, total = places(rows, batch), 0
  for document, label in ((0, 0.25), (1, 1)):
    a, b = x[at[document, 0]], x[at[document, 1]]
    total += (a @ b / np.linalg.norm(a) / np.linalg.norm(b) - label) ** 2
  assert found == {'contrast': (pytest.approx(total, rel=1e-5), 2)}
  assert rows.label(1) == 1 and objective.evaluators == ('loss', 'similarity')
  lenient = contrast.Objective(TOKENIZER, loss='cosine', unlabelled='ignore')
  _, batch = batch_of(lenient, pair('ab', 'cd', label=0.25), pair('ef', 'gh'))
  assert batch['label_weight'].sum() == 1


def test_texts_stand_as_embedding_has_them():
  _, batch = batch_of(contrast.Objective(TOKENIZER), pair('ab', 'c'))
  a, b, c = (ord(letter) + 7 for letter in 'abc')
  assert batch['tokens'][0, :7].tolist() == [2, a, b, 3, 2, c, 3]
  _, batch = batch_of(contrast.Objective(TOKENIZER, pool='last'), pair('ab', 'c'))
  assert batch['tokens'][0, :5].tolist() == [5, a, b, 5, c]
  assert batch['text_lasts'][0, :2].tolist() == [2, 4]


def test_an_answer_is_the_cosine_of_a_pair():
  objective = contrast.Objective(TOKENIZER)
  vectors = [{'vector': np.array([0.6, 0.8])}, {'vector': np.array([1.0, 0])}]
  assert objective.joined(vectors) == {'similarity': pytest.approx(0.6)}
  assert objective.joined(vectors[:1]) == {'similarity': None}


def test_beside_masked_language_modelling():
  parts = {'contrast': contrast.Objective(TOKENIZER), 'mlm': mlm.Objective(TOKENIZER)}
  both = mix.Objective(parts, 'contrast', {'contrast': 1.0, 'mlm': 0.5})
  assert both.compares and both.embedding_pool == 'mean'
  rows = both.rows(memory(*THREE), 64)
  example = both.transform(rows.example(0, RNG), RNG)
  assert {'text_key', 'mask_targets'} <= set(example)
  with pytest.raises(ValueError, match="set rows='contrast'"):
    parts['contrast'].transform({'tokens': np.zeros(3)}, RNG)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(loss='triplet'), "objective.loss='triplet' must be one of softmax, cosine"),
    (dict(pool='max'), "objective.pool='max' must be one of"),
    (dict(temperature=0.0), 'objective.temperature=0.0 must be a number above 0'),
    (dict(loss='cosine', symmetric=True), "symmetric=True needs loss='softmax'"),
    (dict(dims=(4, 4)), r'objective.dims=\(4, 4\) must be different numbers above 0'),
  ],
)
def test_wrong_options(options, message):
  with pytest.raises(ValueError, match=message):
    contrast.Objective(TOKENIZER, **options)


def test_models_that_do_not_suit():
  shape = dict(vocab_size=263, dim=8, layers=1, heads=2, mlp_dim=8, max_len=32)
  with pytest.raises(ValueError, match="use 'last'"):
    contrast.Objective(TOKENIZER).check(decoder.Model(**shape))
  with pytest.raises(ValueError, match="an encoder is read by 'mean' or 'cls'"):
    contrast.Objective(TOKENIZER, pool='last').check(encoder.Model(**shape))
  with pytest.raises(ValueError, match=r'dims=\(8,\) must be below 8'):
    contrast.Objective(TOKENIZER, dims=(8,)).check(encoder.Model(**shape))


def test_records_that_cannot_be():
  with pytest.raises(ValueError, match="field 'negatives' is 3; it must be a text or a list"):
    memory(pair('a', 'b', negatives=3))
  with pytest.raises(ValueError, match='records have negatives and no pair'):
    contrast.Objective(TOKENIZER).rows(memory({'text': 'a', 'negatives': 'b'}), 32)
  cosine = contrast.Objective(TOKENIZER, loss='cosine')
  with pytest.raises(ValueError, match='objective contrast needs labels'):
    cosine.rows(memory(pair('a', 'b')), 32)
  with pytest.raises(ValueError, match="document 0 has the label 'much'; it must be a finite"):
    cosine.rows(memory(pair('a', 'b', label='much')), 32)
  with pytest.raises(ValueError, match='config.data.pair names the field'):
    cosine.rows(memory({'text': 'a', 'label': 1.0}), 32)


def test_what_rows_hold_is_said(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'info', lambda message, *values: lines.append(message % values))
  contrast.Objective(TOKENIZER).rows(memory({'text': 'ab'}, {'text': 'cd'}), 64)
  assert lines[0].startswith('contrast: 2 groups of 4 texts in 1 rows of 64 tokens')
  assert 'each is compared with itself' in lines[1]
