"""A model, the heads that an objective asks for, and that objective's loss, as one Linen module.

Parameters stand under `model` and `heads_<name>`. `initialize` and `apply` are the two ways in:
both know the adapter, if there is one.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.contracts import Adapter, Batch, Metrics, Net, Number, Objective, Outputs
from llm_jax.core.tree import PyTree
from llm_jax.nn import watch as watching
from llm_jax.nn.embedder import Embedder
from llm_jax.nn.rows import at
from llm_jax.parallel.sharding import constrain


class Network(nn.Module):
  """What is run on a batch.

  Attributes:
    model: the model.
    heads: modules by name.
    objective: what is learned; None where there is only a forward pass.
    adapter: what is trained beside the model; None for nothing.
  """

  model: nn.Module
  heads: Mapping[str, nn.Module]
  objective: Objective | None = None
  adapter: Adapter | None = None

  @property
  def terms(self) -> dict[str, float]:
    """Coefficients of the metrics that make up the loss: the objective's and the model's."""
    return dict(self.model.terms) | dict(self.objective.terms)

  def terms_at(self, done: Number) -> dict[str, Number]:
    """The coefficients in training, when a share `done` of its steps is over."""
    return dict(self.model.terms) | dict(self.objective.terms_at(done))

  @property
  def longest(self) -> int:
    """The longest row: the model's, less the positions that the adapter takes."""
    return self.model.max_len - (0 if self.adapter is None else self.adapter.positions)

  def __call__(self, batch: Batch, train: bool = False) -> Metrics:
    """The (sum, weight) metrics of a batch; dropout draws from the stream `dropout` in training."""
    metrics, found = self.part(batch, train)
    return metrics | self.compare(found, batch)

  def part(self, batch: Batch, train: bool = False) -> tuple[Metrics, dict[str, jax.Array]]:
    """The metrics of a part of a batch, and what `compare` wants of it."""
    metrics, hidden_BPD = self.states(batch, train)
    found = {}
    if self.objective.compares:
      with jax.named_scope('objective'):
        found = self.objective.represent(self.net(train), hidden_BPD, batch)
    return metrics, found

  def states(self, batch: Batch, train: bool = False) -> tuple[Metrics, jax.Array]:
    """The metrics of a part of a batch, and the hidden states that they come from."""
    positions = self.objective.positions(batch)
    outputs, seen = self._watched(batch, positions, train, self.objective.watches)
    with jax.named_scope('objective'):
      metrics = self.objective.loss(self.net(train)._replace(seen=seen), outputs.hidden, batch)
    return metrics | outputs.aux_losses, outputs.hidden

  def taught(self, batch: Batch, watch: bool) -> tuple[Net, jax.Array]:
    """As a teacher: itself as objectives see it, and its hidden states where its own reads them.

    Args:
      batch: rows of a student.
      watch: whether what its layers pass on is wanted too.
    """
    outputs, seen = self._watched(batch, self.objective.positions(batch), False, watch)
    net = self.net()._replace(seen=seen, objective=self.objective)
    return net, jax.lax.stop_gradient(outputs.hidden)

  @nn.nowrap
  def _watched(
    self, batch: Batch, positions: jax.Array | None, train: bool, watch: bool
  ) -> tuple[Outputs, dict[str, jax.Array]]:
    """A pass through the model, and what its layers pass on, if wanted.

    They are run for all positions then. What they sow does not reach out of a network that is bound
    already, so another one is run, with the same parameters.
    """
    if not watch or self.is_initializing():
      return self.model(batch, positions, train=train), {}
    params = {'model': self.model.variables['params']}
    rngs = {'dropout': self.make_rng('dropout')} if train else {}
    alone = Network(self.model.clone(parent=None), {}, parent=None)

    def run(network: 'Network') -> Outputs:
      return network.model(batch, None, train=train)

    with nn.intercept_methods(watching.watching):
      outputs, collected = alone.apply(
        {'params': params}, method=run, rngs=rngs, mutable=[watching.WATCHED]
      )
    seen = watching.layers(collected[watching.WATCHED])
    return outputs.replace(hidden=at(outputs.hidden, positions)), seen

  def answer(
    self, batch: Batch, hidden_BPD: jax.Array | None = None, train: bool = False
  ) -> jax.Array:
    """What the objective compares by its `divergence`; hidden states None: of a pass."""
    if hidden_BPD is None:
      hidden_BPD = self.model(batch, self.objective.positions(batch), train=train).hidden
    with jax.named_scope('objective'):
      return self.objective.answer(self.net(train), hidden_BPD, batch)

  @nn.nowrap
  def compare(self, found: Mapping[str, jax.Array], batch: Batch) -> Metrics:
    """The metrics that only the whole batch has."""
    if not self.objective.compares:
      return {}
    with jax.named_scope('objective'):
      return self.objective.compare(found, batch)

  def predict(self, batch: Batch) -> dict[str, jax.Array]:
    """What the objective's predictor says of each row."""
    predictor = self.objective.predictor
    outputs = self.model(batch, predictor.positions(batch))
    return predictor.predict(self.net(), outputs.hidden, batch)

  def net(self, train: bool = False) -> Net:
    """What objectives and predictors get to see."""

    def forward(batch: Batch, positions: jax.Array | None = None) -> Outputs:
      return self.model(batch, positions, train=train)

    return Net(self.model, self.heads, forward, train)


