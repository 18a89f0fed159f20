"""The half of a program that learns nothing: network, shardings, and compiled forward functions.

Allocates no array and knows no optimizer. `training.program.Training` stands on top of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import params as params_lib
from llm_jax.core.config import Config
from llm_jax.core.contracts import Batch, Example, Metrics, Objective, Scheme, Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.parallel import sharding
from llm_jax.programs import assemble, forms
from llm_jax.programs import network as networks
from llm_jax.programs.network import Network


@dataclasses.dataclass(frozen=True)
class Inference:
  """All that running a network needs; functions are compiled when they are first called.

  Attributes:
    config: the config with what was derived filled in (the model's full shape, class names).
    network: model, heads, objective and adapter.
    layout: the mesh of devices, and how arrays lie on it.
    params: all parameters of the network, abstract: shape, type and sharding.
    infos: what each parameter is, by path.
    batch: one global batch, abstract.
    base: the paths of the parameters that are not the adapter's own.
    formed: the kernels and tables that are kept in another form, by path, and how they are put into
      it (`programs.forms`).
  """

  config: Config
  network: Network
  layout: sharding.Layout
  params: dict[str, Any]
  infos: dict[str, params_lib.Info]
  batch: dict[str, jax.ShapeDtypeStruct]
  base: frozenset[str]
  formed: Mapping[str, Scheme]

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """The devices."""
    return self.layout.mesh

  @property
  def objective(self) -> Objective | None:
    """What the network learned, or None."""
    return self.network.objective

  @property
  def model_infos(self) -> dict[str, params_lib.Info]:
    """`infos` of the model alone, by paths within it."""
    prefix = 'model/'
    return {
      path.removeprefix(prefix): info
      for path, info in self.infos.items()
      if path.startswith(prefix)
    }

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows of a batch as one global array on the mesh."""
    by_row = sharding.batch_sharding(self.mesh)
    return jax.make_array_from_process_local_data(by_row, dict(batch))

  def kept(self, params: PyTree) -> dict[str, Any]:
    """Parameters, or some of them, in the form in which the network keeps them."""
    return forms.kept(params, self.infos, self.formed, self.layout)

  def dense(self, params: PyTree) -> dict[str, Any]:
    """Arrays in place of the forms."""
    return forms.dense(params, self.params)

  def function(self, method: Callable[[Network, Batch], Any]) -> Callable[[Any, Batch], Any]:
    """Compiles (params, batch) -> what `method` of the bound network gives, whole on each device.

    Args:
      method: a function of the bound network and a batch.
    """

    def run(params: PyTree, batch: Batch) -> Any:
      return networks.apply(self.network, params, batch, method=method)

    return jax.jit(on_layout(self.layout, run), out_shardings=sharding.replicated(self.mesh))

  @functools.cached_property
  def eval_step(self) -> Callable[[Any, Batch], Metrics]:
    """(params, batch) -> the metrics of the objective."""
    return self.function(lambda network, batch: network(batch))

  @functools.cached_property
  def predict_step(self) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """(params, batch) -> what the objective's predictor says of each row."""
    return self.function(lambda network, batch: network.predict(batch))


def build(
  config: Config,
  objective: Objective | None,
  example: Example,
  devices: Sequence[jax.Device] | None = None,
) -> Inference:
  """Makes the program of a resolved config.

  Args:
    config: the config.
    objective: as `assemble.create_objective` makes it; None for the model alone.
    example: one row as the objective makes it; its shapes are those of every batch.
    devices: the devices to use, all by default.

  Raises:
    ValueError, TypeError: whatever in the config is not possible, before anything is compiled.
  """
  layout = assemble.create_layout(config, devices)
  config = assemble.with_compute_type(config, layout.platform)
  network = network_of(config, objective)
  boxed = abstract_boxed(network, example)
  infos = params_lib.infos(boxed)
  shapes = nn.meta.unbox(boxed)
  shardings = sharding.parameter_shardings(layout, shapes, infos)
  by_row = sharding.batch_sharding(layout.mesh)
  batch = {
    key: jax.ShapeDtypeStruct((config.batch_size, *value.shape), value.dtype, sharding=by_row)
    for key, value in example.items()
  }
  base = frozenset(infos)
  if network.adapter is not None:
    base = networks.base_paths(network, sample_rows(example))
  formed = forms.of_base(config, network.adapter, infos, base)
  formed |= forms.of_method(assemble.create_compression(config), infos, shapes)
  return Inference(config, network, layout, placed(shapes, shardings), infos, batch, base, formed)


def network_of(config: Config, objective: Objective | None) -> Network:
  """The network of a resolved config.

  Raises:
    ValueError: a model that cannot learn the objective.
  """
  model, heads = assemble.create_model(config), {}
  if objective is not None:
    objective.check(model)
    heads = objective.heads(model)
  return Network(model, heads, objective, assemble.create_adapter(config))


def outline(
  config: Config, tokenizer: Tokenizer, devices: Sequence[jax.Device] | None = None
) -> Inference:
  """The program of a config whose data is not there: made-up records give the shapes of a batch.

  Args:
    config: with the model's shape filled in.
    tokenizer: the model's own.
    devices: the devices to use, all by default.
  """
  config = assemble.resolve(config, tokenizer.vocab_size)
  objective = assemble.create_objective(config, tokenizer)
  return build(config, objective, assemble.template(config, objective, tokenizer), devices)


def abstract_boxed(network: Network, example: Example) -> Any:
  """The boxed parameters of a network as shapes."""
  rows = sample_rows(example)
  return jax.eval_shape(lambda: networks.initialize(network, jax.random.PRNGKey(0), rows))


def sample_rows(example: Example) -> dict[str, jax.Array]:
  """A batch of one row of zeros, for initialization."""
  return {key: jnp.zeros((1, *value.shape), value.dtype) for key, value in example.items()}


def placed(shapes: PyTree, shardings: PyTree) -> Any:
  """Abstract arrays with their shardings."""

  def leaf(x: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(leaf, shapes, shardings)


def on_layout(layout: sharding.Layout, function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, traced with the layout in force."""

  @functools.wraps(function)
  def wrapped(*args: Any) -> Any:
    with sharding.use(layout):
      return function(*args)

  return wrapped
