"""`--mode=plan`: what a run needs on a machine that is not here."""

import pathlib

from absl import flags

from llm_jax.modes._command import Command

TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'plan: the machine to plan for, v5e:4x4 say; several, with commas, to compare.',
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
  program.check(config, topology.devices(names[0]))
  plan.run(config, TOPOLOGY.value, command.workdir or pathlib.Path.cwd())
