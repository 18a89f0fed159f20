"""The base of a run: the frozen parameters that it took from another folder. Its checkpoints do not
hold them. They name the folder, and a fingerprint of the values, and whoever opens the run reads
them there again, or refuses others.
"""

import hashlib
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.core.state import Loaded
from llm_jax.parallel import hosts, sharding

FOLDER = 'base'  # of a workdir: where a base may also lie
_SEEDS = (0x9E3779B9, 0x85EBCA6B)
_WORDS = {1: jnp.uint8, 2: jnp.uint16}  # by the bytes of a number; else those of 32 bits


class Base(NamedTuple):
  """What a checkpoint says of the parameters that it does not hold.

  Attributes:
    folder: where they were taken from: a run, or a model of Hugging Face.
    step: of the run's checkpoint; None where it is no run.
    fingerprints: of the values of each, by its path in the network.
  """

  folder: str
  step: int | None
  fingerprints: Mapping[str, str]


# Reads the parameters of a network from a folder; of a run, those of a step.
Load = Callable[[pathlib.Path, int | None], Loaded]


def describe(
  folder: str, loaded: Loaded, frozen: Mapping[str, jax.Array], mesh: jax.sharding.Mesh
) -> Base | None:
  """The base of a new run; None where it has none.

  Args:
    folder: `config.init_from`.
    loaded: what was found there.
    frozen: the frozen parameters of the network, by path.
    mesh: where they lie.
  """
  found = {path: x for path, x in frozen.items() if path in loaded.params}
  if not found:
    return None
  return Base(folder, loaded.step, fingerprints(found, mesh))


def read(
  base: Base,
  workdir: pathlib.Path,
  load: Load,
  wanted: Collection[str],
  mesh: jax.sharding.Mesh,
  held: Mapping[str, jax.Array],
  beside: str = FOLDER,
) -> dict[str, Any]:
  """The parameters of a base that a network wants, by path.

  Args:
    base: as a checkpoint of the run has it.
    workdir: of the run. Where the folder is gone, `beside` in there is read.
    load: reads a folder.
    wanted: the paths of the network's parameters.
    mesh: where the parameters will lie.
    held: parameters that are in memory there; where all that are wanted are among them, to the bit,
      no folder is read.
    beside: where in the workdir they may lie too.

  Raises:
    ValueError: the folder is gone, lacks some of them, or holds others.
  """
  paths = [path for path in base.fingerprints if path in wanted]
  there = {path: held[path] for path in paths if path in held}
  if len(there) == len(paths) and fingerprints(there, mesh).items() <= base.fingerprints.items():
    return there
  folder, other = pathlib.Path(base.folder), workdir / beside
  if hosts.agree(lambda: not folder.exists()):
    folder = other
  way_out = f'Bring it back, or put a copy or a link of it at {other}.'
  if hosts.agree(lambda: not folder.exists()):
    raise ValueError(
      f'the checkpoints of {workdir} hold what was trained alone, and their base, {base.folder}, '
      f'is gone. {way_out}'
    )
  try:
    loaded = load(folder, base.step)
  except ValueError as error:
    raise ValueError(f'the base of {workdir} cannot be read. {way_out} Cause: {error}') from error
  missing = [path for path in paths if path not in loaded.params]
  if missing:
    listed = '\n  '.join(missing[:10])
    raise ValueError(f'{folder} is not the base of {workdir}: it lacks\n  {listed}\n{way_out}')
  found = {path: loaded.params[path] for path in paths}
  for path, known in fingerprints(found, mesh).items():
    if known != base.fingerprints[path]:
      raise ValueError(
        f'{folder} is not the base of {workdir} any more: {path} is not what the run was trained '
        f'on. {way_out}'
      )
  return found


def fingerprints(leaves: Mapping[str, jax.Array], mesh: jax.sharding.Mesh) -> dict[str, str]:
  """Of each array 64 hexadecimal digits that depend on its shape, its type and every bit, and not
  on where it lies.

  Each array is summed up on the devices, in integers, so that no host reads it; the sums are
  hashed. That finds what has changed, by chance or by training, not what was made to look equal.
  """
  sums = hosts.compiled(jax.jit(_sums, out_shardings=sharding.replicated(mesh)))(dict(leaves))
  said = {
    path: f'{leaves[path].shape} {leaves[path].dtype} {found.tolist()}'
    for path, found in sorted(jax.device_get(sums).items())
  }
  return {path: hashlib.sha256(text.encode()).hexdigest() for path, text in said.items()}


def _sums(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  return {path: _sum(x) for path, x in leaves.items()}


def _sum(x: jax.Array) -> jax.Array:
  """[2] uint32: the sum of all words of an array, each mixed with its index, for two seeds."""
  words = jax.lax.bitcast_convert_type(x, _WORDS.get(x.dtype.itemsize, jnp.uint32))
  words = words.astype(jnp.uint32)
  index = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(words.shape):  # from 2 ** 32 words on it begins anew
    index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  mixed = [_mixed(words ^ _mixed(index + jnp.uint32(seed))) for seed in _SEEDS]
  return jnp.stack([jnp.sum(each, dtype=jnp.uint32) for each in mixed])


def _mixed(x: jax.Array) -> jax.Array:
  """The finalizer of MurmurHash3: every bit of a word depends on every other."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
