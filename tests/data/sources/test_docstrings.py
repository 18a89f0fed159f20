"""The embedded labelled corpus: labels that can be learned."""

import ast
import collections
import pickle
from pathlib import Path

import pytest

from llm_jax.data.sources import docstrings, stdlib


@pytest.fixture(scope='module')
def labelled():
  return docstrings.Source()


@pytest.mark.slow
def test_labelled(labelled):
  documents = [labelled[i] for i in range(len(labelled))]
  counts = collections.Counter(document['label'] for document in documents)
  assert 20 <= len(counts) <= 60 and min(counts.values()) >= 30
  assert len(documents) > 1500
  assert len({document['text'] for document in documents}) == len(documents)
  assert min(len(document['text']) for document in documents) >= 80
  module = ast.parse((Path(labelled.library.root) / 'doctest.py').read_bytes())
  assert {'text': ast.get_docstring(module), 'label': 'doctest'} in documents
  assert labelled.fingerprint != stdlib.Source().fingerprint


@pytest.mark.slow
def test_parsed_docstrings_travel_with_a_pickle(labelled):
  parsed = labelled[7]
  copy = pickle.loads(pickle.dumps(labelled))
  assert '_texts' in vars(copy) and copy[7] == parsed


def test_docstrings():
  source = (
    b'"""module"""\nclass A:\n  """class"""\n  async def f(self):\n    """\n    f\n      g\n    '
    b'"""\n'
    b'def g():\n  "g"\n  return "no"\n'
  )
  assert sorted(docstrings.docstrings(source)) == ['class', 'f\n  g', 'g', 'module']
