import dataclasses
import glob
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.core import contracts, progress
from llm_jax.data import cache, cache_writer, encoding

TEXT = encoding.Encoder([contracts.Objective.encode])


@dataclasses.dataclass
class Listed:
  """A source over a list of documents."""

  documents: list
  seconds: float = 0.0

  @property
  def fingerprint(self):
    return json.dumps(self.documents)

  def __len__(self):
    return len(self.documents)

  def __getitem__(self, index):
    time.sleep(self.seconds)
    return self.documents[index]


@dataclasses.dataclass
class Letters:
  """UTF-8 bytes as ids, above a given first id."""

  vocab_size: int = 256
  first: int = 0

  @property
  def fingerprint(self):
    return f'letters {self.vocab_size} {self.first}'

  def encode(self, text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self.first


class Refusing(Letters):
  """Counts on a cache: encoding anything is a failure."""

  def encode(self, text):
    raise RuntimeError('encoded again')


def _texts(n):
  return [{'text': f'document number {i}'} for i in range(n)]


def _spelled(split, name):
  return [bytes(split.array(name, i).astype(np.uint8)).decode() for i in range(len(split))]


def _raw(corpus):
  return corpus.arrays['tokens'].entries.tobytes()


def _entries(directory):
  return sorted(e for e in os.listdir(directory) if not e.endswith('.lock'))


@settings(max_examples=25, deadline=None)
@given(
  texts=st.lists(
    st.tuples(st.text(max_size=20), st.none() | st.text(max_size=9), st.none() | st.floats(0, 1)),
    min_size=1,
    max_size=40,
  )
)
def test_documents_come_back_as_they_went_in(tmp_path_factory, texts):
  documents = [
    dict(text=t) | ({} if p is None else {'pair': p}) | ({} if y is None else {'label': y})
    for t, p, y in texts
  ]
  total = sum(len((t + (p or '')).encode()) for t, p, _ in texts)
  directory = str(tmp_path_factory.mktemp('cache'))
  if not total:
    with pytest.raises(ValueError, match='empty corpus'):
      cache.build(Listed(documents), Letters(), TEXT, directory, workers=1)
    return
  corpus = cache.build(Listed(documents), Letters(), TEXT, directory, workers=1)
  everything, nothing = corpus.split(0.0)
  assert len(corpus) == len(everything) == len(texts) and len(nothing) == 0
  assert (
    corpus.tokens_total
    == everything.tokens_total
    == corpus.bytes_total
    == everything.bytes
    == total
  )
  assert _spelled(everything, 'tokens') == [t for t, _, _ in texts]
  np.testing.assert_array_equal(
    everything.lengths('tokens'), [len(t.encode()) for t, _, _ in texts]
  )
  if any(p is not None for _, p, _ in texts):
    assert everything.names == {'tokens', 'pair_tokens'}
    np.testing.assert_array_equal(
      everything.lengths('pair_tokens'), [len((p or '').encode()) for _, p, _ in texts]
    )
    assert _spelled(everything, 'pair_tokens') == [p or '' for _, p, _ in texts]
  else:
    assert everything.names == {'tokens'}
  labels = [y for _, _, y in texts]
  wanted = labels if any(y is not None for y in labels) else None
  assert everything.values('label') == corpus.values('label') == wanted


def test_parts_of_a_text_are_python_slices(tmp_path):
  train, _ = cache.build(
    Listed([{'text': 'zero'}, {'text': 'abcdef'}]), Letters(), TEXT, str(tmp_path)
  ).split(0.0)
  for start, stop in ((0, None), (2, 4), (4, 99), (6, 9)):
    part = train.array('tokens', 1, start, stop)
    assert part.dtype == np.int32 and bytes(part.astype(np.uint8)) == b'abcdef'[start:stop]


@pytest.mark.parametrize(
  'vocab_size, dtype', [(256, 'uint8'), (257, 'uint16'), (65536, 'uint16'), (65537, 'uint32')]
)
def test_ids_are_kept_in_the_smallest_type(tmp_path, vocab_size, dtype):
  corpus = cache.build(
    Listed([{'text': '~a'}]), Letters(vocab_size, vocab_size - 1 - ord('~')), TEXT, str(tmp_path)
  )
  assert corpus.arrays['tokens'].entries.dtype == dtype
  assert corpus.split(0.0)[0].array('tokens', 0).tolist() == [
    vocab_size - 1,
    vocab_size - 1 - ord('~') + ord('a'),
  ]


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
  with pytest.raises(
    ValueError, match='ids 97 to 100 in documents 0 to 0; they must be from 0 to 99'
  ):
    cache.build(Listed([{'text': 'ad'}]), Letters(100), TEXT, str(tmp_path))
  assert _entries(tmp_path) == []


def test_a_second_run_opens_the_cache_and_other_inputs_get_their_own(tmp_path):
  first = cache.build(Listed(_texts(5)), Letters(), TEXT, str(tmp_path))
  again = cache.build(Listed(_texts(5)), Refusing(), TEXT, str(tmp_path))
  assert again.fingerprint == first.fingerprint and _raw(again) == _raw(first)
  others = [
    cache.build(Listed(_texts(6)), Letters(), TEXT, str(tmp_path)),
    cache.build(Listed(_texts(5)), Letters(257), TEXT, str(tmp_path)),
  ]
  assert len({first.fingerprint, *(c.fingerprint for c in others)}) == 3 == len(_entries(tmp_path))


def test_damage_of_the_right_size_is_seen(tmp_path, caplog):
  source = Listed(_texts(5))
  whole = cache.build(source, Letters(), TEXT, str(tmp_path))
  written = _raw(whole)
  path = os.path.join(whole.directory, 'tokens.values.bin')
  with open(path, 'r+b') as file:
    first = file.read(1)
    file.seek(0)
    file.write(bytes([first[0] ^ 1]))
  assert _raw(cache.build(source, Letters(), TEXT, str(tmp_path))) == written
  assert 'tokens.values.bin is not what was written' in caplog.text


@pytest.mark.parametrize(
  'name, content', [('tokens.values.bin', b'short'), ('meta.json', b''), ('hashes.bin', None)]
)
def test_a_damaged_cache_is_built_again(tmp_path, name, content, caplog):
  source = Listed(_texts(5))
  whole = cache.build(source, Letters(), TEXT, str(tmp_path))
  path = os.path.join(whole.directory, name)
  os.remove(path)
  if content is not None:
    with open(path, 'wb') as file:
      file.write(content)
  with pytest.raises(RuntimeError, match='encoded again'):
    cache.build(source, Refusing(), TEXT, str(tmp_path))
  assert _entries(tmp_path) == []
  assert f'{whole.directory} is damaged' in caplog.text
  repaired = cache.build(source, Letters(), TEXT, str(tmp_path))
  assert _raw(repaired) == _raw(whole) and len(repaired) == 5


def test_an_error_in_a_document_names_it_and_leaves_nothing(tmp_path):
  with pytest.raises(ValueError, match='a record has no text, only txt') as caught:
    cache.build(Listed([{'text': 'a'}, {'txt': 'b'}]), Letters(), TEXT, str(tmp_path))
  assert caught.value.__notes__ == ['while tokenizing document 1']
  assert _entries(tmp_path) == []


def test_progress_is_logged_where_there_is_no_terminal(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(progress, 'LOG_SECONDS', 0.0)
  monkeypatch.setattr(sys, 'stderr', io.StringIO())
  caplog.set_level('INFO')
  cache.build(Listed(_texts(40)), Letters(), TEXT, str(tmp_path), workers=1)
  assert 'Tokenizing: 16 of 40 documents, 0 s left.' in caplog.text
  assert 'Tokenized 40 documents: 710 tokens of 710 bytes' in caplog.text


def test_empty_corpora_and_negative_workers_are_refused(tmp_path):
  for documents in ([], [{'text': ''}, {'text': ''}]):
    with pytest.raises(ValueError, match='empty corpus'):
      cache.build(Listed(documents), Letters(), TEXT, str(tmp_path))
  with pytest.raises(ValueError, match='workers=-1'):
    cache.build(Listed(_texts(2)), Letters(), TEXT, str(tmp_path), workers=-1)
  assert _entries(tmp_path) == []


def test_the_validation_split_is_by_hash(tmp_path):
  texts = _texts(2000)
  small = cache.build(Listed(texts), Letters(), TEXT, str(tmp_path))
  large = cache.build(Listed(_texts(2600)[::-1] + texts[:100]), Letters(), TEXT, str(tmp_path))

  def side(split):
    return set(_spelled(split, 'tokens'))

  for share in (0.05, 0.3):
    train, held = small.split(share)
    assert len(train) + len(held) == 2000 and abs(len(held) - 2000 * share) < 4 * np.sqrt(
      2000 * share * (1 - share)
    )
    assert (
      set(train.ids) | set(held.ids) == set(range(2000))
      and train.bytes + held.bytes == small.bytes_total
    )
    more_train, more_held = large.split(share)
    assert side(train) <= side(more_train) and side(held) <= side(
      more_held
    )  # nothing moves when documents are added
    assert not side(more_train) & side(more_held)  # copies stay together
  assert side(small.split(0.05)[1]) < side(small.split(0.3)[1])


def test_documents_that_share_a_text_but_not_the_pair_are_split_apart(tmp_path):
  corpus = cache.build(
    Listed([{'text': 'same', 'pair': str(i)} for i in range(64)]), Letters(), TEXT, str(tmp_path)
  )
  assert len(set(corpus.hashes.tolist())) == 64
  train, held = corpus.split(0.5)
  assert len(train) and len(held)


def test_a_split_that_leaves_a_side_empty_says_how_to_go_on(tmp_path):
  corpus = cache.build(Listed([{'text': 'one huge file'}]), Letters(), TEXT, str(tmp_path))
  with pytest.raises(ValueError, match=r"(1|0) documents .* of 1; both need some.*unit='line'"):
    corpus.split(0.1)
  for share in (-0.1, 1.0, 2):
    with pytest.raises(ValueError, match=rf'validation={share} must be'):
      corpus.split(share)


RECORDS = [
  {'text': 'one'},
  {'text': 'two', 'pair': 'zwei', 'label': 'x'},
  {'text': 'é', 'label': ['a', 'é']},
  {'text': 'z', 'label': 1.5},
  {'text': '', 'other': 3},
]


def test_content_and_split_are_those_of_revision_6ec0a05(tmp_path):
  """Checkpoints hold the content; the numbers are that revision's own."""
  labelled = cache.build(Listed(RECORDS), Letters(), TEXT, str(tmp_path))
  assert labelled.content == '206f3069bb6bc75ad8b55013f9546c4e'
  assert labelled.hashes.tolist() == [
    10020475944890315492,
    7998329510281333425,
    17236566956269714885,
    15755143374770264236,
    5224996704525874836,
  ]
  assert [cache.held_out(record, 0.5) for record in RECORDS] == [False, True, False, False, True]
  held = labelled.split(0.5)[1]
  assert held.ids.tolist() == [1, 4]
  plain = [{'text': 'one'}, {'text': 'two', 'pair': 'zwei'}, {'text': 'two', 'pair': ''}]
  unlabelled = cache.build(Listed(plain), Letters(), TEXT, str(tmp_path))
  assert unlabelled.content == '14a5e4caad856905c561fed9b118e657'


def tags(record, tokenizer):
  """Spans of digits as an array, and the words as a list."""
  text = record['text']
  given = {'tags': np.array([-int(c.isdigit()) for c in text], np.int64)}
  return given | ({'words': text.split()} if ' ' in text else {'words': None})


TAGGED = encoding.Encoder([*TEXT.functions, tags])


def turns(record, tokenizer):
  """Records without a text."""
  ids = [tokenizer.encode(turn) for turn in record['turns']]
  return {'chat_tokens': np.concatenate(ids), 'ends': np.cumsum(list(map(len, ids)))}


def test_other_arrays_and_values_are_kept_by_name(tmp_path):
  records = [{'text': 'a1'}, {'text': ''}, {'text': '22 b'}, {'text': 'c'}]
  corpus = cache.build(Listed(records), Letters(), TAGGED, str(tmp_path))
  everything, _ = corpus.split(0.0)
  assert everything.names == {'tokens', 'tags'} and corpus.tokens_total == 7
  found = [everything.array('tags', i) for i in range(4)]
  assert [a.tolist() for a in found] == [[0, -1], [], [-1, -1, 0, 0], [0]]
  assert {a.dtype for a in found} == {np.dtype(np.int32)}
  assert everything.values('words') == [None, None, ['22', 'b'], None]
  assert everything.values('label') is None
  with pytest.raises(ValueError, match="no array 'pair_tokens', only tags, tokens"):
    everything.lengths('pair_tokens')


def test_the_content_covers_what_other_encoders_give(tmp_path):
  source = Listed([{'text': 'a1'}, {'text': 'b c'}])
  plain = cache.build(source, Letters(), TEXT, str(tmp_path))
  tagged = cache.build(source, Letters(), TAGGED, str(tmp_path))
  again = cache.build(
    source, Letters(), encoding.Encoder([tags, *TEXT.functions, tags]), str(tmp_path)
  )
  assert again.fingerprint == tagged.fingerprint != plain.fingerprint
  assert again.content == tagged.content != plain.content
  other = cache.build(
    Listed([{'text': 'a1'}, {'text': 'b d'}]), Letters(), encoding.Encoder([tags]), str(tmp_path)
  )
  assert len({plain.content, tagged.content, other.content}) == 3


def test_records_without_a_text_are_split_by_their_json(tmp_path):
  records = [{'turns': [f'hi {i}', 'ho'], 'id': i} for i in range(64)]
  corpus = cache.build(Listed(records), Letters(), encoding.Encoder([turns]), str(tmp_path))
  first = hashlib.blake2b(json.dumps(records[0], sort_keys=True).encode(), digest_size=8)
  assert corpus.hashes[0] == int.from_bytes(first.digest(), 'little')
  train, held = corpus.split(0.5)
  assert [i for i, record in enumerate(records) if cache.held_out(record, 0.5)] == [*held.ids]
  assert train.tokens_total + held.tokens_total == sum(len(f'hi {i}ho') for i in range(64))
  assert train.array('ends', 0)[-1] == train.lengths('chat_tokens')[0]
  assert cache.held_out(dict(reversed(records[0].items())), 0.5) == (0 in held.ids)


def test_a_name_that_turns_up_late_begins_with_empty_entries(tmp_path):
  records = [*_texts(40), {'text': 'a', 'pair': 'b c', 'label': 'x'}, *_texts(30)]
  corpus = cache.build(Listed(records), Letters(), TEXT, str(tmp_path), workers=1)
  everything, _ = corpus.split(0.0)
  assert everything.lengths('pair_tokens').tolist() == [0] * 40 + [3] + [0] * 30
  assert _spelled(everything, 'pair_tokens')[40] == 'b c'
  assert everything.values('label') == [None] * 40 + ['x'] + [None] * 30


def either(record, tokenizer):
  tokens = tokenizer.encode(record['text'])
  return {'tokens': tokens, 'x': tokens if record['text'][-1] == '9' else 'text'}


@pytest.mark.parametrize('count', [12, 40])
def test_a_name_is_an_array_or_something_else(tmp_path, count):
  """Found within the first chunk of 16 documents, and in a later one."""
  records = [{'text': 'a'}] * (count - 1) + [{'text': '9'}]
  with pytest.raises(ValueError, match="'x' (is|as) an array (in|for) some"):
    cache.build(Listed(records), Letters(), encoding.Encoder([either]), str(tmp_path), workers=1)
  assert _entries(tmp_path) == []


@pytest.fixture
def importable(monkeypatch):
  """This module under a name that worker processes can import."""
  monkeypatch.syspath_prepend(os.path.dirname(__file__))
  yield importlib.import_module('test_cache')
  del sys.modules['test_cache']


@pytest.mark.parametrize('encoders, files', [((), 8), (('tags',), 11)])
def test_worker_processes_give_the_same_files(tmp_path, monkeypatch, importable, encoders, files):
  source = importable.Listed(
    [
      dict(text=f'text {i}' * (i % 7), pair='é' * (i % 3), label=f'class {i % 4}')
      for i in range(60)
    ]
  )
  functions = [getattr(importable, name) for name in encoders]
  encoder = encoding.Encoder([*TEXT.functions, *functions])
  alone = cache.build(source, importable.Letters(), encoder, str(tmp_path / 'alone'), workers=1)

  def not_here(*args):
    raise RuntimeError('tokenized in the main process')

  monkeypatch.setattr(cache_writer, 'IN_PROCESS_SECONDS', 0.0)
  monkeypatch.setattr(cache_writer, 'encode', not_here)
  together = cache.build(
    source, importable.Letters(), encoder, str(tmp_path / 'together'), workers=2
  )
  names = sorted(os.listdir(alone.directory))
  assert names == sorted(os.listdir(together.directory)) and len(names) == files
  for name in names:
    with (
      open(os.path.join(alone.directory, name), 'rb') as a,
      open(os.path.join(together.directory, name), 'rb') as b,
    ):
      assert a.read() == b.read(), name


def test_a_document_that_fails_in_a_worker_is_named_too(tmp_path, monkeypatch, importable):
  monkeypatch.setattr(cache_writer, 'IN_PROCESS_SECONDS', 0.0)
  with pytest.raises(ValueError) as caught:
    cache.build(
      importable.Listed(_texts(20) + [{'txt': ''}]),
      importable.Letters(),
      TEXT,
      str(tmp_path),
      workers=2,
    )
  assert caught.value.__notes__ == ['while tokenizing document 20']
  assert _entries(tmp_path) == []


def test_a_builder_that_loses_the_race_uses_the_other_cache(tmp_path, monkeypatch):
  source = Listed(_texts(5))
  winner = cache.build(source, Letters(), TEXT, str(tmp_path / 'elsewhere'))
  write = cache_writer.write

  def overtaken(*args):
    write(*args)
    shutil.copytree(winner.directory, tmp_path / 'here' / winner.fingerprint)

  monkeypatch.setattr(cache_writer, 'write', overtaken)
  assert len(cache.build(source, Letters(), TEXT, str(tmp_path / 'here'))) == 5
  assert _entries(tmp_path / 'here') == [winner.fingerprint]


SCRIPT = """
import resource, sys
sys.path.insert(0, {tests!r})
import test_cache as t
if __name__ == '__main__':
  t.cache.logging.set_verbosity('info')
  if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
  source = t.Listed(t._texts(4000), seconds={seconds})
  corpus = t.cache.build(source, t.Letters(), t.TEXT, {directory!r}, workers=1)
  print('documents', len(corpus))
"""


def _script(directory, limit=0, seconds=0.0):
  code = SCRIPT.format(
    tests=os.path.dirname(__file__), directory=str(directory), limit=limit, seconds=seconds
  )
  return subprocess.Popen(
    [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def test_a_disk_that_fills_leaves_nothing_and_says_what_is_needed(tmp_path):
  process = _script(tmp_path, limit=30_000)
  _, log = process.communicate(timeout=60)
  assert process.returncode and _entries(tmp_path) == []
  message = log.strip().splitlines()[-1]
  assert (
    message.startswith('OSError: [Errno 27] File too large')
    and str(tmp_path) in message
    and 'config.data.cache' in message
  )
  needed = int(message.split('needs about ')[1].split(' bytes')[0])
  directory = cache.build(Listed(_texts(4000)), Letters(), TEXT, str(tmp_path)).directory
  used = sum(os.path.getsize(f) for f in glob.glob(f'{directory}/*'))
  assert 0.7 * used < needed < 1.5 * used


@pytest.mark.slow
def test_a_killed_build_is_cleared_away_and_a_second_builder_waits_for_the_first(tmp_path):
  killed = _script(tmp_path, seconds=0.01)
  _wait_for(lambda: glob.glob(f'{tmp_path}/*.building-*'))
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  assert len(_entries(tmp_path)) == 1  # the remains
  builders = [_script(tmp_path, seconds=1e-4) for _ in range(2)]
  logs = [b.communicate(timeout=120) for b in builders]
  assert [out for out, _ in logs] == ['documents 4000\n'] * 2, logs
  assert sum('Tokenized 4000 documents' in err for _, err in logs) == 1
  assert [len(e) for e in _entries(tmp_path)] == [32]  # one cache, no remains


def _wait_for(condition):
  for _ in range(600):
    if condition():
      return
    time.sleep(0.05)
  raise TimeoutError
