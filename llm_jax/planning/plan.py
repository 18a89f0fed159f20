"""`--mode=plan`: what a run needs and takes on a machine that is not here, by compiling its real
train step for it.

Nothing is read and nothing allocated: shapes come from the config alone, memory from the compiler,
work and traffic from the compiled text (`llm_jax/planning/costs.py`), times from a roofline
(Williams et al. 2009, doi:10.1145/1498765.1498785) over the published figures of the chip
(`llm_jax/parallel/chips.py`).
"""

import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from llm_jax.core import files
from llm_jax.core.config import Config
from llm_jax.core.tree import PyTree
from llm_jax.parallel import chips, sharding, topology
from llm_jax.planning import report as reports
from llm_jax.planning.costs import Costs, costs
from llm_jax.planning.report import Report
from llm_jax.training import memory
from llm_jax.training import program as programs
from llm_jax.training.memory import Trial
from llm_jax.training.program import Training

ASSUMPTIONS = (
  'matrix products run at the published peak rate, whatever their shapes',
  'main memory runs at its published bandwidth; work and memory traffic overlap fully, so the '
  'slower of the two counts',
  'links run at their published bandwidth, all at once, without latency; those between slices are '
  'taken for links within one',
  'transfers that the schedule does not put beside computation are added to the time',
  'input, evaluation and checkpoints take no time',
)
NOT_KNOWN = (
  'how fast the hosts read, tokenize and pack, and how much of their memory that takes',
  'how long the first step compiles on the machine itself; later starts read it from the cache',
  'what evaluation, samples and the writing of checkpoints take of memory and time',
  'kernels, clocks and neighbours slower than the published figures: a measured step is longer',
)
_NOT_SHAPE = (
  'name variant dtype param_dtype remat unroll attention dropout attention_dropout'.split()
)
UNKNOWN = '-'  # what a model's section does not say
_NOT_COMPILED = (
  'executed_flops',
  'kernel_flops',
  'bytes_accessed',
  'compiler_bytes_accessed',
  'collectives',
  'step_seconds_roofline',
  'mfu_roofline',
  'roofline',
)


def run(config: Config, names: str, folder: pathlib.Path) -> Report:
  """Plans a run, prints the report, and writes it to `plan.json` and `plan.md`.

  Args:
    config: checked; `batch_size` is that of the first topology.
    names: topologies, as `topology.devices` takes them, separated by commas; the later ones get as
      many sequences per chip.
    folder: where the files go.

  Returns:
    The report of the first topology, as in plan.json; with several, `scaling` has one of each.

  Raises:
    ValueError: an unknown topology, no compiler for it, a mesh or a batch that does not divide.
  """
  every = names.split(',')
  per_chip = [topology.chips(name) for name in every]
  for name in every[1:]:
    topology.devices(name)  # one that does not exist is refused before the first is planned for
  folder.mkdir(parents=True, exist_ok=True)
  found: list[Report] = []
  for name, count in zip(every, per_chip, strict=True):
    size = config.batch_size * count // per_chip[0]
    found.append(plan(dataclasses.replace(config, batch_size=size), name))
    report, text = _together(found)
    _write(folder, report, text)  # each time: what is done stays if a later one is refused
  print(text)
  logging.info('Also in %s and %s.', folder / 'plan.json', folder / 'plan.md')
  return report


def _together(found: Sequence[Report]) -> tuple[Report, str]:
  texts = [reports.describe(one) for one in found]
  if len(found) == 1:
    return found[0], texts[0]
  texts.append(reports.describe_scaling(found))
  return found[0] | {'scaling': list(found)}, '\n\n'.join(texts)


def _write(folder: pathlib.Path, report: Report, text: str) -> None:
  with files.whole_file(folder / 'plan.json') as file:
    file.write(json.dumps(report, indent=2) + '\n')
  with files.whole_file(folder / 'plan.md') as file:
    file.write(text + '\n')


def plan(config: Config, name: str) -> Report:
  """The report of one config on one topology; where it does not fit, with the changes that were
  tried: of each kind up to the nearest that fits.
  """
  devices = topology.devices(name)
  report = measure(config, name, devices)
  suggestions = [] if report['fits'] else _suggestions(config, name, devices, report)
  return report | {'suggestions': suggestions, 'not_known': list(NOT_KNOWN)}


def measure(config: Config, name: str, devices: Sequence[jax.Device]) -> Report:
  """Compiles the train step for `devices` and reports on it, as in `plan.json`, without looking for
  what would fit.

  Where `model.remat` is 'auto', the report is that of the first of `memory.REMATS` that fits, or of
  the last.
  """

  def trial(config: Config) -> Trial[Report]:
    report = _measure(config, name, devices)
    hbm = report['hbm']
    return Trial(report, hbm['total_bytes'], hbm['limit_bytes'], report['fits'])

  return memory.first_fitting(config, trial).value


