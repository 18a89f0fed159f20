import math
import types

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.objectives import mlm, qa
from llm_jax.objectives.qa import CANDIDATE, END, START

RNG = np.random.default_rng(0)
TOKENIZER = byte.create()


def record(question, context, *answers, **further):
  answers = [{'text': text, 'answer_start': context.index(text)} for text in answers]
  return {'question': question, 'context': context, 'answers': answers} | further


ANN = record('who?', 'Ann sat in Ur', 'Ann')
UR = record('where?', 'Ann sat in Ur', 'Ur', 'in Ur')
NONE = record('when?', 'Ann sat in Ur')


def memory(*records):
  return Memory(records, qa.Objective.encode, TOKENIZER)


def made(**options):
  return qa.Objective(TOKENIZER, **options)


def rows_of(*records, seq_len=32, **options):
  return made(**options).rows(memory(*records), seq_len)


def text_of(tokens):
  return bytes((np.asarray(tokens) - 7).tolist()).decode()


def test_a_row_of_one_question():
  row = rows_of(ANN, packing='none').example(0, RNG)
  assert row['tokens'].tolist()[:21] == [
    2, *(b + 7 for b in b'who?'), 3, *(b + 7 for b in b'Ann sat in Ur'), 3, 0
  ]  # fmt: skip
  assert row['token_types'].tolist() == [0] * 6 + [1] * 14 + [0] * 12
  wanted = np.zeros(32, int)
  wanted[[0, *range(6, 19)]] = CANDIDATE
  wanted[6] |= START
  wanted[8] |= END
  assert row['span'].tolist() == wanted.tolist() and row['span_weight'].tolist() == [1]


def test_windows_overlap_and_those_without_the_answer_say_so():
  rows = rows_of(UR, seq_len=18, stride=2, packing='none')
  windows = [next(iter(rows.windows(index))) for index in range(len(rows))]
  assert sorted((w.start, w.stop) for w in windows) == [(0, 9), (2, 11), (4, 13)]
  assert rows.parts(0) == 3 and rows.texts(0) == [0]
  for index, window in enumerate(windows):
    row = rows.example(index, RNG)
    size = window.stop - window.start
    shown = text_of(row['tokens'][window.context : window.context + size])
    assert shown == UR['context'][window.start : window.stop]
    first, last = (int(np.flatnonzero(row['span'] & bit)[0]) for bit in (START, END))
    whole = window.stop == 13
    assert (first, last) == ((window.context + 7, window.context + 8) if whole else (0, 0))
  # As many tokens lie between the beginnings of windows as the windows have, if there are fewer.
  wide = rows_of(UR, seq_len=18, stride=100, packing='none')
  assert [(w.start, w.stop) for i in range(len(wide)) for w in wide.windows(i)] in (
    [(0, 9), (9, 13)],
    [(9, 13), (0, 9)],
  )


def test_several_windows_share_a_row():
  rows = rows_of(ANN, UR, NONE, seq_len=64)
  assert len(rows) == 1 and sorted(rows.texts(0)) == [0, 1, 2]
  row = rows.example(0, RNG)
  assert row['span_weight'].tolist() == [1, 1, 1, 0]
  for slot, window in enumerate(rows.windows(0)):
    inside = row['segments'] == slot + 1
    (first,), (last,) = (np.flatnonzero(inside & (row['span'] & bit > 0)) for bit in (START, END))
    spelled = '' if first == window.first else text_of(row['tokens'][first : last + 1])
    assert spelled == ['Ann', 'Ur', ''][window.text]


def test_what_is_cut_or_unread_is_said(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'warning', lambda message, *values: lines.append(message % values))
  spaces = types.SimpleNamespace(
    offsets=lambda text: (np.array([9, 9]), np.array([[0, 3], [7, 13]])),
    encode=TOKENIZER.encode,
    vocab_size=TOKENIZER.vocab_size,
  )
  unread = Memory([record('who?', 'Ann sat in Ur', 'sat')], qa.Objective.encode, spaces)
  rows = made(max_question=3, packing='none').rows(unread, 32)
  assert rows.cut == 1 and text_of(rows.example(0, RNG)['tokens'][1:4]) == 'who'
  assert '1 of 1 questions are longer than objective.max_question=3' in lines[0]
  assert 'spelled by no token and are learned as none, the first: document 0' in lines[1]


