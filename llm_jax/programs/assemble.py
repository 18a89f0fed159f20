"""From a config to a Program: model, objective, optimizer, steps, shardings and the abstract state.
Allocates no array.

The only module that looks plugins up by name.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from llm_jax.core import plugins, tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Batch, Objective, Source, Tokenizer
from llm_jax.core.state import TrainState
from llm_jax.nn import layers
from llm_jax.parallel import fsdp, sharding
from llm_jax.programs import step
from llm_jax.training import optimizers as optim

DATA_OPTIONS = (
  'source',
  'validation',
  'cache',
  'workers',
  'parts',
)  # of config.data; the others belong to the source
TOKENS_AT_ONCE = {
  'cpu': 2048,
  'accelerator': 8192,
}  # a micro-batch of a BERT-base on a device then stays within a few GiB


@dataclasses.dataclass(frozen=True)
class Program:
  """All that a run needs, compiled when first called.

  Attributes: config: the config with what was derived filled in (the model's full shape, class
    names). network: model, heads and objective. layout: the mesh of devices, and how things lie on
    it. batch: one global batch, abstract as the state is. state: abstract TrainState, each leaf a
    ShapeDtypeStruct with its sharding. init: seed -> TrainState on the mesh. train_step: (state,
    batch) -> (state, pairs); the state given is consumed. eval_step: (params, batch) -> pairs.
    predict_step: (params, batch) -> what the objective's predictor says of each row, if there is
    one. flops: model FLOPs of one train step, forward and backward (PaLM, arXiv:2204.02311,
    appendix B), nothing recomputed. micro_batches: in how many parts a batch is run.
    gradient_shardings: where the gradient of each parameter lies.
  """

  config: Config
  network: step.Network
  layout: sharding.Layout
  state: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]
  init: Callable[[int], TrainState]
  train_step: Callable[[TrainState, Batch], tuple[TrainState, Any]]
  eval_step: Callable[[Any, Batch], Any]
  predict_step: Callable[[Any, Batch], Any]
  flops: float
  micro_batches: int
  gradient_shardings: Any

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """The devices."""
    return self.layout.mesh

  @property
  def objective(self) -> Objective:
    """What is learned."""
    return self.network.objective

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows of a batch as one global array on the mesh."""
    return jax.make_array_from_process_local_data(sharding.batch_sharding(self.mesh), dict(batch))


def check(config: Config, devices: Sequence[Any] | None = None) -> None:
  """Raises for a name that is not known, an option that its constructor does not take, or a value
  that it refuses.

  Reads no data: what only the data can tell (size of the vocabulary, class names) has stand-ins.
    The mesh is that of `devices`,
  all by default.
  """
  for section, options in data_parts(config):
    plugins.check(
      section,
      plugins.load('source', options['source']).Source,
      _without(options, *DATA_OPTIONS, 'weight'),
    )
    if options.get('weight', 1.0) <= 0:
      raise ValueError(
        f'config.{section}.weight={options["weight"]} must be above 0; leave out a source that is '
        'not wanted.'
      )
  objectives = [
    (f'objective{path}', part, 'objective', 'Objective', ('tokenizer', 'parts'))
    for path, part in _objectives(config.objective)
  ]
  for section, options, kind, factory, given in (
    ('tokenizer', config.tokenizer, 'tokenizer', 'create', ('texts', 'texts_fingerprint', 'cache')),
    ('model', {'vocab_size': 1} | _set(config.model), 'model', 'Model', ()),
    *objectives,
  ):
    module = plugins.load(kind, options['name'])
    plugins.check(
      section, getattr(module, factory), _without(options, 'name', 'variant', 'parts'), given
    )
  optim.parse(config.optimizer)
  _micro_batches(config, _layout(config, devices).mesh)
  config = resolve(config, 1, class_names(config) or ('0', '1'))
  model = create_model(config)
  if config.seq_len > model.max_len:
    raise ValueError(
      f'config.seq_len={config.seq_len} is more than config.model.max_len={model.max_len}; lower '
      'it, or raise '
      'max_len.'
    )
  create_objective(config, plugins.load('tokenizer', 'byte').create()).heads(model)


