"""`--mode=plan`: what a run needs and takes on a machine that is not here, by compiling its true
train step for it.

Nothing is read and nothing allocated: shapes come from the config alone, memory from the compiler,
work and traffic from the compiled text (`llm_jax/planning/hlo.py`), times from a roofline (Williams
et al. 2009, doi:10.1145/1498765.1498785) over the published figures of the chip
(`llm_jax/parallel/chips.py`).
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from llm_jax.core.config import Config
from llm_jax.parallel import chips, sharding, topology
from llm_jax.planning import hlo
from llm_jax.programs import build
from llm_jax.programs.build import Program
from llm_jax.training import memory

ASSUMPTIONS = (
  'matrix products run at the published peak rate, whatever their shapes',
  'main memory runs at its published bandwidth; work and memory traffic overlap fully, so the '
  'slower of the two counts',
  'links run at their published bandwidth, all at once, without latency; those between slices are '
  'taken for links within one',
  'transfers that the schedule does not put beside computation are added to the time',
  'input, evaluation and checkpoints take no time',
)


def run(config: Config, names: str, folder: pathlib.Path) -> dict[str, Any]:
  """Plans a run, prints the report, and writes it to `plan.json` and `plan.md`.

  Args:
    config: checked; `batch_size` is that of the first topology.
    names: topologies, as `topology.devices` takes them, separated by commas; the later ones get as
      many sequences a chip.
    folder: where the files go.

  Returns:
    The report of the first topology as it stands in plan.json; with several, `scaling` has one of
    each.

  Raises:
    ValueError: an unknown topology, no compiler for it, a mesh or a batch that cannot be cut for
      it.
  """
  every = names.split(',')
  chip_counts = [topology.chips(name) for name in every]
  rows = [config.batch_size * count // chip_counts[0] for count in chip_counts]
  reports = [
    plan(dataclasses.replace(config, batch_size=size), name)
    for name, size in zip(every, rows, strict=True)
  ]
  text = '\n\n'.join(
    [*map(describe, reports), *([describe_scaling(reports)] if len(reports) > 1 else [])]
  )
  report = reports[0] | ({'scaling': reports} if len(reports) > 1 else {})
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'plan.json').write_text(json.dumps(report, indent=2) + '\n')
  (folder / 'plan.md').write_text(text + '\n')
  print(text)
  logging.info('Also in %s and %s.', folder / 'plan.json', folder / 'plan.md')
  return report


def plan(config: Config, name: str) -> dict[str, Any]:
  """The report of one config on one topology; where it does not fit, with the first change found
  that does.
  """
  devices = topology.devices(name)
  report = measure(config, name, devices)
  return report | {
    'suggestions': [] if report['fits'] else _suggestions(config, name, devices, report)
  }


def measure(config: Config, name: str, devices: Sequence[Any]) -> dict[str, Any]:
  """Compiles the train step for `devices` and reports on it, as `plan.json` has it; without looking
  for what would fit.

  Where `model.remat` is 'auto', the report is that of the first of `memory.REMATS` that fits, or of
  the last.
  """
  if config.model.get('remat') == 'auto':
    for remat in memory.REMATS:
      report = measure(_changed(config, {'model.remat': remat}), name, devices)
      logging.info(
        'remat=%s: %s GiB, %s.',
        remat,
        _gib(report['hbm']['total_bytes']),
        _verdict(report | {'suggestions': []}),
      )
      if report['fits']:
        break
    return report
  began = time.perf_counter()
  program = build.outline(config, devices)
  chip = chips.CHIPS.get(devices[0].device_kind)
  limit, state = memory.limit(devices), _state_bytes(program)
  known = _known(program, name, devices)
  if state['parameters_bytes'] + state['optimizer_bytes'] > limit:  # no need to ask the compiler
    return known | _not_fitting(state, sum(state.values()), limit, began)
  total, compiled = memory.needed(program)
  if compiled is None:
    return known | _not_fitting(state, max(total, sum(state.values())), limit, began)
  seconds, sizes = time.perf_counter() - began, compiled.memory_analysis()
  hbm = state | {
    'arguments_bytes': sizes.argument_size_in_bytes,
    'temporaries_bytes': sizes.temp_size_in_bytes,
    'total_bytes': total,
    'limit_bytes': int(limit),
  }
  costs, own = hlo.costs(compiled.as_text()), compiled.cost_analysis()
  return (
    known
    | {
      'fits': total <= limit,
      'hbm': hbm,
      'compile_seconds': seconds,
      'compiler_bytes_accessed': own['bytes accessed'],
    }
    | _work(program, costs, chip, len(devices))
  )


def _known(program: Program, name: str, devices: Sequence[Any]) -> dict[str, Any]:
  """What needs no compiler."""
  config, mesh = program.config, program.mesh
  shards = sharding.row_shards(mesh)
  return {
    'topology': name,
    'chips': topology.chips(name),
    'devices': len(devices),
    'device_kind': devices[0].device_kind,
    'mesh': dict(mesh.shape),
    'rules': config.mesh.get('rules', 'fsdp'),
    'model': config.model.get('variant') or config.model['name'],
    'dtype': program.network.model.dtype,
    'remat': program.network.model.remat,
    'micro_batches': program.micro_batches,
    'optimizer': config.optimizer['name'],
    'objective': config.objective['name'],
    'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.state.params)),
    'seq_len': config.seq_len,
    'global_batch_sequences': config.batch_size,
    'global_batch_tokens': config.batch_size * config.seq_len,
    'device_batch_sequences': config.batch_size // shards,
    'device_batch_tokens': config.batch_size * config.seq_len // (shards * mesh.shape['sequence']),
    'model_flops': program.flops / len(devices),
  }


def _not_fitting(
  state: Mapping[str, int], total: float, limit: float, began: float
) -> dict[str, Any]:
  hbm = state | {
    'arguments_bytes': sum(state.values()) - state['gradients_bytes'],
    'temporaries_bytes': None,
    'total_bytes': int(total),
    'limit_bytes': int(limit),
  }
  return {
    'fits': False,
    'hbm': hbm,
    'executed_flops': None,
    'kernel_flops': None,
    'bytes_accessed': None,
    'compiler_bytes_accessed': None,
    'collectives': None,
    'step_seconds_roofline': None,
    'mfu_roofline': None,
    'roofline': None,
    'compile_seconds': time.perf_counter() - began,
  }


def _work(
  program: Program, costs: hlo.Costs, chip: chips.Chip | None, devices: int
) -> dict[str, Any]:
  """What a step does, and the least time that it takes."""
  for count, what in (
    (costs.unknown_loops, 'loops whose turns cannot be read count once'),
    (costs.unknown_kernels, 'kernels that do not say their FLOPs count nothing'),
  ):
    if count:
      logging.warning('executed_flops is too low: %d %s.', count, what)
  collectives = {
    kind: {key: int(value) for key, value in dataclasses.asdict(found).items()}
    for kind, found in sorted(costs.collectives.items())
  }
  known = {
    'executed_flops': costs.flops,
    'kernel_flops': costs.kernel_flops,
    'bytes_accessed': costs.bytes,
    'collectives': collectives,
    'unknown_loops': costs.unknown_loops,
    'unknown_kernels': costs.unknown_kernels,
  }
  if chip is None or chip.memory_bandwidth is None:
    return known | {'step_seconds_roofline': None, 'mfu_roofline': None, 'roofline': None}
  sent = sum(found.wire_bytes for found in costs.collectives.values())
  exposed = sum(
    found.wire_bytes * (1 - found.overlapped_bytes / max(found.bytes, 1))
    for found in costs.collectives.values()
  )
  parts = {
    'compute_seconds': costs.flops / chip.flops,
    'memory_seconds': costs.bytes / chip.memory_bandwidth,
    'links_seconds': sent / chip.link_bandwidth,
    'exposed_links_seconds': exposed / chip.link_bandwidth,
  }
  seconds = max(
    max(parts['compute_seconds'], parts['memory_seconds']) + parts['exposed_links_seconds'],
    parts['links_seconds'],
  )
  return known | {
    'step_seconds_roofline': seconds,
    'mfu_roofline': program.flops / devices / chip.flops / seconds,
    'roofline': parts | {'assumptions': list(ASSUMPTIONS)},
  }


def _state_bytes(program: Program) -> dict[str, int]:
  """Bytes on one device by class, from shapes and shardings; gradients as the optimizer takes them."""
  shard = lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  size = lambda tree: sum(shard(leaf, leaf.sharding) for leaf in jax.tree.leaves(tree))
  gradients = jax.tree.leaves(jax.tree.map(shard, program.state.params, program.gradient_shardings))
  return {
    'parameters_bytes': size(program.state.params),
    'optimizer_bytes': size(program.state.opt_state),
    'gradients_bytes': sum(gradients),
    'batch_bytes': size(program.batch),
  }


def _suggestions(
  config: Config, name: str, devices: Sequence[Any], report: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """The nearest change that fits, found by compiling; the tried ones that do not stand before it."""
  tried = []
  for changes in _changes(config, report):
    flags = ' '.join(f'--config.{key}={value}' for key, value in changes.items())
    logging.info('Does not fit. Trying %s', flags)
    try:
      found = measure(_changed(config, changes), name, devices)
    except ValueError as error:  # this batch does not divide so
      logging.info('%s cannot be: %s', flags, error)
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
      break
  return tried


def _changes(config: Config, report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
  """Settings that take less memory, from the one that costs least; only those that cut the state
  where the state is too large.
  """
  rows = report['device_batch_sequences']
  used, hbm = report['micro_batches'], report['hbm']
  sharded = {} if report['mesh']['fsdp'] > 1 else {'mesh.data': 1, 'mesh.fsdp': -1}
  least = hbm['parameters_bytes'] + hbm['optimizer_bytes'] + hbm['gradients_bytes']
  order = memory.REMATS
  remats = order[order.index(report['remat']) + 1 :] if report['remat'] in order else order[-1:]
  fewer = [
    count for count in (2 * used, 4 * used, rows) if used < count <= rows and rows % count == 0
  ]
  fewer = sorted(set(fewer))
  if least <= hbm['limit_bytes']:
    yield from ({'model.remat': remat} for remat in remats)
    yield from (
      ({'model.remat': 'full'} if remats else {}) | {'micro_batches': count} for count in fewer
    )
  if sharded:
    yield from (sharded | {'model.remat': remat} for remat in (remats[-1:] or memory.REMATS[-1:]))
    yield from (sharded | {'model.remat': 'full', 'micro_batches': count} for count in fewer)


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
  for key, value in changes.items():
    section, _, option = key.rpartition('.')
    value = getattr(config, section) | {option: value} if section else value
    config = dataclasses.replace(config, **{section or key: value})
  return config


def describe(report: Mapping[str, Any]) -> str:
  """A report as people read it, in Markdown."""
  hbm = report['hbm']
  lines = [f'# {report["model"]} on {report["topology"]}: {_verdict(report)}', '']
  lines += [
    f'{report["parameters"]:,} parameters, {report["dtype"]}, {report["optimizer"]}, '
    f'{report["objective"]}; remat '
    f'{report["remat"]}, {report["micro_batches"]} micro-batch(es).',
    '',
  ]
  mesh = (
    ' x '.join(f'{axis} {size}' for axis, size in report['mesh'].items() if size > 1)
    or 'one device'
  )
  lines += [
    f'{report["chips"]:,} chips ({report["device_kind"]}), mesh {mesh} ({report["rules"]}). A '
    'step: '
    f'{report["global_batch_sequences"]:,} sequences of {report["seq_len"]:,}, '
    f'{report["global_batch_tokens"]:,} tokens; '
    f'a device: {report["device_batch_sequences"]:,} sequences, {report["device_batch_tokens"]:,} '
    'tokens.',
    '',
  ]
  lines += _table(
    ('memory of a device', 'GiB'),
    [
      *((key, _gib(hbm[f'{key}_bytes'])) for key in ('parameters', 'optimizer', 'batch')),
      ('temporaries: gradients, activations and all else', _gib(hbm['temporaries_bytes'])),
      ('of these gradients, where all are held at once', _gib(hbm['gradients_bytes'])),
      ('**total**', _gib(hbm['total_bytes'])),
      ('limit', _gib(hbm['limit_bytes'])),
    ],
  )
  if report['executed_flops'] is not None:
    lines += _work_lines(report)
  if report['suggestions']:
    lines += _table(
      ('changes', 'fits', 'total GiB'),
      [
        (f'`{tried["flags"]}`', 'yes' if tried['fits'] else 'no', _gib(tried['total_bytes']))
        for tried in report['suggestions']
      ],
    )
  return '\n'.join([*lines, f'Compiled in {report["compile_seconds"]:.0f} s.'])


def _verdict(report: Mapping[str, Any]) -> str:
  if report['fits']:
    return 'fits'
  short = _gib(report['hbm']['total_bytes'] - report['hbm']['limit_bytes'])
  fitting = [tried['flags'] for tried in report['suggestions'] if tried['fits']]
  none = 'none of the changes tried fits; take more chips, or a smaller batch'
  way = f'this change would fit: `{fitting[0]}`' if fitting else none
  return f'does not fit: short by {short} GiB; {way}'


def _work_lines(report: Mapping[str, Any]) -> list[str]:
  executed, model = report['executed_flops'], report['model_flops']
  lines = _table(
    ('work of a device in a step', ''),
    [
      ('model TFLOP', f'{model / 1e12:.3f}'),
      ('executed TFLOP', f'{executed / 1e12:.3f}'),
      ('executed / model (recompute, optimizer)', f'{executed / model:.3f}'),
      ('GB of main memory accessed', f'{report["bytes_accessed"] / 1e9:.1f}'),
    ],
  )
  if report['collectives']:
    lines += _table(
      ('collective', 'count', 'GiB', 'GiB sent', 'GiB beside computation'),
      [
        (
          kind,
          f'{found["count"]:,}',
          _gib(found['bytes']),
          _gib(found['wire_bytes']),
          _gib(found['overlapped_bytes']),
        )
        for kind, found in report['collectives'].items()
      ],
    )
  if report['roofline'] is None:
    return lines
  parts = report['roofline']
  lines += _table(
    ('roofline of a step', 'ms'),
    [
      *(
        (key.removesuffix('_seconds').replace('_', ' '), f'{parts[key] * 1e3:.1f}')
        for key in parts
        if key != 'assumptions'
      ),
      ('**step**', f'{report["step_seconds_roofline"] * 1e3:.1f}'),
    ],
  )
  rate = report['global_batch_tokens'] / report['step_seconds_roofline']
  return [
    *lines,
    f'At best {report["mfu_roofline"]:.0%} of the peak FLOP/s (MFU), {rate:,.0f} tokens/s. '
    'Assumed: ' + '; '.join(parts['assumptions']) + '.',
    '',
  ]


def describe_scaling(reports: Sequence[Mapping[str, Any]]) -> str:
  """What a device sends in a step, from topology to topology."""
  kinds = sorted({kind for report in reports for kind in report['collectives'] or ()})
  cell = lambda report, kind: _gib((report['collectives'] or {}).get(kind, {}).get('bytes'))
  rows = [
    (
      f'{report["chips"]:,}',
      *(cell(report, kind) for kind in kinds),
      _gib(sum(found['wire_bytes'] for found in (report['collectives'] or {}).values())),
      _gib(report['hbm']['total_bytes']),
    )
    for report in reports
  ]
  title = f'# Collectives of a device and step, from {reports[0]["chips"]:,} to {reports[-1]["chips"]:,} chips'
  return '\n'.join(
    [
      title,
      '',
      *_table(('chips', *(f'{kind} GiB' for kind in kinds), 'sent GiB', 'memory GiB'), rows),
    ]
  )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  line = lambda cells: (
    '| ' + ' | '.join(f'{cell:<{width}}' for cell, width in zip(cells, widths, strict=True)) + ' |'
  )
  return [
    line(header),
    '|' + '|'.join('-' * (width + 2) for width in widths) + '|',
    *map(line, rows),
    '',
  ]


def _gib(size: float | None) -> str:
  return '-' if size is None else f'{size / 2**30:.{2 if size >= 2**27 or not size else 4}f}'
