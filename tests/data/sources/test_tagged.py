"""CoNLL columns, CoNLL-U and word/tag text; bad lines are named by file and line."""

import gzip
import pickle
import random

import pytest

from llm_jax.data.sources import conll, conllu, headings, word_tag

NEWS = """-DOCSTART- -X- -X- O

EU NNP I-NP B-ORG
rejects VBZ I-VP O

 \t
-DOCSTART- -X- -X- O
New\u00a0York NNP I-NP B-LOC
. . O O
"""


def write(path, text):
  data = text.encode() if isinstance(text, str) else text
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return str(path)


def everything(source):
  return [source[i] for i in range(len(source))]


@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('name', ['a.conll', 'a.conll.gz'])
def test_columns(tmp_path, end, name):
  path = write(tmp_path / name, '\ufeff' + NEWS.replace('\n', end).rstrip())
  source = conll.Source(path)
  assert everything(source) == [
    {'words': ['EU', 'rejects'], 'tags': ['B-ORG', 'O']},
    {'words': ['New\u00a0York', '.'], 'tags': ['B-LOC', 'O']},
  ]
  assert source.where(1).endswith(f'{name}:8') and source[-1] == source[1]
  chunks = conll.Source(path, tag_column=2)
  assert chunks[0]['tags'] == ['I-NP', 'I-VP'] and chunks.fingerprint != source.fingerprint
  assert pickle.loads(pickle.dumps(source))[0] == source[0]


def test_tabs_go_before_spaces(tmp_path):
  source = conll.Source(write(tmp_path / 'a.txt', '1\tNew York\tB\n2\tis  big\tO\n'), 1)
  assert source[0] == {'words': ['New York', 'is  big'], 'tags': ['B', 'O']}


@pytest.mark.parametrize(
  ('text', 'options', 'message'),
  [
    ('a O\nb X O\n', {}, r'a.conll:2: 3 columns, and 2 in the lines before'),
    ('\na O\n\nb O\nc\n', {}, r'a.conll:5: 1 columns'),
    ('a O\n', dict(tag_column=2), r'a.conll:1: no column 2, only 2; `tag_column` names it'),
    ('a\tO\nb\t\n', {}, r'a.conll:2: column -1 is empty'),
    (b'a O\n\xff O\n', {}, r'a.conll:2: not UTF-8'),
    ('-DOCSTART- O\n\n', {}, 'empty corpus'),
  ],
)
def test_columns_that_cannot_be(tmp_path, text, options, message):
  with pytest.raises(ValueError, match=message):
    everything(conll.Source(write(tmp_path / 'a.conll', text), **options))


SPANISH = """# sent_id = 1
# text = Vamos al mar
1\tVamos\tir\tVERB\tV\t_\t0\troot\t_\t_
2-3\tal\t_\t_\t_\t_\t_\t_\t_\t_
2\ta\ta\tADP\tP\t_\t4\tcase\t_\t_
3\tel\tel\tDET\tD\tGender=Masc\t4\tdet\t_\t_
3.1\tnada\t_\t_\t_\t_\t_\t_\t_\t_
4\tmar\tmar\tNOUN\tN\t_\t1\tobl\t_\tSpaceAfter=No

# text = Ya
1\tYa\tya\tADV\tA\t_\t0\troot\t_\t_
"""


