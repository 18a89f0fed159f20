import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data import encoding
from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.nn.crf import FIRST, GAP, LAST, WORD
from llm_jax.objectives import mix, mlm, tag
from llm_jax.objectives.shared import tags as tags_lib

RNG = np.random.default_rng(0)
TOKENIZER = byte.create()
BIO = ('B-LOC', 'B-PER', 'I-PER', 'O')
ANN = {'words': ['Ann', 'Lee', 'in', 'Ur'], 'tags': ['B-PER', 'I-PER', 'O', 'B-LOC']}


def memory(*records, **options):
  return Memory(records, tag.Objective.encoding(options), TOKENIZER)


def made(tags=BIO, **options):
  return tag.Objective(TOKENIZER, tags, **options)


def test_a_row_of_two_texts():
  objective = made()
  rows = objective.rows(memory(ANN, {'words': ['Bo'], 'tags': ['B-PER']}), 24)
  assert len(rows) == 1 and rows.texts(0) == [0, 1]
  row = rows.example(0, RNG)
  text = b'Ann Lee in Ur'
  assert (
    row['tokens'].tolist()
    == [2, *(b + 7 for b in text), 3, 2, *(b + 7 for b in b'Bo'), 3] + [0] * 5
  )
  assert row['segments'].tolist() == [1] * 15 + [2] * 4 + [0] * 5
  positions = [1, 5, 9, 12, 16]
  wanted = np.zeros(24, int)
  wanted[positions] = [WORD | FIRST, WORD, WORD, WORD | LAST, WORD | FIRST | LAST]
  assert row['chain'].tolist() == wanted.tolist()
  assert np.flatnonzero(row['tag_weight']).tolist() == positions
  assert row['tag'][positions].tolist() == [1, 2, 3, 0, 1]
  assert [rows.tags(text) for text in (0, 1)] == [ANN['tags'], ['B-PER']]
  assert {name: value.dtype for name, value in row.items() if name[:3] in ('tag', 'cha')} == {
    'chain': np.int32,
    'tag': np.int32,
    'tag_weight': np.float32,
  }


def test_all_tokens_of_a_word_may_learn_its_tag():
  row = made(label_all=True).rows(memory(ANN), 16).example(0, RNG)
  assert row['tag_weight'].tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0]
  assert row['tag'][[1, 2, 3, 5, 6, 7, 12, 13]].tolist() == [1, 1, 1, 2, 2, 2, 0, 0]
  assert np.flatnonzero(row['chain']).tolist() == [1, 5, 9, 12]
  with pytest.raises(ValueError, match="label_all needs loss='softmax'"):
    made(label_all=True, loss='crf')


def test_words_that_are_not_read_are_counted_and_answered(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'warning', lambda message, *values: lines.append(message % values))
  torn = {'words': ['', 'Ann', '', 'Lee', 'far', 'off'], 'tags': [*'OO', 'B-PER', 'I-PER', *'OO']}
  rows = made(loss='crf').rows(memory(torn), 12)
  row = rows.example(0, RNG)
  text = ' Ann  Lee far off'  # of which ten bytes fit
  assert bytes((row['tokens'][1:-1] - 7).tolist()).decode() == text[:10] and rows.cut == 1
  positions = np.flatnonzero(row['chain'])
  assert row['chain'][positions].tolist() == [WORD | FIRST | GAP, WORD | GAP]
  assert row['tag'][positions].tolist() == [3, 2]
  assert (
    "tag: 4 of 6 words have no token of their own in their row, the first: word 0 ('')"
    in (lines[-1])
  )
  said = {'tags': np.full(12, 1), 'probability': np.full(12, 0.5)}
  said |= {'entropy': np.arange(12.0), 'margin': np.arange(12.0)}
  said['probability'][positions[0]] = 0.125
  (answer,) = made(loss='crf').answers(said, rows, 0)
  assert answer['probability'] == pytest.approx(0.25)  # the geometric mean
  assert (answer['entropy'], answer['margin']) == (positions.mean(), positions.min())
  assert answer['words'] == torn['words'] and answer['unread'] == [0, 2, 4, 5]
  assert answer['tags'] == ['O', 'B-PER', 'O', 'B-PER', 'O', 'O']
  assert answer['probabilities'] == [None, 0.125, None, 0.5, None, None]
  assert [entity['words'] for entity in answer['entities']] == [[1, 2], [3, 4]]


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  """A tokenizer whose tokens are pieces of words, some of several characters."""
  from llm_jax.data.tokenizers import sentencepiece

  text = ['the cat sat on the mat 我们 在北京 见面 😀😀 caf\u00e9', 'on the 北京 mat 😀'] * 30
  folder = tmp_path_factory.mktemp('pieces')
  return sentencepiece.create(
    texts=lambda: iter(text), texts_fingerprint='t', cache=str(folder), vocab_size=287
  )


