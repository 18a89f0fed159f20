"""Templates, verbalizers and demonstrations as ids: those of the filled phrase."""

import re

import numpy as np
import pytest

from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.objectives.shared import demonstrations, templates, verbalizers
from llm_jax.objectives.shared.demonstrations import Demonstrations
from llm_jax.objectives.shared.templates import Template
from llm_jax.objectives.shared.verbalizers import Words

BYTES = byte.create()


class Spaced:
  """Words and signs, each with the space before it, as GPT-2 splits a text."""

  unk_id, mask_id = 0, 1

  def __init__(self):
    self.known = {}

  def encode(self, text):
    parts = re.findall(r' ?\w+| ?[^\w\s]|\s', text)
    return np.array([self.known.setdefault(part, 2 + len(self.known)) for part in parts], np.int32)


SPACED = Spaced()


@pytest.mark.parametrize('tokenizer', [BYTES, SPACED])
@pytest.mark.parametrize(
  ('template', 'phrase'),
  [
    ('{text} It was {mask}.', 'a cat sat It was great.'),
    ('Review: {text} Verdict: {mask}', 'Review: a cat sat Verdict: great'),
    ('{text}? {mask}, {pair}', 'a cat sat? great, it did'),
    ('({mask}) {pair}! {text}', '(great) it did! a cat sat'),
    ('{mask} says {{{text}}}', 'great says {a cat sat}'),
  ],
)
def test_the_ids_are_those_of_the_phrase(tokenizer, template, phrase):
  record = {'text': 'a cat sat', 'pair': 'it did', 'label': 'x'}
  made = Template(template, tokenizer)
  encoded = templates.encoding(template)(record, tokenizer)
  assert encoded['label'] == 'x'
  word = made.word('great')
  ids, gap = made.filled(encoded['tokens'], encoded['pair_tokens'], word)
  assert ids.tolist() == tokenizer.encode(phrase).tolist()
  assert ids[gap : gap + len(word)].tolist() == word.tolist()
  fields = len(encoded['tokens']) + len(word)
  fields += len(encoded['pair_tokens']) if made.paired else 0
  assert made.size == len(ids) - fields
  assert made.last == template.endswith('{mask}')
  assert made.text('text', 'a cat sat').tolist() == encoded['tokens'].tolist()


def test_a_text_behind_nothing_is_read_as_classify_reads_it():
  """So that the two share a token cache, and `--text` names its field."""
  assert templates.encoding('{text} It was {mask}.') is templates.contracts.Objective.encode


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    ('{text} It was.', r"objective.template='\{text\} It was.' has no \{mask\}"),
    ('It was {mask}.', r'has no \{text\}; it is needed'),
    ('{text} {mask} {mask}', r'has \{mask\} 2 times'),
    ('{text} {text} {mask}', r'has \{text\} 2 times'),
    ('{text} {body} {mask}', r'has the field \{body\}; it may have \{text\}, \{pair\}, \{mask\}'),
    ('{text} {maks}', r"has the field \{maks\} \(did you mean 'mask'\?\); it may have"),
    ('{text} {mask:>8}', r'has the field \{mask:>8\}'),
    ('{text} {} {mask}', r'has the field \{\}'),
    ('{text} {mask', r"has no|expected '\}'"),
    ('{text} } {mask}', r"Single '\}'.*; a brace that is no field is written twice"),
  ],
)
def test_templates_that_cannot_be(template, message):
  with pytest.raises(ValueError, match=message):
    templates.parse(template)


def words(given, template='{text} It was {mask}', tokenizer=BYTES):
  return Words(tuple(given), given, Template(template, tokenizer), tokenizer)


def test_words_of_classes():
  found = words({'good': ['ab', 'c'], 'bad': 'xyz'})
  assert found.longest == 4 and found.firsts.tolist() == [0, 2]
  assert [len(ids) for ids in found.ids] == [3, 2, 4]
  assert found.inside_WM.sum(-1).tolist() == [3, 2, 4]
  assert BYTES.decode(found.targets_WM[2]) == ' xyz'
  assert found.words_CK[found.counted_CK].tolist() == [0, 1, 2]
  assert found.counted_CK.tolist() == [[True, True], [True, False]]
  assert found.described() == "good: 'ab' (3), 'c' (2); bad: 'xyz' (4)"
  named = Words(('0', '1'), {}, Template('{text}{mask}', BYTES), BYTES)
  assert [BYTES.decode(ids) for ids in named.ids] == ['0', '1']


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'a': '', 'b': 'x'}, "the word '' of 'a' has no token"),
    ({'a': ['x', ' '], 'b': 'y'}, "the word ' ' of 'a' has no token"),
    ({'a': 'x', 'b': ['y', 'x']}, "'x' of 'b' has the tokens of 'x' of 'a'"),
    ({'a': 'x', 'b': 3}, r"objective.verbalizers\['b'\]=3 must be a word or a list"),
    ({'a': 'x', 'b': []}, r"objective.verbalizers\['b'\]=\[\] must be"),
    ({'a': 'x', 'b': ['y', 4]}, r"objective.verbalizers\['b'\]=\['y', 4\] must be"),
  ],
)
def test_words_that_cannot_be(given, message):
  with pytest.raises(ValueError, match=message):
    words(given)


