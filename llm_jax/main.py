"""The command line: `python -m llm_jax.main --config=FILE --workdir=DIR [--mode=MODE] ...`.

Reads the flags and hands over to the mode. Heavy imports come after the first checks, so that a
slip of the pen is answered at once.
"""

import importlib
import os
import pathlib
import re
import signal
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from llm_jax.core import files, installed, plugins
from llm_jax.modes._command import Command, UsageError, of_adapter, usage_errors

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, with its argument if it takes one: configs/gpt2.py:medium'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: config, tokenizer, checkpoints, metrics.'
)
MODE = flags.DEFINE_string(
  'mode', 'train', 'What to do; or the dotted path of a module of your own.'
)
COMPILATION_CACHE = flags.DEFINE_bool(
  'compilation_cache',
  True,
  'Keep compiled programs for the next start: in the workdir, or without one in the cache folder '
  'of the data.',
)
COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, where several processes are started by hand.'
)
PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes; found out under Slurm, Open MPI, on TPU pods.'
)
PROCESS = flags.DEFINE_integer('process_id', None, 'Which of the processes this is, from 0.')

INTERRUPTED = 128 + signal.SIGINT  # exit status, as a shell has it
STEP_ERRORS = (FloatingPointError, OSError)  # a loss that is no number, a disk that is full
_NONE = re.compile(r'--config\.([\w.]+)=None')  # ml_collections has no flag for it
_emptied: set[str] = set()  # the options that flags set to None


def main(argv: Sequence[str]) -> None:
  """Runs the mode of the flags."""
  if len(argv) > 1:
    raise UsageError(f'{" ".join(argv[1:])}: not a flag. Usage: {_usage()}')
  mode = _mode(MODE.value)
  _check_flags(mode)
  if hasattr(mode, 'prepare') and _is_the_program():
    mode.prepare()
  with usage_errors():
    command = _command(mode)
  from llm_jax.training import logs

  logs.show()
  alone = getattr(mode, 'ALONE', False)
  with usage_errors():
    if not alone:
      _join_processes(saves=getattr(mode, 'SAVES', False))
    rest = mode.run(command)
  if rest is not None:
    with usage_errors(STEP_ERRORS):
      rest()
  if not alone:
    sys.modules['llm_jax.parallel.hosts'].finish()


def _command(mode: types.ModuleType) -> Command:
  workdir = files.local('--workdir', WORKDIR.value)
  workdir = workdir and workdir.absolute()
  settings, overrides = None, frozenset()
  if CONFIG.value is not None:
    settings = CONFIG.value.to_dict()
    overrides = frozenset(config_flags.get_override_values(flags.FLAGS['config'])) | _emptied
    for option in _emptied:
      _empty(settings, option)
  workdir, settings = of_adapter(workdir, settings, getattr(mode, 'NEEDS_CONFIG', False))
  return Command(MODE.value, settings, workdir, overrides, COMPILATION_CACHE.value)


def _empty(settings: dict[str, Any], option: str) -> None:
  """Sets an option to None, which leaves it to its default."""
  *sections, name = option.split('.')
  section: Any = settings
  for key in sections:
    section = section.get(key) if isinstance(section, dict) else None
  if not isinstance(section, dict) or name not in section:
    raise ValueError(f'--config.{option}=None: the config has no {option!r}.')
  section[name] = None


def _mode(name: str) -> types.ModuleType:
  with usage_errors():
    return plugins.load('mode', name)


def _check_flags(mode: types.ModuleType) -> None:
  """Raises UsageError where the mode needs a workdir or a config that is not there."""
  wanted = getattr(mode, 'WORKDIR', 'model')
  names_folder = CONFIG.value is not None and CONFIG.value.get('init_from')
  if not WORKDIR.value and (wanted == 'always' or (wanted == 'model' and not names_folder)):
    way_out = ', or --config=configs/hf.py --config.init_from=FOLDER' if wanted == 'model' else ''
    raise UsageError(f'--workdir is needed{way_out}. Usage: {_usage()}')
  if CONFIG.value is None and getattr(mode, 'NEEDS_CONFIG', False):
    raise UsageError(f'--config is needed. Usage: {_usage()}')


def _is_the_program() -> bool:
  """Whether the process was started for this module, and not for one that calls it."""
  main = sys.modules['__main__']
  return main.__dict__.get('_command') is _command or (
    pathlib.Path(getattr(main, '__file__', None) or '').stem == 'llm_jax'
  )


def _join_processes(saves: bool) -> None:
  from llm_jax.parallel import hosts

  hosts.start(COORDINATOR.value, PROCESSES.value, PROCESS.value, saves=saves)


