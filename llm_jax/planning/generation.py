"""`--mode=plan --plan=generate`: what it takes to write with a decoder on a machine that is not
here, by compiling its real step for it: the next token of all rows.

As in `planning.plan` nothing is read and nothing allocated. The rate is a lower bound of the time,
from the published figures of the chip: the bytes that a step reads and writes, and its products.
"""

import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core import files
from llm_jax.core.config import Config
from llm_jax.core.tree import PyTree
from llm_jax.generation.decoding import Generator
from llm_jax.parallel import chips, topology
from llm_jax.planning.costs import costs
from llm_jax.planning.report import gib
from llm_jax.programs import assemble, forms, inference
from llm_jax.training import memory

Report = dict[str, Any]
FILES = 'generate_plan'


def run(
  config: Config, names: str, folder: pathlib.Path, rows: int, slots: int | None = None
) -> list[Report]:
  """Plans for each topology, prints the reports, and writes `generate_plan.json` and `.md`.

  Args:
    config: of the model; `config.compress` and `model.cache_dtype` say what is kept in fewer bits.
    names: topologies, with commas between them.
    folder: where the files go.
    rows: that are written at once.
    slots: tokens that each row has room for, its prompt among them; None for all that the model
      takes.

  Raises:
    ValueError: an unknown topology, a model that does not write, rows longer than it takes.
  """
  found = [plan(config, name, rows, slots) for name in names.split(',')]
  text = '\n\n'.join(map(describe, found))
  folder.mkdir(parents=True, exist_ok=True)
  with files.whole_file(folder / f'{FILES}.json') as file:
    json.dump(found, file, indent=2)
  with files.whole_file(folder / f'{FILES}.md') as file:
    file.write(f'{text}\n')
  print(text)
  return found


def plan(config: Config, name: str, rows: int, slots: int | None = None) -> Report:
  """The report of one topology, as in the JSON file."""
  devices = topology.devices(name)
  program = _program(config, devices)
  model = program.network.model
  if not model.causal or model.reads_source():
    raise ValueError(
      f'--plan=generate is for decoders, and config.model.name={config.model["name"]!r} is none.'
    )
  network = program.network
  slots = slots or network.longest
  if not 0 < slots <= network.longest or rows < 1:
    raise ValueError(
      f'--plan_rows={rows} and --plan_slots={slots} must be at least 1, and a row of this model '
      f'has at most {network.longest} tokens.'
    )
  generator = Generator(model, program.model_infos, program.layout, network.adapter)
  stored = forms.placed(program.params, program.infos, program.formed, program.layout)['model']
  began, limit = time.perf_counter(), memory.limit(devices)
  try:
    weights = _made(generator.weights, stored)
  except jax.errors.JaxRuntimeError as error:  # what is read and what is run, both at once
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    weights = stored
  state = _made(generator._blank, rows=rows, slots=slots, source=0)
  known = {
    'topology': name,
    'device_kind': devices[0].device_kind,
    'devices': len(devices),
    'model': config.model.get('variant') or config.model['name'],
    'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.params)),
    'form': config.compress.get('name') or str(next(iter(jax.tree.leaves(stored))).dtype),
    'rows': rows,
    'slots': slots,
    'weights_bytes': _shards(weights),
    'cache_bytes': _shards(state.cache),
    'preparing_bytes': _shards(stored) + _shards(weights),
    'limit_bytes': int(limit),
  }
  least = max(known['preparing_bytes'], known['weights_bytes'] + known['cache_bytes'])
  if least > limit:  # no need to ask the compiler
    return known | {'fits': False, 'total_bytes': least}
  compiled = generator._next.lower(weights, state=state).compile()
  sizes, work = compiled.memory_analysis(), costs(compiled.as_text())
  total = max(sizes.argument_size_in_bytes + sizes.temp_size_in_bytes, least)
  found = {
    'fits': total <= limit,
    'total_bytes': int(total),
    'temporaries_bytes': sizes.temp_size_in_bytes,
    'bytes_accessed': work.bytes,
    'executed_flops': work.flops,
    'compile_seconds': time.perf_counter() - began,
  }
  return known | found | _rate(found, rows, chips.CHIPS.get(devices[0].device_kind))


def describe(report: Report) -> str:
  """A report in Markdown."""
  verdict = 'fits' if report['fits'] else 'does not fit'
  lines = [
    f'# Writing with {report["model"]} on {report["topology"]}: {verdict}',
    '',
    f'{report["parameters"]:,} parameters, {report["form"]}; {report["rows"]} row(s) of at most '
    f'{report["slots"]:,} tokens.',
    '',
    '| memory per device | GiB |',
    '|---|---|',
    f'| weights | {gib(report["weights_bytes"])} |',
    f'| keys and values | {gib(report["cache_bytes"])} |',
    f'| weights as they are read, and as they are run | {gib(report["preparing_bytes"])} |',
    f'| **most at once** | {gib(report["total_bytes"])} |',
    f'| limit | {gib(report["limit_bytes"])} |',
  ]
  if 'bytes_accessed' in report:
    lines += [
      '',
      f'A step reads and writes {report["bytes_accessed"] / 1e9:.2f} GB on each device, '
      f'{report["bytes_accessed"] / report["rows"] / 1e9:.2f} GB for a token.',
    ]
  if report.get('tokens_per_second') is not None:
    lines += [
      f'At most {report["tokens_per_second"]:,.0f} tokens/s ({report["step_seconds"] * 1e3:.2f} ms '
      f'a step): main memory {report["memory_seconds"] * 1e3:.2f} ms, products '
      f'{report["compute_seconds"] * 1e3:.2f} ms.',
    ]
  return '\n'.join(lines)


def _program(config: Config, devices: Sequence[jax.Device]) -> inference.Inference:
  """The program of a config whose tokenizer is not there."""
  size = config.model.get('vocab_size') or config.tokenizer.get('vocab_size')
  tokenizer = assemble.byte_tokenizer(config)
  config = assemble.resolve(config, size or tokenizer.vocab_size)
  config = assemble.with_stand_ins(config, tokenizer)
  return inference.outline(config, tokenizer, devices)


def _made(function: Any, *args: Any, **options: Any) -> Any:
  """What a jitted function gives, abstract, and where it lies."""
  lowered = function.lower(*args, **options)
  where = lowered.compile().output_shardings
  shapes = lowered.out_info
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    where,
  )


def _shards(tree: PyTree) -> int:
  """Bytes on one device; numbers of 4 bits are two in a byte."""

  def size(leaf: jax.ShapeDtypeStruct) -> int:
    bits = 4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits // 8

  return sum(map(size, jax.tree.leaves(tree)))


def _rate(found: Report, rows: int, chip: chips.Chip | None) -> Report:
  if chip is None or chip.memory_bandwidth is None:
    return dict.fromkeys(('tokens_per_second', 'step_seconds'))
  parts = {
    'compute_seconds': found['executed_flops'] / chip.flops,
    'memory_seconds': found['bytes_accessed'] / chip.memory_bandwidth,
  }
  seconds = max(parts.values())
  return parts | {'step_seconds': seconds, 'tokens_per_second': rows / seconds}
