"""One process at a time trains in a folder: the lock of a workdir.

The lock is one of the operating system (POSIX record locks, which reach over NFS): it goes with the
process that holds it, however that ends, so none is ever left behind. The file beside it says who
holds it.
"""

import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
from typing import IO

from absl import logging

NAME = '.owner'
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_held: dict[pathlib.Path, IO[str]] = {}


def check(folder: pathlib.Path) -> None:
  """Raises ValueError where another process trains in a folder; makes nothing."""
  path = _path(folder)
  if path in _held or not path.exists():
    return
  with open(path, 'r+', encoding='utf-8') as file:
    _lock(file, folder)


def take(folder: pathlib.Path) -> None:
  """Makes this process the one that trains in a folder, until `release` or its end.

  A process that has it already keeps it.

  Raises:
    ValueError: another process trains there.
    OSError: the folder cannot be written to.
  """
  path = _path(folder)
  if path in _held:
    return
  file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115 - held open, as the lock goes with it
  try:
    _lock(file, folder)
  except ValueError:
    file.close()
    raise
  file.truncate(0)
  since = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  json.dump({'host': socket.gethostname(), 'process': os.getpid(), 'since': since}, file)
  file.flush()
  _held[path] = file


def release(folder: pathlib.Path) -> None:
  """Lets others train there; nothing where this process does not hold it."""
  file = _held.pop(_path(folder), None)
  if file is not None:
    file.close()


def _path(folder: pathlib.Path) -> pathlib.Path:
  return folder.absolute() / NAME


def _lock(file: IO[str], folder: pathlib.Path) -> None:
  try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except (BlockingIOError, PermissionError) as error:
    raise ValueError(
      f'--workdir={folder}: another run trains there ({_owner(file)}). Wait for it or stop it, and '
      'the same command goes on from its last checkpoint; or give this one a folder of its own.'
    ) from error
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    logging.warning('%s has no locks: make sure that no other run trains there.', folder)


def _owner(file: IO[str]) -> str:
  file.seek(0)
  try:
    found = json.load(file)
    return f'process {found["process"]} on {found["host"]}, since {found["since"]}'
  except (ValueError, KeyError, TypeError):  # it is being written
    return 'which has just begun'
