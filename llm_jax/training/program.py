"""The training half of a program: optimizer, jitted train step, abstract state and model FLOPs."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from llm_jax.core import config as config_lib
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import (
  SOURCE,
  Adapter,
  Batch,
  Compression,
  Example,
  Metrics,
  Objective,
  Tokenizer,
)
from llm_jax.core.state import AVERAGES, COMPRESSED, TrainState
from llm_jax.core.tree import PyTree
from llm_jax.parallel import fsdp, hosts, sharding
from llm_jax.programs import assemble, forms, inference, teachers
from llm_jax.programs import network as networks
from llm_jax.programs.inference import Inference
from llm_jax.programs.network import Network
from llm_jax.training import adversarial, optimizers, step


@dataclasses.dataclass(frozen=True)
class Training(Inference):
  """All that a training run needs, compiled when first called.

  Attributes:
    state: abstract TrainState, each leaf a ShapeDtypeStruct with its sharding.
    init: seed -> TrainState on the mesh, the frozen parameters as arrays (see `kept`).
    train_step: (state, batch) -> (state, metrics); the state given is consumed.
    flops: model FLOPs of one train step, forward and backward (PaLM, arXiv:2204.02311, appendix
      B), nothing recomputed, and no gradient that nothing learns from; 0 where the model does not
      say.
    micro_batches: in how many parts a batch is run.
    gradient_shardings: where the gradient of each trained parameter lies.
    layers: of stacks that are trained in part, which of their layers are, bool by path.
    adversarial: how texts are moved to learn from them; None: they are not.
  """

  state: TrainState
  init: Callable[[int], TrainState]
  train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
  flops: float
  micro_batches: int
  gradient_shardings: PyTree
  layers: Mapping[str, np.ndarray]
  adversarial: adversarial.Method | None

  @functools.cached_property
  def finite(self) -> Callable[[TrainState], jax.Array]:
    """Whether all parameters, and all that the optimizer keeps of them, are finite."""

    def check(state: TrainState) -> jax.Array:
      leaves = jax.tree.leaves((state.params, state.opt_state))
      numbers = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
      return jnp.stack([jnp.all(jnp.isfinite(x)) for x in numbers]).all()

    return hosts.compiled(jax.jit(check, out_shardings=sharding.replicated(self.mesh)))


def check(config: Config, devices: Sequence[jax.Device] | None = None) -> None:
  """As `assemble.check`, and the sections that training alone needs."""
  config_lib.require(config, 'data', 'optimizer')
  assemble.check(config, devices)
  optimizers.parse(config.optimizer)
  method = adversarial.parse(config.adversarial)
  if method is not None:
    tokenizer = assemble.byte_tokenizer(config)
    stand_in = assemble.with_stand_ins(assemble.resolve(config, 1), tokenizer)
    method.check(assemble.create_objective(stand_in, tokenizer))


def build(
  config: Config,
  objective: Objective,
  example: Example,
  devices: Sequence[jax.Device] | None = None,
) -> Training:
  """Makes the program of a resolved config; arguments and errors as `inference.build`."""
  base = inference.build(config, objective, example, devices)
  base = dataclasses.replace(base, formed=dict(base.formed) | teachers.schemes(base))
  network, layout = base.network, base.layout
  micro_batches = assemble.micro_batches(config, base.mesh)
  _log_micro_batches(config, base.mesh, micro_batches)
  trained, layers = _trained(base)
  params, _ = params_lib.split(base.params, trained.__contains__)
  factor = (lambda path: 1.0) if network.adapter is None else network.adapter.rate
  tx, learning_rate = optimizers.create(config.optimizer, config.steps, params, base.infos, factor)
  ema_decay = _ema_decay(config, network.adapter)
  method = adversarial.parse(config.adversarial)
  if method is not None:
    method.check(objective)
  compression = _compression(base)
  init = functools.partial(
    _init,
    network=network,
    rows=inference.sample_rows(example),
    trained=trained,
    tx=tx,
    averages=bool(ema_decay),
    compression=compression,
    infos=base.infos,
  )
  drawn = jax.eval_shape(init, 0)
  shapes = drawn.replace(frozen=forms.abstract(drawn.frozen, base.infos, base.formed))
  shardings = _state_shardings(layout, shapes, forms.with_parts(base.infos, base.formed))
  gradient_shardings = sharding.parameter_shardings(layout, shapes.params, base.infos, True)
  train_step = functools.partial(
    step.train_step,
    network=network,
    tx=tx,
    learning_rate=learning_rate,
    steps=config.steps,
    micro_batches=micro_batches,
    shardings=gradient_shardings,
    layers=layers,
    begins={} if network.adapter is None else network.adapter.begins(params, base.infos),
    ema_decay=ema_decay,
    adversarial=method,
    compression=compression,
    infos=base.infos,
    forward=forms.learner(base.infos, base.formed) if compression else None,
  )
  fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
  return Training(
    **fields,
    state=inference.placed(shapes, shardings),
    init=jax.jit(init, out_shardings=_state_shardings(layout, drawn, base.infos)),
    train_step=jax.jit(
      inference.on_layout(layout, train_step),
      in_shardings=(shardings, sharding.batch_sharding(base.mesh)),
      out_shardings=(shardings, sharding.replicated(base.mesh)),
      donate_argnums=0,
      compiler_options=fsdp.compiler_options(base.mesh),
    ),
    flops=_flops(base, method, trained, layers),
    micro_batches=micro_batches,
    gradient_shardings=gradient_shardings,
    layers=layers,
    adversarial=method,
  )


def outline(
  config: Config, devices: Sequence[jax.Device], tokenizer: Tokenizer | None = None
) -> Training:
  """The program of a config whose data is not there: made-up records give the shapes of a batch.

  Without a tokenizer the vocabulary has `config.model.vocab_size` or
  `config.tokenizer.vocab_size` ids; what only data can tell (class names) has stand-ins.

  Args:
    config: as it is read from a file.
    devices: to build for, described ones included.
    tokenizer: the model's own; None where it is not there either.

  Raises:
    ValueError, TypeError: whatever in the config is not possible.
  """
  size = config.model.get('vocab_size') or config.tokenizer.get('vocab_size')
  if size and not config.model.get('vocab_size'):
    size += len(config.tokenizer.get('added') or ()) + (config.tokenizer.get('sentinels') or 0)
  if tokenizer is not None:
    size = tokenizer.vocab_size
  tokenizer = tokenizer or assemble.byte_tokenizer(config)
  config = assemble.resolve(config, size or tokenizer.vocab_size)
  config = assemble.with_stand_ins(config, tokenizer)
  objective = assemble.create_objective(config, tokenizer)
  example = assemble.template(config, objective, tokenizer)
  return build(config, teachers.beside(config, objective, tokenizer), example, devices)


def _compression(program: Inference) -> Compression | None:
  """The method that a run is trained with; None where there is none.

  Raises:
    ValueError: it is not trained with, or not in this run.
  """
  config = program.config
  method = assemble.create_compression(config)
  if method is None:
    return None
  name = config.compress['name']
  if not method.trains:
    raise ValueError(
      f'config.compress.name={name!r} is for --mode=compress; a run is not trained with it.'
    )
  for section, given in (
    ('adapter', config.adapter.get('name')),
    ('adversarial', config.adversarial.get('name')),
    ('optimizer.ema_decay', config.optimizer.get('ema_decay')),
  ):
    if given:
      raise ValueError(
        f'config.compress.name={name!r} in training and config.{section}={given!r} do not go '
        'together; train without the latter, or compress after the training.'
      )
  method.check(program.infos, tree.flatten(program.params))
  return method


def _ema_decay(config: Config, adapter: Adapter | None) -> float:
  """That of the optimizer's section; ValueError where an adapter changes parameters itself."""
  decay = optimizers.parse(config.optimizer).ema_decay
  if decay and adapter is not None and type(adapter).after_update is not Adapter.after_update:
    raise ValueError(
      f'config.optimizer.ema_decay={decay} would bring back what the adapter '
      f'{config.adapter["name"]!r} takes out of its parameters after a step; set it to 0.'
    )
  return decay


