"""Reads the text of a compiled XLA program: what one step really does, loops counted as often as
they turn.

XLA's own cost analysis counts the body of a loop once and cannot look into Pallas kernels, so a
scanned model hides most of its work from it. Here each instruction counts as often as it runs. All
figures are of one device.

The grammar is that of `jax.stages.Compiled.as_text()`: computations of one instruction a line,
`%name = type opcode(operands), attributes`, in the order in which they are scheduled.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'ragged-all-to-all',
  'collective-broadcast',
)
_BITS = {'pred': 8, 'bf16': 16, 'f8e4m3fn': 8, 'f8e5m2': 8, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?')
_HEADER = re.compile(r'^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->.*\{\s*$')
_END = re.compile(r'^\}(, execution_thread="[^"]*")?\s*$')
_INSTRUCTION = re.compile(r'^\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|called_computations|branch_computations|true_computation|'
  r'false_computation)=(\{[^}]*\}|%?[\w.\-]+)'
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
_SCOPE = 'kernel_flops'

# What these call is run on each element, and takes no product and sends nothing.
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


class Array(NamedTuple):
  """Element type, dimensions, and the memory that it lies in: 0 is the device's main memory, others
  lie in the core itself.
  """

  kind: str
  shape: tuple[int, ...]
  space: int = 0


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: its result (an array, or those of a tuple), what it does, to what, and the rest of
  the line.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def bytes(self) -> int:
    """Of the result."""
    return sum(array_bytes(array) for array in self.arrays)

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it runs."""
    return tuple(
      name.strip(' %{}')
      for match in _CALLED.findall(self.attributes)
      for name in match.strip('{}').split(',')
    )


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order of the schedule, and the name of the last one's value."""

  name: str
  instructions: Mapping[str, Instruction]
  root: str


@dataclasses.dataclass
class Collective:
  """What the chips send each other by one kind of operation in a step.

  Attributes:
    count: how often it runs.
    bytes: the whole array that is put together or taken apart (the larger of operand and result),
      each time, on one device.
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
    flops: of matrix products and convolutions, 2 a multiply and add, and what kernels say of
      themselves.
    kernel_flops: the part of `flops` in custom kernels (Pallas).
    bytes: of the device's main memory, read and written.
    collectives: by kind.
    unknown_loops: loops whose number of turns could not be read, counted once.
    unknown_kernels: custom kernels that do not say their FLOPs, counted 0.
  """

  flops: float = 0
  kernel_flops: float = 0
  bytes: float = 0
  collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
  unknown_loops: int = 0
  unknown_kernels: int = 0


def costs(text: str) -> Costs:
  """What one run of a compiled program takes on one device.

  Args:
    text: of `Compiled.as_text()`.

  Raises:
    ValueError: a text without an entry computation.
  """
  computations, entry = parse(text)
  total = Costs()
  _walk(computations, computations[entry], 1.0, True, False, total)
  return total


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """The computations of a program by name, and the name of the entry."""
  computations, entry, name, lines = {}, None, None, []
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header and '=' not in line.split('(')[0]:
      name, lines = header[2], []
      entry = name if header[1] else entry
    elif _END.match(line) and name is not None:
      computations[name] = _computation(name, lines)
      name = None
    elif lines and not _INSTRUCTION.match(
      line
    ):  # what a kernel says of itself may hold line breaks
      lines[-1] += line
    elif name is not None:
      lines.append(line)
  if entry is None:
    raise ValueError('the text has no ENTRY computation; give that of Compiled.as_text().')
  return computations, entry


def kernel_flops(**passes: int) -> str:
  """A name for `jax.named_scope` around a kernel that does not say its FLOPs itself: those of each
  of its passes.

  A pass is known by `_pass_` in the kernel's name: `kernel_flops(fwd=2, dkv=5)` for
  `splash_mha_fwd_residuals` and so on.
  """
  return '.'.join([_SCOPE, *(f'{name}_{flops}' for name, flops in passes.items())])


def array_bytes(array: Array) -> int:
  """Bytes of an array without padding."""
  digits = re.search(r'\d+', array.kind)
  bits = _BITS.get(array.kind, int(digits[0]) if digits else 8)
  return math.prod(array.shape) * bits // 8