def _measure(config: Config, name: str, devices: Sequence[jax.Device]) -> Report:
  began = time.perf_counter()
  program = programs.outline(config, devices)
  limit, state = memory.limit(devices), _state_bytes(program)
  known = _known(program, name, devices) | {'model': _model(config)}
  least = sum(state.values())
  if state['parameters_bytes'] + state['optimizer_bytes'] > limit:  # no need to ask the compiler
    return known | _not_fitting(state, least, limit, began)
  total, compiled = memory.needed(program)
  if compiled is None:
    return known | _not_fitting(state, max(total, least), limit, began)
  seconds = time.perf_counter() - began
  sizes = compiled.memory_analysis()
  hbm = state | {
    'arguments_bytes': sizes.argument_size_in_bytes,
    'temporaries_bytes': sizes.temp_size_in_bytes,
    'total_bytes': total,
    'limit_bytes': int(limit),
  }
  compiled_only = {
    'fits': total <= limit,
    'hbm': hbm,
    'compile_seconds': seconds,
    'compiler_bytes_accessed': compiled.cost_analysis()['bytes accessed'],
  }
  work = _work(costs(compiled.as_text()))
  chip = chips.CHIPS.get(devices[0].device_kind)
  return known | compiled_only | work | _roofline(known['model_flops'], work, chip)


def _known(program: Training, name: str, devices: Sequence[jax.Device]) -> Report:
  """What needs no compiler."""
  config, mesh = program.config, program.mesh
  shards, rows = sharding.row_shards(mesh), config.batch_size
  parts = shards * mesh.shape['sequence']
  return {
    'topology': name,
    'chips': topology.chips(name),
    'devices': len(devices),
    'device_kind': devices[0].device_kind,
    'mesh': dict(mesh.shape),
    'rules': config.mesh.get('rules', 'fsdp'),
    'dtype': config.model.get('dtype', UNKNOWN),
    'parameters_dtype': _dtypes((program.state.params, program.state.frozen)),
    'remat': config.model.get('remat', UNKNOWN),
    'micro_batches': program.micro_batches,
    'optimizer': config.optimizer['name'],
    'objective': config.objective['name'],
    'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.params)),
    'seq_len': config.seq_len,
    'global_batch_sequences': rows,
    'global_batch_tokens': rows * config.seq_len,
    'device_batch_sequences': rows // shards,
    'device_batch_tokens': rows * config.seq_len // parts,
    'model_flops': program.flops / len(devices) if program.flops else None,
  }


def _model(config: Config) -> str:
  """The variant, and what the config changes of its shape."""
  variant = config.model.get('variant')
  if not variant:
    return config.model['name']
  changed = [
    f'{option}={value}'
    for option, value in config.model.items()
    if option not in _NOT_SHAPE and value is not None
  ]
  return f'{variant} with {", ".join(changed)}' if changed else variant


def _dtypes(params: PyTree) -> str:
  return ' and '.join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)}))


