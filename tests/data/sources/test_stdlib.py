"""The embedded corpus: what is in it, what is not, and labels that can be learned."""

import ast
import collections
import pickle
import sysconfig
from pathlib import Path

import pytest

from llm_jax.data.sources import stdlib


def test_files():
  source = stdlib.Source()
  root = Path(sysconfig.get_path('stdlib'))
  assert 300 < len(source) < 2000
  left_out = {'test', 'tests', 'site-packages', 'idle_test', 'encodings'}
  assert not [name for name in source.files if left_out & set(name.split('/'))]
  for name in ('argparse.py', 'json/decoder.py'):
    assert source[source.files.index(name)] == {'text': (root / name).read_bytes().decode()}
  assert sum(len(source[i]['text']) for i in range(len(source))) > 8_000_000
  assert stdlib.Source().fingerprint == source.fingerprint


@pytest.fixture(scope='module')
def labelled():
  return stdlib.Source(labelled=True)


def test_labelled(labelled):
  documents = [labelled[i] for i in range(len(labelled))]
  counts = collections.Counter(document['label'] for document in documents)
  assert 20 <= len(counts) <= 60 and min(counts.values()) >= 30
  assert len(documents) > 1500
  assert len({document['text'] for document in documents}) == len(documents)
  assert min(len(document['text']) for document in documents) >= 80
  module = ast.parse((Path(labelled.root) / 'doctest.py').read_bytes())
  assert {'text': ast.get_docstring(module), 'label': 'doctest'} in documents
  assert labelled.fingerprint != stdlib.Source().fingerprint


def test_parsed_docstrings_travel_with_a_pickle(labelled):
  copy = pickle.loads(pickle.dumps(labelled))
  assert '_docstrings' in vars(copy) and copy[7] == labelled[7]


def test_docstrings():
  source = (b'"""module"""\nclass A:\n  """class"""\n  async def f(self):\n    """\n    f\n      g\n    """\n'
            b'def g():\n  "g"\n  return "no"\n')
  assert sorted(stdlib.docstrings(source)) == ['class', 'f\n  g', 'g', 'module']