def test_words_that_the_tokenizer_does_not_know():
  class Knows(byte.Tokenizer):
    """Knows no letter z."""

    def encode(self, text, special=False):
      ids = super().encode(text)
      return np.where(ids == 7 + ord('z'), self.unk_id, ids)

  with pytest.raises(ValueError, match="knows no part of the word 'zz' of 'b'"):
    words({'a': 'x', 'b': 'zz'}, '{text}{mask}', Knows())
  assert words({'a': 'x', 'b': 'yz'}, '{text}{mask}', Knows()).partly_unknown() == ['yz']


@pytest.mark.parametrize(
  ('ids', 'stems', 'read'),
  [
    ([[5], [6]], [()], [0, 0]),
    ([[5], [7, 8], [7, 9, 4]], [(7, 9)], [0, 0, 0]),
    ([[7, 8], [9, 8], [9, 8, 7, 6], [3]], [(7,), (9, 8, 7)], [0, 1, 1, 0]),
  ],
)
def test_words_are_read_behind_few_continuations(ids, stems, read):
  found, numbers = verbalizers.stems(ids)
  assert (found, numbers) == (stems, read)
  for word, number in zip(ids, numbers, strict=True):  # all but its last id stands there
    assert found[number][: len(word) - 1] == tuple(word[:-1])


RECORDS = [
  {'text': 'abcdef'[i] * (1 + i % 2), 'label': 'xy'[i // 3], 'pair': 'p'} for i in range(6)
]


@pytest.mark.parametrize('paired', [False, True])
def test_demonstrations_are_never_the_text_itself(paired):
  template = '{text}/{pair}={mask}' if paired else '{text}={mask}'
  records = [{k: v for k, v in r.items() if paired or k != 'pair'} for r in RECORDS]
  documents = Memory([*records, records[0]], templates.encoding(template), BYTES)
  chosen = demonstrations.choose([documents], ('x', 'y'), 2, seed=3)
  assert [name for name, *_ in chosen] == ['x'] * 3 + ['y'] * 3
  assert chosen == demonstrations.choose([documents], ('x', 'y'), 2, seed=3)
  assert any(chosen != demonstrations.choose([documents], ('x', 'y'), 2, seed=s) for s in range(9))
  made = Template(template, BYTES)
  answers = {'x': BYTES.encode('1'), 'y': BYTES.encode('2')}
  shown = Demonstrations(chosen, 2, made, answers, BYTES.encode(';'))
  middle = '/p' if paired else ''
  phrase = {r['text']: f'{r["text"]}{middle}={"12"["xy".index(r["label"])]};' for r in records}
  for index, record in enumerate(records):
    text, pair = demonstrations.texts(documents, index)
    parts = BYTES.decode(shown(text, pair)).split(';')[:-1]
    assert len(parts) == 4 and [part[-1] for part in parts] == ['1', '2', '1', '2']
    assert {f'{part};' for part in parts} <= set(phrase.values()) - {phrase[record['text']]}
    assert len(text) in shown.lengths
  usual = BYTES.decode(shown.usual)
  own = [r['text'] for r in records if phrase[r['text']] in usual]
  assert len(own) == 4  # so that for these something else is shown


def test_given_demonstrations_are_those_of_documents():
  made = Template('Text: {text}={mask}', BYTES)
  answers = {'x': BYTES.encode('1'), 'y': BYTES.encode('2')}
  ids = [('x', BYTES.encode(' ab').tolist()), ('y', BYTES.encode(' c').tolist())]
  given = Demonstrations([('x', 'ab'), ('y', 'c')], 1, made, answers, BYTES.encode('|'))
  taken = Demonstrations(ids, 1, made, answers, BYTES.encode('|'))
  assert BYTES.decode(given.usual) == BYTES.decode(taken.usual) == 'Text: ab=1|Text: c=2|'


@pytest.mark.parametrize(
  ('shown', 'message'),
  [
    ([('x', 'a')], "objective.demonstrations=1 of each class.* fewer different ones of 'y'"),
    ([('x', 'a'), ('z', 'b')], r"objective.shown has \('z', 'b'\); each must be \(class, text\)"),
    ([('x', 'a', 'b')], r'each must be \(class, text\), the class one of x, y'),
    (['xa'], 'objective.shown has xa; each must be'),
  ],
)
def test_demonstrations_that_cannot_be(shown, message):
  with pytest.raises(ValueError, match=message):
    Demonstrations(shown, 1, Template('{text}{mask}', BYTES), {'x': [1], 'y': [2]}, np.zeros(0))


def test_a_class_with_too_few_documents():
  documents = Memory(RECORDS, templates.contracts.Objective.encode, BYTES)
  with pytest.raises(ValueError, match="needs 4 different training documents.* 'x' has 3"):
    demonstrations.choose([documents], ('x', 'y'), 3, 0)
