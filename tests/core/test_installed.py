"""Config files: those of the working folder come first, then those that are installed."""

import pathlib

import pytest

from llm_jax.core import installed

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
  ('path', 'found'),
  [
    ('configs/bert_tiny.py', CONFIGS / 'bert_tiny.py'),
    ('configs/gpt2.py:medium', f'{CONFIGS}/gpt2.py:medium'),
    ('configs/llama.py:3.2-1b', f'{CONFIGS}/llama.py:3.2-1b'),
  ],
)
def test_an_installed_config_is_found_from_any_folder(path, found):
  assert installed.config_file(path) == str(found)
  assert (CONFIGS / path.partition(':')[0].removeprefix('configs/')).is_file()


def test_a_file_of_the_working_folder_comes_first(tmp_path):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'gpt2.py').touch()
  assert installed.config_file('configs/gpt2.py:medium') == 'configs/gpt2.py:medium'
  assert installed.config_file('configs/llama.py') == str(CONFIGS / 'llama.py')


@pytest.mark.parametrize(
  'path',
  [
    'configs/bert_tinny.py',
    'bert_tiny.py',
    'mine/configs/bert_tiny.py',
    '/configs/bert_tiny.py',
    'configs/../configs/bert_tiny.py',
    'configs/bert_tiny',
    'configs/',
    '',
  ],
)
def test_any_other_path_stays_as_it_is(path):
  assert installed.config_file(path) == path