def _computation(name: str, lines: list[str]) -> Computation:
  instructions, root = {}, ''
  for line in lines:
    match = _INSTRUCTION.match(line)
    if match:
      instruction = _instruction(match[2], re.sub(r'/\*.*?\*/', '', match[3]))
      instructions[instruction.name] = instruction
      root = instruction.name if match[1] else root
  return Computation(name, instructions, root or next(reversed(instructions), ''))


def _instruction(name: str, rest: str) -> Instruction:
  end = _closing(rest, 0) if rest.startswith('(') else _end_of_array(rest)
  kind, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition('(')
  close = _closing(rest, len(opcode)) if '(' in rest else len(rest)
  operands = tuple(re.findall(r'%([\w.\-]+)', rest[len(opcode) : close]))
  return Instruction(
    name,
    tuple(_array(*found) for found in _ARRAY.findall(kind)),
    opcode.strip(),
    operands,
    rest[len(opcode) :],
  )


def _array(kind: str, dimensions: str, layout: str) -> Array:
  space = re.search(r'S\((\d+)\)', layout)
  return Array(
    kind,
    tuple(int(d.lstrip('<=')) for d in dimensions.split(',') if d),
    int(space[1]) if space else 0,
  )


def _closing(text: str, start: int) -> int:
  """One past the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if depth == 0 and i >= start and text[i] == ')':
      return i + 1
  return len(text)


def _end_of_array(text: str) -> int:
  """One past the type at the beginning of a text: up to the first blank outside of braces and
  brackets.
  """
  depth = 0
  for i, character in enumerate(text):
    depth += {'{': 1, '[': 1, '(': 1, '}': -1, ']': -1, ')': -1}.get(character, 0)
    if character == ' ' and depth == 0:
      return i
  return len(text)


def _walk(
  computations: Mapping[str, Computation],
  computation: Computation,
  times: float,
  outer: bool,
  beside: bool,
  total: Costs,
) -> None:
  """Adds what `times` runs of a computation take.

  `outer` where its instructions read and write main memory, as those inside of a fusion do not;
  `beside` where all of it runs while the device computes.
  """
  for instruction in computation.instructions.values():
    opcode, turns = instruction.opcode, 1.0
    if opcode == 'while':
      found = trip_count(computations, computation, instruction)
      total.unknown_loops += found is None
      turns = 1.0 if found is None else found
    elif opcode in ('dot', 'convolution'):
      total.flops += times * _product_flops(computation, instruction)
    elif opcode == 'custom-call' and 'tpu_custom_call' in instruction.attributes:
      _add_kernel(instruction, times, total)
    elif opcode.removesuffix('-start') in COLLECTIVES:
      _add_collective(
        computation,
        instruction,
        times,
        beside or _overlaps(computations, computation, instruction),
        total,
      )
    if opcode.removesuffix('-start') not in _PER_ELEMENT:
      overlaps = beside or _overlaps(computations, computation, instruction)
      still_outer = outer and opcode in ('while', 'call', 'conditional')
      for name in instruction.called:
        _walk(computations, computations[name], times * turns, still_outer, overlaps, total)
    if outer and opcode not in _NO_TRAFFIC and not opcode.endswith('-done'):
      total.bytes += times * _traffic(computations, computation, instruction)


def _traffic(
  computations: Mapping[str, Computation], computation: Computation, instruction: Instruction
) -> int:
  """Bytes of main memory that an instruction reads and writes; of what it takes a slice of, or
  updates a slice in, the slice.
  """
  slices = ('dynamic-slice', 'slice', 'gather')
  if instruction.opcode in slices:
    return instruction.bytes + _main(instruction)
  if instruction.opcode == 'copy-start':  # its tuple holds the copy, then what is copied
    return _main(instruction)
  if instruction.opcode.removesuffix('-start') in slices:  # what is sliced, then the slice
    slice_ = Instruction('', instruction.arrays[1:2], '', (), '')
    return slice_.bytes + _main(slice_)
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * _operand_bytes(computation, instruction.operands[1])
  if instruction.opcode != 'fusion':
    operands = [
      computation.instructions[name]
      for name in instruction.operands
      if name in computation.instructions
    ]
    return _main(instruction) + sum(map(_main, operands))
  inside = computations[instruction.called[0]]
  root = inside.instructions[inside.root]
  written = _main(instruction)
  in_place = root.opcode == 'dynamic-update-slice'
  if in_place:
    written = min(written, inside.instructions[root.operands[1]].bytes)
  return written + sum(
    _read(computation, instruction, inside, number, root if in_place else None, slices)
    for number in range(len(instruction.operands))
  )


def _read(
  computation: Computation,
  fusion: Instruction,
  inside: Computation,
  number: int,
  updated: Instruction | None,
  slices: tuple[str, ...],
) -> int:
  """Bytes that a fusion reads of its operand `number`: the slices of it where it is only sliced,
  nothing where only updated.
  """
  operand = computation.instructions.get(fusion.operands[number])
  if operand is None or not _main(operand):
    return 0
  parameters = (i for i in inside.instructions.values() if i.opcode == 'parameter')
  name = next(
    (parameter.name for parameter in parameters if parameter.attributes.startswith(f'({number})')),
    '',
  )
  users = [i for i in inside.instructions.values() if name in i.operands]
  if users and all(i.opcode in slices or i is updated and i.operands[0] == name for i in users):
    return min(_main(operand), sum(i.bytes for i in users if i is not updated))
  return _main(operand)


def _main(instruction: Instruction) -> int:
  return sum(array_bytes(array) for array in instruction.arrays if array.space == 0)


def _operand_bytes(computation: Computation, name: str) -> int:
  operand = computation.instructions.get(name)
  return 0 if operand is None else operand.bytes


def _add_kernel(instruction: Instruction, times: float, total: Costs) -> None:
  flops = _said(instruction.attributes)
  total.unknown_kernels += flops is None
  total.flops += times * (flops or 0)
  total.kernel_flops += times * (flops or 0)


def _said(attributes: str) -> int | None:
  """FLOPs of a kernel as its own estimate or its scope says them."""
  estimate = re.search(r'"?cost_estimate"?\s*:\s*\{[^}]*?"?flops"?\s*:\s*"?(\d+)', attributes)
  if estimate:
    return int(estimate[1])
  scope = re.search(rf'op_name="[^"]*{_SCOPE}\.([\w.]+)([^"]*)"', attributes)
  passes = dict(part.split('_') for part in scope[1].split('.')) if scope else {}
  return next((int(flops) for name, flops in passes.items() if f'_{name}_' in scope[2]), None)


def _add_collective(
  computation: Computation, instruction: Instruction, times: float, overlaps: bool, total: Costs
) -> None:
  kind = instruction.opcode.removesuffix('-start')
  size = max(
    _payload(instruction), sum(_operand_bytes(computation, name) for name in instruction.operands)
  )
  group = _group_size(instruction)
  share = 1.0 if kind in ('collective-permute', 'collective-broadcast') else (group - 1) / group
  entry = total.collectives.setdefault(kind, Collective())
  entry.count += times
  entry.bytes += times * size
  entry.wire_bytes += times * size * share * (2 if kind == 'all-reduce' else 1)
  if overlaps:
    entry.overlapped_bytes += times * size


def _payload(instruction: Instruction) -> int:
  """Bytes of the result; of an asynchronous start, whose tuple repeats the operands and has
  counters, the largest array.
  """
  if instruction.opcode.endswith('-start') and instruction.opcode != 'all-reduce-start':
    return max((array_bytes(array) for array in instruction.arrays), default=0)
  return instruction.bytes


def _group_size(instruction: Instruction) -> int:
  """How many devices take part, as replica_groups is written: {{0,1},{2,3}}, [2,4]<=[8], or
  mesh['a'=4,'b'=2] {'a'}.
  """
  text = instruction.attributes
  mesh = re.search(r'replica_groups=(?:@\w+)?mesh\[([^\]]*)\]\s*\{([^}]*)\}', text)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    return (
      math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]) if axis in sizes)
      or 1
    )
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]', text)
  if iota:
    return int(iota[2])
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', text)
  return len(listed[1].split(',')) if listed else 2


def _overlaps(
  computations: Mapping[str, Computation], computation: Computation, instruction: Instruction
) -> bool:
  """Whether products or kernels run beside an instruction: between its start and its end, or inside
  of the same fusion.
  """
  if instruction.opcode == 'fusion':
    return _computes(computations, instruction)
  if not instruction.opcode.endswith('-start'):
    return False
  names = list(computation.instructions)
  for name in itertools.islice(names, names.index(instruction.name) + 1, None):
    between = computation.instructions[name]
    if instruction.name in between.operands and between.opcode.endswith('-done'):
      return False
    if _computes(computations, between):
      return True
  return False


def _computes(computations: Mapping[str, Computation], instruction: Instruction) -> bool:
  if instruction.opcode in ('dot', 'convolution') or 'tpu_custom_call' in instruction.attributes:
    return True
  return any(
    _computes(computations, inner)
    for name in instruction.called
    if name in computations
    for inner in computations[name].instructions.values()
  )


def trip_count(
  computations: Mapping[str, Computation], computation: Computation, loop: Instruction
) -> int | None:
  """How often a while loop turns; None where it cannot be read.

  From `known_trip_count` where the compiler left it; else from the condition `counter < limit`, the
  counter's first value and what the body adds to it, all constants.
  """
  known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
  if known:
    return int(known[1])
  condition, body = (
    computations[re.search(rf'{role}=%?([\w.\-]+)', loop.attributes)[1]]
    for role in ('condition', 'body')
  )
  found = _comparison(computations, condition)
  if found is None:
    return None
  index, limit, direction = found
  start, step = _first_value(computation, loop, index), _step(computations, body, index)
  if direction not in ('LT', 'NE', 'LE') or not step:
    return None
  return max(0, math.ceil((limit + (direction == 'LE') - start) / step))


def _comparison(
  computations: Mapping[str, Computation], condition: Computation
) -> tuple[int, int, str] | None:
  """(tuple index of the counter, limit, direction) of a loop's condition, which may stand in a
  fusion.
  """
  root = condition.instructions[condition.root]
  inner, arguments = condition, None
  while root.opcode == 'fusion':
    arguments = [condition.instructions[name] for name in root.operands]
    inner = computations[root.called[0]]
    root = inner.instructions[inner.root]
  if root.opcode != 'compare' or len(root.operands) != 2:
    return None
  left, right = (_outside(inner, name, arguments) for name in root.operands)
  index, limit = _tuple_index(left), _constant(right)
  direction = re.search(r'direction=(\w+)', root.attributes)
  return (
    None if index is None or limit is None or direction is None else (index, limit, direction[1])
  )


def _outside(inner: Computation, name: str, arguments: list[Instruction] | None) -> Instruction:
  """The instruction of a name; where it is a parameter of a fusion, what the fusion was given for
  it.
  """
  instruction = inner.instructions[name]
  if instruction.opcode == 'parameter' and arguments is not None:
    return arguments[int(re.search(r'\((\d+)\)', instruction.attributes)[1])]
  return instruction


def _tuple_index(instruction: Instruction) -> int | None:
  match = (
    re.search(r'index=(\d+)', instruction.attributes)
    if instruction.opcode == 'get-tuple-element'
    else None
  )
  return int(match[1]) if match else None


def _constant(instruction: Instruction | None) -> int | None:
  match = (
    re.match(r'\((-?\d+)\)', instruction.attributes)
    if instruction and instruction.opcode == 'constant'
    else None
  )
  return int(match[1]) if match else None


def _first_value(computation: Computation, loop: Instruction, index: int) -> int:
  """The counter's value before the loop: 0 where it is not written as a constant (as `lax.scan`
  begins).
  """
  initial = computation.instructions.get(loop.operands[0]) if loop.operands else None
  if initial is None or initial.opcode != 'tuple' or index >= len(initial.operands):
    return 0
  value = computation.instructions.get(initial.operands[index])
  while (
    value is not None
    and value.opcode in ('copy', 'copy-done', 'copy-start', 'bitcast')
    and value.operands
  ):
    value = computation.instructions.get(value.operands[0])
  return _constant(value) or 0


def _step(computations: Mapping[str, Computation], body: Computation, index: int) -> int | None:
  """What a turn of the loop adds to the counter; 1 where that is not written as a constant."""
  root = body.instructions[body.root]
  if root.opcode != 'tuple' or index >= len(root.operands):
    return 1
  value = body.instructions.get(root.operands[index])
  inner, arguments = body, None
  while value is not None and value.opcode in (
    'copy',
    'copy-done',
    'copy-start',
    'bitcast',
    'fusion',
  ):
    if value.opcode == 'fusion':
      arguments = [body.instructions[name] for name in value.operands]
      inner = computations[value.called[0]]
      value = inner.instructions[inner.root]
    else:
      value = inner.instructions.get(value.operands[0])
  if value is None or value.opcode != 'add':
    return 1
  constants = [_constant(_outside(inner, name, arguments)) for name in value.operands]
  return next((constant for constant in constants if constant), 1)


def _product_flops(computation: Computation, instruction: Instruction) -> float:
  """2 a multiply and add of a `dot` or `convolution`; places that padding or dilation leave empty
  do not count.
  """
  result = instruction.arrays[0].shape
  left, right = (
    computation.instructions[name].arrays[0].shape for name in instruction.operands[:2]
  )
  if instruction.opcode == 'dot':
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
    return 2.0 * math.prod(result) * math.prod(left[int(d)] for d in contracted[1].split(',') if d)
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
  groups = re.search(r'feature_group_count=(\d+)', instruction.attributes)
  batches = re.search(r'batch_group_count=(\d+)', instruction.attributes)
  size = {('l', label): left[i] for i, label in enumerate(labels[1])}
  size |= {('r', label): right[i] for i, label in enumerate(labels[2])}
  size |= {('o', label): result[i] for i, label in enumerate(labels[3])}
  window = _window(instruction.attributes, sum(label.isdigit() for label in labels[1]))
  places = 1
  for d, axis in enumerate(window):
    places *= _pairs(size['l', str(d)], size['r', str(d)], size['o', str(d)], *axis)
  flops = 2.0 * size['o', 'b'] * size['o', 'f'] * size['r', 'i'] * places
  return flops / (int(batches[1]) if batches else 1) if not groups else flops


def _window(attributes: str, dimensions: int) -> list[tuple[int, int, int, int]]:
  """(stride, padding before, dilation of the left side, of the right side) of each spatial
  dimension.
  """
  match = re.search(r'window=\{([^}]*)\}', attributes)
  fields = dict(part.split('=') for part in match[1].split()) if match else {}
  one = lambda name, default: (
    [int(v) for v in fields[name].split('x')] if name in fields else [default] * dimensions
  )
  pads = (
    [int(pair.split('_')[0]) for pair in fields['pad'].split('x')]
    if 'pad' in fields
    else [0] * dimensions
  )
  return list(zip(one('stride', 1), pads, one('lhs_dilate', 1), one('rhs_dilate', 1), strict=True))


@functools.cache
def _pairs(length: int, kernel: int, out: int, stride: int, pad: int, left: int, right: int) -> int:
  """Pairs of an output place and a kernel place that meet an input that is there, along one spatial
  dimension.
  """
  if kernel == 1 and out == 1 and pad == 0:
    return 1
  reach = (length - 1) * left
  return sum(
    0 <= (place := o * stride + k * right - pad) <= reach and place % left == 0
    for o in range(out)
    for k in range(kernel)
  )


def while_bodies(text: str) -> Iterator[tuple[str, int | None]]:
  """Name of the body and number of turns of each loop of a program, for those who want to look at
  one.
  """
  computations, _ = parse(text)
  for computation in computations.values():
    for instruction in computation.instructions.values():
      if instruction.opcode == 'while':
        yield (
          re.search(r'body=%?([\w.\-]+)', instruction.attributes)[1],
          trip_count(computations, computation, instruction),
        )