def data_parts(config: Config) -> list[tuple[str, dict[str, Any]]]:
  """Where each source of the data stands in the config, and its section; more than one where
  `data.source` is 'mixture'.
  """
  if config.data['source'] != 'mixture':
    return [('data', config.data)]
  if not config.data.get('parts'):
    raise ValueError(
      "config.data.source='mixture' needs config.data.parts: a section for each source, with its "
      'weight.'
    )
  return [(f'data.parts.{name}', part) for name, part in config.data['parts'].items()]


def sources(config: Config) -> tuple[list[Source], list[float]]:
  """The sources of the data, and their weights in the mixture."""
  parts = data_parts(config)
  made = [
    plugins.construct(
      section,
      plugins.load('source', part['source']).Source,
      _without(part, *DATA_OPTIONS, 'weight'),
    )
    for section, part in parts
  ]
  return made, [float(part.get('weight', 1.0)) for _, part in parts]


def create_tokenizer(
  config: Config, texts: Callable[[], Iterator[str]], fingerprint: str, cache: str
) -> Tokenizer:
  """The tokenizer of the config, trained on `texts` where it is one that is trained.

  Args:
    config: the config.
    texts: gives a fresh iterator over the training documents at each call.
    fingerprint: of those documents, the key under which `cache` keeps a trained tokenizer.
    cache: a folder.
  """
  module = plugins.load('tokenizer', config.tokenizer['name'])
  options = _without(config.tokenizer, 'name')
  return plugins.construct(
    'tokenizer', module.create, options, texts=texts, texts_fingerprint=fingerprint, cache=cache
  )


def load_tokenizer(config: Config, directory: str) -> Tokenizer:
  """The tokenizer that was saved in a folder."""
  return plugins.load('tokenizer', config.tokenizer['name']).load(directory)


def model_modules() -> dict[str, types.ModuleType]:
  """The modules of the models that ship with the package, by name."""
  return {name: plugins.load('model', name) for name in plugins.names('model')}


def create_model(config: Config) -> nn.Module:
  """The model of a resolved config."""
  return plugins.construct(
    'model',
    plugins.load('model', config.model['name']).Model,
    _without(config.model, 'name', 'variant'),
  )


def create_objective(config: Config, tokenizer: Tokenizer) -> Objective:
  """The objective of the config; `mix` gets its parts made."""
  section = config.objective
  parts = {
    name: _objective(f'objective.parts.{name}', {'name': name} | part, tokenizer)
    for name, part in (section.get('parts') or {}).items()
  }
  return _objective('objective', _without(section, 'parts'), tokenizer, parts=parts)


def class_names(config: Config) -> tuple[str, ...] | None:
  """The class names that the config holds, if its objective has classes and they are known."""
  named = [
    tuple(part['classes']) for _, part in _objectives(config.objective) if part.get('classes')
  ]
  return named[0] if named else None


def collect_classes(config: Config, labels: Iterable[Any]) -> tuple[str, ...] | None:
  """The classes among the labels of the training set, or None where the objective has no classes."""
  for _, part in _objectives(config.objective):
    module = plugins.load('objective', part['name'])
    if hasattr(module, 'collect_classes') and part.get('task') != 'regression':
      classes = module.collect_classes(labels)
      logging.info('%d classes: %s', len(classes), ', '.join(classes[:50]))
      return classes
  return None


def resolve(config: Config, vocab_size: int, classes: tuple[str, ...] | None) -> Config:
  """The config with what the data decides filled in: the model's full shape, and the names of the
  classes.
  """
  objective = config.objective
  if classes is not None:
    parts = {
      name: _with_classes({'name': name} | part, classes)
      for name, part in (objective.get('parts') or {}).items()
    }
    objective = _with_classes(objective, classes) | ({'parts': parts} if parts else {})
  return dataclasses.replace(config, model=model_options(config, vocab_size), objective=objective)


