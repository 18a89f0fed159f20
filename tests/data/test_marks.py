import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import marks

TEXT = st.text(
  st.characters(exclude_categories=['Cs']) | st.sampled_from('@#我们😀\u0301 '), min_size=1
)


def spans_of(text):
  two = st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))
  return two.map(sorted).map(tuple).filter(lambda span: span[0] < span[1])


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.data())
def test_marks_surround_exactly_the_characters_of_their_spans(data):
  """Private letters as signs show it: what stands between two of a kind, the others left out, is
  the span, and without any the text is as it was.
  """
  text = data.draw(TEXT)
  spans = data.draw(st.lists(spans_of(text), min_size=1, max_size=3, unique=True))
  signs = [chr(0xF0000 + number) for number in range(2 * len(spans))]
  around = [marks.Mark(*span, *signs[2 * i : 2 * i + 2]) for i, span in enumerate(spans)]
  found = marks.insert(text, around)
  without = lambda part: re.sub('[\U000f0000-\U000fffff]', '', part)
  assert without(found.text) == without(text)
  for number, (start, stop) in enumerate(spans):
    opens, closes = found.opens[number], found.closes[number]
    assert (found.text[opens], found.text[closes]) == tuple(signs[2 * number : 2 * number + 2])
    assert without(found.text[opens:closes]) == without(text[start:stop])
  assert [found.text[i] for i in found.moved] == list(text)


def test_which_sign_comes_first():
  mark = lambda start, stop, sign: marks.Mark(start, stop, f'{sign} ', f' {sign}')
  outer, inner = mark(0, 5, '@'), mark(0, 2, '#')
  assert marks.insert('ab cd', [outer, inner]).text == '@ # ab # cd @'
  assert marks.insert('ab cd', [inner, outer]).text == '@ # ab # cd @'
  assert marks.insert('ab cd', [outer, mark(3, 5, '#')]).text == '@ ab # cd # @'
  assert marks.insert('北京大学', [mark(0, 2, '@'), mark(2, 4, '#')]).text == '@ 北京 @# 大学 #'
  assert marks.insert('abcd', [mark(0, 3, '@'), mark(1, 4, '#')]).text == '@ a# bc @d #'


def test_the_token_of_a_character():
  spans = np.array([(0, 2), (2, 2), (2, 3), (2, 3), (3, 6)])
  assert [marks.token_of(spans, character) for character in range(6)] == [0, 0, 2, 4, 4, 4]
  assert marks.token_of(spans, 2, last=True) == 3
  with pytest.raises(ValueError, match='the tokenizer has no token for a sign'):
    marks.token_of(spans, 6)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (None, r"field 'head' is None; it must be \[start, end\], characters of the text, with 0 <= "),
    ([3, 3], r'is \[3, 3\]; it must be'),
    ([2, 6], r'is \[2, 6\]; it must be .*end <= 5'),
    ([-1, 2], r'is \[-1, 2\]; it must be'),
    ([0, 1, 2], r'is \[0, 1, 2\]; it must be'),
    ([False, True], r'is \[False, True\]; it must be'),
    ('[0, 2]', r"is '\[0, 2\]'; it must be"),
    ([2, 3], r'is \[2, 3\], which holds nothing but white space'),
  ],
)
def test_spans_that_cannot_be(given, message):
  assert marks.span([0, 2], 'head', 'ab cd') == (0, 2)
  with pytest.raises(ValueError, match=message):
    marks.span(given, 'head', 'ab cd')
