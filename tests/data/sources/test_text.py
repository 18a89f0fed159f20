"""Text files: units, gzip, paths, skipped files, long documents, against plain Python reading."""

import gzip
import logging
import os
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.core import plugins
from llm_jax.data.sources import text


def texts(source):
  return [source[i]['text'] for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'deep' / 'er').mkdir(parents=True)
  (tmp_path / 'b.txt').write_bytes('first line\nsecond, 第二行\n\n\nnew block\r\nits end'.encode())
  (tmp_path / 'a.md').write_bytes(b'\xef\xbb\xbfwith a mark\n')
  (tmp_path / 'deep' / 'er' / 'c.py').write_text('x = 1\n')
  (tmp_path / 'deep' / 'd.txt.gz').write_bytes(gzip.compress(b'zipped\n\nzwei\n'))
  (tmp_path / 'ignored.bin').write_text('not of a text suffix')
  return tmp_path


def test_a_document_is_a_file(folder):
  source = text.Source(str(folder))
  want = [
    'with a mark\n',
    'first line\nsecond, 第二行\n\n\nnew block\r\nits end',
    'zipped\n\nzwei\n',
    'x = 1\n',
  ]
  assert texts(source) == want
  assert source[-1] == {'text': 'x = 1\n'}
  assert texts(pickle.loads(pickle.dumps(source))) == want
  with pytest.raises(IndexError):
    source[len(source)]


def test_a_document_is_a_line_or_a_block(folder):
  assert texts(text.Source(str(folder / 'b.txt'), unit='line')) == [
    'first line',
    'second, 第二行',
    'new block',
    'its end',
  ]
  assert texts(text.Source(str(folder / 'b.txt'), unit='block')) == [
    'first line\nsecond, 第二行',
    'new block\r\nits end',
  ]
  assert texts(text.Source(str(folder / 'deep'), unit='block')) == ['zipped', 'zwei', 'x = 1']


def test_gzip_reads_in_any_order(folder):
  source = text.Source(f'{folder}/deep/d.txt.gz,{folder}/a.md', unit='line')
  assert [source[i]['text'] for i in (1, 0, 2, 1, 0)] == [
    'zwei',
    'zipped',
    'with a mark',
    'zwei',
    'zipped',
  ]


def test_paths(folder):
  assert len(text.Source(f'{folder}/*.txt')) == 1
  assert len(text.Source(f'{folder}/**/*.*')) == 5  # named by the glob, so ignored.bin counts
  assert len(text.Source(f'{folder}/b.txt, {folder}/b.txt,{folder}/deep')) == 3
  odd = folder / 'a,b [1].txt'
  odd.write_text('comma and brackets')
  assert texts(text.Source(str(odd))) == ['comma and brackets']


@pytest.mark.parametrize(
  'path, said',
  [('nothing/*.txt', 'matches no file'), ('absent.txt', 'does not exist'), ('', 'matches no file')],
)
def test_a_path_that_matches_nothing(tmp_path, path, said):
  with pytest.raises(ValueError, match=said):
    text.Source(str(tmp_path / path) if path else path)
  with pytest.raises(ValueError, match='known suffix'):
    text.Source(str(tmp_path))


def test_options_are_checked(folder):
  with pytest.raises(ValueError, match='allowed: file, line, block'):
    text.Source(str(folder), unit='page')
  with pytest.raises(ValueError, match='config.data needs path'):
    plugins.construct('data', text.Source, {'unit': 'line', 'path': None})
  with pytest.raises(ValueError, match="did you mean 'unit'"):
    plugins.construct('data', text.Source, {'path': str(folder), 'units': 'line'})


def test_files_that_are_no_text_are_skipped_and_counted(tmp_path, caplog):
  (tmp_path / 'good.txt').write_text('good')
  (tmp_path / 'latin.txt').write_bytes('café au lait'.encode('latin-1'))
  (tmp_path / 'zeros.txt').write_bytes(b'text\0more')
  (tmp_path / 'cut.txt').write_bytes('ends in é'.encode()[:-1])
  with caplog.at_level(logging.WARNING, logger='absl'):
    assert texts(text.Source(str(tmp_path))) == ['good']
  assert '3 of 4 files' in caplog.text and 'latin.txt' in caplog.text and 'NUL byte' in caplog.text


