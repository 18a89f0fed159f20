"""`--mode=plan`: what a run needs on a machine that is not here."""

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.core.config import Config

TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'plan: the machine to plan for, v5e:4x4 say; several, with commas, to compare.',
)
PLAN = flags.DEFINE_enum(
  'plan',
  'train',
  ['train', 'generate'],
  'plan: for what: a train step, or the next token of rows that a decoder writes.',
)
ROWS = flags.DEFINE_integer('plan_rows', 1, 'plan, generate: rows that are written at once.')
SLOTS = flags.DEFINE_integer(
  'plan_slots', None, 'plan, generate: tokens of a row; by default as many as the model takes.'
)
NEEDS_CONFIG = True
WORKDIR = 'optional'
ALONE = True


def run(command: Command) -> None:
  """Prints the report, and writes it to the workdir, or to the current folder."""
  if not TOPOLOGY.value:
    raise ValueError('--mode=plan needs --topology=v5e:4x4, or another machine.')
  import jax

  jax.config.update('jax_platforms', 'cpu')  # chips of this machine, if any, are left alone
  from llm_jax.parallel import topology
  from llm_jax.planning import plan
  from llm_jax.training import program

  names = TOPOLOGY.value.split(',')
  topology.prepare(names)
  config = command.config()
  if PLAN.value == 'generate':
    _generate(command, config)
    return
  program.check(config, topology.devices(names[0]))
  plan.run(config, TOPOLOGY.value, command.workdir or pathlib.Path.cwd())


def _generate(command: Command, config: 'Config') -> None:
  from llm_jax.parallel import topology
  from llm_jax.planning import generation
  from llm_jax.programs import assemble

  assemble.check(config, topology.devices(TOPOLOGY.value.split(',')[0]))
  folder = command.workdir or pathlib.Path.cwd()
  generation.run(config, TOPOLOGY.value, folder, ROWS.value, SLOTS.value)
