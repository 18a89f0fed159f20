"""What one run of a compiled XLA program takes on one device: FLOPs, bytes of main memory, and what
the chips send each other.

XLA's own cost analysis counts the body of a loop once and cannot look into Pallas kernels, so it
misses most of the work of a scanned model. Here each instruction counts as often as it runs.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from llm_jax.core import scopes
from llm_jax.planning import hlo_text, loops, products
from llm_jax.planning.hlo_text import Computation, Instruction, Program

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'ragged-all-to-all',
  'collective-broadcast',
)
_NO_TRAFFIC = (
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'after-all',
  'partition-id',
  'replica-id',
  'iota',
  'opt-barrier',
  'domain',
)
# The computations that these call run on each element; they hold no product and send nothing.
_PER_ELEMENT = (
  'all-reduce',
  'reduce',
  'reduce-scatter',
  'scatter',
  'sort',
  'map',
  'reduce-window',
  'select-and-scatter',
)
_SLICES = ('dynamic-slice', 'slice', 'gather')
_CONTROL = ('while', 'call', 'conditional')
_PRODUCTS = ('dot', 'convolution')
_KERNEL = 'tpu_custom_call'
# A TPU's transfer beside products is a chain of fusions: one that starts it, those in which it goes
# on while they compute, one that ends it. Each but the last has the collective in it.
_CHAIN = re.compile(r'chain_id="(\w+)"')
_CHAIN_STARTS = 'AsyncCollectiveStart'
_ESTIMATE = re.compile(r'"?cost_estimate"?\s*:\s*\{[^}]*?"?flops"?\s*:\s*"?(\d+)')


@dataclasses.dataclass
class Collective:
  """What the chips send each other by one kind of operation, per step.

  Attributes:
    count: how often it runs.
    bytes: the whole array that is put together or split (the larger of operand and result), summed
      over the runs, on one device.
    wire_bytes: what a device sends in a ring: (n - 1) / n of `bytes` in a group of n, twice that
      for an all-reduce.
    overlapped_bytes: the part of `bytes` whose transfer runs while the device computes.
  """

  count: float = 0
  bytes: float = 0
  wire_bytes: float = 0
  overlapped_bytes: float = 0


@dataclasses.dataclass
class Costs:
  """One run of the program on one device.

  Attributes:
    flops: of matrix products and convolutions, 2 per multiply and add, and those that kernels
      state.
    kernel_flops: the part of `flops` in custom kernels (Pallas).
    bytes: of the device's main memory, read and written.
    collectives: by kind.
    unknown_loops: loops whose number of iterations could not be read, counted once.
    unknown_kernels: custom kernels that state no FLOPs, counted 0.
  """

  flops: float = 0
  kernel_flops: float = 0
  bytes: float = 0
  collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
  unknown_loops: int = 0
  unknown_kernels: int = 0


@dataclasses.dataclass(frozen=True)
class _Run:
  """How a computation runs.

  Attributes:
    times: how often.
    outer: whether its instructions read and write main memory, as those inside of a fusion do not.
    beside: whether all of it runs while the device computes.
    chains: as `_chains` gives them.
  """

  times: float
  outer: bool
  beside: bool
  chains: Mapping[str, bool]


def costs(text: str) -> Costs:
  """What one run of a compiled program takes on one device.

  Args:
    text: of `Compiled.as_text()`.

  Raises:
    ValueError: a text without an entry computation.
  """
  program, entry = hlo_text.parse(text)
  total = Costs()
  first = _Run(times=1.0, outer=True, beside=False, chains=_chains(program))
  _walk(program, program[entry], first, total)
  return total


def _walk(program: Program, computation: Computation, run: _Run, total: Costs) -> None:
  """Adds what all runs of a computation take."""
  for instruction in computation.instructions.values():
    opcode = instruction.opcode
    chain, beside = _chain(instruction), run.beside or _overlaps(program, computation, instruction)
    beside |= run.chains.get(chain, False)
    if not _goes_on(computation, instruction, run.chains):
      _add_work(computation, instruction, dataclasses.replace(run, beside=beside), total)
    if opcode.removesuffix('-start') not in _PER_ELEMENT:
      iterations = _iterations(program, computation, instruction, total)
      outer = run.outer and opcode in _CONTROL
      inner = _Run(run.times * iterations, outer, beside, run.chains)
      for name in instruction.called:
        _walk(program, program[name], inner, total)
    if run.outer and opcode not in _NO_TRAFFIC and not opcode.endswith('-done'):
      total.bytes += run.times * _traffic(program, computation, instruction, run.chains)


def _add_work(computation: Computation, instruction: Instruction, run: _Run, total: Costs) -> None:
  """Adds FLOPs and transfers of one instruction."""
  opcode = instruction.opcode
  if opcode in _PRODUCTS:
    total.flops += run.times * products.flops(computation, instruction)
  elif opcode == 'custom-call' and _KERNEL in instruction.attributes:
    _add_kernel(instruction, run.times, total)
  elif opcode.removesuffix('-start') in COLLECTIVES:
    _add_collective(computation, instruction, run, total)


def _iterations(
  program: Program, computation: Computation, instruction: Instruction, total: Costs
) -> float:
  """How often an instruction runs what it calls."""
  if instruction.opcode != 'while':
    return 1.0
  found = loops.trip_count(program, computation, instruction)
  if found is None:
    total.unknown_loops += 1
    return 1.0
  return found


def _add_kernel(instruction: Instruction, times: float, total: Costs) -> None:
  flops = _kernel_flops(instruction.attributes)
  if flops is None:
    total.unknown_kernels += 1
    return
  total.flops += times * flops
  total.kernel_flops += times * flops


def _kernel_flops(attributes: str) -> int | None:
  """FLOPs of a kernel as its own estimate or its scope states them."""
  estimate = _ESTIMATE.search(attributes)
  if estimate:
    return int(estimate[1])
  name = re.search(r'op_name="([^"]*)"', attributes)
  return scopes.flops_of_kernel(name[1]) if name else None


def _add_collective(
  computation: Computation, instruction: Instruction, run: _Run, total: Costs
) -> None:
  kind = instruction.opcode.removesuffix('-start')
  operands = [_operand_bytes(computation, name) for name in instruction.operands]
  size = run.times * max(_payload(instruction), sum(operands))
  entry = total.collectives.setdefault(kind, Collective())
  entry.count += run.times
  entry.bytes += size
  entry.wire_bytes += size * _share_sent(kind, _group_size(instruction))
  if run.beside:
    entry.overlapped_bytes += size


def _share_sent(kind: str, group: int) -> float:
  """What a device sends of each byte, in a ring of `group` devices."""
  if kind in ('collective-permute', 'collective-broadcast'):
    return 1.0
  share = (group - 1) / group
  return 2 * share if kind == 'all-reduce' else share


def _payload(instruction: Instruction) -> int:
  """Bytes of the result; of an asynchronous start, whose tuple repeats the operands and has
  counters, the largest array.
  """
  if instruction.opcode.endswith('-start') and instruction.opcode != 'all-reduce-start':
    return max((array.bytes for array in instruction.arrays), default=0)
  return instruction.bytes


def _group_size(instruction: Instruction) -> int:
  """How many devices take part.

  replica_groups is written {{0,1},{2,3}}, [2,4]<=[8], or mesh['a'=4,'b'=2] {'a'}.
  """
  text = instruction.attributes
  mesh = re.search(r'replica_groups=(?:@\w+)?mesh\[([^\]]*)\]\s*\{([^}]*)\}', text)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    axes = re.findall(r"'([^']+)'", mesh[2])
    return math.prod(int(sizes[axis]) for axis in axes if axis in sizes) or 1
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]', text)
  if iota:
    return int(iota[2])
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', text)
  return len(listed[1].split(',')) if listed else 2


def _overlaps(program: Program, computation: Computation, instruction: Instruction) -> bool:
  """Whether products or kernels run beside an instruction: between its start and its end, or inside
  of the same fusion.
  """
  if instruction.opcode == 'fusion':
    return _computes(program, instruction)
  if not instruction.opcode.endswith('-start'):
    return False
  names = list(computation.instructions)
  for name in itertools.islice(names, names.index(instruction.name) + 1, None):
    later = computation.instructions[name]
    if instruction.name in later.operands and later.opcode.endswith('-done'):
      return False
    if _computes(program, later):
      return True
  return False


def _chains(program: Program) -> dict[str, bool]:
  """The chains that are started -> whether products or kernels run in one of their fusions."""
  started, busy = set(), set()
  for computation in program.values():
    inside = computation.instructions.values()
    names = {name for instruction in inside if (name := _chain(instruction))}
    started |= names if _starts(computation) else set()
    busy |= names if names and any(_computes(program, one) for one in inside) else set()
  return {name: name in busy for name in started}


def _chain(instruction: Instruction) -> str:
  """The name of its chain, '' where it is in none."""
  found = _CHAIN.search(instruction.attributes)
  return found[1] if found else ''


def _starts(computation: Computation) -> bool:
  """Whether it starts a chain."""
  return any(_CHAIN_STARTS in other.attributes for other in computation.instructions.values())


def _goes_on(
  computation: Computation, instruction: Instruction, chains: Mapping[str, bool]
) -> bool:
  """Whether it is a transfer that another fusion has started."""
  return _chain(instruction) in chains and not _starts(computation)


def _computes(program: Program, instruction: Instruction) -> bool:
  if instruction.opcode in _PRODUCTS or _KERNEL in instruction.attributes:
    return True
  for name in instruction.called:
    inside = program[name].instructions.values() if name in program else ()
    if any(_computes(program, inner) for inner in inside):
      return True
  return False


def _traffic(
  program: Program, computation: Computation, instruction: Instruction, chains: Mapping[str, bool]
) -> int:
  """Bytes of main memory that an instruction reads and writes; where it reads or updates a slice,
  those of the slice.
  """
  opcode = instruction.opcode
  if opcode in _SLICES:
    return instruction.bytes + instruction.main_bytes
  if opcode == 'copy-start':  # its tuple holds the copy, then what is copied
    return instruction.main_bytes
  if opcode.removesuffix('-start') in _SLICES:  # its tuple holds what is sliced, then the slice
    slice_ = dataclasses.replace(instruction, arrays=instruction.arrays[1:2])
    return slice_.bytes + slice_.main_bytes
  if opcode == 'dynamic-update-slice':
    return 2 * _operand_bytes(computation, instruction.operands[1])
  if opcode == 'fusion':
    return _fusion_traffic(computation, instruction, program[instruction.called[0]], chains)
  known = [name for name in instruction.operands if name in computation.instructions]
  read = sum(computation.instructions[name].main_bytes for name in known)
  return instruction.main_bytes + read


def _fusion_traffic(
  computation: Computation, fusion: Instruction, inside: Computation, chains: Mapping[str, bool]
) -> int:
  """Bytes that a fusion reads and writes; `inside` is what it runs."""
  whole = inside.instructions.values()
  chain = [instruction for instruction in whole if _goes_on(inside, instruction, chains)]
  if chain:
    return _traffic_beside_chain(computation, fusion, inside, chain)
  written, updated = fusion.main_bytes, None
  if inside.result.opcode == 'dynamic-update-slice':  # in place: only the slice is written
    updated = inside.result
    written = min(written, inside.instructions[updated.operands[1]].bytes)
  numbers = range(len(fusion.operands))
  return written + sum(_read(computation, fusion, inside, n, updated) for n in numbers)


def _traffic_beside_chain(
  computation: Computation, fusion: Instruction, inside: Computation, chain: Sequence[Instruction]
) -> int:
  """Likewise where a transfer goes on, whose buffers the fusion only hands on."""
  ours = {name for transfer in chain for name in (transfer.name, *transfer.operands)}
  ours |= {name for name in inside.result.operands if _is_parameter(inside, name)}
  outputs = zip(fusion.arrays, inside.result.operands, strict=False)
  written = sum(array.bytes for array, name in outputs if not array.space and name not in ours)
  numbers = range(len(fusion.operands))
  kept = [n for n in numbers if (one := inside.parameter(n)) is None or one.name not in ours]
  return written + sum(_read(computation, fusion, inside, n, None) for n in kept)


def _is_parameter(computation: Computation, name: str) -> bool:
  found = computation.instructions.get(name)
  return found is not None and found.opcode == 'parameter'


def _read(
  computation: Computation,
  fusion: Instruction,
  inside: Computation,
  number: int,
  updated: Instruction | None,
) -> int:
  """Bytes that a fusion reads of its operand `number`: the slices of it where it is only sliced,
  nothing where it is only updated.
  """
  operand = computation.instructions.get(fusion.operands[number])
  if operand is None or not operand.main_bytes:
    return 0
  parameter = inside.parameter(number)
  name = parameter.name if parameter else ''
  users = [user for user in inside.instructions.values() if name in user.operands]
  sliced = [user for user in users if user is not updated]
  only_sliced = all(user.opcode in _SLICES for user in sliced)
  only_updated = updated is None or updated not in users or updated.operands[0] == name
  if users and only_sliced and only_updated:
    return min(operand.main_bytes, sum(user.bytes for user in sliced))
  return operand.main_bytes


def _operand_bytes(computation: Computation, name: str) -> int:
  operand = computation.instructions.get(name)
  return 0 if operand is None else operand.bytes
