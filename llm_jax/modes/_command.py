"""What every mode is given: the config, the workdir, and how errors of use differ from defects."""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.core import files, named_adapters

if TYPE_CHECKING:
  from llm_jax.core.config import Config
  from llm_jax.inference.ensembles import Ensemble
  from llm_jax.inference.session import Session

INPUT = flags.DEFINE_string(
  'input',
  None,
  'predict, explain, embed, generate: a .jsonl, .csv, .tsv or .txt file (a text per line), these '
  'with .gz, or a .parquet file; for words .conll and .conllu, for questions .json of SQuAD; - for '
  'standard input: JSON lines, plain ones, or, with --text, a table.',
)
OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'predict, explain, embed, generate: a .jsonl, .csv, .tsv or .parquet file, embed also .npy; '
  'export: a folder.',
)
TEXT = flags.DEFINE_string(
  'text',
  None,
  'predict, explain, embed, generate: the field of --input with the text; by default that of the '
  'run, else `text`, else the only one that holds words.',
)
PAIR = flags.DEFINE_string(
  'pair',
  None,
  'predict, explain: the field of --input with the second text; by default that of the run, else '
  '`pair`.',
)
SOUP = flags.DEFINE_list(
  'soup',
  [],
  'All modes that use a model: workdirs of further runs of the same shape, with commas between; '
  'the parameters of all are averaged.',
)
ENSEMBLE = flags.DEFINE_list(
  'ensemble',
  [],
  'predict, eval: workdirs of further runs with the same classes, with commas between; the answers '
  'of all are averaged.',
)
ADAPTER = flags.DEFINE_string(
  'adapter',
  None,
  'All modes: the name of one of the adapters on the base in --workdir. Each is trained, and then '
  'found, in WORKDIR/adapters/NAME; a base that is no run there is given by --config.init_from. '
  'Without --workdir: one of those in --config.init_from, a folder of the library peft.',
)
TOGETHER = ('predict', 'eval')  # the modes that an ensemble serves
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


class UsageError(Exception):
  """What the user gave is not possible; the message says what, what is allowed, and the way out."""