@pytest.mark.parametrize(
  ('answers', 'message'),
  [
    (
      [{'text': 'Bo', 'answer_start': 4}],
      "'Bo' is not in its context, which has 'sa' at character 4",
    ),
    ([{'text': '', 'answer_start': 0}], "field 'answers' holds"),
    ([{'text': 'Ann'}], "field 'answers' holds"),
    (['Ann'], "field 'answers' holds 'Ann'"),
    ('Ann', "field 'answers' is 'Ann'; it must be a list"),
    ({'text': ['Ann'], 'answer_start': []}, 'lists of equal lengths'),
  ],
)
def test_wrong_answers_are_named(answers, message):
  with pytest.raises(ValueError, match=message):
    qa.Objective.encode(ANN | {'answers': answers}, TOKENIZER)


def test_answers_that_stand_elsewhere_are_taken_from_the_nearest_place(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'warning', lambda message, *values: lines.append(message % values))
  ends = {'text': ['a', 'a', 'a'], 'answer_start': [4, 9, -1]}
  encoded = qa.Objective.encode(
    {'question': '?', 'context': 'a bab cab', 'answers': ends}, TOKENIZER
  )
  assert encoded['answers'] == [('a', 3), ('a', 7), ('a', 0)] and encoded['moved'] == 3
  assert 'moved' not in qa.Objective.encode(ANN, TOKENIZER)
  wrong = {'answers': [{'text': 'Ur', 'answer_start': 10}]}
  assert rows_of(ANN, UR | wrong).given[1] == [['Ur', 11]]
  assert (
    'answers of 1 questions do not stand where they say' in lines[-1] and 'document 1' in lines[-1]
  )


def test_answers_come_in_both_forms_of_json():
  lists = {'text': ['Ann', 'Ur'], 'answer_start': [0, 11]}
  encoded = qa.Objective.encode(ANN | {'answers': lists}, TOKENIZER)
  assert encoded['answers'] == [('Ann', 0), ('Ur', 11)]
  assert 'answers' not in qa.Objective.encode({'question': '?', 'context': 'x'}, TOKENIZER)
  with pytest.raises(ValueError, match="field 'context' is None"):
    qa.Objective.encode({'question': 'who?'}, TOKENIZER)


def test_options_that_are_not_possible():
  for options, message in (
    (dict(stride=0), 'objective.stride=0'),
    (dict(dropout=1.0), 'objective.dropout=1.0'),
    (dict(threshold=math.inf), 'objective.threshold=inf'),
    (dict(packing='windows'), "objective.packing='windows'"),
  ):
    with pytest.raises(ValueError, match=message):
      made(**options)
  with pytest.raises(ValueError, match='seq_len=9 leaves no room for a context'):
    rows_of(UR, seq_len=9)
  with pytest.raises(ValueError, match='a causal model has not seen'):
    made().check(types.SimpleNamespace(causal=True))
  with pytest.raises(ValueError, match='document 0: no answers; give them'):
    rows_of({'question': '?', 'context': 'x'})
  assert rows_of({'question': '?', 'context': 'x'}, unlabelled='ignore').answers(0) is None
  masked = mlm.Objective(TOKENIZER).rows(
    Memory([{'text': 'x'}], mlm.Objective.encode, TOKENIZER), 16
  )
  with pytest.raises(ValueError, match="in a mix, set rows='qa'"):
    made().transform(masked.example(0, RNG), RNG)


