"""What a folder of sentence-transformers says of its vectors."""

import json

import pytest

from llm_jax.hf import sentences


def folder(path, modules, pooling, options=None):
  types = [f'sentence_transformers.models.{name}' for name in modules]
  paths = {'Pooling': '1_Pooling'}
  listed = [
    {'idx': i, 'path': paths.get(name, ''), 'type': types[i]} for i, name in enumerate(modules)
  ]
  (path / '1_Pooling').mkdir(exist_ok=True)
  (path / 'modules.json').write_text(json.dumps(listed))
  (path / '1_Pooling' / 'config.json').write_text(json.dumps(pooling))
  if options is not None:
    (path / 'sentence_bert_config.json').write_text(json.dumps(options))
  return path


def test_a_folder_without_modules(tmp_path):
  assert sentences.read(tmp_path) is None and sentences.max_len(tmp_path) is None


@pytest.mark.parametrize(
  'key, pool',
  [
    ('pooling_mode_cls_token', 'cls'),
    ('pooling_mode_mean_tokens', 'mean'),
    ('pooling_mode_lasttoken', 'last'),
  ],
)
def test_what_it_says(tmp_path, key, pool):
  pooling = {'word_embedding_dimension': 384, key: True, 'pooling_mode_max_tokens': False}
  path = folder(tmp_path, ['Transformer', 'Pooling'], pooling)
  assert sentences.read(path) == sentences.Sentences(pool, normalize=False, lower=False)
  options = {'max_seq_length': 256, 'do_lower_case': True}
  path = folder(tmp_path, ['Transformer', 'Pooling', 'Normalize'], pooling, options)
  assert sentences.read(path) == sentences.Sentences(pool, normalize=True, lower=True)
  assert sentences.max_len(path) == 256


@pytest.mark.parametrize(
  'modules, pooling, message',
  [
    (['Transformer', 'Pooling', 'Dense'], {}, 'Dense is not supported'),
    (['Transformer', 'Pooling'], {'pooling_mode_max_tokens': True}, 'by pooling_mode_max_tokens'),
    (
      ['Transformer', 'Pooling'],
      {'pooling_mode_cls_token': True, 'pooling_mode_mean_tokens': True},
      'pooling_mode_cls_token and pooling_mode_mean_tokens',
    ),
    (['Transformer', 'Pooling'], {}, 'pooling by nothing'),
  ],
)
def test_what_is_not_supported(tmp_path, modules, pooling, message):
  with pytest.raises(ValueError, match=message):
    sentences.read(folder(tmp_path, modules, pooling))