@contextlib.contextmanager
def usage_errors(errors: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
  """Turns errors whose message is enough into one message, without a traceback."""
  try:
    yield
  except errors as error:
    raise UsageError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Command:
  """One call of the program.

  Attributes:
    mode: its name.
    settings: the config as nested dictionaries, as it is read from the file and the flags; None
      where no file was named.
    workdir: the folder of the run; None where none was named.
    overrides: the options of the config that flags set: 'tokenizer.name'.
    keep_compiled: whether compiled programs are kept for the next start.
  """

  mode: str
  settings: dict[str, Any] | None
  workdir: pathlib.Path | None
  overrides: frozenset[str] = frozenset()
  keep_compiled: bool = True

  def parsed(self) -> 'Config':
    """The config as it is read, its top level checked.

    Where a flag names another plug-in than the file, the old one's options are dropped.
    """
    from llm_jax.core import config as config_lib
    from llm_jax.core import recipes
    from llm_jax.programs import assemble

    takes = {}
    if 'optimizer.name' in self.overrides:
      from llm_jax.training import optimizers

      takes['optimizer'] = optimizers.options
    if 'adversarial.name' in self.overrides:
      from llm_jax.training import adversarial

      takes['adversarial'] = adversarial.options
    settings = recipes.chosen(self.settings, self.overrides)
    return config_lib.parse(assemble.without_replaced_options(settings, self.overrides, takes))

  def config(self) -> 'Config':
    """The config, with what `init_from` decides filled in."""
    from llm_jax.programs import pretrained

    return pretrained.fill_in(self.parsed())

  def session(self) -> 'Session | Ensemble':
    """The model that the config's `init_from` names, or else the run in the workdir; with the runs
    of --soup and --ensemble.

    Raises:
      ValueError: runs that do not go together, an ensemble where the mode needs one model.
    """
    from llm_jax.inference import ensembles, session
    from llm_jax.programs import assemble
    from llm_jax.training import corpora

    soup, ensemble = (_folders(flag) for flag in (SOUP, ENSEMBLE))
    if ensemble and self.mode not in TOGETHER:
      raise ValueError(
        f'--ensemble averages answers, for --mode={" and ".join(TOGETHER)}, not {self.mode}; '
        '--soup averages parameters, and is one model.'
      )
    given = None
    if self.settings is not None:
      given = self.config()
      assemble.check(dataclasses.replace(given, data={}))  # whose fields only are read
    if self.workdir is not None or given is not None:
      self.use_compilation_cache(self.workdir or corpora.cache_directory(given))
    return ensembles.together(session.open_model(self.workdir, given), soup, ensemble)

  def use_compilation_cache(self, folder: pathlib.Path) -> None:
    """Keeps compiled programs in a folder, and takes them from there."""
    if self.keep_compiled:
      from llm_jax.programs import compilation

      compilation.keep(folder)

  def require(self, *examples: str) -> None:
    """Raises ValueError unless all flags are set, each given as 'input=x.jsonl'."""
    missing = [example for example in examples if _flag(example.partition('=')[0]) is None]
    if missing:
      wanted = ' and '.join(f'--{example}' for example in examples)
      raise ValueError(f'--mode={self.mode} needs {wanted}.')


@contextlib.contextmanager
def input_file() -> Iterator[pathlib.Path | None]:
  """The file of --input; of standard input, `-`, a copy that is there inside the block.

  Raises:
    ValueError: an address, or standard input where there are several processes.
  """
  if INPUT.value != '-':
    yield files.local('--input', INPUT.value)
    return
  from llm_jax.inference import records
  from llm_jax.parallel import hosts

  if hosts.several():
    raise ValueError('--input=- is read by one process; with several, give a file that all see.')
  with tempfile.TemporaryDirectory() as folder:
    yield records.spool(sys.stdin.buffer, pathlib.Path(folder), TEXT.value)


def output_path() -> pathlib.Path | None:
  """The file or folder of --output."""
  return files.local('--output', OUTPUT.value)


def of_adapter(
  workdir: pathlib.Path | None, settings: dict[str, Any] | None, makes: bool
) -> tuple[pathlib.Path | None, dict[str, Any] | None]:
  """The workdir and the config of --adapter, where it is given.

  Args:
    workdir: of the base.
    settings: the config, nested; None where no file was named.
    makes: whether the mode makes a run; otherwise it must be there.

  Raises:
    ValueError: no adapter of this name, or nothing that could be its base.
  """
  name = ADAPTER.value
  if name is None:
    return workdir, settings
  base = (settings or {}).get('init_from')
  if workdir is None:
    if not base:
      raise ValueError(f'--adapter={name} is one of those in --workdir, which is not given.')
    folder = files.local('config.init_from', base).absolute()
    return None, settings | {'init_from': str(named_adapters.existing(folder, name))}
  if not makes:
    return named_adapters.existing(workdir, name), settings
  if not (settings.get('adapter') or {}).get('name'):
    raise ValueError(
      f'--adapter={name} is what is trained beside a base; say how by --config.adapter.name (lora, '
      'say).'
    )
  if not base and not (workdir / 'config.json').is_file():
    raise ValueError(
      f'--adapter={name} needs a base: {workdir} holds no run; give --config.init_from=FOLDER.'
    )
  return named_adapters.workdir(workdir, name), settings | {'init_from': base or str(workdir)}


def check_input(source: pathlib.Path) -> None:
  """Raises ValueError unless the records of this file can be read."""
  from llm_jax.inference import records

  if not source.name.endswith(records.SUFFIXES) or not source.is_file():
    raise ValueError(
      f'--input={source} must be a file that exists, one of {" ".join(records.SUFFIXES)}, or - for '
      'standard input.'
    )


def check_output(
  target: pathlib.Path, suffixes: Sequence[str], source: pathlib.Path | None = None
) -> None:
  """Raises ValueError unless a file of this name can be written without losing `source`."""
  folder = target.absolute().parent
  if target.suffix not in suffixes or target.is_dir() or not folder.is_dir():
    kind = ' or '.join(suffixes)
    raise ValueError(f'--output={target} must be a {kind} file in a folder that exists.')
  if source is not None and target.exists() and target.samefile(source):
    raise ValueError(f'--output={target} is --input too; give another name.')


def _folders(flag: flags.FlagHolder) -> list[pathlib.Path]:
  return [files.local(f'--{flag.name}', folder.strip()) for folder in flag.value if folder.strip()]


def _flag(name: str) -> Any:
  return flags.FLAGS[name].value
