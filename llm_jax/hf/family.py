"""What a family of Hugging Face's models is to ours: its config.json as our options, its tensors as
our parameters.

A model's module declares the families that it can hold in `HF`, as data; `hf` reads and writes
folders by them. Their tensors are ours with other names and axes: linear weights lie [out, in],
heads are not an axis of their own, queries, keys and values may be one matrix. `Tensor` says so by
letters, and the same view of their array is read on the way in and filled on the way out.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

ACTIVATIONS = {
  'gelu': 'gelu',
  'gelu_python': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'relu': 'relu',
  'silu': 'silu',
  'swish': 'silu',
}
NUMBERS = (
  'vocab_size',
  'dim',
  'layers',
  'heads',
  'kv_heads',
  'head_dim',
  'mlp_dim',
  'max_len',
  'positions',
  'position_offset',
  'rope_theta',
  'rope_local_theta',
  'rope_scaling',
  'token_types',
  'embedding_norm',
  'norm',
  'norm_order',
  'norm_bias',
  'norm_eps',
  'bias',
  'qkv_bias',
  'qk_norm',
  'activation',
  'gated',
  'window',
  'global_every',
  'tied',
)
"""Options that decide what a model computes; the others say how it is initialised, trained or run.
"""
LINEAR = ('OI->IO', 'O->O')  # axes of a weight and of its bias
HEADS_OUT = ('(NH)D->DNH', '(NH)->NH')
HEADS_IN = ('D(NH)->NHD', 'D->D')
_ALWAYS = {
  'quantization_config': None,
  'is_encoder_decoder': False,
  'is_decoder': False,
  'add_cross_attention': False,
  'pruned_heads': {},
}
_MOST_LAYERS = 10_000  # so that a damaged number is an error and not a list of that length
TOKEN, OUTPUT = 'model/embedder/token/embedding', 'model/output/kernel'
_FIRST, _STACKED = 'model/stack/first/', 'model/stack/layers/'


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of theirs, and the parameter or parameters of ours that it is.

  Attributes:
    name: theirs, without the prefix of the model's body; {} is the number of a layer.
    axes: 'theirs->ours', a letter an axis; letters in brackets are one axis of theirs; S cuts
      theirs into equal parts, one for each path.
    paths: ours; where the name has {}, within a layer.
    beside: a head that must be there too, for this to be the place of the parameter; None: none.
  """

  name: str
  axes: str
  paths: tuple[str, ...]
  beside: str | None = None

  @property
  def layered(self) -> bool:
    """Whether there is one in each layer."""
    return '{}' in self.name

  def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
    """Their shape, by the shape of one of ours."""
    sizes = self._sizes(ours)
    return tuple(
      math.prod(sizes[letter] for letter in axis.strip('()'))
      for axis in re.findall(r'\(\w+\)|\w', self._theirs)
    )

  def part(self, theirs: np.ndarray, path: str, ours: Sequence[int]) -> np.ndarray:
    """The view of their array that is the parameter `path`, of shape `ours`; what is assigned to it
    stands in theirs.
    """
    sizes, letters = self._sizes(ours), re.sub(r'[()]', '', self._theirs)
    x = theirs.reshape([sizes[letter] for letter in letters])
    if 'S' in letters:
      x = x[(slice(None),) * letters.index('S') + (self.paths.index(path),)]
      letters = letters.replace('S', '')
    return x.transpose([letters.index(letter) for letter in self._ours])

  @property
  def _theirs(self) -> str:
    return self.axes.split('->')[0]

  @property
  def _ours(self) -> str:
    return self.axes.split('->')[1]

  def _sizes(self, ours: Sequence[int]) -> dict[str, int]:
    return dict(zip(self._ours, ours, strict=True)) | {'S': len(self.paths)}


class Place(NamedTuple):
  """Where a parameter stands in a folder.

  Attributes:
    tensor: what kind of tensor it is, or is a part of.
    path: which of its `paths`.
    names: their names, without prefix: one a layer where the parameter is stacked, else one.
    stacked: whether axis 0 of the parameter is that of the layers.
  """

  tensor: Tensor
  path: str
  names: tuple[str, ...]
  stacked: bool