def _usage() -> str:
  modes = '|'.join(plugins.names('mode'))
  return (
    'python -m llm_jax.main --config=configs/bert_tiny.py --workdir=DIR '
    f'[--mode={modes}] [--config.a=x ...]'
  )


def _define_flags(argv: Sequence[str]) -> None:
  """Imports the modes, which define their flags: those of the package, and one of the user's."""
  for name in plugins.names('mode'):
    importlib.import_module(f'llm_jax.modes.{name}')
  for index, argument in enumerate(argv):
    flag, equals, name = argument.lstrip('-').partition('=')
    if not argument.startswith('-') or flag != 'mode':
      continue
    if not equals:
      name = ''.join(argv[index + 1 : index + 2])
    if '.' in name:
      with usage_errors():
        importlib.import_module(name)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """absl's parser, with ml_collections' answers to a wrong key or value as one line."""
  _define_flags(argv)
  argv = [_with_config_file(argument) for argument in argv]
  emptied = {argument for argument in argv if _NONE.fullmatch(argument)}
  _emptied.update(_NONE.fullmatch(argument)[1] for argument in emptied)
  argv = [argument for argument in argv if argument not in emptied]
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    if 'get_config' in str(error):
      raise UsageError(f'the config file has no function get_config() ({error}).') from error
    raise UsageError(_unknown_key(argv, str(error))) from error
  except (flags.Error, TypeError, ValueError, OSError) as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A config file's own error comes last in a traceback.
    message = lines[-1] if 'Traceback' in str(error) else ' '.join(lines)
    if "Unknown command line flag 'config." in message:
      message += ' without --config=FILE; --text and --pair name the fields of --input.'
    raise UsageError(message) from error


def _with_config_file(argument: str) -> str:
  """`--config=FILE` with the file where it is: here, or installed with the package.

  Raises:
    UsageError: there is no such file.
  """
  if not argument.startswith('--config='):
    return argument
  found = installed.config_file(argument.removeprefix('--config='))
  path = found.partition(':')[0]
  if not pathlib.Path(path).is_file():
    raise UsageError(f'--config={path}: no such file.')
  return f'--config={found}'


def _unknown_key(argv: Sequence[str], message: str) -> str:
  """What ml_collections means by 'stepz' and "Did you mean "steps"?", with the flag that it stands
  in.
  """
  quoted = re.findall(r'[\w.]+', message)
  key = quoted[0] if quoted else message
  pattern = rf'--config\..*\b{re.escape(key)}\b'
  flag = next((a for a in argv if re.match(pattern, a.partition('=')[0])), '--config')
  close = re.search(r'Did you mean "(\w+)"', message)
  section = flag.removeprefix('--').partition('=')[0].rpartition(f'.{key}')[0] or 'config'
  return f'{flag}: {section} has no {key!r}' + (f'; did you mean {close[1]!r}?' if close else '.')


def cli() -> None:
  """Entry point: errors of use are one message and exit status 2; `--verbosity=1` shows where they
  came from.

  Whatever ends one of several processes ends all of them.
  """
  try:
    app.run(main, flags_parser=_parse_flags)
  except UsageError as error:
    if flags.FLAGS.is_parsed() and logging.get_verbosity() > logging.INFO:
      traceback.print_exc()
    print(f'llm_jax: {error}', file=sys.stderr)
    _abort(str(error), 2)
    sys.exit(2)
  except KeyboardInterrupt as error:
    print('llm_jax: stopped by Ctrl-C; what was saved before is whole.', file=sys.stderr)
    _abort(f'{type(error).__name__}', INTERRUPTED)
    _leave(INTERRUPTED)
  except Exception as error:
    if _several():
      lost = sys.modules['llm_jax.parallel.hosts'].lost(error)
      if lost is None or logging.get_verbosity() > logging.INFO:
        traceback.print_exc()
      if lost:
        print(f'llm_jax: {lost}', file=sys.stderr, flush=True)
      _abort(lost or f'{type(error).__name__}: {error}', 1)
    raise


def _abort(reason: str, status: int) -> None:
  if _several():
    sys.modules['llm_jax.parallel.hosts'].abort(reason, status)


def _leave(status: int) -> NoReturn:
  """Ends the process at once. Where Ctrl-C comes while XLA compiles, an orderly exit takes down
  Python under what XLA still holds of it, and ends in a segmentation fault.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _several() -> bool:
  hosts = sys.modules.get('llm_jax.parallel.hosts')  # its import takes seconds
  return hosts is not None and hosts.several()


if __name__ == '__main__':
  cli()
