"""A dataset that TFDS itself prepared, read back without TensorFlow."""

import pickle
import shutil

import pytest

from llm_jax.data.sources import tfds

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
        'text': tfds.features.Text(), 'second': tfds.features.Text(),
        'label': tfds.features.ClassLabel(names=['no', 'yes']),
        'score': tfds.features.Scalar(np.float32), 'number': tfds.features.Scalar(np.int64),
        'tags': tfds.features.Sequence(tfds.features.ClassLabel(names=['red', 'blue'])),
        'words': tfds.features.Sequence(tfds.features.Text()),
    }))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(12), 'test': self._generate_examples(3)}

  def _generate_examples(self, count):
    for i in range(count):
      label = -1 if i == 11 else i % 2
      yield i, {'text': f'text {i} 好', 'second': f'second {i}', 'label': label, 'score': i / 2,
                'number': i, 'tags': ['red', 'blue'][:i % 3], 'words': ['w'] * (i % 2)}
"""


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The folder with the prepared dataset; its builder lies in a package folder of its own, as TFDS
  wants.
  """
  import importlib
  import sys

  root = tmp_path_factory.mktemp('tfds')
  package = root / 'code' / 'tiny_texts'
  package.mkdir(parents=True)
  (package / '__init__.py').write_text('')
  (package / 'tiny_texts.py').write_text(BUILDER)
  sys.path.insert(0, str(root / 'code'))
  try:
    module = importlib.import_module('tiny_texts.tiny_texts')
    module.Builder(data_dir=str(root / 'data'), file_format='array_record').download_and_prepare()
  finally:
    sys.path.remove(str(root / 'code'))
  return root / 'data'


def documents(source):
  return [source[i] for i in range(len(source))]


def number(document):
  return int(document['text'].split()[1])


def test_documents(prepared):
  source = tfds.Source('tiny_texts', data_dir=str(prepared), pair='second')
  read = documents(source)
  assert sorted(map(number, read)) == list(range(12))
  assert all(d == {'text': f'text {number(d)} 好', 'pair': f'second {number(d)}'} for d in read)
  copy = pickle.loads(pickle.dumps(source))
  assert copy[3] == source[3] and copy.fingerprint == source.fingerprint
  with pytest.raises(IndexError):
    source[12]


def test_by_folder_and_by_slice(prepared):
  by_folder = tfds.Source(str(prepared / 'tiny_texts' / '1.0.0'), split='test')
  assert len(by_folder) == 3
  assert by_folder.fingerprint != tfds.Source('tiny_texts', data_dir=str(prepared)).fingerprint
  part = tfds.Source('tiny_texts', split='train[:50%]', data_dir=str(prepared))
  whole = tfds.Source('tiny_texts', data_dir=str(prepared))
  assert documents(part) == documents(whole)[:6]


@pytest.mark.parametrize(
  'field, want',
  [
    ('label', lambda i: ['no', 'yes'][i % 2]),
    ('score', lambda i: i / 2),
    ('number', str),
    ('tags', lambda i: ['red', 'blue'][: i % 3]),
    ('words', lambda i: ['w'] * (i % 2)),
  ],
)
def test_labels(prepared, field, want):
  source = tfds.Source('tiny_texts', data_dir=str(prepared), label=field)
  read = [
    source[i]
    for i in range(len(source))
    if number(tfds.Source('tiny_texts', data_dir=str(prepared))[i]) != 11
  ]
  assert [d['label'] for d in read] == [want(number(d)) for d in read]


def test_an_example_without_a_label(prepared):
  source = tfds.Source('tiny_texts', data_dir=str(prepared), label='label')
  (index,) = (i for i, document in enumerate(documents(source)) if 'label' not in document)
  assert number(source[index]) == 11 and source.where(index).endswith(f'example {index}')


def test_errors_say_the_way_out(prepared, tmp_path):
  with pytest.raises(ValueError, match='download_and_prepare'):
    tfds.Source('no_such_data_set', data_dir=str(tmp_path))
  with pytest.raises(ValueError, match=r'no dataset prepared under .*array_record'):
    tfds.Source('imdb_reviews', data_dir=str(tmp_path))  # one whose code TFDS has
  sequential = shutil.copytree(prepared / 'tiny_texts' / '1.0.0', tmp_path / 'sequential')
  info = sequential / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(ValueError, match=r'prepared as tfrecord, which has no random access'):
    tfds.Source(str(sequential))
  with pytest.raises(ValueError, match=r"split='valid' .*it has: .*test"):
    tfds.Source('tiny_texts', split='valid', data_dir=str(prepared))
  with pytest.raises(ValueError, match=r"no field 'txt' \(did you mean 'text'"):
    tfds.Source('tiny_texts', data_dir=str(prepared), text='txt')