@dataclasses.dataclass(frozen=True)
class Rule:
  """Options that are not one field each: how they are read from a config.json, and written to one."""

  read: Callable[[Mapping[str, Any]], dict[str, Any]]
  write: Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type`.

  Attributes:
    prefix: before the names of the body's tensors, in all classes but the last of `classes`.
    fields: key of their config.json -> (our option, type or table of values[, default]). Without a
      default the key must be there; a default of None allows null. Sizes (int) are at least 1. Keys
      that are one option must agree, if it is one of `NUMBERS`.
    options: what the family fixes of ours.
    body: tensors under the prefix.
    heads: the other tensors; where two are one parameter, the first that fits is taken.
    classes: their classes, the most special first, and the heads that each holds; 'vocabulary' is a
      decoder's projection.
    fixed: key -> (the value that it must have, what it is where it is left out).
    rules: the options that are not one field each.
    copies: other names of a tensor; both may be there, and are equal.
    ignored: patterns of the names of tensors that are no parameters.
  """

  prefix: str
  fields: Mapping[str, tuple]
  options: Mapping[str, Any]
  body: tuple[Tensor, ...]
  heads: tuple[Tensor, ...]
  classes: Mapping[str, tuple[str, ...]]
  fixed: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
  rules: tuple[Rule, ...] = ()
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()

  def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of our model, from a config.json.

    Raises:
      ValueError: a key that is missing or of the wrong type, or a value that our model cannot do.
    """
    for key, (wanted, left_out) in (
      {key: (value, value) for key, value in _ALWAYS.items()} | dict(self.fixed)
    ).items():
      found = config.get(key, left_out)
      if found != wanted and (found or wanted):
        said = '' if key in config else ' (what it is where it is left out)'
        raise ValueError(f'{key}={found!r}{said} cannot be done here; only {key}={wanted!r} can.')
    options = dict(self.options)
    for key, (option, kind, *default) in self.fields.items():
      value = field(config, key, kind, *default)
      if options.setdefault(option, value) != value and option in NUMBERS:
        raise ValueError(
          f'{key}={value!r} cannot be done here together with {option}={options[option]!r}.'
        )
    if options['layers'] > _MOST_LAYERS:
      raise ValueError(f'{options["layers"]} layers cannot be; at most {_MOST_LAYERS}.')
    for rule in self.rules:
      options |= rule.read(config)
    return options

  def write(self, options: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json from options as `values` gives them; whether `read` gives the same again is for
    the caller to see.
    """
    config = {key: wanted for key, (wanted, _) in self.fixed.items()}
    for key, (option, kind, *_) in self.fields.items():
      value = options.get(option)
      config[key] = (
        next((name for name, ours in kind.items() if ours == value), value)
        if isinstance(kind, Mapping)
        else value
      )
    for rule in self.rules:
      config |= rule.write(options)
    return config

  def places(self, params: Mapping[str, Any]) -> dict[str, list[Place]]:
    """Every place of each parameter, the most special first; `params` are all of the network, by
    path, with their shapes.
    """
    parents = {path.split('/')[0] for path in params}
    tensors: dict[str, list[Tensor]] = {}
    for tensor in (*self.heads, *self.body):
      if tensor.beside is None or tensor.beside in parents:
        for path in tensor.paths:
          tensors.setdefault(path, []).append(tensor)
    first = any(path.startswith(_FIRST) for path in params)
    period = len(
      {path.removeprefix(_STACKED).split('/')[0] for path in params if path.startswith(_STACKED)}
    )
    found = {}
    for path, leaf in params.items():
      inner, layers = _layers(path, leaf, first, period)
      found[path] = [
        Place(
          tensor,
          inner,
          tuple(tensor.name.format(i) for i in layers or (0,)),
          path.startswith(_STACKED),
        )
        for tensor in tensors.get(inner, ())
      ]
    return found

  def tied(self, config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the projection on the vocabulary is the token table."""
    return bool(config.get('tie_word_embeddings', self.fields['tie_word_embeddings'][2]))

  def canonical(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The names of a folder's tensors by what they are called here: without prefix, norms' old
    `gamma` and `beta` as today.

    Raises:
      ValueError: two names of one tensor.
    """
    there: dict[str, str] = {}
    for name in names:
      short = name.removeprefix(self.prefix)
      for old, new in (
        ('LayerNorm.gamma', 'LayerNorm.weight'),
        ('LayerNorm.beta', 'LayerNorm.bias'),
      ):
        short = short.removesuffix(old) + new if short.endswith(old) else short
      if short in there:
        raise ValueError(f'{there[short]!r} and {name!r} are two names of the same tensor.')
      there[short] = name
    for copy, name in self.equal(config).items():
      # Where the projection is not tied, neither is its bias, and that of the projection is the one
      # that counts.
      if copy in there and (
        name not in there or (copy.endswith('.bias') and not self.tied(config))
      ):
        there[name] = there.pop(copy)
    return there

  def equal(self, config: Mapping[str, Any]) -> dict[str, str]:
    """Names of tensors that are others under a second name, and the others'; a tied projection
    among them.
    """
    table, projection = (
      next(tensor.name for tensor in (*self.heads, *self.body) if path in tensor.paths)
      for path in (TOKEN, OUTPUT)
    )
    return {**self.copies} | ({projection: table} if self.tied(config) else {})

  def within_layers(self, name: str) -> bool:
    """Whether a name, without prefix, is one of a layer's tensors, known or not."""
    stems = {tensor.name.partition('{}')[0] for tensor in self.body if tensor.layered}
    return any(re.match(rf'{re.escape(stem)}\d+\.', name) for stem in stems)


def values(model: Any) -> dict[str, Any]:
  """All options of a model, with what is left open filled in."""
  options = {
    f.name: getattr(model, f.name)
    for f in dataclasses.fields(model)
    if f.name not in ('parent', 'name')
  }
  options['head_dim'] = model.options.head_dim
  options['kv_heads'] = options['kv_heads'] or options['heads']
  options['qkv_bias'] = options['bias'] if options['qkv_bias'] is None else options['qkv_bias']
  return options


def differences(model: Any, other: Any) -> list[str]:
  """The options by which two models compute different things, as the first has them:
  'norm="rmsnorm"'.
  """
  mine, theirs = (_relevant(values(each)) for each in (model, other))
  return [
    f'{name}={mine[name]!r}' for name in mine if name in theirs and mine[name] != theirs[name]
  ]


def field(config: Mapping[str, Any], key: str, kind: Any, *default: Any) -> Any:
  """The value of a key as `kind` (int, float, bool, or a table of allowed values) wants it;
  ValueError where it is not.
  """
  if key not in config and not default:
    raise ValueError(f'{key} is missing.')
  value = config.get(key, *default)
  if value is None and default == (None,):
    return None
  if isinstance(kind, Mapping):
    if not isinstance(value, str) or value not in kind:
      raise ValueError(f'{key}={value!r} cannot be done here; known: {", ".join(kind)}.')
    return kind[value]
  if kind is bool and isinstance(value, bool):
    return value
  if kind is int and type(value) is int and 1 <= value < 2**31:
    return value
  if kind is float and type(value) in (int, float) and 0 <= value < math.inf:
    return float(value)
  wanted = {
    bool: 'true or false',
    int: 'a whole number, at least 1',
    float: 'a number, at least 0',
  }[kind]
  raise ValueError(f'{key}={value!r} must be {wanted}.')


def table(name: str, path: str) -> tuple[Tensor, ...]:
  """Their embedding `name`."""
  return (Tensor(f'{name}.weight', 'VD->VD', (f'{path}/embedding',)),)


def linear(
  name: str, *paths: str, axes: tuple[str, str] = LINEAR, beside: str | None = None
) -> tuple[Tensor, ...]:
  """Weight and bias of their layer `name`, which is one linear layer of ours, or several."""
  return tuple(
    Tensor(f'{name}.{theirs}', letters, tuple(f'{path}/{ours}' for path in paths), beside)
    for theirs, ours, letters in zip(('weight', 'bias'), ('kernel', 'bias'), axes, strict=True)
  )


def norm(name: str, path: str) -> tuple[Tensor, ...]:
  """Weight and bias of their norm `name`."""
  return (
    Tensor(f'{name}.weight', 'D->D', (f'{path}/scale',)),
    Tensor(f'{name}.bias', 'D->D', (f'{path}/bias',)),
  )


def bias(name: str, path: str) -> tuple[Tensor, ...]:
  """A bias of theirs that stands by itself."""
  return (Tensor(name, 'V->V', (path,)),)


def vocabulary(name: str) -> tuple[Tensor, ...]:
  """Their projection on the vocabulary, where it is not tied."""
  return (Tensor(name, 'VD->DV', (OUTPUT,)),)


def rope(config: Mapping[str, Any], theta: Any) -> tuple[float, tuple[float, ...] | None]:
  """Base and scaling of rotary positions, in the spelling of transformers 5 (`rope_parameters`) or
  4 (`rope_scaling`).

  Args:
    config: with these keys.
    theta: the base where they do not say it.

  Raises:
    ValueError: a kind of rotation other than 'default', 'linear' and 'llama3', or a part of the
      dimensions only.
  """
  said = config.get('rope_parameters') or config.get('rope_scaling') or {}
  if not isinstance(said, dict):
    raise ValueError(f'rope_parameters={said!r} must be a dictionary.')
  kind = said.get('rope_type', said.get('type', 'default'))
  part = said.get('partial_rotary_factor', config.get('partial_rotary_factor', 1.0))
  if part not in (None, 1.0):
    raise ValueError(f'partial_rotary_factor={part!r} cannot be done here; only 1.0 can.')
  number = lambda key, *default: field(said, key, float, *default)
  base = number('rope_theta', theta)
  if base is None or base < 1:
    raise ValueError(f'rope_theta={base} must be at least 1.')
  if kind == 'default':
    return base, None
  if kind == 'linear':
    scaling = (number('factor'),)
  elif kind == 'llama3':
    key = 'original_max_position_embeddings'
    length = field(
      {key: config.get('max_position_embeddings')}
      | {k: config[k] for k in config if k == key}
      | said,
      key,
      int,
    )
    scaling = (
      *(number(key) for key in ('factor', 'low_freq_factor', 'high_freq_factor')),
      float(length),
    )
  else:
    raise ValueError(f'rope_type={kind!r} cannot be done here; known: default, linear, llama3.')
  if scaling[0] < 1:
    raise ValueError(f'the factor of rope_type={kind!r} is {scaling[0]}; it must be at least 1.')
  return base, scaling


def rope_scaling(scaling: tuple[float, ...] | None) -> dict[str, Any] | None:
  """What a config.json says of a scaling, in the spelling that transformers 4 and 5 both read."""
  if scaling is None:
    return None
  keys = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
  said = dict(zip(keys, scaling, strict=False))
  if len(scaling) == 1:
    return {'rope_type': 'linear', 'type': 'linear', **said}
  return {'rope_type': 'llama3', **said, keys[-1]: int(said[keys[-1]])}


def _relevant(options: Mapping[str, Any]) -> dict[str, Any]:
  """The options that decide what a model with these computes."""
  found = {name: options[name] for name in NUMBERS if name in options}
  if options['positions'] == 'rope':
    found.pop('position_offset', None)
  else:
    for name in ('rope_theta', 'rope_local_theta', 'rope_scaling'):
      found.pop(name, None)
  if options['window'] is None:
    found.pop('rope_local_theta', None)
  return found


def _layers(path: str, leaf: Any, first: bool, period: int) -> tuple[str, Sequence[int]]:
  """The name of a parameter within its layer, and the numbers of the layers that it is stacked of
  (see `layers.Stack`).
  """
  if path.startswith(_FIRST):
    return path.removeprefix(_FIRST), (0,)
  if not path.startswith(_STACKED):
    return path, ()
  block, _, inner = path.removeprefix(_STACKED).partition('/')
  start = first + int(block.removeprefix('block').removeprefix('_') or 0)
  return inner, range(start, start + leaf.shape[0] * period, period)