def predictor_section(config: Config) -> dict[str, Any]:
  """The section of the objective, or of the part of a mix, that gives labels to new texts.

  Raises:
    ValueError: there is none.
  """
  for _, part in _objectives(config.objective):
    if hasattr(plugins.load('objective', part['name']).Objective, 'predict'):
      return dict(part)
  raise ValueError(
    f'the objective {config.objective["name"]} gives no labels to texts; fine-tune the run first: '
    '--config=configs/classify.py --config.init_from=WORKDIR.'
  )


def build(
  config: Config,
  tokenizer: Tokenizer,
  example: Mapping[str, np.ndarray],
  devices: Sequence[Any] | None = None,
) -> Program:
  """Makes the Program of a config.

  Args:
    config: the resolved config.
    tokenizer: gives the objective its special ids.
    example: one row as the objective makes it; its shapes are those of every batch.
    devices: the devices to use, all by default.

  Raises:
    ValueError, TypeError: whatever in the config cannot be, before anything is compiled.
  """
  layout = _layout(config, devices)
  mesh = layout.mesh
  micro_batches = _micro_batches(config, mesh)
  logging.info(
    'micro_batches=%d: %d tokens at once on a device.',
    micro_batches,
    config.batch_size * config.seq_len // (micro_batches * sharding.row_shards(mesh)),
  )
  model = create_model(config)
  objective = create_objective(config, tokenizer)
  network = step.Network(model=model, heads=objective.heads(model), objective=objective)

  by_row, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  batch = {
    key: jax.ShapeDtypeStruct((config.batch_size, *value.shape), value.dtype, sharding=by_row)
    for key, value in example.items()
  }
  rows = {key: jnp.zeros((1, *value.shape), value.dtype) for key, value in example.items()}
  boxed = jax.eval_shape(lambda: network.init(jax.random.PRNGKey(0), rows)['params'])
  params = nn.meta.unbox(boxed)
  tx, learning_rate = optim.create(config.optimizer, config.steps, params)

  def init(seed: jax.Array) -> TrainState:
    param_key, rng = jax.random.split(jax.random.PRNGKey(seed))
    params = nn.meta.unbox(network.init(param_key, rows)['params'])
    return TrainState(
      step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), rng=rng
    )

  state, shardings, kept = _abstract_state(layout, init, boxed)
  on = functools.partial(_laid_out, layout)
  train = functools.partial(
    step.train_step,
    network=network,
    tx=tx,
    learning_rate=learning_rate,
    micro_batches=micro_batches,
    shardings=kept,
  )
  return Program(
    config=config,
    network=network,
    layout=layout,
    state=state,
    batch=batch,
    init=jax.jit(init, out_shardings=shardings),
    train_step=jax.jit(
      on(train),
      in_shardings=(shardings, by_row),
      out_shardings=(shardings, everywhere),
      donate_argnums=0,
      compiler_options=fsdp.compiler_options(layout.mesh),
    ),
    eval_step=jax.jit(
      on(functools.partial(step.eval_step, network=network)),
      in_shardings=(shardings.params, by_row),
      out_shardings=everywhere,
    ),
    predict_step=jax.jit(
      on(functools.partial(step.predict_step, network=network)),
      in_shardings=(shardings.params, by_row),
      out_shardings=everywhere,
    ),
    flops=_flops(layout, model, objective, params, batch),
    micro_batches=micro_batches,
    gradient_shardings=kept,
  )


def outline(config: Config, devices: Sequence[Any], tokenizer: Tokenizer | None = None) -> Program:
  """The Program of a config whose data is not there: made-up documents give the shapes of a batch.

  Without a tokenizer the vocabulary has `config.model.vocab_size` or `config.tokenizer.vocab_size`
  ids; nameless classes are two.

  Args:
    config: as it is read from a file.
    devices: to build for, described ones included.
    tokenizer: the model's own; None where it is not there either.

  Raises:
    ValueError, TypeError: whatever in the config cannot be.
  """
  size = (
    tokenizer.vocab_size
    if tokenizer
    else config.model.get('vocab_size') or config.tokenizer.get('vocab_size')
  )
  tokenizer = tokenizer or plugins.load('tokenizer', 'byte').create()
  classes = class_names(config) or ('0', '1')
  config = resolve(config, size or tokenizer.vocab_size, classes)
  objective = create_objective(config, tokenizer)
  labels = {'regression': 0.0, 'multilabel': [classes[0]]}
  token = int(np.flatnonzero(~np.asarray(tokenizer.special))[-1])
  documents = _Outlines(
    4,
    4 * config.seq_len,
    token,
    labels.get(getattr(objective.predictor, 'task', None), classes[0]),
    paired=config.data.get('pair') is not None,
  )
  rng = np.random.default_rng(0)
  example = objective.transform(objective.rows(documents, config.seq_len).example(0, rng), rng)
  return build(config, tokenizer, example, devices)