def _state_bytes(program: Training) -> dict[str, int]:
  """Bytes on one device by class, from shapes and shardings; gradients as the optimizer takes them,
  what adapters carry beside the optimizer's state.
  """

  def shard(leaf: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> int:
    return math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize

  def size(tree: PyTree) -> int:
    return sum(shard(leaf, leaf.sharding) for leaf in jax.tree.leaves(tree))

  state = program.state
  gradients = jax.tree.map(shard, state.params, program.gradient_shardings)
  return {
    'parameters_bytes': size((state.params, state.frozen)),
    'optimizer_bytes': size((state.opt_state, state.extras)),
    'gradients_bytes': sum(jax.tree.leaves(gradients)),
    'batch_bytes': size(program.batch),
  }


def _not_fitting(state: Mapping[str, int], total: float, limit: float, began: float) -> Report:
  hbm = dict(state) | {  # without temporaries the total is a lower bound, or what the compiler said
    'arguments_bytes': sum(state.values()) - state['gradients_bytes'],
    'temporaries_bytes': None,
    'total_bytes': int(total),
    'limit_bytes': int(limit),
  }
  seconds = time.perf_counter() - began
  return {'fits': False, 'hbm': hbm, 'compile_seconds': seconds} | dict.fromkeys(_NOT_COMPILED)


def _work(found: Costs) -> Report:
  """What a device does and sends per step."""
  unknown = {
    'loops whose number of iterations cannot be read count once': found.unknown_loops,
    'kernels that state no FLOPs count nothing': found.unknown_kernels,
  }
  for what, count in unknown.items():
    if count:
      logging.warning('executed_flops is too low: %d %s.', count, what)
  collectives = {}
  for kind, collective in sorted(found.collectives.items()):
    numbers = dataclasses.asdict(collective)
    collectives[kind] = {name: int(number) for name, number in numbers.items()}
  return {
    'executed_flops': found.flops,
    'kernel_flops': found.kernel_flops,
    'bytes_accessed': found.bytes,
    'collectives': collectives,
    'unknown_loops': found.unknown_loops,
    'unknown_kernels': found.unknown_kernels,
  }


def _roofline(
  model_flops: float | None, work: Mapping[str, Any], chip: chips.Chip | None
) -> Report:
  """The least time that a step takes."""
  if chip is None or chip.memory_bandwidth is None or chip.link_bandwidth is None:
    return dict.fromkeys(('step_seconds_roofline', 'mfu_roofline', 'roofline'))
  collectives = work['collectives'].values()
  sent = sum(found['wire_bytes'] for found in collectives)
  exposed = sum(
    found['wire_bytes'] * (1 - found['overlapped_bytes'] / max(found['bytes'], 1))
    for found in collectives
  )
  parts = {
    'compute_seconds': work['executed_flops'] / chip.flops,
    'memory_seconds': work['bytes_accessed'] / chip.memory_bandwidth,
    'links_seconds': sent / chip.link_bandwidth,
    'exposed_links_seconds': exposed / chip.link_bandwidth,
  }
  busy = max(parts['compute_seconds'], parts['memory_seconds'])
  seconds = max(busy + parts['exposed_links_seconds'], parts['links_seconds'])
  return {
    'step_seconds_roofline': seconds,
    'mfu_roofline': None if model_flops is None else model_flops / chip.flops / seconds,
    'roofline': parts | {'assumptions': list(ASSUMPTIONS)},
  }


def _suggestions(
  config: Config, name: str, devices: Sequence[jax.Device], report: Report
) -> list[Report]:
  """Changes that were compiled: of each kind up to the first that fits. Those that fit come first,
  the nearest before the others.
  """
  tried, done = [], set()
  for kind, changes in _changes(config, report):
    if kind in done:
      continue
    flags = ' '.join(f'--config.{key}={value}' for key, value in changes.items())
    logging.info('Does not fit. Trying %s', flags)
    try:
      found = measure(_changed(config, changes), name, devices)
    except ValueError as error:  # this batch does not divide so
      logging.info('%s is not possible: %s', flags, error)
      continue
    tried.append(
      {
        'flags': flags,
        'changes': changes,
        'fits': found['fits'],
        'total_bytes': found['hbm']['total_bytes'],
        'executed_flops': found['executed_flops'],
        'step_seconds_roofline': found['step_seconds_roofline'],
      }
    )
    if found['fits']:
      done.add(kind)
  return sorted(tried, key=lambda one: not one['fits'])


def _changes(config: Config, report: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Settings that take less memory, by kind, from the one that costs least; only those that cut the
  state where the state is too large.
  """
  hbm = report['hbm']
  least = hbm['parameters_bytes'] + hbm['optimizer_bytes'] + hbm['gradients_bytes']
  remats = _cheaper_remats(report['remat'])
  counts = _larger_counts(report['micro_batches'], report['device_batch_sequences'])
  full, as_it_is = {'model.remat': 'full'}, {}
  optional = [as_it_is] if report['remat'] == UNKNOWN else []  # the model may not know the option
  if least <= hbm['limit_bytes']:
    for remat in remats:
      yield 'remat', {'model.remat': remat}
    for count, kept in itertools.product(counts, [full if remats else as_it_is, *optional]):
      yield 'micro_batches', kept | {'micro_batches': count}
    shards = config.batch_size // report['device_batch_sequences']
    for rows in _smaller(report['device_batch_sequences']):
      for kept in [full if remats else as_it_is, *optional]:
        yield 'batch', kept | {'batch_size': shards * rows, 'micro_batches': 1}
  if report['mesh']['fsdp'] > 1 or report['devices'] == 1:
    return
  sharded = {'mesh.data': 1, 'mesh.fsdp': -1}
  for kept in [full, *optional]:
    yield 'fsdp', sharded | kept
  for count, kept in itertools.product(counts, [full, *optional]):
    yield 'fsdp', sharded | kept | {'micro_batches': count}


def _cheaper_remats(remat: str) -> tuple[str, ...]:
  """The policies that keep less than `remat`."""
  if remat == UNKNOWN:
    return memory.REMATS[1:]
  if remat not in memory.REMATS:
    return memory.REMATS[-1:]
  return memory.REMATS[memory.REMATS.index(remat) + 1 :]


def _larger_counts(used: int, rows: int) -> list[int]:
  """Numbers of micro-batches above `used` that divide the rows of a device."""
  return sorted(
    {count for count in (2 * used, 4 * used, rows) if used < count and rows % count == 0}
  )


def _smaller(rows: int) -> list[int]:
  """Rows of a device in smaller batches: half, a quarter, one."""
  return sorted({count for count in (rows // 2, rows // 4, 1) if 0 < count < rows}, reverse=True)


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
  for key, value in changes.items():
    section, _, option = key.rpartition('.')
    if section:
      value = getattr(config, section) | {option: value}
    config = dataclasses.replace(config, **{section or key: value})
  return config
