import types

import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.evaluators import entities
from llm_jax.objectives import tag
from llm_jax.objectives.shared import tags as tags_lib

TOKENIZER = byte.create()
RIGHT = [['B-PER', 'I-PER', 'O', 'B-LOC'], ['O', 'B-PER'], ['B-LOC', 'I-LOC']]
SAID = [['B-PER', 'I-PER', 'O', 'I-LOC'], ['B-LOC', 'O'], ['B-LOC', 'O']]


def test_entities_by_hand():
  """Right: two of PER, two of LOC. Said: PER; LOC, which an I begins only by default; LOC; LOC."""
  numbers, report = entities.scores(RIGHT, SAID, 'IOB2')
  assert numbers == pytest.approx(
    {
      'word_accuracy': 4 / 8,
      'precision': 2 / 4,
      'recall': 2 / 4,
      'f1': 0.5,
      'strict_precision': 1 / 3,
      'strict_recall': 1 / 4,
      'strict_f1': 2 / 7,
    }
  )
  assert 'conlleval' in report and 'strictly by IOB2' in report and 'word accuracy 0.5000' in report
  assert report.count(' PER ') == report.count(' LOC ') == 2
  perfect, _ = entities.scores(RIGHT, RIGHT, 'IOB2')
  assert set(perfect.values()) == {1.0}


def test_bilou_is_read_in_both_modes():
  right = [['B-x', 'L-x', 'U-x', 'U-x', 'O'], ['U-y']]
  numbers, _ = entities.scores(right, right, 'BILOU')
  assert set(numbers.values()) == {1.0}
  said = [['B-x', 'L-x', 'U-x', 'O', 'O'], ['U-x']]
  numbers, _ = entities.scores(right, said, 'BILOU')
  assert numbers['f1'] == numbers['strict_f1'] == pytest.approx(2 * 2 / (4 + 3))


def test_no_entities_at_all():
  numbers, report = entities.scores([['O', 'O']], [['O', 'O']], 'IOB2')
  assert numbers['word_accuracy'] == 1.0 and numbers['f1'] == numbers['strict_f1'] == 0.0
  assert report.count('none, given or answered') == 2


@pytest.mark.parametrize('scheme', ['IOB1', 'IOB2', 'IOBES', 'BILOU'])
def test_the_strict_mode_is_exact_matching_of_spans(scheme):
  """For tags that keep their scheme: by sets of (text, type, first, stop)."""
  rng = np.random.default_rng(0)
  names = ['O', *(f'{letter}-{kind}' for letter in tags_lib.SCHEMES[scheme] for kind in 'xy')]

  def drawn():
    tags = ['O']
    while len(tags) < 9:
      tags.append(str(rng.choice([t for t in names if tags_lib.allowed(scheme, tags[-1], t)])))
    while not tags_lib.allowed(scheme, tags[-1], 'O'):
      tags.append(
        next(t for t in names[1:] if t[0] in 'EL' and tags_lib.allowed(scheme, tags[-1], t))
      )
    return [*tags, *['O'] * (12 - len(tags))]

  right, said = [drawn() for _ in range(30)], [drawn() for _ in range(30)]
  wanted, found = (
    {(i, *entity) for i, tags in enumerate(texts) for entity in tags_lib.entities(tags)}
    for texts in (right, said)
  )
  numbers, _ = entities.scores(right, said, scheme)
  f1 = 2 * len(wanted & found) / (len(wanted) + len(found))
  assert numbers['strict_f1'] == pytest.approx(f1) and 0 < f1 < 0.5
  assert numbers['f1'] == pytest.approx(f1)


def test_tags_without_a_scheme():
  numbers, report = entities.scores([['N', 'V', 'N'], ['V']], [['N', 'V', 'V'], ['V']], 'none')
  assert numbers == pytest.approx({'word_accuracy': 3 / 4, 'macro_f1': (2 / 3 + 4 / 5) / 2})
  assert ' N ' in report and 'macro avg' in report