WORDS = st.lists(
  st.one_of(
    st.sampled_from(
      [
        'the',
        'cat',
        '我们',
        '北京',
        '我',
        '😀',
        'cafe\u0301',
        '\U0001f469\u200d\U0001f467',
        '',
        ' ',
        'New York',
      ]
    ),
    st.text(st.characters(exclude_categories=['Cs']), max_size=5),
  ),
  max_size=8,
)


@settings(deadline=None, max_examples=40)
@given(
  texts=st.lists(WORDS, min_size=1, max_size=5),
  seq_len=st.integers(8, 60),
  name=st.sampled_from(['space', 'character']),
  packing=st.sampled_from(['best_fit', 'none']),
  own=st.booleans(),
  data=st.data(),
)
def test_training_evaluation_and_prediction_label_the_same_words(
  pieces, texts, seq_len, name, packing, own, data
):
  """What stands in a row for learning comes back, through `answers`, at the words it was given for;
  and the token that a word is read at spells its first character.
  """
  tokenizer = TOKENIZER if own else pieces
  objective = tag.Objective(tokenizer, BIO, words=name, packing=packing)
  encode = tag.Objective.encoding({'words': name})
  tags = [
    data.draw(st.lists(st.sampled_from(BIO), min_size=len(w), max_size=len(w))) for w in texts
  ]
  both = [{'words': w, 'tags': t} for w, t in zip(texts, tags, strict=True)]
  learned = objective.rows(Memory(both, encode, tokenizer), seq_len)
  asked = objective.layout(Memory([{'words': w} for w in texts], encode, tokenizer), seq_len)
  assert len(learned) == len(asked)
  for index in range(len(learned)):
    row, plain = learned.example(index, RNG), asked.example(index, RNG)
    assert not plain['tag_weight'].any()
    for key in row.keys() - {'tag', 'tag_weight'}:
      np.testing.assert_array_equal(row[key], plain[key])
    assert ((row['chain'] > 0) == (row['tag_weight'] > 0)).all()
    answers = list(objective.answers({'tags': row['tag']}, asked, index))
    for text, answer in zip(asked.texts(index), answers, strict=True):
      unread = answer.get('unread', [])
      assert answer['words'] == texts[text] and len(answer['tags']) == len(texts[text])
      for word, (found, wanted) in enumerate(zip(answer['tags'], tags[text], strict=True)):
        assert found == ('O' if word in unread else wanted)
    for text, positions, read in asked.word_positions(index):
      joiner = ' ' if name == 'space' else ''
      ids, spans = tokenizer.offsets(joiner.join(texts[text]))
      before = joiner.join(texts[text][:1])[:0]
      begins = [len(joiner.join([*texts[text][:w], before])) for w in range(len(texts[text]))]
      first = int(np.flatnonzero(row['segments'] == 1 + asked.texts(index).index(text))[0]) + 1
      for position, word in zip(positions, read, strict=True):
        begin, end = spans[position - first]
        assert row['tokens'][position] == ids[position - first]
        assert begin < begins[word] + len(texts[text][word]) and begins[word] < end
        if own:  # a character is never shared by two words
          assert begin == begins[word]
      if own and len(ids) <= seq_len - 2:
        assert read.tolist() == [w for w, word in enumerate(texts[text]) if word]


def test_spans_of_characters_become_tags():
  text = 'Ann Lee went to New  York.'
  spans = [[16, 25, 'LOC'], [0, 7, 'PER']]
  (tags,) = tags_lib.given(memory({'text': text, 'spans': spans}, words='punctuation'))
  assert tags == ['B-PER', 'I-PER', 'O', 'O', 'B-LOC', 'I-LOC', 'O']
  (tags,) = tags_lib.given(
    memory({'text': '我在北京', 'spans': [[2, 4, 'LOC']]}, words='character')
  )
  assert tags == ['O', 'O', 'B-LOC', 'I-LOC']
  (again,) = tags_lib.given(memory({'text': '', 'spans': []}))
  assert again == []