class _Outlines:
  """Documents of one length that say nothing."""

  def __init__(self, count: int, length: int, token: int, label: Any, paired: bool):
    self.ids, self.lengths, self.labels = np.arange(count), np.full(count, length), [label] * count
    self.token = token
    self.pair_lengths = self.lengths if paired else None

  def __len__(self) -> int:
    return len(self.ids)

  def text(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    return np.full(self.lengths[index], self.token, np.int32)[start:stop]

  def pair(self, index: int) -> np.ndarray:
    return self.text(index)


def model_options(config: Config, vocab_size: int) -> dict[str, Any]:
  """The model section with its variant's published shape filled in; what the section itself says
  goes first.
  """
  section = _set(config.model)
  module = plugins.load('model', section['name'])
  variant = section.get('variant')
  if variant is not None and variant not in module.VARIANTS:
    raise ValueError(
      f'config.model.variant={variant!r} is not known{plugins.nearest(variant, module.VARIANTS)}; '
      f'known: {", ".join(module.VARIANTS)}.'
    )
  options = module.VARIANTS.get(variant, {}) | section
  if options.setdefault('vocab_size', vocab_size) < vocab_size:
    raise ValueError(
      f"config.model.vocab_size={options['vocab_size']} is smaller than the tokenizer's "
      f'{vocab_size}; '
      'leave it unset.'
    )
  return options


def _flops(
  layout: sharding.Layout, model: nn.Module, objective: Objective, params: Any, batch: Batch
) -> float:
  length, places = batch['tokens'].shape[1], jax.eval_shape(objective.places, batch)
  with sharding.use(layout):
    narrow = places is not None and layers.ends_narrow(model.unroll, length, places.shape[1])
  return model_flops(
    params, batch, causal='targets' in batch, last=places.shape[1] if narrow else length
  )


def model_flops(params: Any, batch: Batch, causal: bool, last: int) -> float:
  """FLOPs of the matrix products of one forward and backward pass, three times the forward pass.

  A kernel counts 2 FLOPs a weight for each place where it is used: every token in the model's
    layers, the predicted places in
  the vocabulary projection and the head before it; heads that read a place a text are left out.
  Attention adds 4 T N H a token and layer, half of it if causal, windows not considered. The last
  layer, its keys and values apart, counts at `last` places.
  """
  rows, length = batch['tokens'].shape
  predicted = (
    length if causal else batch['mask_positions'].shape[1] if 'mask_positions' in batch else 0
  )
  weights = {path: leaf.shape for path, leaf in tree.flatten(params).items()}
  kernels = {path: shape for path, shape in weights.items() if path.endswith('kernel')}
  size = lambda prefix: sum(
    math.prod(shape) for path, shape in kernels.items() if path.startswith(prefix)
  )
  vocabulary = size('model/output/') or math.prod(weights['model/embedder/token/embedding'])
  queries = sum(
    math.prod(shape) // shape[-3]
    for path, shape in kernels.items()
    if path.endswith('attention/query/kernel')
  )
  attention = 4 * length * queries / (2 if causal else 1)
  forward = length * (2 * size('model/stack/') + attention) + predicted * 2 * (
    size('heads_mlm/') + vocabulary
  )
  return 3.0 * rows * (forward - (length - last) * _last_layer(kernels, length, causal))


def _last_layer(kernels: Mapping[str, Sequence[int]], length: int, causal: bool) -> float:
  """FLOPs of the forward pass at a place in the last of the stacked layers, keys and values apart."""
  start = 'model/stack/layers/'
  block = max(
    (path.removeprefix(start).partition('/')[0] for path in kernels if path.startswith(start)),
    default='',
  )
  shapes = {
    path.removeprefix(f'{start}{block}/'): shape[1:]
    for path, shape in kernels.items()
    if path.startswith(f'{start}{block}/')
  }
  queries = math.prod(shapes.get('attention/query/kernel', (0, 0))[1:])
  used = (
    shape
    for path, shape in shapes.items()
    if path not in ('attention/key/kernel', 'attention/value/kernel')
  )
  return sum(2 * math.prod(shape) for shape in used) + 4 * length * queries / (2 if causal else 1)


def _objectives(section: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
  parts = section.get('parts') or {}
  return [
    ('', section),
    *((f'.parts.{name}', {'name': name} | part) for name, part in parts.items()),
  ]


def _with_classes(section: Mapping[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
  takes = 'classes' in plugins.signature(plugins.load('objective', section['name']).Objective)
  return dict(section) | (
    {'classes': classes} if takes and section.get('task') != 'regression' else {}
  )


def _objective(
  section: str, options: Mapping[str, Any], tokenizer: Tokenizer, **given
) -> Objective:
  factory = plugins.load('objective', options['name']).Objective
  return plugins.construct(
    section, factory, _without(options, 'name'), tokenizer=tokenizer, **given
  )


def _layout(config: Config, devices: Sequence[Any] | None) -> sharding.Layout:
  layout = plugins.construct('mesh', sharding.create_layout, config.mesh, devices=devices)
  if config.seq_len % layout.mesh.shape['sequence']:
    raise ValueError(
      f'config.seq_len={config.seq_len} must divide by '
      f'config.mesh.sequence={layout.mesh.shape["sequence"]}.'
    )
  return layout


def _laid_out(layout: sharding.Layout, function: Callable) -> Callable:
  """`function`, traced with the layout in force."""

  @functools.wraps(function)
  def wrapped(*args):
    with sharding.use(layout):
      return function(*args)

  return wrapped


def _abstract_state(
  layout: sharding.Layout, init: Callable, boxed_params: Any
) -> tuple[TrainState, TrainState, Any]:
  """The state's shapes with their shardings; the shardings; and those of what the optimizer keeps
  for each parameter.
  """
  shapes = jax.eval_shape(init, 0)
  params, kept = (
    sharding.parameter_shardings(layout, boxed_params, optimizer) for optimizer in (False, True)
  )
  everywhere = sharding.replicated(layout.mesh)
  shardings = TrainState(
    step=everywhere,
    params=params,
    rng=everywhere,
    opt_state=sharding.optimizer_shardings(layout.mesh, shapes.params, kept, shapes.opt_state),
  )
  return (
    jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    ),
    shardings,
    kept,
  )


def _micro_batches(config: Config, mesh: jax.sharding.Mesh) -> int:
  """config.micro_batches, or as few as keep the tokens that one device runs at once moderate."""
  shards, platform = sharding.row_shards(mesh), mesh.devices.flat[0].platform
  most = TOKENS_AT_ONCE['cpu' if platform == 'cpu' else 'accelerator']
  fitting = (
    k
    for k in range(1, config.batch_size + 1)
    if config.batch_size % (k * shards) == 0
    and (
      config.batch_size // (k * shards) * config.seq_len <= most or k * shards == config.batch_size
    )
  )
  count = config.micro_batches or next(fitting, 1)
  if config.batch_size % (shards * count):
    raise ValueError(
      f'config.batch_size={config.batch_size} must divide by {shards * count} (data and fsdp axes '
      f'{shards} x '
      f'micro_batches {count}); try {-(-config.batch_size // (shards * count)) * shards * count}.'
    )
  return count


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in options.items() if v is not None}


def _without(options: Mapping[str, Any], *keys: str) -> dict[str, Any]:
  return {k: v for k, v in options.items() if k not in keys}
