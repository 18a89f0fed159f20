"""What a model does with texts (`core.contracts.Seen`): activations, gradients, ids."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import metrics as metrics_lib
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.contracts import (
  ACTIVATIONS,
  GRADIENTS,
  IDS,
  Batch,
  Documents,
  Example,
  Scheme,
  Seen,
)
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.nn.linear import Linear, multiply
from llm_jax.programs import inference
from llm_jax.programs import network as networks
from llm_jax.programs.inference import Inference

COLLECTION = 'seen'
SQUARE, MOST, WRONG, SIZE = 'square', 'most', 'wrong', 'size'
PARTS = ('heads', 'kv_heads', 'mlp')  # the axes of what may be left out of a layer


def look(
  program: Inference,
  params: PyTree,
  wanted: Sequence[str],
  batches: Iterable[Example],
  documents: Sequence[Documents],
  schemes: Mapping[str, Scheme],
) -> Seen:
  """What is to be known of a model.

  Args:
    program: of the model.
    params: its parameters, arrays.
    wanted: some of the fields of `Seen`.
    batches: of texts, this host's rows.
    documents: all texts, for the counts of ids.
    schemes: how kernels would be put into another form, for how much their products would differ.

  Raises:
    ValueError: there is no text.
  """
  found = Seen()
  batches = [program.put(batch) for batch in batches] if set(wanted) - {IDS} else []
  if set(wanted) - {IDS} and not batches:
    raise ValueError('config.compress looks at texts, and there is none; look at config.data.')
  if ACTIVATIONS in wanted:
    found = found.replace(activations=activations(program, params, batches, schemes))
  if GRADIENTS in wanted:
    found = found.replace(gradients=gradients(program, params, batches))
  if IDS in wanted:
    found = found.replace(counts=counts(documents, program.network.model.vocab_size))
  return found


def activations(
  program: Inference,
  params: PyTree,
  batches: Sequence[Batch],
  schemes: Mapping[str, Scheme],
) -> dict[str, dict[str, jax.Array]]:
  """Of each kernel of a linear map in the model, what it multiplies; see `Seen`."""

  def run(params: PyTree, batch: Batch) -> Any:
    watch = functools.partial(_watch, batch=batch, infos=program.infos, schemes=schemes)
    with nn.intercept_methods(watch):
      _, seen = networks.apply(program.network, params, batch, mutable=[COLLECTION])
    return seen[COLLECTION]

  traced = jax.jit(inference.on_layout(program.layout, run))
  found: dict[str, Any] = {}
  for batch in batches:
    for path, leaf in tree.flatten(traced(params, batch)).items():
      path, _, name = path.rpartition('/')
      said = found.setdefault(path, {})
      joined = jnp.maximum if name == MOST else jnp.add
      said[name] = joined(said[name], leaf) if name in said else leaf
  return {f'{path}/kernel': _means(said, len(batches)) for path, said in found.items()}


def gradients(program: Inference, params: PyTree, batches: Sequence[Batch]) -> dict[str, jax.Array]:
  """How much the loss changes where parts of a layer are left out; see `Seen`."""
  chosen = {path: info for path, info in program.infos.items() if _of_layer(info)}

  def run(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    some, others = params_lib.split(params, chosen.__contains__)

    def loss(some: PyTree) -> jax.Array:
      whole = params_lib.merge(some, others)
      return metrics_lib.total(networks.apply(program.network, whole, batch), program.network.terms)

    grads = tree.flatten(jax.grad(loss)(some))
    return {
      path: jnp.abs(_over_parts(leaf * grads[path], chosen[path]))
      for path, leaf in tree.flatten(some).items()
    }

  traced = jax.jit(inference.on_layout(program.layout, run))
  sums: dict[str, jax.Array] = {}
  for batch in batches:
    found = traced(params, batch)
    sums = jax.tree.map(jnp.add, sums, found) if sums else found
  return {path: total / len(batches) for path, total in sums.items()}


def counts(documents: Sequence[Documents], size: int) -> np.ndarray:
  """How often each id stands in documents, [V] int64."""
  found = np.zeros(size, np.int64)
  for part in documents:
    names = [name for name in part.names if name == 'tokens' or name.endswith('_tokens')]
    for index in range(len(part)):
      for name in names:
        found += np.bincount(part.array(name, index), minlength=size)
  return found


def _watch(
  next_fun: Any,
  args: tuple[Any, ...],
  kwargs: dict[str, Any],
  context: nn.module.InterceptorContext,
  *,
  batch: Batch,
  infos: Mapping[str, Info],
  schemes: Mapping[str, Scheme],
) -> Any:
  """Stands around the linear maps of the model, and sows what they multiply."""
  module = context.module
  watched = isinstance(module, Linear) and context.method_name == '__call__'
  if not watched or module.path[:1] != ('model',):
    return next_fun(*args, **kwargs)
  path = f'{"/".join(module.path)}/kernel'
  info = _of_one_layer(infos[path])
  x = args[0].astype(jnp.float32)
  counted = batch['segments'] > 0
  rows = x.ndim - len(info.inputs)
  if x.shape[:rows] != counted.shape:
    counted = jnp.ones(x.shape[:rows], bool)
  counted = counted.reshape(*counted.shape, *[1] * len(info.inputs))
  x = jnp.where(counted, x, 0)
  over = tuple(range(rows))
  values = {SQUARE: jnp.sum(x**2, over) / jnp.sum(counted), MOST: jnp.max(jnp.abs(x))}
  if path in schemes:
    kernel = module.get_variable('params', 'kernel')
    given = values | {SQUARE: values[SQUARE]}
    form = schemes[path].form(kernel, info, given)
    names, wide = (None,) * kernel.ndim, jnp.float32
    right = multiply(kernel, module.spec, x, names, wide, wide)
    values[WRONG] = jnp.sum((form.product(module.spec, x, wide, wide) - right) ** 2)
    values[SIZE] = jnp.sum(right**2)
  for name, value in values.items():
    module.sow(COLLECTION, name, value, lambda _, new: new, lambda: None)
  return next_fun(*args, **kwargs)


def _means(said: Mapping[str, jax.Array], count: int) -> dict[str, jax.Array]:
  found = {SQUARE: said[SQUARE] / count, MOST: said[MOST]}
  if WRONG in said:
    found['error'] = jnp.sqrt(said[WRONG] / jnp.maximum(said[SIZE], jnp.finfo(jnp.float32).tiny))
  return found


def _of_one_layer(info: Info) -> Info:
  names = info.names[info.stacked :]
  return Info(names, info.inputs, info.decayed, info.layer, info.period, info.formable)


def _of_layer(info: Info) -> bool:
  return bool(set(PARTS) & set(info.names)) and info.layer is not None and info.layer >= 0


def _over_parts(x: jax.Array, info: Info) -> jax.Array:
  kept = (params_lib.LAYERS, *PARTS)
  return jnp.sum(x, tuple(i for i, name in enumerate(info.names) if name not in kept))
