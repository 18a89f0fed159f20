"""A plan as people read it: Markdown from the dictionary that `plan.json` holds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Report = dict[str, Any]  # as `plan.plan` makes it
_KEPT = ('parameters', 'optimizer', 'batch')


def describe(report: Mapping[str, Any]) -> str:
  """One report in Markdown."""
  lines = [
    f'# {report["model"]} on {report["topology"]}: {_verdict(report)}',
    '',
    *_header(report),
    *_memory_table(report['hbm']),
  ]
  if report['executed_flops'] is not None:
    lines += _work_table(report)
    lines += _collectives_table(report['collectives'])
  if report['roofline'] is not None:
    lines += _roofline_table(report)
  if report['suggestions']:
    lines += _suggestions_table(report['suggestions'])
  return '\n'.join([*lines, *_reservations(report), _compiled(report)])


def describe_scaling(reports: Sequence[Mapping[str, Any]]) -> str:
  """What a device sends per step, from topology to topology."""
  kinds = sorted({kind for report in reports for kind in report['collectives'] or ()})
  first, last = reports[0]['chips'], reports[-1]['chips']
  header = ('chips', *(f'{kind} GiB' for kind in kinds), 'sent GiB', 'memory GiB')
  rows = [_scaling_row(report, kinds) for report in reports]
  title = f'# Collectives per device and step, from {first:,} to {last:,} chips'
  return '\n'.join([title, '', *_table(header, rows)])


def gib(size: float | None) -> str:
  """Bytes in GiB; '-' where they are not known."""
  if size is None:
    return '-'
  digits = 2 if size >= 2**27 or not size else 4
  return f'{size / 2**30:.{digits}f}'


def _verdict(report: Mapping[str, Any]) -> str:
  if report['fits']:
    return 'fits'
  short = gib(report['hbm']['total_bytes'] - report['hbm']['limit_bytes'])
  fitting = [tried['flags'] for tried in report['suggestions'] if tried['fits']]
  way = 'take a smaller model, or more chips with --config.mesh.data=1 --config.mesh.fsdp=-1'
  if report['suggestions']:
    way = f'none of the changes tried fits; {way}'
  if fitting:
    way = f'this change would fit: `{fitting[0]}`'
  return f'does not fit: short by {short} GiB; {way}'


def _header(report: Mapping[str, Any]) -> list[str]:
  sizes = [f'{axis} {size}' for axis, size in report['mesh'].items() if size > 1]
  mesh = f'mesh {" x ".join(sizes)} ({report["rules"]})' if sizes else 'one device'
  chips = '1 chip' if report['chips'] == 1 else f'{report["chips"]:,} chips'
  return [
    f'{report["parameters"]:,} parameters, computed in {report["dtype"]}, kept in '
    f'{report["parameters_dtype"]}; optimizer {report["optimizer"]}, objective '
    f'{report["objective"]}; remat {report["remat"]}, {report["micro_batches"]} micro-batch(es).',
    '',
    f'{chips} ({report["device_kind"]}), {mesh}. '
    f'Per step: {report["global_batch_sequences"]:,} sequences of {report["seq_len"]:,}, '
    f'{report["global_batch_tokens"]:,} tokens; per device: '
    f'{report["device_batch_sequences"]:,} sequences, {report["device_batch_tokens"]:,} tokens.',
    '',
  ]


def _memory_table(hbm: Mapping[str, Any]) -> list[str]:
  rest, alone = _rest(hbm), _state_alone(hbm)
  rows = [
    *((key, gib(hbm[f'{key}_bytes'])) for key in _KEPT),
    ('gradients' if alone else 'gradients, activations and all else', gib(rest)),
    ('**total, before activations**' if alone else '**total**', gib(hbm['total_bytes'])),
    ('limit', gib(hbm['limit_bytes'])),
  ]
  if not alone:
    rows.append(('gradients, where all are held at once', gib(hbm['gradients_bytes'])))
  return _table(('memory per device', 'GiB'), rows)


def _rest(hbm: Mapping[str, Any]) -> int:
  return hbm['total_bytes'] - sum(hbm[f'{key}_bytes'] for key in _KEPT)


def _state_alone(hbm: Mapping[str, Any]) -> bool:
  """Whether the total is that of the state, which was too large to ask the compiler."""
  return _rest(hbm) == hbm['gradients_bytes']


def _work_table(report: Mapping[str, Any]) -> list[str]:
  executed, model = report['executed_flops'], report['model_flops']
  rows = [
    ('model TFLOP', f'{model / 1e12:.3f}' if model else '-'),
    ('executed TFLOP', f'{executed / 1e12:.3f}'),
    ('executed / model (recompute, optimizer)', f'{executed / model:.3f}' if model else '-'),
    ('GB of main memory accessed', f'{report["bytes_accessed"] / 1e9:.1f}'),
  ]
  return _table(('work per device and step', ''), rows)


def _collectives_table(collectives: Mapping[str, Mapping[str, int]]) -> list[str]:
  if not collectives:
    return []
  header = ('collective', 'count', 'GiB', 'GiB sent', 'GiB beside computation')
  sizes = ('bytes', 'wire_bytes', 'overlapped_bytes')
  rows = [
    (kind, f'{found["count"]:,}', *(gib(found[size]) for size in sizes))
    for kind, found in collectives.items()
  ]
  return _table(header, rows)


def _roofline_table(report: Mapping[str, Any]) -> list[str]:
  roofline, step = report['roofline'], report['step_seconds_roofline']
  parts = {key: seconds for key, seconds in roofline.items() if key != 'assumptions'}
  rows = [
    (key.removesuffix('_seconds').replace('_', ' '), f'{seconds * 1e3:.1f}')
    for key, seconds in parts.items()
  ]
  rows.append(('**step**', f'{step * 1e3:.1f}'))
  mfu = report['mfu_roofline']
  share = '' if mfu is None else f'{mfu:.0%} of the peak FLOP/s (MFU), '
  rate = report['global_batch_tokens'] / step
  return [
    *_table(('roofline of a step', 'ms'), rows),
    f'At best {share}{rate:,.0f} tokens/s.',
    '',
  ]


def _suggestions_table(suggestions: Iterable[Mapping[str, Any]]) -> list[str]:
  rows = [
    (
      f'`{tried["flags"]}`',
      'yes' if tried['fits'] else 'no',
      gib(tried['total_bytes']),
      _milliseconds(tried['step_seconds_roofline']),
    )
    for tried in suggestions
  ]
  return _table(('change', 'fits', 'total GiB', 'step at least, ms'), rows)


def _milliseconds(seconds: float | None) -> str:
  return '-' if seconds is None else f'{seconds * 1e3:.1f}'


def _reservations(report: Mapping[str, Any]) -> list[str]:
  """What the figures rest on, and what they say nothing about."""
  parts = {
    'Assumed for the times:': (report['roofline'] or {}).get('assumptions', ()),
    'Not known here:': report['not_known'],
  }
  return [
    line
    for title, items in parts.items()
    if items
    for line in (title, '', *(f'- {item}' for item in items), '')
  ]


def _compiled(report: Mapping[str, Any]) -> str:
  if _state_alone(report['hbm']):
    return 'Nothing was compiled: parameters and optimizer alone are more than the limit.'
  return f'This plan compiled in {report["compile_seconds"]:.0f} s on the machine that made it.'


def _scaling_row(report: Mapping[str, Any], kinds: Iterable[str]) -> list[str]:
  collectives = report['collectives'] or {}
  sizes = [collectives[kind]['bytes'] if kind in collectives else None for kind in kinds]
  sent = sum(found['wire_bytes'] for found in collectives.values())
  total = report['hbm']['total_bytes']
  return [f'{report["chips"]:,}', *map(gib, sizes), gib(sent), gib(total)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """A Markdown table whose columns are aligned, and an empty line."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

  def line(cells: Sequence[str]) -> str:
    padded = [f'{cell:<{width}}' for cell, width in zip(cells, widths, strict=True)]
    return f'| {" | ".join(padded)} |'

  rule = '|'.join('-' * (width + 2) for width in widths)
  return [line(header), f'|{rule}|', *map(line, rows), '']
