"""The command line: `python -m llm_jax.main --config=FILE --workdir=DIR [--mode=...]
[--config.a.b=value ...]`.

Reads the flags, checks the config, and hands over to the mode. Heavy imports come after the first
checks, so that a slip of the pen is answered at once.
"""

import contextlib
import dataclasses
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file, with its argument if it takes one: configs/gpt2.py:medium'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: config, tokenizer, checkpoints, metrics.'
)
MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'eval', 'predict', 'embed', 'generate', 'export', 'plan'],
  'What to do.',
)
INPUT = flags.DEFINE_string(
  'input',
  None,
  'predict, embed: a .jsonl file, its texts in the field `text` if not told otherwise; '
  'embed, generate: also a .txt file, a text a line.',
)
OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'predict: a .jsonl file; embed: .npy or .jsonl; generate: .jsonl; export: a folder.',
)
POOL = flags.DEFINE_enum(
  'pool', 'mean', ['mean', 'cls', 'last'], 'embed: what of a text its vector is.'
)
NORMALIZE = flags.DEFINE_bool('normalize', True, 'embed: vectors of length 1.')
PROMPT = flags.DEFINE_multi_string(
  'prompt', None, 'generate: a text to go on from, or to fill in at [MASK]; may be repeated.'
)
STOP = flags.DEFINE_multi_string(
  'stop', [], 'generate: a string before which a text ends; may be repeated.'
)
flags.DEFINE_integer('max_new_tokens', 128, 'generate: the most tokens that come after a prompt.')
flags.DEFINE_float(
  'temperature', 1.0, 'generate: how freely is drawn; 0 takes the most likely token.'
)
flags.DEFINE_integer('top_k', 0, 'generate: only the most likely K tokens are drawn; 0 for all.')
flags.DEFINE_float(
  'top_p', 1.0, 'generate: only the most likely tokens of this probability together are drawn.'
)
flags.DEFINE_float(
  'min_p',
  0.0,
  'generate: only tokens at least this many times as likely as the most likely are drawn.',
)
flags.DEFINE_float(
  'repetition_penalty',
  1.0,
  'generate: above 1, tokens that stand in the text already become less likely.',
)
flags.DEFINE_integer('beams', 1, 'generate: beam search with so many beams; needs --temperature=0.')
flags.DEFINE_float('length_penalty', 1.0, 'generate: of beam search; above 1 favours long texts.')
flags.DEFINE_integer('seed', 0, 'generate: the same seed draws the same text.')
TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'plan: the machine to plan for, v5e:4x4 say; several, with commas, to compare.'
)
COMPILATION_CACHE = flags.DEFINE_bool(
  'compilation_cache',
  True,
  'Keep compiled programs for the next start: in the workdir, or '
  'without one in the cache folder of the data.',
)
COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, where several processes are started by hand.'
)
PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes; found out under Slurm, Open MPI, on TPU pods.'
)
PROCESS = flags.DEFINE_integer('process_id', None, 'Which of the processes this is, from 0.')

USAGE = (
  'python -m llm_jax.main --config=configs/bert_tiny.py --workdir=DIR '
  '[--mode=train|eval|predict|embed|generate|export|plan] [--config.a=x ...]'
)


NEEDS = {
  'predict': ('input=x.jsonl', 'output=y.jsonl'),
  'embed': ('input=x.jsonl', 'output=y.npy'),
  'export': ('output=FOLDER',),
}


class UsageError(Exception):
  """What the user gave cannot be; the message says what, what is allowed, and the way out."""


def main(argv: Sequence[str]) -> None:
  """Runs the mode of the flags."""
  if len(argv) > 1:
    raise UsageError(f'{" ".join(argv[1:])}: not a flag. Usage: {USAGE}')
  if (
    not WORKDIR.value
    and MODE.value != 'plan'
    and (MODE.value == 'train' or CONFIG.value is None or not CONFIG.value.init_from)
  ):
    raise UsageError(
      '--workdir is needed'
      + ', or --config=configs/hf.py --config.init_from=FOLDER' * (MODE.value != 'train')
      + f'. Usage: {USAGE}'
    )
  if CONFIG.value is None and MODE.value in ('train', 'plan'):
    raise UsageError(f'--config is needed. Usage: {USAGE}')
  from llm_jax.parallel import heap
  from llm_jax.training import logs

  logs.show()
  workdir = pathlib.Path(WORKDIR.value or '.').expanduser().absolute()  # '.': of a plan
  if MODE.value == 'plan':
    _plan(workdir)
    return
  if MODE.value == 'train':
    heap.keep()
  from llm_jax.parallel import hosts

  with _told():
    hosts.start(COORDINATOR.value, PROCESSES.value, PROCESS.value, saves=MODE.value == 'train')
  if MODE.value == 'train':
    _train(workdir)
  else:
    with _told():
      _use(workdir if WORKDIR.value else None)
  hosts.finish()