def test_the_data_say_whether_there_is_always_an_answer():
  derive = lambda *records, **options: qa.Objective.derive(options, [memory(*records)])
  assert derive(ANN, UR) == {'no_answer': False} and derive(ANN, NONE) == {'no_answer': True}
  assert derive(ANN, no_answer=True) == {}
  with pytest.raises(ValueError, match='needs answers and this corpus has none'):
    derive({'question': '?', 'context': 'x'})
  for options in ({}, {'no_answer': True}):
    samples = memory(*qa.Objective.sample_records(options))
    assert qa.Objective.derive({}, [samples]) == {'no_answer': bool(options)}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_best_spans_are_those_of_all(data):
  numbers = st.integers(-9, 9).map(float)
  starts = np.array(data.draw(st.lists(numbers, max_size=7)))
  ends = np.array(data.draw(st.lists(numbers, min_size=len(starts), max_size=len(starts))))
  most, count = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
  every = [
    (starts[i] + ends[j], i, j)
    for i in range(len(starts))
    for j in range(i, min(i + most, len(starts)))
  ]
  wanted = sorted(every, key=lambda span: (-span[0], span[1], span[2]))[:count]
  assert qa.best_spans(starts, ends, most, count) == wanted


def scored(rows, index, marks, nothing):
  """Scores of a row's tokens: 0 but where `marks` (character of the context -> start, end) says."""
  starts, ends = np.full(rows.seq_len, -50.0), np.full(rows.seq_len, -50.0)
  for window in rows.windows(index):
    starts[window.first] = ends[window.first] = nothing / 2
    for character, (start, end) in marks.items():
      if window.start <= character < window.stop:
        position = window.context + character - window.start
        starts[position], ends[position] = start, end
  return {'starts': starts, 'ends': ends}


def answer_of(objective, rows, marks, nothing):
  parts = [
    part
    for index in range(len(rows))
    for part in objective.answers(scored(rows, index, marks, nothing), rows, index)
  ]
  return objective.joined(parts)


MARKS = {0: (3.0, -50.0), 2: (-50.0, 2.0), 11: (1.0, -50.0), 12: (-50.0, 2.5)}


def test_an_answer_is_the_best_of_all_windows():
  objective = made(stride=4, packing='none', n_best=3)
  rows = objective.layout(memory(ANN), 18)
  assert rows.parts(0) > 1
  answer = answer_of(objective, rows, MARKS, nothing=99.0)
  assert (answer['answer'], answer['start'], answer['end']) == ('Ann', 0, 3)
  assert [found['text'] for found in answer['answers']][:2] == ['Ann', 'Ur']
  weights = np.exp([5.0, 3.5])
  assert answer['probability'] == pytest.approx(weights[0] / weights.sum())
  assert answer['margin'] == pytest.approx((weights[0] - weights[1]) / weights.sum())
  assert answer['entropy'] > 0
  assert 'no_answer_probability' not in answer  # there always is one


def test_no_answer_is_said_above_a_threshold():
  objective = made(stride=4, packing='none', no_answer=True)
  rows = objective.layout(memory(ANN), 18)
  answer = answer_of(objective, rows, MARKS, nothing=5.5)
  assert answer['answer'] == '' and 'start' not in answer
  assert answer['no_answer_score'] == pytest.approx(0.5)
  assert answer['probability'] == answer['no_answer_probability'] > 0.5
  assert answer['answers'][0]['text'] == 'Ann'
  objective.calibrate({'loss': 1.0})
  assert answer_of(objective, rows, MARKS, nothing=5.5)['answer'] == ''
  objective.calibrate({qa.THRESHOLD: 0.75})
  assert answer_of(objective, rows, MARKS, nothing=5.5)['answer'] == 'Ann'
  fixed = made(no_answer=True, threshold=0.25)
  fixed.calibrate({qa.THRESHOLD: 9.0})
  assert fixed.threshold == 0.25


def test_a_context_without_a_token_has_no_answer():
  objective = made(no_answer=True, packing='none')
  rows = objective.layout(memory({'question': '?', 'context': ''}), 18)
  answer = answer_of(objective, rows, {}, nothing=1.0)
  assert answer['answer'] == '' and answer['answers'] == [] and answer['probability'] == 1.0
