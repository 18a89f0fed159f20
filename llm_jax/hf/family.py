"""What a family of Hugging Face's models is to ours: its config.json our options, its tensors our
parameters.

`families` holds one file per family, as data; `folders` reads and writes folders by them.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llm_jax.core.contracts import Model
from llm_jax.core.params import EMBEDDINGS, Info
from llm_jax.hf.fields import Kind, field
from llm_jax.hf.tensors import OUTPUT, TOKEN, Location, Tensor

RUN_TIME = frozenset(
  {
    'dropout',
    'attention_dropout',
    'init_distribution',
    'init_std',
    'position_std',
    'depth_scaled_init',
    'dtype',
    'param_dtype',
    'cache_dtype',
    'attention',
    'remat',
    'unroll',
  }
)
"""Options that say how a model is initialised, trained or run. All others decide what it computes.
"""

CONFIG = 'config.json'

_LINEN = ('parent', 'name')  # fields of every Linen module
_ALWAYS = {
  'quantization_config': None,
  'is_encoder_decoder': False,
  'is_decoder': False,
  'add_cross_attention': False,
  'pruned_heads': {},
}
_MOST_LAYERS = 10_000  # so that a damaged number is an error and not a list of that length
_OLD_NORMS = {'LayerNorm.gamma': 'LayerNorm.weight', 'LayerNorm.beta': 'LayerNorm.bias'}
_UNREAD = {
  'rope': ('position_offset',),
  'learned': ('rope_theta', 'rope_local_theta', 'rope_scaling', 'buckets', 'farthest'),
  'sinusoidal': ('position_offset', 'rope_theta', 'buckets', 'farthest'),
  'relative': ('position_offset', 'rope_theta', 'max_len'),
}  # positions -> the options that have no effect with them

Families = Mapping[str, tuple[str, 'Family']]  # model_type -> (our model's name, family)


@dataclasses.dataclass(frozen=True)
class Rule:
  """Options that are not one key each: how a config.json gives them, and which keys they become."""

  read: Callable[[Mapping[str, Any]], dict[str, Any]]
  write: Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type`.

  Attributes:
    prefix: before the names of the body's tensors, in all classes but the last of `classes`.
    fields: key of their config.json -> (our option, kind[, default]), as `fields.field` takes
      them. `tie_word_embeddings` must be among them. Keys that are one option must agree, unless
      it is one of `RUN_TIME`.
    options: options of ours that are the same in the whole family.
    body: tensors under the prefix.
    heads: the other tensors. Where two hold one parameter, the first that the folder has is read.
    classes: their classes, the most special first, and the heads that each holds; 'vocabulary' is
      a decoder's projection.
    fixed: key -> (the only value that is supported, the default of a key that is left out).
    rules: options that are not one key each.
    copies: second names of a tensor -> the first. A folder may hold both, if they are equal.
    ignored: patterns of names of tensors that are no parameters.
    rank: where several families hold a model, it is exported as the one with the lowest rank.
    stacks: where a model has several stacks of layers: the path of each, with a slash at the end ->
      what stands before the names of parameters within its layers in `body`.
    tied_by_values: whether a projection that is there and differs from the token table is one of
      its own, whatever config.json says.
    classifier: options of the objective `classify` that its classifiers have, where they are not
      BERT's; `write` gets the objective's section.
  """

  prefix: str
  fields: Mapping[str, tuple[str, Kind] | tuple[str, Kind, Any]]
  options: Mapping[str, Any]
  body: tuple[Tensor, ...]
  heads: tuple[Tensor, ...]
  classes: Mapping[str, tuple[str, ...]]
  fixed: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
  rules: tuple[Rule, ...] = ()
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  rank: int = 1000
  stacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
  tied_by_values: bool = False
  classifier: Rule | None = None

  def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of our model, from a config.json.

    Raises:
      ValueError: a key that is missing or of the wrong type, or a value that is not supported.
    """
    self._check_fixed(config)
    options = dict(self.options)
    for key, (option, kind, *default) in self.fields.items():
      value = field(config, key, kind, *default)
      other = options.setdefault(option, value)
      if other != value and option not in RUN_TIME:
        raise ValueError(f'{key}={value!r} is not supported together with {option}={other!r}.')
    for rule in self.rules:
      options |= rule.read(config)
    for layers in (options['layers'], options.get('encoder_layers') or 0):
      if layers > _MOST_LAYERS:
        raise ValueError(f'{layers} layers are too many; at most {_MOST_LAYERS}.')
    return options

  def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json from options as `values` gives them.

    It may not say all of them: whether `read` gives the same again is for the caller to check.
    """
    config = {key: wanted for key, (wanted, _) in self.fixed.items()}
    for key, (option, kind, *_) in self.fields.items():
      value = options.get(option)
      if isinstance(kind, Mapping):
        value = next((theirs for theirs, ours in kind.items() if ours == value), value)
      config[key] = value
    for rule in self.rules:
      config |= rule.write(options)
    return config

  def locations(
    self, params: Mapping[str, Any], infos: Mapping[str, Info]
  ) -> dict[str, list[Location]]:
    """Every location of each parameter, the most special first.

    Args:
      params: all parameters of the network by path, or their shapes.
      infos: what each of them is.

    Raises:
      ValueError: two parameters would be the same tensor.
    """
    outside, layered = self._by_path(params)
    found, first = {}, self._first_layers(params, infos)
    for path, leaf in params.items():
      info = infos[path]
      if info.layer is None or info.layer == EMBEDDINGS:
        found[path] = [Location(t, path, (t.name,), info.stacked) for t in outside.get(path, ())]
        continue
      stack = self._stack(path)
      inner = within_layer(path, layered, self.stacks.get(stack, ''))
      numbers = info.depths(leaf.shape).reshape(-1) - first[stack]
      found[path] = [
        Location(t, inner, tuple(t.name.format(n) for n in numbers), info.stacked)
        for t in layered.get(inner, ())
      ]
    _check_distinct(found)
    return found

  def tied(self, config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the projection on the vocabulary is the token table; False
    of a family that has no such projection.
    """
    if None in self.ends:
      return False
    return bool(config.get('tie_word_embeddings', self.fields['tie_word_embeddings'][2]))

  @property
  def ends(self) -> tuple[str | None, str | None]:
    """The names of the projection on the vocabulary and of the table of tokens; None for one that
    the family does not have.
    """
    return self._name_of(OUTPUT), self._name_of(TOKEN)

  def canonical(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The names by which the tables know a folder's tensors -> its own names.

    They have no prefix, and norms' old `gamma` and `beta` are `weight` and `bias`.

    Raises:
      ValueError: two names of one tensor.
    """
    found: dict[str, str] = {}
    for name in names:
      short = name.removeprefix(self.prefix)
      for old, new in _OLD_NORMS.items():
        if short.endswith(old):
          short = short.removesuffix(old) + new
      if short in found:
        raise ValueError(f'{found[short]!r} and {name!r} are two names of the same tensor.')
      found[short] = name
    tied = self.tied(config)
    for copy, name in self.equal(config).items():
      # Where the projection is not tied, its bias is not tied either, and is the one that counts.
      counts = copy.endswith('.bias') and not tied
      if copy in found and (name not in found or counts):
        found[name] = found.pop(copy)
    return found

  def equal(self, config: Mapping[str, Any]) -> dict[str, str]:
    """Second names of tensors -> the first; a tied projection is one of them."""
    if not self.tied(config):
      return dict(self.copies)
    projection, token_table = self.ends
    return {**self.copies, projection: token_table}

  def within_layers(self, name: str) -> bool:
    """Whether a name, without prefix, is that of a tensor in a layer, known or not."""
    stems = {tensor.name.partition('{}')[0] for tensor in self.body if tensor.layered}
    return any(re.match(rf'{re.escape(stem)}\d+\.', name) for stem in stems)

  def _check_fixed(self, config: Mapping[str, Any]) -> None:
    always = {key: (value, value) for key, value in _ALWAYS.items()}
    for key, (wanted, left_out) in (always | dict(self.fixed)).items():
      found = config.get(key, left_out)
      if found != wanted and (found or wanted):  # null is as good as false
        origin = '' if key in config else ' (the default of a key that is left out)'
        raise ValueError(f'{key}={found!r}{origin} is not supported; only {key}={wanted!r} is.')

  def _stack(self, path: str) -> str:
    """Which of `stacks` a parameter is in; '' where the model has one."""
    return next((stack for stack in self.stacks if path.startswith(stack)), '')

  def side(self, name: str) -> str:
    """What of `stacks` a name of a parameter within a layer begins with; '' for nothing."""
    return next((side for side in self.stacks.values() if name.startswith(side)), '')

  def _first_layers(
    self, params: Mapping[str, Any], infos: Mapping[str, Info]
  ) -> collections.Counter[str]:
    """The number of the first layer of each of `stacks`."""
    found = collections.Counter[str]()
    for stack in self.stacks:
      depths = [infos[path].depths(x.shape) for path, x in params.items() if path.startswith(stack)]
      found[stack] = min((int(depth.min()) for depth in depths if depth is not None), default=0)
    return found

  def _by_path(
    self, params: Mapping[str, Any]
  ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """The tensors of each parameter outside of layers, and in them, the most special first."""
    outside: dict[str, list[Tensor]] = {}
    layered: dict[str, list[Tensor]] = {}
    there = lambda part: any(f'/{part}/' in f'/{path}/' for path in params)
    for tensor in (*self.heads, *self.body):
      if tensor.needs is None or there(tensor.needs):
        group = layered if tensor.layered else outside
        for path in tensor.paths:
          group.setdefault(path, []).append(tensor)
    return outside, layered

  def _name_of(self, path: str) -> str | None:
    tensors = (*self.heads, *self.body)
    return next((tensor.name for tensor in tensors if path in tensor.paths), None)


def within_layer(path: str, known: Iterable[str], stack: str = '') -> str:
  """The name of a parameter in its layer: its path without the modules that hold the layers.

  That is the longest end of the path (whole components) that `known` has, with `stack` before it;
  without one, the path.
  """
  parts = path.split('/')
  ends = (stack + '/'.join(parts[i:]) for i in range(len(parts)))
  return next((end for end in ends if end in known), path)


def decisive(model: Model | type[Model]) -> tuple[str, ...]:
  """The names of the options that decide what a model computes; `model` may be its class."""
  return tuple(name for name in _option_names(model) if name not in RUN_TIME)


def values(model: Model) -> dict[str, Any]:
  """All options of a model, with what is left open filled in."""
  options = {name: getattr(model, name) for name in _option_names(model)}
  if 'head_dim' in options:
    options['head_dim'] = model.options.head_dim
  if 'kv_heads' in options:
    options['kv_heads'] = options['kv_heads'] or options['heads']
  if 'encoder_layers' in options:
    options['encoder_layers'] = options['encoder_layers'] or options['layers']
  if 'qkv_bias' in options and options['qkv_bias'] is None:
    options['qkv_bias'] = options['bias']
  return options


def differences(model: Model, other: Any) -> list[str]:
  """The options by which two models compute different things, with the values of the first:
  'norm="rmsnorm"'.
  """
  mine, theirs = _effective(model), _effective(other)
  shared = [name for name in mine if name in theirs]
  return [f'{name}={mine[name]!r}' for name in shared if mine[name] != theirs[name]]


def _option_names(model: Model | type[Model]) -> list[str]:
  return [f.name for f in dataclasses.fields(model) if f.name not in _LINEN]


def _effective(model: Model) -> dict[str, Any]:
  """The options that have an effect on what a model computes."""
  options = values(model)
  unread = set(_UNREAD.get(options.get('positions'), ()))
  if 'window' in options and options['window'] is None:
    unread.add('rope_local_theta')
  return {name: options[name] for name in decisive(model) if name not in unread}


def _check_distinct(locations: Mapping[str, Sequence[Location]]) -> None:
  holders: dict[tuple[str, str], str] = {}
  for path, found in locations.items():
    for location in found:
      for name in location.names:
        other = holders.setdefault((name, location.path), path)
        if other != path:
          raise ValueError(f'{other} and {path} would both be {name}.')