def _train(workdir: pathlib.Path) -> None:
  with _told():
    config = _checked_config(workdir=workdir)
    from llm_jax.programs import workdir as runs
    from llm_jax.training import corpora as prepare
    from llm_jax.training import loop as train

    runs.open_workdir(workdir)
    _keep_compiled(workdir)
    run = train.start(prepare.load(config, workdir), workdir)
  with _told((FloatingPointError, OSError)):  # a loss that is no number, a disk that is full
    train.train(run)


def _use(workdir: pathlib.Path | None) -> None:
  """The modes that use a model: the run in the workdir, or the folder that config.init_from names."""
  if any(
    flags.FLAGS[example.partition('=')[0]].value is None for example in NEEDS.get(MODE.value, ())
  ):
    raise ValueError(
      f'--mode={MODE.value} needs {" and ".join(f"--{example}" for example in NEEDS[MODE.value])}.'
    )
  from llm_jax.inference import use
  from llm_jax.training import corpora as prepare

  config = _checked_config() if CONFIG.value is not None else None
  _keep_compiled(workdir or prepare.cache_directory(config))
  opened = use.open_model(workdir, config)
  source, target = (
    pathlib.Path(flag.value).expanduser() if flag.value else None for flag in (INPUT, OUTPUT)
  )
  if MODE.value == 'eval':
    use.evaluate(opened, workdir)
  elif MODE.value == 'predict':
    use.predict(opened, source, target)
  elif MODE.value == 'export':
    use.export(opened, target)
  elif MODE.value == 'embed':
    from llm_jax.inference import embed

    embed.run(opened, source, target, POOL.value, NORMALIZE.value)
  else:
    from llm_jax.inference import complete
    from llm_jax.inference.decoding import Sampling

    sampling = Sampling(
      **{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Sampling)}
    )
    complete.run(opened, PROMPT.value, source, target, sampling, STOP.value)


def _keep_compiled(directory: pathlib.Path) -> None:
  if COMPILATION_CACHE.value:
    from llm_jax.programs import compilation

    compilation.keep(directory)


def _plan(workdir: pathlib.Path) -> None:
  with _told():
    if not TOPOLOGY.value:
      raise ValueError('--mode=plan needs --topology=v5e:4x4, or another machine.')
    import jax

    jax.config.update(
      'jax_platforms', 'cpu'
    )  # chips of this machine, if it has any, are left alone
    from llm_jax.parallel import topology
    from llm_jax.planning import plan

    topology.prepare(TOPOLOGY.value.split(','))
    plan.run(
      _checked_config(topology.devices(TOPOLOGY.value.split(',')[0])), TOPOLOGY.value, workdir
    )


def _checked_config(devices: Sequence[Any] | None = None, workdir: pathlib.Path | None = None):
  from llm_jax.core import config
  from llm_jax.programs import build, pretrained

  parsed = pretrained.complete(config.parse(CONFIG.value.to_dict()), workdir)
  build.check(parsed, devices)
  return parsed


@contextlib.contextmanager
def _told(errors: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, ImportError)):
  """Makes errors whose message is enough into one message; before the first step, a ValueError
  speaks of what the user gave.
  """
  try:
    yield
  except errors as error:
    raise UsageError(str(error)) from error


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """absl's parser, with ml_collections' answers to a wrong key or value (AttributeError, TypeError,
  ...) as one line.
  """
  for argument in argv:
    path = argument.removeprefix('--config=').partition(':')[0]
    if argument.startswith('--config=') and not pathlib.Path(path).is_file():
      raise UsageError(f'--config={path}: no such file.')
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError) as error:
    if 'get_config' in str(error):
      raise UsageError(f'the config file has no function get_config() ({error}).') from error
    raise UsageError(_unknown_key(argv, str(error))) from error
  except (flags.Error, TypeError, ValueError, OSError) as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise UsageError(
      lines[-1] if 'Traceback' in str(error) else ' '.join(lines)
    ) from error  # a config file's own error is last


def _unknown_key(argv: Sequence[str], message: str) -> str:
  """What ml_collections means by `'\\'stepz\\'\\nDid you mean "steps" instead of "stepz"?'`, with
  the flag that it stands in.
  """
  quoted = re.findall(r'[\w.]+', message)
  key = quoted[0] if quoted else message
  flag = next(
    (a for a in argv if re.match(rf'--config\..*\b{re.escape(key)}\b', a.partition('=')[0])),
    '--config',
  )
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
  except (Exception, KeyboardInterrupt) as error:
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


def _several() -> bool:
  return (
    'llm_jax.parallel.hosts' in sys.modules and sys.modules['llm_jax.parallel.hosts'].several()
  )  # its import takes seconds


if __name__ == '__main__':
  cli()
