"""Copies in other words: what each operation may do, and that no copy of a held-out record is
trained on.
"""

import collections
import json

import numpy as np
import pytest

from configs import classify as config_file
from llm_jax.core import config as config_lib
from llm_jax.data import augmentation, cache, encoding
from llm_jax.data.tokenizers import byte
from llm_jax.objectives import classify
from llm_jax.programs import assemble
from llm_jax.training import corpora

SYNONYMS = {'good': ('fine', 'very nice'), 'film': ('movie',)}
TEXT = 'a good film, Good to see: "film" again and again'


class Source:
  """Numbered texts with a pair and a label; each fourth is the one before it again."""

  fingerprint = 'numbered'

  def __len__(self):
    return 80

  def __getitem__(self, index):
    number = index - (index % 4 == 3)
    return {'text': f'a good film {number} to see', 'pair': 'one', 'label': 'ab'[number % 2]}

  def where(self, index):
    return f'x.jsonl:{index + 1}'


@pytest.fixture
def synonyms(tmp_path):
  path = tmp_path / 'synonyms.tsv'
  path.write_text('Good\tfine, very nice\n\nfilm\tmovie\n')
  return str(path)


def copies(rules, count=60):
  return [rules(TEXT, np.random.default_rng(i)).split(' ') for i in range(count)]


def test_each_operation_changes_what_it_may(synonyms):
  words, counts = TEXT.split(), collections.Counter(TEXT.split())
  made = {
    name: augmentation.Rules(synonyms, 0.2, operations=(name,)) for name in augmentation.OPERATIONS
  }
  for new in copies(made['replace']):
    joined = ' '.join(new)
    assert len([w for w in ('fine', 'nice', 'movie') if w in joined.lower()]) and 'again' in new
    for old, replaced in (
      ('good', 'fine'),
      ('Good', 'Fine'),
      ('film,', 'movie,'),
      ('"film"', '"movie"'),
    ):
      assert (
        joined.count(old)
        + joined.count(replaced)
        + joined.count({'good': 'very nice', 'Good': 'Very nice'}.get(old, '-'))
        == counts[old]
      )
  for new in copies(made['insert']):
    inserted = collections.Counter(new) - counts
    assert not counts - collections.Counter(new)
    assert 2 <= sum(inserted.values()) <= 4
    assert {word.lower() for word in inserted} <= {'fine', 'very', 'nice', 'movie'}
  swapped = copies(made['swap'])
  assert all(sorted(new) == sorted(words) for new in swapped)
  assert sum(new != words for new in swapped) > 50
  for new in copies(made['delete']):
    rest = iter(words)
    assert 0 < len(new) < len(words) and all(word in rest for word in new)  # in their order
  assert len({len(new) for new in copies(made['delete'])}) > 2


def test_what_cannot_be_changed_stays(synonyms):
  rng = np.random.default_rng(0)
  rules = augmentation.Rules(synonyms)
  assert rules('word', rng) == 'word' and rules('', rng) == ''
  assert augmentation.Rules().chosen == ('swap', 'delete')
  assert {tuple(sorted(new)) for new in copies(augmentation.Rules(operations=('swap',)))} == {
    tuple(sorted(TEXT.split()))
  }


def test_a_copy_depends_on_seed_record_and_number_alone(synonyms):
  made = [
    augmentation.Augmented(Source(), augmentation.Rules(synonyms, copies=3, seed=seed))
    for seed in (0, 0, 1)
  ]
  one, again, other = ([source[i] for i in range(len(source))] for source in made)
  assert len(one) == 80 * 4 and one == again and one[:80] == other[:80] != one[80:160]
  assert one != other and made[0].fingerprint == made[1].fingerprint != made[2].fingerprint
  for index in (80, 82, 83, 319):
    original = int(made[0].originals[index])
    assert original == (index - 80) // 3 and one[index]['label'] == one[original]['label']
    assert one[index].keys() == one[original].keys() and one[index]['pair'] == 'one'
  assert made[0].where(83) == 'a copy of x.jsonl:2' and made[0].where(3) == 'x.jsonl:4'