def _init(
  seed: jax.typing.ArrayLike,
  *,
  network: Network,
  rows: Batch,
  trained: frozenset[str],
  tx: optax.GradientTransformation,
  averages: bool,
  compression: Compression | None,
  infos: Mapping[str, params_lib.Info],
) -> TrainState:
  """The first state."""
  param_key, rng = jax.random.split(jax.random.PRNGKey(seed))
  whole = nn.meta.unbox(networks.initialize(network, param_key, rows))
  params, frozen = params_lib.split(whole, trained.__contains__)
  extras = {} if network.adapter is None else dict(network.adapter.extras(whole))
  if averages:
    extras[AVERAGES] = jax.tree.map(jnp.copy, params)  # a state has no buffer twice
  if compression is not None:
    extras[COMPRESSED] = compression.extras(params, infos)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    rng=rng,
    frozen=frozen,
    extras=extras,
  )


def _trained(program: Inference) -> tuple[frozenset[str], dict[str, np.ndarray]]:
  """The paths of the parameters that learn, and in which layers those that do so in part.

  Raises:
    ValueError: there is none, or an option of the adapter does not fit the network.
  """
  adapter, infos, base = program.network.adapter, program.infos, program.base
  learned = {path: info for path, info in infos.items() if program.objective.trains(path)}
  if adapter is None:
    return frozenset(learned), {}
  adapter.check(infos, base)
  trained = {path for path, info in learned.items() if adapter.trains(path, info, path in base)}
  chosen, _ = params_lib.split(program.params, trained.__contains__)
  layers = adapter.trained_layers(chosen, infos)
  trained -= {path for path, which in layers.items() if not np.any(which)}
  if not trained:
    raise ValueError('config.adapter leaves no parameter to train; look at its `trains`.')
  parts = {path: np.asarray(which) for path, which in layers.items() if path in trained}
  return frozenset(trained), {path: which for path, which in parts.items() if not which.all()}