def initialize(network: Network, key: jax.Array, rows: Batch) -> dict[str, Any]:
  """New parameters, boxed (`core.params`): those of the base first, then the adapter's own.

  The base draws what it would draw without an adapter. What is trained beside a frozen base of few
  bits, or in it, is float32, that small steps are not lost.
  """
  base = network.clone(adapter=None)
  params = base.init(key, rows)['params']
  if network.adapter is None:
    return params
  with nn.intercept_methods(network.adapter.intercept):
    adapted = base.init(jax.random.fold_in(key, 1), rows)['params']
  frozen_too = frozenset(params_lib.infos(params))
  return _wide_where_trained(_with_new(params, adapted), network.adapter, frozen_too)


def apply(
  network: Network,
  params: PyTree,
  batch: Batch,
  method: Callable[..., Any] | str | None = None,
  rngs: Mapping[str, jax.Array] | None = None,
  delta_BTD: jax.Array | None = None,
  **kwargs: Any,
) -> Any:
  """`network.apply` on all parameters, through the adapter if there is one.

  Args:
    network: the network.
    params: unboxed, trained and frozen ones together.
    batch: what the method takes.
    method: of the network; None for its call, the metrics.
    rngs: random streams by name.
    delta_BTD: what is added to the vectors of the batch's tokens, an adapter's among them; None for
      nothing.
    **kwargs: further arguments of the method.

  Raises:
    ValueError: there is a delta, and the model has no `nn.embedder.Embedder`.
  """
  rngs = dict(rngs or {})
  adapter = network.adapter
  with contextlib.ExitStack() as stack:
    if adapter is not None:
      stack.enter_context(nn.intercept_methods(adapter.intercept))
      params = adapter.weights(params)
    if delta_BTD is not None:
      stack.enter_context(_moved(delta_BTD))
    return network.apply({'params': params}, batch, method=method, rngs=rngs, **kwargs)


@contextlib.contextmanager
def _moved(delta_BTD: jax.Array) -> Iterator[None]:
  """Adds delta to what an embedder gives for tokens."""
  seen: set[tuple[str, ...]] = set()

  def add(next_fun, args, kwargs, context):
    x_BTD = next_fun(*args, **kwargs)
    if not isinstance(context.module, Embedder) or context.method_name != 'vectors':
      return x_BTD
    if x_BTD.shape != delta_BTD.shape:
      raise ValueError(
        f'the vectors of tokens {x_BTD.shape} cannot be moved by {delta_BTD.shape}: the objective '
        'passes other rows than those of the batch through the model; leave config.adversarial out.'
      )
    seen.add(context.module.path)
    if len(seen) > 1:
      raise ValueError(
        f'config.adversarial moves the vectors of one row, and this model embeds {len(seen)}: '
        f'{", ".join(sorted(map("/".join, seen)))}; leave it out.'
      )
    return x_BTD.astype(delta_BTD.dtype) + constrain(delta_BTD, 'batch', 'length', None)

  with nn.intercept_methods(add):
    yield
  if not seen:
    raise ValueError(
      'config.adversarial moves the vectors that `nn.embedder.Embedder` gives for tokens, and this '
      'model has none; leave it out.'
    )


def base_paths(network: Network, rows: Batch) -> frozenset[str]:
  """The paths of the parameters that the network has without its adapter."""
  base = network.clone(adapter=None)
  shapes = jax.eval_shape(lambda: base.init(jax.random.PRNGKey(0), rows)['params'])
  return frozenset(params_lib.infos(shapes))


def _with_new(old: PyTree, new: Any) -> dict[str, Any]:
  """`old` with the leaves of `new` that it lacks; boxes are leaves."""
  found: dict[str, Any] = {}
  for params in (new, old):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box):
      found[jax.tree_util.keystr(path, simple=True, separator='/')] = leaf
  return tree.nest(found)


def _wide_where_trained(params: PyTree, adapter: Adapter, base: frozenset[str]) -> Any:
  """The parameters, those that an adapter trains in 32 bits at least."""
  infos = params_lib.infos(params)

  def leaf(keys: Any, x: Any) -> Any:
    path = jax.tree_util.keystr(keys, simple=True, separator='/')
    if not adapter.trains(path, infos[path], path in base):
      return x
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), x)

  return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
  return isinstance(leaf, nn.meta.AxisMetadata)
