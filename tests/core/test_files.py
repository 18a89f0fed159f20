"""What is written whole: the old content until the end, the new one after it, nothing left over."""

import pathlib

import pytest

from llm_jax.core import files


def names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_it_is_written_to_the_end(tmp_path):
  target = tmp_path / 'a.json'
  target.write_text('old')
  with files.whole_file(target) as file:
    file.write('né')
    file.flush()
    assert target.read_text() == 'old' and len(names(tmp_path)) == 2
  assert target.read_bytes() == 'né'.encode() and names(tmp_path) == ['a.json']


def test_bytes_and_a_path_that_is_text(tmp_path):
  with files.whole_file(str(tmp_path / 'a.bin'), 'wb') as file:
    file.write(b'\x00\xff')
  assert (tmp_path / 'a.bin').read_bytes() == b'\x00\xff' and names(tmp_path) == ['a.bin']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_a_file_whose_writing_fails_is_as_it_was(tmp_path, error):
  target = tmp_path / 'a.json'
  target.write_text('old')
  with pytest.raises(error), files.whole_file(target) as file:
    file.write('new')
    raise error
  assert target.read_text() == 'old' and names(tmp_path) == ['a.json']


def test_a_file_is_not_appended_to(tmp_path):
  with pytest.raises(ValueError, match="mode='a' must be 'w' or 'wb'"):
    with files.whole_file(tmp_path / 'a', 'a'):
      pass


def test_a_folder_is_replaced_when_it_is_written_to_the_end(tmp_path):
  target = tmp_path / 'model'
  target.mkdir()
  (target / 'old').write_text('old')
  left = tmp_path / 'model.partial'  # by a process that was killed
  left.mkdir()
  (left / 'half').write_text('half')
  with files.whole_folder(target) as folder:
    (folder / 'new').write_text('new')
    assert names(target) == ['old']
  assert names(tmp_path) == ['model'] and names(target) == ['new']


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_a_folder_whose_writing_fails_is_as_it_was(tmp_path, error):
  target = tmp_path / 'model'
  target.mkdir()
  (target / 'old').write_text('old')
  with pytest.raises(error), files.whole_folder(str(target)) as folder:
    (folder / 'new').write_text('new')
    raise error
  assert names(tmp_path) == ['model'] and names(target) == ['old']