def validation_of(objective, records, seq_len, said):
  """Two rows at a time; `said` makes the tags of a row from it."""
  rows = objective.rows(Memory(records, tag.Objective.encoding({}), TOKENIZER), seq_len)
  examples = [rows.example(i, np.random.default_rng(0)) for i in range(len(rows))]
  examples += [{k: np.zeros_like(v) for k, v in examples[0].items()}] * (len(rows) % 2)
  batches = [
    {k: np.stack([e[k] for e in examples[i : i + 2]]) for k in examples[0]}
    for i in range(0, len(examples), 2)
  ]
  return contracts.Validation(
    objective=objective,
    terms={},
    tokenizer=TOKENIZER,
    batches=lambda: iter(batches),
    losses=None,
    predict=lambda batch, keys: {'tags': said(batch)},
    rows=[(rows, index) for index in range(len(rows))],
  )


def test_every_word_counts_also_one_that_is_not_read():
  records = [
    {'words': ['aa', 'bb', 'cc'], 'tags': ['B-x', 'I-x', 'O']},
    {'words': ['dddd', 'ee', '', 'f', 'gg'], 'tags': ['O', 'B-x', 'I-x', 'O', 'B-x']},
    {'words': ['h'], 'tags': ['O']},
    {'words': ['ignored']},
  ]
  objective = tag.Objective(TOKENIZER, ('B-x', 'I-x', 'O'), unlabelled='ignore', packing='none')
  validation = validation_of(objective, records, 12, lambda batch: batch['tag'])
  numbers, _ = entities.Evaluator().evaluate(validation)
  # All that is read is right; '' and 'gg', which is cut off, are answered by O.
  assert numbers['word_accuracy'] == pytest.approx(7 / 9)
  assert numbers['recall'] == pytest.approx(1 / 3) and numbers['precision'] == pytest.approx(1 / 2)
  wrong = validation_of(objective, records, 12, lambda batch: (batch['tag'] + 1) % 3)
  assert entities.Evaluator().evaluate(wrong)[0]['word_accuracy'] == 0
  packed = tag.Objective(TOKENIZER, ('B-x', 'I-x', 'O'), unlabelled='ignore')
  again = validation_of(packed, records, 12, lambda batch: batch['tag'])
  assert entities.Evaluator().evaluate(again)[0] == numbers


def test_groups_of_texts_are_scored_apart():
  words = lambda *tags: {'words': ['aa'] * len(tags), 'tags': list(tags)}
  records = [words('B-x', 'O')] * 12 + [words('O', 'B-x')] * 11 + [words('O')] * 3
  objective = tag.Objective(TOKENIZER, ('B-x', 'O'), packing='none')
  said = lambda batch: np.where(np.arange(12) == 1, 0, 1) * np.ones_like(batch['tag'])
  validation = validation_of(objective, records, 12, said)
  groups = ['begin'] * 12 + ['end'] * 11 + ['rare'] * 3
  order = [rows.texts(index)[0] for rows, index in validation.rows]
  validation = validation._replace(slices={'kind': [[groups[text]] for text in order]})
  numbers, report = entities.Evaluator().evaluate(validation)
  assert numbers['kind_word_accuracy_gap'] == numbers['kind_f1_gap'] == 1.0
  assert 'end      11 texts' in report and 'fewer than 10 texts' in report
  assert np.isnan(entities._by_group('k', ['a'], [['O']], [['O']], 'IOB2')[0]['k_f1_gap'])


def test_refusals():
  validation = types.SimpleNamespace(objective=types.SimpleNamespace(predictor=None))
  with pytest.raises(ValueError, match="'entities' scores tags of words"):
    entities.Evaluator().evaluate(validation)
  objective = tag.Objective(TOKENIZER, ('O', 'B-x'), unlabelled='ignore')
  nothing = validation_of(objective, [{'words': ['a']}], 8, lambda batch: batch['tag'])
  with pytest.raises(ValueError, match='no word of the validation set has a tag'):
    entities.Evaluator().evaluate(nothing)
