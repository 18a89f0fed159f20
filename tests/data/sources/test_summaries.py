"""First sentences of docstrings, and what follows them."""

import types

import pytest

from llm_jax.data.sources import first_sentences, functions, preferences, summaries

FILE = '''
def a():
  """Reads a table from a file that has a header line. The columns are
  named by that line, and a file without one is an error.
  """
def b():
  """Reads a table from a file that has a header line. Another text that follows the
  sentence, which has been seen.
  """
def c():
  """Writes rows to a file, one after the other, as
  they come! What is there already stays as it is, and the rows follow it.
  """
def d():
  """Too short. But what follows it is long enough to be taken for a text of its own."""
def e():
  """Long enough to be a summary of something, I hope. Too short."""
'''


@pytest.fixture
def library(monkeypatch):
  stand_in = types.SimpleNamespace(
    files=['a.py'], read=lambda name: FILE.encode(), fingerprint='files'
  )
  monkeypatch.setattr(summaries.stdlib, 'Source', lambda: stand_in)


def test_a_summary_and_what_follows_it(library):
  source = summaries.Source()
  assert [source[i] for i in range(len(source))] == [
    {
      'text': 'Reads a table from a file that has a header line.',
      'pair': 'The columns are\nnamed by that line, and a file without one is an error.',
    },
    {
      'text': 'Writes rows to a file, one after the other, as they come!',
      'pair': 'What is there already stays as it is, and the rows follow it.',
    },
  ]


def test_what_a_sentence_stands_for(library):
  source, pairs = first_sentences.Source(), summaries.Source()
  assert [source[i] for i in range(len(source))] == [
    {'text': pairs[i]['pair'], 'target': pairs[i]['text']} for i in range(2)
  ]
  assert source.fingerprint != pairs.fingerprint


def test_which_sentence_is_preferred(library):
  source, pairs = preferences.Source(), summaries.Source()
  for index in range(len(source)):
    record = source[index]
    assert record == source[index] and record['chosen'] == pairs[index]['text']
    assert record['prompt'] == pairs[index]['pair']
    assert record['rejected'] in {pairs[i]['text'] for i in range(len(pairs)) if i != index}
  assert source.fingerprint not in (pairs.fingerprint, first_sentences.Source().fingerprint)


def test_candidates(library):
  source, plain = summaries.Source(candidates=2), summaries.Source()
  for index in range(len(source)):
    record = source[index]
    assert record == source[index] and record['text'] == plain[index]['text']
    right = int(record['label'])
    assert record['choices'][right] == plain[index]['pair'] != record['choices'][1 - right]
    assert record['passages'] == record['choices']
    assert record['relevance'] == [int(i == right) for i in range(2)]
  assert source.fingerprint != plain.fingerprint
  for wrong in (1, -1):
    with pytest.raises(ValueError, match=f'config.data.candidates={wrong} must be 0, or at least'):
      summaries.Source(candidates=wrong)


@pytest.mark.slow
def test_those_of_the_standard_library():
  source = summaries.Source(candidates=4)
  assert len(source) > 1500
  texts = [source[i]['text'] for i in range(len(source))]
  assert len(set(texts)) == len(texts)
  places = [int(source[i]['label']) for i in range(400)]
  assert all(60 < places.count(place) < 140 for place in range(4))


def test_pairs_that_are_alike_by_degrees(library):
  plain, source = summaries.Source(), summaries.Source(graded=True)
  assert source.fingerprint != plain.fingerprint and source[0] == source[0]
  for index in range(len(source)):
    record, words = source[index], plain[index]['text'].split()
    left = record['pair'].split()
    there = iter(words)
    assert all(word in there for word in left)  # in their order
    assert record['label'] == len(left) / len(words) and record['text'] == plain[index]['text']
  with pytest.raises(ValueError, match='config.data.candidates=2 leaves no pair to be graded'):
    summaries.Source(candidates=2, graded=True)


CODE = b'''
class A:
  @property
  def first(self):
    """Doc."""
    return [
      1,
    ]

  def second(self):
    return 2

async def third():
  """Doc."""
  def inner():
    """Inner."""
'''


def test_functions_with_docstrings():
  first, third, inner = functions.functions(CODE)
  assert first == 'def first(self):\n  """Doc."""\n  return [\n    1,\n  ]\n'
  assert third.startswith('async def third():\n') and inner == 'def inner():\n  """Inner."""\n'