def test_no_copy_of_a_held_out_record_is_trained_on(synonyms, tmp_path, caplog):
  rules = augmentation.Rules(synonyms, copies=3)
  source = augmentation.Augmented(Source(), rules)
  encoder = encoding.Encoder([classify.Objective.encode])

  def built(source):
    return cache.build(source, byte.create(), encoder, str(tmp_path / 'cache'), 1)

  corpus, plain = built(source), built(Source())
  with caplog.at_level('INFO', 'absl'):
    train, validation = augmentation.split(corpus, source, 0.3)
  wanted, held = plain.split(0.3)
  assert validation.ids.tolist() == held.ids.tolist() and len(held) > 5
  assert [i for i in train.ids if i < 80] == wanted.ids.tolist()
  texts = [source[i]['text'] for i in train.ids]
  assert not {source[i]['text'] for i in held.ids} & set(texts)
  assert set(source.originals[train.ids].tolist()) == set(wanted.ids.tolist())
  assert all(source[i]['text'] != source[source.originals[i]]['text'] for i in train.ids if i >= 80)
  assert 2.7 * len(wanted) < len(train) - len(wanted) <= 3 * len(wanted)
  assert f'{len(train) - len(wanted)} copies of {len(wanted)} training documents' in caplog.text
  careless, _ = corpus.split(0.3)  # by the hash of each copy alone, copies leak
  assert set(source.originals[careless.ids].tolist()) & set(held.ids.tolist())


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('x.tsv', 'good\tfine\nbad, worse\n', r"x.tsv:2: 'bad, worse' must be one word, a tab"),
    ('x.tsv', 'good\t ,\n', r'x.tsv:1: .* must be one word'),
    ('x.tsv', 'very good\tfine\n', r'x.tsv:1: .* must be one word'),
    ('x.tsv', '\n \n', 'x.tsv holds no synonyms; it must have lines'),
    ('x.json', '{}', 'x.json holds no synonyms'),
    ('x.json', '{"good":\n ["fine",\n}', r'x.json:3: .*; it must be an object'),
    ('x.json', '["good"]', 'x.json holds list; it must be'),
    ('x.json', '{"good": "fine"}', "'good' has 'fine'; it must be an object"),
    ('x.tsv', None, r'synonyms=.*x.tsv cannot be read \(No such file'),
  ],
)
def test_a_file_of_synonyms_that_is_none(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    augmentation.Rules(str(tmp_path / name))


def test_both_kinds_of_files_say_the_same(synonyms, tmp_path):
  (tmp_path / 'x.json').write_text(json.dumps({'GOOD': ['fine', 'very nice'], 'film': ['movie']}))
  read = [augmentation.Rules(str(path)).known for path in (synonyms, tmp_path / 'x.json')]
  assert read == [SYNONYMS, SYNONYMS]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(rate=0.0), r'augment.rate=0.0 must be a share'),
    (dict(copies=0), r'augment.copies=0 must be at least 1'),
    (dict(operations=('swaps',)), "'swaps' must be one of replace, insert, swap, delete"),
    (dict(operations=('replace',)), "'replace' needs config.data.augment.synonyms=FILE"),
    (dict(seed=-1), 'augment.seed=-1 must not be negative'),
  ],
)
def test_rules_that_are_not_possible(options, message):
  with pytest.raises(ValueError, match=message):
    augmentation.Rules(**options)


def settings(tmp_path, **changes):
  """A config that reads a file of texts with labels, with copies."""
  if not (tmp_path / 'x.jsonl').exists():
    records = [Source()[i] for i in range(40)]
    (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, records)))
  tree = config_file.get_config().to_dict()
  tree |= dict(steps=1, batch_size=4, seq_len=32, tokenizer=dict(name='byte'))
  tree['data'] |= dict(source='jsonl', path=str(tmp_path / 'x.jsonl'), label='label', workers=1)
  tree['data'] |= dict(validation=0.3, cache=str(tmp_path / 'cache'), augment=dict(copies=2))
  del tree['pretrained']
  for section, options in changes.items():
    tree[section] = tree[section] | options if isinstance(options, dict) else options
  return config_lib.parse(tree)


def test_a_config_with_copies_trains_on_them_alone(tmp_path):
  config = settings(tmp_path)
  plain = assemble.without_copies(config)
  assert assemble.augmentation(plain) is None
  assert assemble.augmentation(config) == augmentation.Rules(copies=2)
  found, without = (corpora.documents(each, byte.create()) for each in (config, plain))
  assert found.validation[0].ids.tolist() == without.validation[0].ids.tolist()
  (train,), (before,) = found.train, without.train
  assert len(before) < len(train) <= 3 * len(before) and len(without.validation[0])
  labels = [train.values('label')[i] for i in range(len(train))]
  assert labels[: len(before)] == list(before.values('label'))
  assert found.fingerprint != without.fingerprint


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(folds=3), r'leave it out, or config.folds=3'),
    (dict(objective=dict(name='tag')), 'the objective tag reads more of a record than text, pair'),
    (
      dict(data=dict(augment=dict(copy=1))),
      r"config.data.augment.copy is not an option .*'copies'",
    ),
    (
      dict(data=dict(source='mixture', parts=dict(a=dict(source='text', augment=dict(copies=1))))),
      'config.data.parts.a.augment: copies are made of all parts; set data.augment',
    ),
  ],
)
def test_where_there_can_be_no_copies(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    assemble.augmentation(settings(tmp_path, **changes))


def test_words_that_a_model_replaces():
  text = "It's a  good film, Good: well-made!"
  rng = np.random.default_rng(0)
  every = augmentation.blanks(text, 0.99, rng)
  assert every.masked('#').count('#') == 5  # of 6 words, rounded down
  assert ''.join(every.parts) == text
  found = collections.Counter()
  for seed in range(200):
    one = augmentation.blanks(text, 0.1, np.random.default_rng(seed))
    assert one.masked('#').count('#') == 1 and ''.join(one.parts) == text
    found[one.parts[1]] += 1
  assert found.keys() == {"It's", 'a', 'good', 'film', 'Good', 'well-made'}
  assert min(found.values()) > 15
  holes = augmentation.Blanks(('a ', 'Good', ' ', 'film', '!'))
  candidates = [[('good', 0.9), ('fine', 0.05), ('##ly', 0.05)], [('.', 0.6), ('film', 0.4)]]
  assert holes.filled(candidates, rng) == 'a Fine film!'  # a word, another one, or none
  likely = [[('x', 0.75), ('y', 0.25)], []]
  with pytest.raises(ValueError, match='zip'):
    holes.filled(likely[:1], rng)
  share = np.mean(['X' in holes.filled(likely, rng) for _ in range(400)])
  assert 0.68 < share < 0.82
  with pytest.raises(ValueError, match="'...' has no word that could be replaced"):
    augmentation.blanks('...', 0.1, rng)
