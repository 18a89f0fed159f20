"""Several adapters on one base, by name: each is a run in the folder `adapters` of a workdir, which
may itself be that of the base. The library peft keeps several in folders of one folder.
"""

import json
import pathlib
import re

FOLDER = 'adapters'
_PEFT = 'adapter_config.json'
_NAME = re.compile(r'\w[\w.-]*')


def workdir(home: pathlib.Path, name: str) -> pathlib.Path:
  """The workdir of the adapter with this name.

  Raises:
    ValueError: a name that cannot be that of a folder.
  """
  if not _NAME.fullmatch(name):
    raise ValueError(
      f'--adapter={name}: a name is of letters, digits, _, - and ., and begins with none of the '
      'last two.'
    )
  return home / FOLDER / name


def existing(home: pathlib.Path, name: str) -> pathlib.Path:
  """The workdir, or folder of peft, of the adapter with this name.

  Raises:
    ValueError: there is none.
  """
  own = workdir(home, name)
  folder = home / name if (home / name / _PEFT).is_file() else own
  if not _holds(folder):
    known = ', '.join(names(home))
    there = f'there are {known}' if known else f'there are none: train one with --adapter={name}'
    raise ValueError(f'--adapter={name}: {home} has no adapter of this name; {there}.')
  return folder


def names(home: pathlib.Path) -> list[str]:
  """The names of the adapters on the base whose workdir, or folder of peft, this is."""
  found = [*(home / FOLDER).glob('*'), *(path.parent for path in home.glob(f'*/{_PEFT}'))]
  return sorted(path.name for path in found if _holds(path))


def home(folder: pathlib.Path) -> pathlib.Path:
  """The folder of all adapters, of which the workdir or folder of peft of one is given; any other
  folder as it is.
  """
  if folder.parent.name == FOLDER:
    return folder.parent.parent
  return folder.parent if (folder / _PEFT).is_file() else folder


def _holds(folder: pathlib.Path) -> bool:
  """Whether a folder holds a run with an adapter, or one of peft."""
  if (folder / _PEFT).is_file():
    return True
  try:
    return bool(json.loads((folder / 'config.json').read_text())['adapter'].get('name'))
  except (OSError, ValueError, LookupError, AttributeError):
    saved = folder.glob('checkpoints/*')  # the newest has the config too
    return any(path.name.isdigit() for path in saved)
