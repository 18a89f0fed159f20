import jax
import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.models import decoder, encoder
from llm_jax.objectives import relation
from llm_jax.programs import network as networks

RNG = np.random.default_rng(0)
TOKENIZER = byte.create()
ANN = {'text': 'Ann saw Bo.', 'head': [0, 3], 'tail': [8, 10], 'label': 'saw'}
TYPES = {'head_type': 'PERSON', 'tail_type': 'job_title'}


def memory(*records, tokenizer=TOKENIZER, **options):
  return Memory(records, relation.Objective.encoding(options), tokenizer)


def made(classes=('none', 'saw'), **options):
  return relation.Objective(TOKENIZER, classes, **options)


def spelled(tokens):
  return bytes(int(token) - 7 for token in tokens if token >= 7).decode('utf-8', 'replace')


def test_a_row_of_two_texts():
  other = {'text': '我在北京', 'head': [2, 4], 'tail': [0, 1], 'label': 'none'}
  rows = made().rows(memory(ANN, other), 64)
  assert len(rows) == 1 and rows.texts(0) == [0, 1]
  row = rows.example(0, RNG)
  first, second = '@ Ann @ saw # Bo #.', '# 我 #在@ 北京 @'
  assert spelled(row['tokens']) == first + second
  assert row['label'][:2].tolist() == [1, 0] and row['label_weight'].sum() == 2
  at = lambda text, before: [before + 1 + text.encode().index(sign) for sign in b'@#']
  wanted = [at(first, 0), at(second, len(first) + 2)]  # in frames of two tokens
  assert row['markers'].dtype == np.int32 and row['markers'][:2].tolist() == wanted
  closing = made(pool='closing').rows(memory(ANN), 32).example(0, RNG)
  assert closing['markers'][0].tolist() == [1 + first.rindex(sign) for sign in '@#']
  assert closing['tokens'][0] == TOKENIZER.bos_id


def test_typed_markers_are_those_of_the_paper():
  row = made(markers='typed').rows(memory(ANN | TYPES, markers='typed'), 64).example(0, RNG)
  text = '@ * person * Ann @ saw # ^ job title ^ Bo #.'
  assert spelled(row['tokens']) == text
  assert row['markers'][0].tolist() == [1, 1 + text.index('#')]
  for wrong in (None, ' ', 3):
    with pytest.raises(ValueError, match=f"'tail_type' is {wrong!r}; objective.markers='typed'"):
      memory(ANN | TYPES | {'tail_type': wrong}, markers='typed')


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  """A tokenizer whose tokens are pieces of words, some of several characters."""
  from llm_jax.data.tokenizers import sentencepiece

  text = ['the cat sat on the mat 我们 在北京 见面 😀😀 caf\u00e9', 'on @ the @ # 北京 mat 😀'] * 30
  folder = tmp_path_factory.mktemp('pieces')
  return sentencepiece.create(
    texts=lambda: iter(text), texts_fingerprint='t', cache=str(folder), vocab_size=289
  )


PARTS = st.one_of(
  st.sampled_from(
    ['the cat', ' sat', '我们在北京', '😀', '\U0001f469\u200d\U0001f467', '@ #', ' ']
  ),
  st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=6),
)


def filled(data, text):
  span = st.tuples(*[st.integers(0, len(text))] * 2).map(sorted)
  return data.draw(span.filter(lambda s: text[s[0] : s[1]].strip()))


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
  parts=st.lists(PARTS, min_size=1, max_size=6),
  room=st.integers(0, 60),
  own=st.booleans(),
  data=st.data(),
)
def test_what_is_read_stands_at_signs_around_the_given_characters(pieces, parts, room, own, data):
  """Of any text and any row that holds both spans: what the tokens between the signs spell is the
  span, but for the signs of the other, and the row begins and ends in the text.
  """
  text = ''.join(parts)
  if sum(not c.isspace() for c in text) < 2:
    return
  head, tail = filled(data, text), filled(data, text)
  if head == tail:
    return
  tokenizer = TOKENIZER if own else pieces
  record = {'text': text, 'head': head, 'tail': tail}
  documents = memory(record, tokenizer=tokenizer)
  tokens = documents.array('tokens', 0)
  assert len(documents.array('markers', 0)) == 4
  objective = relation.Objective(tokenizer, ('a', 'b'), unlabelled='ignore')
  markers = documents.array('markers', 0)
  needed = int(markers.max() - markers.min()) + 1
  seq_len = needed + room + objective.frame.single
  row = objective.rows(documents, seq_len).example(0, RNG)
  kept = row['tokens'][row['segments'] > 0][1:-1]
  start = int(row['markers'][0, 0]) - 1 - int(markers[0])  # of what is kept, counted backwards
  np.testing.assert_array_equal(kept, tokens[-start : len(kept) - start])
  assert len(kept) == min(len(tokens), needed + room)
  opens, closes = markers[:2], markers[2:]
  for (first, stop), opening, closing, sign, other in zip(
    (head, tail), opens, closes, '@#', '#@', strict=True
  ):
    said = tokenizer.decode(tokens[opening : closing + 1])
    # A token may spell a neighbour too, where a sign has none of its own.
    inner = said[said.index(f'{sign} ') + 2 : said.rindex(f' {sign}')]
    span = text[first:stop]
    if not set('@# ') & set(span) and '\ufffd' not in said:
      assert inner.replace(f'{other} ', '').replace(f' {other}', '') == span


