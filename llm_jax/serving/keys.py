"""The keys of those who may ask: a file with a key on each line, plain or as `sha256:` and 64 hex
digits, and behind it limits of its own.

    s3cret-of-the-web-page     per_minute=600 tokens_per_minute=20000 at_once=8
    sha256:9f86d081884c7d65...

Keys are kept hashed, and compared in constant time. Lines that begin with # are comments.
"""

import collections
import hashlib
import hmac
import pathlib
import re
import time
from collections.abc import Callable

LIMITS = ('per_minute', 'tokens_per_minute', 'at_once')
LEAST = 8  # characters of a plain key


class Key:
  """One key.

  Args:
    digest: SHA-256 of the key.
    number: of its line, which stands for it in logs.
    per_minute: requests that it may make in any 60 seconds; None for any number.
    tokens_per_minute: tokens, read and written, after which it must wait until they are 60 seconds
      ago; None likewise.
    at_once: requests of it that may be answered at the same time; None likewise.
    now: the time in seconds.
  """

  def __init__(
    self,
    digest: bytes,
    number: int,
    per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    at_once: int | None = None,
    now: Callable[[], float] = time.monotonic,
  ):
    self.digest, self.number, self._now = digest, number, now
    self.per_minute, self.tokens_per_minute = per_minute, tokens_per_minute
    self.at_once, self._open = at_once, 0
    self._begun: collections.deque[float] = collections.deque()
    self._spent: collections.deque[tuple[float, int]] = collections.deque()
    self._tokens = 0  # of all that is in it

  def enter(self) -> float | None:
    """Counts a request; or, where it is one too many, says in how many seconds to come again."""
    now = self._now()
    while self._begun and self._begun[0] <= now - 60:
      self._begun.popleft()
    while self._spent and self._spent[0][0] <= now - 60:
      self._tokens -= self._spent.popleft()[1]
    if self.at_once is not None and self._open >= self.at_once:
      return 1.0
    if self.tokens_per_minute is not None and self._tokens >= self.tokens_per_minute:
      return self._spent[0][0] + 60 - now
    if self.per_minute is not None:
      if len(self._begun) >= self.per_minute:
        return self._begun[0] + 60 - now
      self._begun.append(now)
    self._open += 1
    return None

  def leave(self, tokens: int) -> None:
    """A request is over, for which so many tokens were read and written."""
    self._open -= 1
    if self.tokens_per_minute is not None and tokens:
      self._spent.append((self._now(), tokens))
      self._tokens += tokens


class Keys:
  """All keys of a file.

  Args:
    path: of the file.
    now: the time in seconds.

  Raises:
    ValueError: a line that is no key, or a file without one; lines are named by their number alone.
  """

  def __init__(self, path: pathlib.Path, now: Callable[[], float] = time.monotonic):
    self._keys = []
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
      words = line.split()
      if words and not words[0].startswith('#'):
        self._keys.append(_key(words, f'{path}, line {number}', number, now))
    if not self._keys:
      raise ValueError(f'{path} has no key; write one on each line.')

  def find(self, given: str) -> Key | None:
    """The key of this text; None where there is none. All are looked at, whichever it is."""
    digest, found = _digest(given), None
    for key in self._keys:
      if hmac.compare_digest(key.digest, digest):
        found = key
    return found


def _key(words: list[str], where: str, number: int, now: Callable[[], float]) -> Key:
  text, *rest = words
  if text.startswith('sha256:'):
    if not re.fullmatch(r'[0-9a-fA-F]{64}', text.removeprefix('sha256:')):
      raise ValueError(f'{where}: sha256: needs 64 hex digits behind it.')
    digest = bytes.fromhex(text.removeprefix('sha256:'))
  elif len(text) < LEAST:
    raise ValueError(f'{where}: a key needs at least {LEAST} characters.')
  else:
    digest = _digest(text)
  limits = {}
  for word in rest:
    name, _, value = word.partition('=')
    if name not in LIMITS or not value.isdecimal() or int(value) < 1:
      raise ValueError(
        f'{where}: behind a key stand limits, {", ".join(LIMITS)}, each with = and a whole '
        'number from 1 on.'
      )
    limits[name] = int(value)
  return Key(digest, number, **limits, now=now)


def _digest(text: str) -> bytes:
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).digest()