def test_universal_dependencies(tmp_path):
  path = write(tmp_path / 'a.conllu', SPANISH)
  source = conllu.Source(path)
  assert everything(source) == [
    {'words': ['Vamos', 'a', 'el', 'mar'], 'tags': ['VERB', 'ADP', 'DET', 'NOUN']},
    {'words': ['Ya'], 'tags': ['ADV']},
  ]
  assert source.where(0).endswith('a.conllu:3')
  assert conllu.Source(path, 'xpos')[0]['tags'] == ['V', 'P', 'D', 'N']
  assert conllu.Source(path, 'feats')[0]['tags'] == ['_', '_', 'Gender=Masc', '_']
  with pytest.raises(ValueError, match="column='upo' is not known.*'upos'"):
    conllu.Source(path, 'upo')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (('2\ta', '3\ta'), r'a.conllu:5: the word number 3 comes after 1'),
    (('\tADP\t', ' ADP '), r'a.conllu:5: 8 columns; CoNLL-U has 10'),
    (('ADP', '_'), r"a.conllu:5: no upos \('_'\)"),
    (('2-3', '2-x'), r"a.conllu:4: '2-x' is no number"),
  ],
)
def test_universal_dependencies_that_cannot_be(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    everything(conllu.Source(write(tmp_path / 'a.conllu', SPANISH.replace(*change, 1))))


def test_words_with_a_slash(tmp_path):
  path = write(tmp_path / 'a.pos', '\ufeffThe/DT 1/2/CD\t//SYM \r\n\n  \nGo/VB\n')
  source = word_tag.Source(path)
  assert everything(source) == [
    {'words': ['The', '1/2', '/'], 'tags': ['DT', 'CD', 'SYM']},
    {'words': ['Go'], 'tags': ['VB']},
  ]
  assert source.where(1).endswith('a.pos:4')
  other = word_tag.Source(write(tmp_path / 'b.pos', '人民_n 日报_n'), '_')
  assert other[0] == {'words': ['人民', '日报'], 'tags': ['n', 'n']}


@pytest.mark.parametrize('item', ['plain', '/DT', 'word/'])
def test_words_that_cannot_be(tmp_path, item):
  source = word_tag.Source(write(tmp_path / 'a.pos', f'a/X\nb/X {item}\n'))
  with pytest.raises(ValueError, match=f"a.pos:2: item 1 is '{item}'; each must be a word"):
    source[1]
  assert source[0]['words'] == ['a']


@pytest.mark.parametrize(
  ('line', 'entities'),
  [
    ('async def f(self, *, a=g(b, c)):', ['function f', 'parameter self', 'parameter a']),
    ('class A(b.C, D, metaclass=E):', ['class A', 'class b . C', 'class D']),
    ('import os.path, sys as s', ['module os . path', 'module sys']),
    ('from .x import (a as b, c)', ['module . x', 'name a', 'name c']),
  ],
)
def test_headings(line, entities):
  words = headings._WORDS.findall(line)
  found = []
  for word, tag in zip(words, headings.tags(words), strict=True):
    if tag[0] == 'B':
      found.append(f'{tag[2:]} {word}')
    elif tag[0] == 'I':
      found[-1] += f' {word}'
  assert found == entities


def test_the_library_has_headings():
  source = headings.Source()
  assert len(source) > 5000 and source[0].keys() == {'words', 'tags'}
  kinds = {tag[2:] for i in range(0, len(source), 7) for tag in source[i]['tags']}
  assert kinds == {'', 'function', 'parameter', 'class', 'module', 'name'}


TAKES = {'f a': 'takes', 'f b': 'takes', 'a f': 'is taken by', 'b f': 'is taken by'}


@pytest.mark.parametrize(
  ('line', 'predicate', 'others', 'labels'),
  [
    ('def f(a, b):', 'f', 'a b', TAKES),
    ('class A(B):', 'A', 'B', {'A B': 'extends', 'B A': 'is extended by'}),
    ('from x.y import z', 'x.y', 'z', {'x.y z': 'offers', 'z x.y': 'is offered by'}),
    ('import a, b', 'a', 'b', {}),
  ],
)
def test_roles_and_relations_of_headings(line, predicate, others, labels):
  words = headings._WORDS.findall(line)
  found = headings.roles(words)
  first, stop = found['predicate']
  assert ''.join(words[first:stop]) == predicate
  tagged = [word for word, tag in zip(words, found['tags'], strict=True) if tag != 'O']
  assert ' '.join(tagged) == others
  for seed in range(40):
    related = headings.relation(line, random.Random(seed))
    names = [line[slice(*related[field])] for field in ('head', 'tail')]
    assert related['label'] == labels.get(' '.join(names), 'beside')


def test_other_views_of_the_library():
  plain = headings.Source()
  for view, keys in (
    ('roles', {'words', 'tags', 'predicate'}),
    ('relations', {'text', 'head', 'tail', 'label'}),
  ):
    source = headings.Source(view)
    assert source[0].keys() == keys and source[7] == source[7]
    assert 3000 < len(source) < len(plain) and source.fingerprint != plain.fingerprint
  assert len({source[i]['label'] for i in range(0, len(source), 9)}) == 7
  with pytest.raises(
    ValueError, match="config.data.view='x' must be one of tags, relations, roles"
  ):
    headings.Source('x')