@pytest.mark.parametrize(
  ('spans', 'message'),
  [
    (
      [[0, 3, 'X'], [2, 7, 'Y']],
      r"document 0: field 'spans': \[2, 7, 'Y'\] overlaps with \[0, 3\]",
    ),
    ([[0, 2, 'X']], r"\[0, 2, 'X'\] cuts the word 'Ann' \(characters 0 to 3\) in two"),
    ([[4, 13, 'X']], r"\[4, 13, 'X'\] is outside of the text, which has 12 characters"),
    ([[-2, 3, 'X']], r"\[-2, 3, 'X'\] is outside"),
    ([[3, 4, 'X']], r"\[3, 4, 'X'\] holds no word of the text, only white space"),
    ([[3, 3, 'X']], r"\[3, 3, 'X'\] must be \[start, end, label\], with start < end"),
    ([[0, 3]], r'\[0, 3\] must be'),
    ([[0, '3', 'X']], 'must be'),
    ([[0, 3, '']], 'must be'),
    ('0-3', "field 'spans' is '0-3'; it must be a list"),
  ],
)
def test_spans_that_cannot_be(spans, message):
  with pytest.raises(ValueError, match=message):
    list(tags_lib.given(memory({'text': 'Ann Lee went', 'spans': spans})))


@pytest.mark.parametrize(
  ('tags', 'options', 'message'),
  [
    (['O'], {}, "document 0: field 'tags' has 1 tags for 2 words"),
    ('OO', {}, "field 'tags' is 'OO'; it must be a list"),
    (['O', None], {}, "field 'tags': that of word 1 is None"),
    (
      ['O', 'B-X'],
      {},
      r"document 0: word 1 has the tag 'B-X', which is none of the 4 tags.*B-LOC,",
    ),
    (['O', 'I-PER'], dict(loss='crf'), "word 1 has the tag 'I-PER' after 'O', which scheme=IOB2"),
    (['I-PER', 'O'], dict(loss='hinge'), "word 0 has the tag 'I-PER' after nothing"),
    (None, {}, 'document 0 has no tags; give it some.*unlabelled=ignore'),
  ],
)
def test_tags_that_cannot_be(tags, options, message):
  record = {'words': ['a', 'b']} | ({} if tags is None else {'tags': tags})
  with pytest.raises(ValueError, match=message):
    made(**options).rows(memory(record), 16)


def test_softmax_counts_what_breaks_the_scheme(caplog):
  records = [{'words': ['a', 'b'], 'tags': ['O', 'I-PER']}, ANN]
  made().rows(memory(*records), 16)
  assert 'the tags of 1 of 2 documents break their scheme' in caplog.text
  assert "document 0: word 1 has the tag 'I-PER' after 'O', which scheme=IOB2" in caplog.text
  caplog.clear()
  made(scheme='none').rows(memory(*records), 16)
  assert 'scheme' not in caplog.text


def test_rows_of_a_mix_are_masked_too():
  parts = dict(tag=made(), mlm=mlm.Objective(TOKENIZER, mask_rate=0.5))
  both = mix.Objective(parts=parts, rows='tag', weights=dict(tag=1.0, mlm=0.1))
  text = 'Ann Lee in Ur'
  encoder = encoding.Encoder([tag.Objective.encoding({}), mlm.Objective.encode])
  documents = Memory([{'text': text, 'spans': [[0, 7, 'PER']]}], encoder, TOKENIZER)
  row = both.transform(both.rows(documents, 24).example(0, RNG), np.random.default_rng(0))
  assert row['mask_weights'].sum() == 6 and row['tag_weight'].sum() == 4
  assert both.predictor is parts['tag'] and both.terms == {'tag': 1.0, 'mlm': 0.1}


def test_tags_that_can_be():
  assert len(made().rows(memory({'words': ['a', 'b'], 'tags': ['O', 'I-PER']}), 16)) == 1
  both = memory({'words': ['a']}, {'words': ['b'], 'tags': ['O']})
  row = made(unlabelled='ignore', loss='crf').rows(both, 16).example(0, RNG)
  assert np.flatnonzero(row['chain']).tolist() == [1, 4] and row['tag_weight'].sum() == 1
  free = made(loss='crf', scheme='none')
  assert len(free.rows(memory({'words': ['a'], 'tags': ['I-PER']}), 16)) == 1