def test_an_empty_corpus(tmp_path):
  (tmp_path / 'blank.txt').write_text(' \n\n')
  (tmp_path / 'none.txt').write_text('')
  (tmp_path / 'mark.txt').write_bytes(b'\xef\xbb\xbf')
  for unit in text.UNITS:
    with pytest.raises(ValueError, match='empty corpus'):
      len(text.Source(str(tmp_path), unit=unit))


def test_a_broken_gzip_file_is_an_error(tmp_path):
  (tmp_path / 'cut.gz').write_bytes(gzip.compress(bytes(range(65, 91)) * 1000)[:-20])
  (tmp_path / 'fake.gz').write_text('plain text')
  for name in ('cut.gz', 'fake.gz'):
    with pytest.raises(ValueError, match=f'{name}: not a whole gzip'):
      len(text.Source(str(tmp_path / name)))


def test_another_content_of_the_same_name_size_and_time_is_seen(tmp_path):
  path = tmp_path / 'x.txt'
  path.write_text('one and two')
  os.utime(path, ns=(10**18, 10**18))
  before = text.Source(str(path)).fingerprint
  path.write_text('two and one')
  os.utime(path, ns=(10**18, 10**18))
  assert text.Source(str(path)).fingerprint != before


def test_the_fingerprint_follows_files_and_options(folder):
  before = text.Source(str(folder)).fingerprint
  assert text.Source(str(folder)).fingerprint == before
  assert text.Source(str(folder), unit='line').fingerprint != before
  moved = folder.rename(folder.with_name('moved'))
  assert text.Source(str(moved)).fingerprint == before
  (moved / 'b.txt').write_text('changed')
  assert text.Source(str(moved)).fingerprint != before


def test_a_file_that_shrinks_after_the_index(folder):
  source = text.Source(str(folder / 'b.txt'))
  assert len(source) == 1
  (folder / 'b.txt').write_text('short')
  with pytest.raises(ValueError, match='changed after it was indexed'):
    source[0]


@pytest.mark.parametrize('unit', ['file', 'line', 'block'])
def test_a_long_document_is_cut_and_nothing_lost(tmp_path, caplog, unit):
  lines = ['一二三' * 700 + 'x' * (i % 3) for i in range(3)] + ['short'] * 400
  (tmp_path / 'long.txt').write_text('\n'.join(lines))
  source = text.Source(str(tmp_path), unit=unit, max_document_bytes=1024)
  with caplog.at_level(logging.WARNING, logger='absl'):
    pieces = texts(source)
  assert max(len(piece.encode()) for piece in pieces) <= 1024
  assert 'were cut at' in caplog.text
  assert ''.join(pieces) == ('' if unit == 'line' else '\n').join(lines)
  if unit != 'line':
    assert len(pieces) < 40  # pieces are filled, cut at line ends among the short lines
    assert all(piece.endswith('short\n') for piece in pieces[-3:-1])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.text(alphabet='ab\n 一é', max_size=12), max_size=8).map('\n'.join))
def test_scan_agrees_with_splitting_the_string(tmp_path_factory, content):
  path = tmp_path_factory.mktemp('scan') / 'x.txt'
  path.write_bytes(content.encode())
  lines = [line for line in content.split('\n') if line.strip()]
  if not lines:
    with pytest.raises(ValueError, match='empty corpus'):
      len(text.Source(str(path), unit='line'))
    return
  assert texts(text.Source(str(path), unit='line')) == lines
  assert texts(text.Source(str(path))) == [content]
  blocks, block = [], []
  for line in [*content.split('\n'), '']:
    if line.strip():
      block.append(line)
    elif block:
      blocks.append('\n'.join(block))
      block = []
  assert texts(text.Source(str(path), unit='block')) == blocks
