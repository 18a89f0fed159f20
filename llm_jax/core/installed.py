"""The config files that are installed beside the package.

A checkout has them in its folder `configs`; so has a plain `pip install`, as a package of its own.
`configs/bert_tiny.py` therefore means the same in every working folder.
"""

import pathlib
import re

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def config_file(path: str) -> str:
  """The config file that a path means, with its argument if it has one (`configs/gpt2.py:medium`).

  Args:
    path: a file; `configs/NAME.py` may also be one of the package's own.

  Returns:
    The path itself if the file exists, otherwise that of the installed file of this name; the path
    itself if there is neither.
  """
  name, colon, argument = path.partition(':')
  if pathlib.Path(name).is_file():
    return path
  installed = CONFIGS / pathlib.PurePosixPath(name).name
  if re.fullmatch(r'configs/\w+\.py', name) and installed.is_file():
    return f'{installed}{colon}{argument}'
  return path