@pytest.mark.parametrize(
  ('tags', 'scheme'),
  [
    (('O', 'B-A', 'I-A'), 'IOB2'),
    (('O', 'B-A'), 'IOB2'),
    (('I-A', 'O'), 'IOB1'),
    (('O', 'B-A', 'I-A', 'E-A', 'S-B'), 'IOBES'),
    (('O', 'B-A', 'L-A', 'U-B'), 'BILOU'),
    (('O', 'B-A', 'L-A', 'E-A'), 'none'),
    (('NN', 'B-A'), 'none'),
    (('O',), 'none'),
    (('B', 'I', 'O'), 'none'),
  ],
)
def test_a_scheme_is_known_by_the_names_of_tags(tags, scheme):
  assert tags_lib.scheme_of(tags) == scheme


def legal(scheme, tags):
  """Whether tags can be read as entities that spell just them: by trying all of these."""

  def spelled(kind, size, before):
    if scheme == 'IOB1':
      head = 'B-' if before == kind else 'I-'
      return [head + kind] + ['I-' + kind] * (size - 1)
    if scheme == 'IOB2':
      return ['B-' + kind] + ['I-' + kind] * (size - 1)
    single, end = ('S-', 'E-') if scheme == 'IOBES' else ('U-', 'L-')
    if size == 1:
      return [single + kind]
    return ['B-' + kind] + ['I-' + kind] * (size - 2) + [end + kind]

  def search(done, before):
    if len(done) == len(tags):
      return True
    if tags[len(done)] == 'O' and search([*done, 'O'], None):
      return True
    for kind in 'xy':
      for size in range(1, len(tags) - len(done) + 1):
        whole = done + spelled(kind, size, before)
        if whole == list(tags[: len(whole)]) and search(whole, kind):
          return True
    return False

  return search([], None)


@pytest.mark.parametrize('scheme', tags_lib.SCHEMES)
def test_rules_allow_just_what_spells_entities(scheme):
  names = ['O', *(f'{letter}-{kind}' for letter in tags_lib.SCHEMES[scheme] for kind in 'xy')]
  rules = tags_lib.rules(scheme, names)
  rng = np.random.default_rng(0)
  seen = set()
  for size in rng.integers(1, 5, 800):
    ids = rng.integers(0, len(names), size)
    found = (
      rules.first_C[ids[0]] and rules.last_C[ids[-1]] and rules.next_CC[ids[:-1], ids[1:]].all()
    )
    assert found == legal(scheme, [names[i] for i in ids])
    seen.add(bool(found))
  assert seen == {True, False}


@settings(deadline=None)
@given(st.lists(st.sampled_from(['O', *(f'{p}-{k}' for p in 'BIES' for k in 'xy')]), max_size=8))
def test_entities_are_those_of_seqeval(tags):
  from seqeval.metrics.sequence_labeling import get_entities

  wanted = [(kind, first, last + 1) for kind, first, last in get_entities(tags)]
  assert [tuple(entity) for entity in tags_lib.entities(tags)] == wanted


def test_entities_have_characters():
  rows = made().layout(memory({'text': 'Ann  Lee at Ur'}), 32)
  (said,) = made().answers({'tags': np.array([0, 1, 0, 0, 0, 0, 2, *[3] * 6, 0, 0, 0])}, rows, 0)
  assert said['words'] == ['Ann', 'Lee', 'at', 'Ur']
  assert said['tags'] == ['B-PER', 'I-PER', 'O', 'B-LOC']
  assert said['entities'] == [
    {'label': 'PER', 'text': 'Ann  Lee', 'start': 0, 'end': 8, 'words': [0, 2]},
    {'label': 'LOC', 'text': 'Ur', 'start': 12, 'end': 14, 'words': [3, 4]},
  ]
  assert 'entities' not in next(made(scheme='none').answers({'tags': np.zeros(32, int)}, rows, 0))


