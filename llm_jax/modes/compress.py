"""`--mode=compress`: a smaller model, as a folder that every mode opens by `--config.init_from`."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from absl import logging

from llm_jax.modes import _command
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.inference.session import Session

NEEDS_CONFIG = True
ROWS = 64  # of training texts that a method looks at


def run(command: Command) -> None:
  """Makes it, measures it beside its parent, and writes --output."""
  command.require('output=FOLDER')
  compress(command, _command.output_path())


def compress(command: Command, target: pathlib.Path) -> None:
  """The same for a folder that is given.

  Raises:
    ValueError: a method that this model cannot take, a folder that holds something, a model that is
      worse than its parent by more than `config.compress.tolerance`: nothing is written then.
  """
  from llm_jax.compressing import making, measuring, writing
  from llm_jax.core import config as config_lib
  from llm_jax.core import files, tree
  from llm_jax.parallel import hosts
  from llm_jax.programs import assemble, pretrained

  hosts.agree(lambda: writing.check_target(target))
  if not command.settings.get('init_from'):
    command = dataclasses.replace(
      command, settings=command.settings | {'init_from': str(command.workdir)}
    )
  config = command.parsed()
  section = config_lib.given(config.compress)
  method = assemble.create_compression(config)
  if method is None:
    raise ValueError('--mode=compress needs config.compress.name, the method (int8, say).')
  rows, tolerance = section.get('rows', ROWS), section.get('tolerance')
  opened = _opened(command)
  if opened.program.formed and (opened.origin / writing.REPORT).exists():
    raise ValueError(
      f'{opened.origin} was made by {opened.config.compress["name"]}, and its kernels are in '
      'another form already; compress the model that it was made from.'
    )
  session, params = making.parent(opened)
  program = session.program
  schemes = method.schemes(program.infos, tree.flatten(program.params))
  making.check(method, session, schemes)
  splits = measuring.texts(session.config, session.tokenizer)
  measuring.check_tolerance(tolerance, splits)
  seen = making.look(method, session, params, splits, rows)
  made = making.make(session, params, section, seen)
  before = measuring.measure(
    making.Made(session.config, session.tokenizer, program, params), splits
  )
  same = made.tokenizer.fingerprint == session.tokenizer.fingerprint
  theirs = splits if same else measuring.texts(made.config, made.tokenizer)
  after = measuring.measure(made, theirs)
  of_run = None if pretrained.is_foreign(session.origin) else params
  said = measuring.report(before, after, (measuring.bytes_of(session.origin, of_run), 0))
  measuring.within(said, tolerance)
  writing.write(made, target, dict(after.values) or None)
  if hosts.primary():
    said['numbers']['bytes on disk'][1] = measuring.bytes_of(target)
    with files.whole_file(target / writing.REPORT) as file:
      file.write(measuring.as_json(said))
    print(measuring.table(said))
  logging.info('Written to %s; --config.init_from=%s opens it in every mode.', target, target)


def _opened(command: Command) -> 'Session':
  """The model that is to be made smaller; where the config names no texts, those that it was
  trained on belong to it.
  """
  from llm_jax.inference import session as sessions
  from llm_jax.programs import assemble, pretrained, workdir

  config = command.config()
  assemble.check(dataclasses.replace(config, data={}))
  origin = pathlib.Path(config.init_from)
  if not (config.data.get('source') or config.data.get('parts')):
    if pretrained.is_foreign(origin):
      config = dataclasses.replace(config, data={}, validation={}, test={})
    else:
      saved = workdir.read_config(origin)
      config = dataclasses.replace(config, data=saved.data, validation=saved.validation)
  command.use_compilation_cache(command.workdir or origin)
  return sessions.open_model(None, config)
