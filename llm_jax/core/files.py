"""Files and folders that are there whole or not at all, and paths that options give.

`whole_file` and `whole_folder` write beside the target, as `NAME.partial`, and rename when the
block has ended without an error. A process that is killed in between leaves the partial one, which
the next attempt overwrites; two processes must not write the same target at once.
"""

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import IO, Any

_ADDRESS = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://')


def local(option: str, given: str | None) -> pathlib.Path | None:
  """The path that an option gives, `~` expanded; None for nothing.

  Args:
    option: its name, for the message: '--workdir'.
    given: its value.

  Raises:
    ValueError: an address (gs://bucket/run).
  """
  if not given:
    return None
  if _ADDRESS.match(given):
    raise ValueError(
      f'{option}={given} is an address, and files are read and written by their paths; mount it '
      '(gcsfuse, s3fs) and give the folder where it is mounted, or copy it.'
    )
  return pathlib.Path(given).expanduser()


def remove(path: pathlib.Path) -> None:
  """Removes a folder and all that is in it; nothing where there is none."""
  shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def whole_file(
  path: str | os.PathLike[str], mode: str = 'w', encoding: str | None = None
) -> Iterator[IO[Any]]:
  """A file to write, which becomes `path` at the end; where the block fails, `path` is as it was.

  Args:
    path: the target, in a folder that exists; what stands there is replaced.
    mode: 'w' or 'wb'.
    encoding: of text; UTF-8 by default.
  """
  if mode not in ('w', 'wb'):
    raise ValueError(f"mode={mode!r} must be 'w' or 'wb': a whole file is written anew.")
  if mode == 'w':
    encoding = encoding or 'utf-8'
  target = pathlib.Path(path)
  partial = _partial(target)
  try:
    with open(partial, mode, encoding=encoding) as file:
      yield file
    partial.replace(target)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """A fresh folder to fill, which becomes `path` at the end; where the block fails, `path` is as
  it was.

  Args:
    path: the target, in a folder that exists; a folder that stands there is removed just before
      the new one takes its name.
  """
  target = pathlib.Path(path)
  partial = _partial(target)
  shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
  partial.mkdir()
  try:
    yield partial
    if target.is_dir():
      shutil.rmtree(target)
    partial.rename(target)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _partial(target: pathlib.Path) -> pathlib.Path:
  return target.with_name(f'{target.name}.partial')
