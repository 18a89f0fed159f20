"""The average of the parameters of several runs that have one shape: a model soup (Wortsman et al.
2022, arXiv:2203.05482, section 2, uniform). It costs no more than one of them to use.

Runs that started from the same weights lie in one basin of the loss, where an average is at least a
model; of runs that started apart it is not.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import tree
from llm_jax.core.config import Config
from llm_jax.parallel import hosts
from llm_jax.programs import bases
from llm_jax.programs.inference import Inference

# Options by which runs of a soup may differ: none of them changes what a parameter means.
FREE = (
  *(
    'variant',
    'dtype',
    'remat',
    'unroll',
    'attention',
    'dropout',
    'attention_dropout',
    'cache_dtype',
  ),
  # of adapters, while they are trained
  *('loraplus_lr_ratio', 'warmup_steps', 'final_steps', 'every', 'orthogonality'),
)
# Options of an objective by which they may not.
READING = ('name', 'task', 'classes', 'tags', 'pool', 'transform', 'loss', 'scheme', 'words')


def check(first: Config, other: Config, folder: pathlib.Path) -> None:
  """Raises ValueError where equal parameters of two runs would not mean the same.

  Args:
    first: the resolved config of a run.
    other: of another.
    folder: the folder of the other, for messages.
  """
  for section in ('model', 'adapter', 'objective'):
    ours, theirs = (_meaning(section, getattr(config, section)) for config in (first, other))
    for name in sorted(ours.keys() | theirs.keys()):
      if ours.get(name) != theirs.get(name):
        raise ValueError(
          f'the parameters of {folder} cannot be averaged with those of the first run: '
          f'config.{section}.{name} is {theirs.get(name)!r} there, and {ours.get(name)!r} here. '
          'An ensemble averages the answers of models that differ.'
        )


def average(
  program: Inference,
  folders: Sequence[pathlib.Path],
  load: Callable[[pathlib.Path], dict[str, Any]],
) -> dict[str, Any]:
  """The mean of the parameters of several runs, at most two of which are held at a time.

  Of runs with an adapter what is trained is averaged, of LoRA its thin matrices; the base is the
  same for all.

  Args:
    program: of the network.
    folders: of the runs.
    load: gives the parameters of one of them as the program wants them, nested.

  Raises:
    ValueError: a run has parameters that the first one lacks, or the other way round; or another
      base.
  """
  first, *others = folders
  mean = tree.flatten(load(first))
  frozen = _frozen(program, mean)
  base = bases.fingerprints({path: mean[path] for path in frozen}, program.mesh) if frozen else {}
  trained = [path for path in mean if path not in base]
  where = {path: mean[path].sharding for path in trained}
  mix = hosts.compiled(jax.jit(_mixed, donate_argnums=0, out_shardings=where))
  for count, folder in enumerate(others, start=2):
    found = tree.flatten(load(folder))
    difference = tree.difference(mean, found)
    if difference:
      raise ValueError(
        f'the parameters of {folder} cannot be averaged with those of {first} (- it lacks, + it '
        f'has beyond):\n{difference}'
      )
    _check_base(base, found, program, folder, first)
    both = ({path: params[path] for path in trained} for params in (mean, found))
    mean |= mix(*both, np.float32(count))
  return tree.nest(mean)


def _meaning(section: str, options: Mapping[str, Any]) -> dict[str, Any]:
  """The options that decide what parameters mean; lists and tuples are the same."""
  found = {
    name: list(value) if isinstance(value, list | tuple) else value
    for name, value in options.items()
    if value is not None and name not in FREE
  }
  if section == 'objective':
    return {name: value for name, value in found.items() if name in READING}
  return found


def _frozen(program: Inference, paths: Mapping[str, Any]) -> list[str]:
  """The parameters that an adapter leaves as they were."""
  adapter = program.network.adapter
  if adapter is None:
    return []
  trains = lambda path: adapter.trains(path, program.infos[path], path in program.base)
  return [path for path in paths if not trains(path)]


def _check_base(
  base: Mapping[str, str],
  found: Mapping[str, jax.Array],
  program: Inference,
  folder: pathlib.Path,
  first: pathlib.Path,
) -> None:
  if not base:
    return
  theirs = bases.fingerprints({path: found[path] for path in base}, program.mesh)
  for path, known in base.items():
    if theirs[path] != known:
      raise ValueError(
        f'{folder} was trained beside another base than {first}: {path} differs. What adapters '
        'have learned can be averaged where their base is the same; an ensemble averages answers.'
      )


def _mixed(
  mean: Mapping[str, jax.Array], found: Mapping[str, jax.Array], count: jax.Array
) -> dict[str, jax.Array]:
  """The mean of `count` arrays from that of all but the last; of equal ones exactly these."""
  return {path: _moved(x, found[path], count) for path, x in mean.items()}


def _moved(mean: jax.Array, last: jax.Array, count: jax.Array) -> jax.Array:
  kind = jnp.promote_types(mean.dtype, jnp.float32)
  wide = mean.astype(kind)
  return (wide + (last.astype(kind) - wide) / count.astype(kind)).astype(mean.dtype)