def test_options_come_from_the_training_documents():
  one, two = memory(ANN), memory({'words': ['x', 'y'], 'tags': ['O', 'B-ORG']})
  found = tag.Objective.derive({}, [one, two])
  assert found == {
    'tags': ('B-LOC', 'B-ORG', 'B-PER', 'I-PER', 'O'),
    'scheme': 'IOB2',
    'unread': 'O',
  }
  pos = memory({'words': ['a', 'b', 'c'], 'tags': ['N', 'V', 'V']})
  assert tag.Objective.derive({}, [pos]) == {'tags': ('N', 'V'), 'scheme': 'none', 'unread': 'V'}
  assert tag.Objective.derive(dict(tags=('N', 'V'), scheme='none', unread='N'), [pos]) == {}
  with pytest.raises(ValueError, match='needs tags and this corpus has none'):
    tag.Objective.derive({}, [memory({'words': ['a']})])


@pytest.mark.parametrize('options', [{}, {'scheme': 'BILOU'}, {'tags': ('L-x', 'B-x', 'U-x', 'O')}])
def test_made_up_records_give_rows_like_real_ones(options):
  documents = memory(*tag.Objective.sample_records(options))
  derived = tag.Objective.derive(options, [documents]) | options
  row = tag.Objective(TOKENIZER, loss='crf', **derived).rows(documents, 16).example(0, RNG)
  real = made().rows(memory(ANN), 16).example(0, RNG)
  assert {k: (v.shape, v.dtype) for k, v in row.items()} == {
    k: (v.shape, v.dtype) for k, v in real.items()
  }
  assert row['tag_weight'].any()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(loss='mse'), "loss='mse' must be one of softmax, crf, hinge"),
    (dict(packing='windows'), "packing='windows'"),
    (dict(unlabelled='skip'), "unlabelled='skip'"),
    (dict(dropout=1.0), 'dropout=1.0'),
    (dict(words='blank'), "words='blank'"),
    (dict(scheme='BIOX'), "scheme='BIOX' must be one of IOB1, IOB2, IOBES, BILOU, none"),
    (dict(scheme='BILOU', tags=('O', 'E-x')), "not 'E-x'"),
    (dict(unread='X'), "unread='X' must be one of the tags"),
    (dict(tags=('a', 'a')), 'each once'),
    (dict(tags=None), 'leave it unset'),
  ],
)
def test_refuses(options, message):
  with pytest.raises(ValueError, match=message):
    tag.Objective(TOKENIZER, **{'tags': BIO} | options)


def test_other_refusals():
  with pytest.raises(ValueError, match="rows='tag'"):
    made().transform({'tokens': np.zeros(4, np.int32)}, RNG)
  with pytest.raises(ValueError, match='a causal model has not seen the rest'):
    made().check(types.SimpleNamespace(causal=True))
  with pytest.raises(ValueError, match="words='blank'"):
    tag.Objective.encoding({'words': 'blank'})


def net_of(rng, tags=4, dim=6):
  w = rng.normal(size=(dim, tags)).astype(np.float32)
  moves = [rng.normal(size=size).astype(np.float32) for size in ((tags,), (tags, tags), (tags,))]
  heads = {'tagger': lambda x: x @ w, 'moves': lambda: tuple(map(jnp.asarray, moves))}
  return types.SimpleNamespace(heads=heads), w, moves


def batch_of(rng):
  row = made().rows(memory(ANN, {'words': ['Bo'], 'tags': ['B-PER']}), 24).example(0, RNG)
  batch = {key: np.stack([value, np.zeros_like(value)]) for key, value in row.items()}
  return batch, rng.normal(size=(2, 24, 6)).astype(np.float32)


def test_softmax(small):
  rng = np.random.default_rng(0)
  net, w, _ = net_of(rng)
  batch, hidden = batch_of(rng)
  metrics = made().loss(net, jnp.asarray(hidden), batch)
  positions = np.flatnonzero(batch['chain'][0])
  logits = hidden[0, positions].astype(np.float64) @ w
  wanted = small.cross_entropy(logits, batch['tag'][0, positions]).sum()
  np.testing.assert_allclose([float(x) for x in metrics['tag']], [wanted, 5], rtol=1e-5)
  right = (logits.argmax(-1) == batch['tag'][0, positions]).sum()
  assert [float(x) for x in metrics['tag_accuracy']] == [right, 5]
  said = made().predict(net, jnp.asarray(hidden), batch)
  assert said['tags'][0, positions].tolist() == logits.argmax(-1).tolist()
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(said['probability'][0, positions], p.max(-1), rtol=1e-4)
  entropy, best = -(p * np.log(p)).sum(-1), np.sort(p, -1)
  np.testing.assert_allclose(said['entropy'][0, positions], entropy, rtol=1e-4)
  np.testing.assert_allclose(said['margin'][0, positions], best[:, -1] - best[:, -2], rtol=1e-4)


