"""`--mode=train`: trains a run in the workdir, from the start or from where it was left."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.training import logs, loop

NEEDS_CONFIG = True
WORKDIR = 'always'
SAVES = True


def prepare() -> None:
  """Before anything else, in a process of the program's own: how a CPU's memory is held."""
  from llm_jax.parallel.cpu import memory

  memory.set_up()


def run(command: Command) -> Callable[[], Any]:
  """Prepares the run; what is returned trains it."""
  from llm_jax.core import ownership
  from llm_jax.parallel import hosts

  hosts.agree(lambda: ownership.check(command.workdir))  # before imports that take seconds
  from llm_jax.training import loop

  config = command.parsed()
  command.use_compilation_cache(command.workdir)
  started = loop.prepare(config, command.workdir)
  return lambda: _train(started)


def _train(run: 'loop.Run') -> dict[str, float]:
  from llm_jax.inference import testing
  from llm_jax.training import loop

  values = loop.train(run, [samples, *configured(run)])
  testing.score(run)
  return values


def samples(run: 'loop.Run', log: 'logs.Log') -> Any:
  """The hook that shows what a decoder writes."""
  from llm_jax.inference.samples import Samples

  return Samples.of(run, log)


def configured(run: 'loop.Run') -> list[Callable[..., Any]]:
  """Makers of the hooks that the config names."""
  from llm_jax.programs import assemble

  config = run.program.config

  def maker(name: str) -> Callable[..., Any]:
    return lambda run, log: assemble.create_hook(config, name, run=run, log=log)

  return [maker(name) for name in config.hooks]
