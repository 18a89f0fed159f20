"""Keys: found by what they are, kept hashed, and limited."""

import hashlib

import pytest

from llm_jax.serving.keys import Keys

HASHED = hashlib.sha256(b'another-key').hexdigest()


def keys(tmp_path, text, now=lambda: 0.0):
  (tmp_path / 'keys').write_text(text)
  return Keys(tmp_path / 'keys', now)


def test_plain_and_hashed_ones_are_found_and_no_others(tmp_path):
  found = keys(tmp_path, f'# ours\nplain-key  per_minute=3\n\nsha256:{HASHED} at_once=1\n')
  assert found.find('plain-key').per_minute == 3 and found.find('another-key').at_once == 1
  for other in ('', 'plain-ke', 'plain-key ', HASHED, f'sha256:{HASHED}', 'ké', '\udc80'):
    assert found.find(other) is None
  assert b'plain' not in found.find('plain-key').digest


def test_limits_of_a_minute_and_at_once(tmp_path):
  clock = [0.0]
  found = keys(tmp_path, 'plain-key per_minute=2 at_once=2', lambda: clock[0])
  key = found.find('plain-key')
  assert key.enter() is None and key.enter() is None
  assert key.enter() == 1.0  # two are open
  key.leave(0)
  clock[0] = 20.0
  assert key.enter() == 40.0  # two in this minute
  clock[0] = 60.1
  assert key.enter() is None


def test_tokens_of_a_minute(tmp_path):
  clock = [0.0]
  key = keys(tmp_path, 'plain-key tokens_per_minute=100', lambda: clock[0]).find('plain-key')
  for seconds, tokens in ((0, 60), (10, 50)):
    clock[0] = seconds
    assert key.enter() is None
    key.leave(tokens)
  clock[0] = 20.0
  assert key.enter() == 40.0  # 110 of 100 until the first are a minute ago
  clock[0] = 61.0
  assert key.enter() is None


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('', 'has no key'),
    ('# nothing\n', 'has no key'),
    ('short\n', 'line 1: a key needs at least 8'),
    ('long-enough\nsha256:12\n', 'line 2: sha256: needs 64 hex digits'),
    ('long-enough per_hour=2\n', 'per_minute, tokens_per_minute, at_once'),
    ('long-enough at_once=0\n', 'from 1 on'),
  ],
)
def test_lines_that_are_no_keys_are_named_by_their_number_alone(text, words, tmp_path):
  with pytest.raises(ValueError, match=words) as caught:
    keys(tmp_path, text)
  assert 'long-enough' not in str(caught.value)