@pytest.mark.parametrize('loss', ['crf', 'hinge'])
def test_chains_by_hand(loss):
  """All taggings of both texts in NumPy, those that IOB2 forbids left out."""
  import itertools

  rng = np.random.default_rng(1)
  net, w, (first, both, last) = net_of(rng)
  batch, hidden = batch_of(rng)
  objective = made(loss=loss)
  metrics, said = jax.jit(
    lambda x: (objective.loss(net, x, batch), objective.predict(net, x, batch))
  )(hidden)
  logits = hidden[0].astype(np.float64) @ w
  total = 0.0
  for positions in ([1, 5, 9, 12], [16]):
    gold, scores = batch['tag'][0, positions], {}
    for y in itertools.product(range(4), repeat=len(positions)):
      if legal('IOB2', [BIO[i].replace('LOC', 'x').replace('PER', 'y') for i in y]):
        inner = sum(both[a, b] for a, b in zip(y, y[1:], strict=False))
        scores[y] = first[y[0]] + inner + last[y[-1]] + logits[positions, list(y)].sum()
    right = scores[tuple(gold)]
    best = max(scores, key=scores.__getitem__)
    if loss == 'crf':
      log_z = np.log(np.sum(np.exp(list(scores.values()))))
      total += log_z - right
      share = sum(np.exp(s - log_z) for y, s in scores.items() if y[0] == best[0])
      assert float(said['probability'][0, positions[0]]) == pytest.approx(share, rel=1e-4)
    else:
      total += max(s + np.sum(np.array(y) != gold) for y, s in scores.items()) - right
    assert said['tags'][0, positions].tolist() == list(best)
  assert (
    float(metrics['tag'][0]) == pytest.approx(total, rel=1e-5) and float(metrics['tag'][1]) == 5
  )
  assert ('probability' in said) == (loss == 'crf')
  free = jax.jit(lambda x: made(loss=loss, scheme='none').loss(net, x, batch))(hidden)
  assert float(free['tag'][0]) > float(metrics['tag'][0]) + 1e-3  # negative control


@pytest.mark.parametrize('loss', tag.LOSSES)
def test_each_loss_leads_to_the_right_tags(loss):
  batch, hidden = batch_of(np.random.default_rng(2))
  objective = made(loss=loss)
  _, w, moves = net_of(np.random.default_rng(2))

  def value(params):
    w, moves = params
    net = types.SimpleNamespace(heads={'tagger': lambda x: x @ w, 'moves': lambda: moves})
    total, weight = objective.loss(net, hidden, batch)['tag']
    return total / weight, objective.predict(net, hidden, batch)['tags']

  @jax.jit
  def descend(params):
    (loss, tags), grads = jax.value_and_grad(value, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), loss, tags

  params, losses = (w, moves), []
  for _ in range(80):
    params, loss_value, tags = descend(params)
    losses.append(float(loss_value))
  words = batch['tag_weight'] > 0
  assert (np.asarray(tags)[words] == batch['tag'][words]).all()
  assert losses[-1] < 0.2 * losses[0] and all(np.isfinite(losses))


def test_an_answer_breaks_no_rule_where_words_are_not_read():
  """Around a word without a token, which gets O, no I stands after it, nor does B go on into it."""
  tags = ('B-x', 'L-x', 'O', 'U-x')
  objective = tag.Objective(TOKENIZER, tags, loss='crf', dropout=0.0)
  rows = objective.layout(memory({'words': ['', 'a', '', 'b', 'c', 'd', 'e']}), 9)
  row = rows.example(0, RNG)  # of ' a  b c', which is cut
  batch = {key: value[None] for key, value in row.items()}
  net, _, _ = net_of(np.random.default_rng(0))
  predict = jax.jit(lambda hidden: objective.predict(net, hidden, batch))
  for _ in range(20):
    said = predict(RNG.normal(size=(1, 9, 6)).astype(np.float32) * 3)
    (answer,) = objective.answers({k: np.asarray(v)[0] for k, v in said.items()}, rows, 0)
    padded = ['O', *answer['tags'], 'O']
    assert answer['unread'] == [0, 2, 5, 6]
    assert all(tags_lib.allowed('BILOU', a, b) for a, b in zip(padded, padded[1:], strict=False))
