"""What a run with an adapter trains: a table before its first step, and the proof that it learns.

The gradient of each trained parameter is taken on the first batch, without dropout. One that is
zero where the method does not say so would stay as it is, and is an error.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import tree
from llm_jax.core.contracts import Batch, Example
from llm_jax.core.state import TrainState
from llm_jax.parallel import hosts, sharding
from llm_jax.programs import inference
from llm_jax.training import logs, step
from llm_jax.training.program import Training


class Gradient(NamedTuple):
  """Of one parameter.

  Attributes:
    norm: over all of it.
    least: the largest absolute value; of a stack that of the layer in which it is least.
  """

  norm: jax.Array
  least: jax.Array


def report(program: Training, state: TrainState, train: Sequence[Example]) -> str:
  """The table, with the gradients of the first batch; all hosts call it.

  Args:
    program: with an adapter.
    state: before the first step.
    train: the training stream.

  Raises:
    ValueError: a trained parameter has no gradient, and the adapter does not say why.
  """
  rows = [train[int(i)] for i in hosts.rows(program.mesh, program.config.batch_size)]
  batch = program.put({key: np.stack([row[key] for row in rows]) for key in rows[0]})
  found = jax.device_get(gradients(program, state, batch))
  check(program, found)
  return table(program, found)


def gradients(program: Training, state: TrainState, batch: Batch) -> dict[str, Gradient]:
  """The gradient of each trained parameter, by path, on one global batch."""

  def run(state: TrainState, batch: Batch) -> dict[str, Gradient]:
    found, _ = step.gradient(
      state.params,
      batch,
      None,
      frozen=state.frozen,
      network=program.network,
      micro_batches=program.micro_batches,
      shardings=program.gradient_shardings,
    )
    return {path: _gradient(x, program, path) for path, x in tree.flatten(found).items()}

  everywhere = sharding.replicated(program.mesh)
  jitted = jax.jit(inference.on_layout(program.layout, run), out_shardings=everywhere)
  return hosts.compiled(jitted)(state, batch)


def check(program: Training, found: Mapping[str, Gradient]) -> None:
  """Raises ValueError for a parameter that has no gradient without a known reason."""
  dead = [path for path, x in found.items() if not x.least > 0 and not _reason(program, path)]
  if dead:
    listed = '\n  '.join(dead)
    raise ValueError(
      f'config.adapter.name={program.config.adapter["name"]!r} trains parameters that the loss of '
      f'the first batch does not depend on, or not in every layer:\n  {listed}\nLeave them out, '
      'or see that they reach the loss.'
    )


def table(program: Training, found: Mapping[str, Gradient]) -> str:
  """A line for each trained parameter, and the sum, with its share of all.

  Args:
    program: with an adapter.
    found: the gradients.
  """
  shapes = tree.flatten(program.state.params)
  counts = {path: _count(leaf, program.layers.get(path)) for path, leaf in shapes.items()}
  lines = [('trained', 'shape', 'count', 'gradient norm')]
  for path, leaf in shapes.items():
    why = _reason(program, path)
    norm = f'{float(found[path].norm):.3g}' + (f' ({why})' if why else '')
    shape = ' x '.join(map(str, leaf.shape)) or 'scalar'
    lines.append((path, shape, f'{counts[path]:,}', norm))
  trained = sum(counts.values())
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.params))
  return '\n'.join(
    [
      *logs.aligned(lines, right='count'),
      f'{trained:,} of {total:,} parameters are trained ({trained / total:.2%}), in {len(shapes)} '
      'arrays; all others stay as they are.',
    ]
  )


def _reason(program: Training, path: str) -> str | None:
  """Why a parameter has no gradient, as adapter or objective say."""
  found = program.network.adapter.no_gradient(path)
  return found or program.objective.no_gradient(path)


def _count(leaf: jax.ShapeDtypeStruct, layers: np.ndarray | None) -> int:
  """The numbers that are trained, in all layers or in some."""
  size = math.prod(leaf.shape)
  return size if layers is None else size // len(layers) * int(layers.sum())


def _gradient(x: jax.Array, program: Training, path: str) -> Gradient:
  x = jnp.abs(x.astype(jnp.float32))
  if path in program.layers:
    x = x[np.flatnonzero(program.layers[path])]
  stacked = program.infos[path].stacked
  of_layers = jnp.max(x.reshape(x.shape[0] if stacked else 1, -1), axis=1)
  return Gradient(jnp.linalg.norm(x.reshape(-1)), jnp.min(of_layers))