def _state_shardings(
  layout: sharding.Layout, shapes: TrainState, infos: dict[str, params_lib.Info]
) -> TrainState:
  everywhere = sharding.replicated(layout.mesh)
  kept = sharding.parameter_shardings(layout, shapes.params, infos, optimizer=True)
  extras = jax.tree.map(lambda _: everywhere, dict(shapes.extras))
  if AVERAGES in extras:
    extras[AVERAGES] = kept
  extras[COMPRESSED] = {
    name: sharding.parameter_shardings(layout, carried, infos)
    for name, carried in dict(shapes.extras).get(COMPRESSED, {}).items()
  }
  if COMPRESSED not in shapes.extras:
    del extras[COMPRESSED]
  return TrainState(
    step=everywhere,
    params=sharding.parameter_shardings(layout, shapes.params, infos),
    opt_state=sharding.optimizer_shardings(layout.mesh, shapes.params, kept, shapes.opt_state),
    rng=everywhere,
    frozen=sharding.parameter_shardings(layout, shapes.frozen, infos),
    extras=extras,
  )


def _flops(
  program: Inference,
  method: adversarial.Method | None,
  trained: frozenset[str],
  layers: Mapping[str, np.ndarray],
) -> float:
  """A forward and a backward pass, and what further passes cost."""
  network, batch = program.network, program.batch
  rows, length = next(iter(batch.values())).shape[0], program.config.seq_len
  positions = jax.eval_shape(network.objective.positions, batch)
  read = length if positions is None else positions.shape[1]
  second = (batch[f'{SOURCE}tokens'].shape[1],) if network.model.reads_source() else ()
  with sharding.use(program.layout):
    model = rows * network.model.flops(length, read, *second)
  if not model or second and network.adapter is not None:  # layers of both rows differ in tokens
    return 0.0
  turns = network.objective.turns or (network.objective,)
  heads = sum(turn.flops(network.model, batch) for turn in turns) / len(turns)
  costs = adversarial.Cost(model, 2.0 * model)
  if network.adapter is not None:
    costs = _costs_beside_base(program, model, rows * length, trained, layers)
  # A head is a frozen vocabulary, or a further pass through the model.
  whole = adversarial.Cost(*(cost * (1 + heads / model) for cost in costs))
  return whole.step if method is None else method.flops(whole, costs)


def _costs_beside_base(
  program: Inference,
  model: float,
  tokens: int,
  trained: frozenset[str],
  layers: Mapping[str, np.ndarray],
) -> adversarial.Cost:
  """Of the model with an adapter: its own matrices cost 2 FLOPs per weight and token as well; a
  frozen matrix has no gradient of its own, and a layer below all that learns has none at all.

  Args:
    program: has an adapter.
    model: FLOPs of a forward pass through its base.
    tokens: of the batch.
    trained: paths of the parameters that learn.
    layers: of those that do so in part, in which layers.
  """
  count, learns = 0, []  # the layers, those of what is trained; prompts come before all layers
  own, frozen = collections.Counter[int](), collections.Counter[int]()
  for path, leaf in tree.flatten(program.params).items():
    info, based = program.infos[path], path in program.base
    depths = info.depths(leaf.shape)
    if depths is None:  # of the base: after all layers
      learns += [] if based or path.startswith('heads_') else [params_lib.EMBEDDINGS]
      continue
    depths, size = np.atleast_1d(depths), leaf.size // np.size(depths)
    count = max(count, int(depths.max()) + 1)
    moves = layers.get(path, np.full(depths.shape, path in trained))
    learns += depths[moves].tolist()
    if info.inputs and depths.min() >= 0:
      counted = frozen if based else own
      counted.update(dict.fromkeys(depths[~moves if based else slice(None)].tolist(), size))
  lowest = min(learns, default=count)
  added = 2.0 * tokens * own.total()
  backward = sum(2 * model / count - 2.0 * tokens * frozen[i] for i in range(max(lowest, 0), count))
  return adversarial.Cost(model + added, backward + 2 * added)


def _log_micro_batches(config: Config, mesh: jax.sharding.Mesh, count: int) -> None:
  tokens = config.batch_size * config.seq_len // (count * sharding.row_shards(mesh))
  logging.info('micro_batches=%d: %d tokens at once on a device.', count, tokens)