def test_long_texts_are_cut_around_their_spans(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'warning', lambda message, *values: lines.append(message % values))
  far = {'text': 'x' * 50 + 'Ann saw Bo.' + 'y' * 50, 'head': [50, 53], 'tail': [58, 60]}
  far |= {'label': 'saw'}
  rows = made().rows(memory(far), 32)
  row = rows.example(0, RNG)
  assert spelled(row['tokens']) == 'x' * 6 + '@ Ann @ saw # Bo #.' + 'y' * 5
  assert row['markers'][0].tolist() == [7, 7 + 12] and rows.cut == 1
  assert 'relation: 1 of 1 documents are longer than seq_len=32' in lines[-1]
  exact = made().rows(memory(far), 20).example(0, RNG)
  assert spelled(exact['tokens']) == '@ Ann @ saw # Bo #'
  with pytest.raises(
    ValueError, match='document 0: head and tail with their signs span 18 tokens, '
  ):
    made().rows(memory(far), 19)
  layout = made().layout(memory(ANN | {'text': 'Ann saw Bo' + 'z' * 9}, far), 20)
  assert not layout.torn and len(layout) == 2
  layout = made().layout(memory(far, {'text': 'abc', 'head': [0, 1], 'tail': [2, 3]}), 19)
  assert 'relation: 1 of 2 texts have no answer but `error`, the first: document 0' in lines[-1]
  said = {}
  for index in range(len(layout)):
    row = {'probabilities': np.full((layout.slots, 2), 0.5)}
    assert (layout.example(index, RNG)['markers'] < 19).all()
    said |= dict(zip(layout.texts(index), made().answers(row, layout, index), strict=True))
  assert list(said[0]) == ['error'] and 'seq_len=19 leaves room for 17' in said[0]['error']
  assert said[1]['probabilities'] == {'none': 0.5, 'saw': 0.5}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(tail=[0, 3]), r"fields 'head' and 'tail' are both \[0, 3\]; they must be different"),
    (dict(tail=[8, 12]), r"field 'tail' is \[8, 12\]; it must be \[start, end\].*end <= 11"),
    (dict(head=None), "field 'head' is None; it must be"),
    (dict(head=[2, 2]), r"field 'head' is \[2, 2\]; it must be"),
    (dict(text=None), "field 'text' is None; a record needs a text, head and tail"),
  ],
)
def test_records_that_cannot_be(change, message):
  with pytest.raises(ValueError, match=message):
    memory(ANN | change)


def test_labels_that_cannot_be():
  with pytest.raises(
    ValueError, match="document 0 has the label 'met'; it must be one of the 2 cl"
  ):
    made().rows(memory(ANN | {'label': 'met'}), 64)
  with pytest.raises(ValueError, match='objective relation needs labels and this corpus has none'):
    made().rows(memory({**ANN, 'label': None}), 64)
  found = relation.Objective.derive({'balance': True}, [memory(ANN, ANN, ANN | {'label': 'met'})])
  assert found == {'classes': ('met', 'saw'), 'class_weights': (1.5, 0.75)}


def test_spans_may_hold_each_other():
  inside = ANN | {'head': [0, 11], 'tail': [0, 3]}
  row = made().rows(memory(inside), 64).example(0, RNG)
  assert spelled(row['tokens']) == '@ # Ann # saw Bo. @'
  assert row['markers'][0].tolist() == [1, 3]


def test_wrong_options_and_models():
  for options in (dict(markers='bold'), dict(pool='mean')):
    with pytest.raises(ValueError, match='must be one of'):
      made(**options)
  shape = dict(vocab_size=263, dim=8, layers=1, heads=2, mlp_dim=8, max_len=32)
  with pytest.raises(ValueError, match="pool='markers' does not suit .*; use 'closing'"):
    made().check(decoder.Model(**shape))
  with pytest.raises(
    ValueError, match="pool='closing' does not suit .* read by 'markers' or 'cls'"
  ):
    made(pool='closing').check(encoder.Model(**shape))
  made(pool='cls').check(encoder.Model(**shape))
  with pytest.raises(ValueError, match="objective relation labels .* set rows='relation'"):
    made().transform({'tokens': np.zeros(3)}, RNG)


def test_the_first_token_may_be_read_as_in_classify():
  objective = made(pool='cls')
  row = objective.rows(memory(ANN), 64).example(0, RNG)
  batch = {key: value[None] for key, value in row.items()}
  model = encoder.Model(vocab_size=263, dim=8, layers=1, heads=2, mlp_dim=8, max_len=64)
  network = networks.Network(model=model, heads=objective.heads(model), objective=objective)
  params = jax.eval_shape(network.init, jax.random.PRNGKey(0), batch)['params']
  assert set(params) == {'model', 'heads_pooler', 'heads_classifier'}
  np.testing.assert_array_equal(objective.positions(batch), batch['text_firsts'])
