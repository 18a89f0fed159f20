"""Reads the text of a compiled XLA program into computations of instructions.

The grammar is that of `jax.stages.Compiled.as_text()`: computations with one instruction per line,
`%name = type opcode(operands), attributes`, in the order in which they are scheduled.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_BITS = {'pred': 8, 'bf16': 16, 'f8e4m3fn': 8, 'f8e5m2': 8, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?')
_HEADER = re.compile(r'^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->.*\{\s*$')
_END = re.compile(r'^\}(, execution_thread="[^"]*")?\s*$')
_INSTRUCTION = re.compile(r'^\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$')
_COMMENT = re.compile(r'/\*.*?\*/')
_OPERAND = re.compile(r'%([\w.\-]+)')
_SPACE = re.compile(r'S\((\d+)\)')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|called_computations|branch_computations|true_computation|'
  r'false_computation)=(\{[^}]*\}|%?[\w.\-]+)'
)


class Array(NamedTuple):
  """An array as the text writes it.

  Attributes:
    kind: element type, 'bf16'.
    shape: dimensions.
    space: the memory that it lies in; 0 is the device's main memory, others lie in the core itself.
  """

  kind: str
  shape: tuple[int, ...]
  space: int = 0

  @property
  def bytes(self) -> int:
    """Without padding."""
    digits = re.search(r'\d+', self.kind)
    bits = _BITS.get(self.kind, int(digits[0]) if digits else 8)
    return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    name: of its result.
    arrays: the result; several where it is a tuple.
    opcode: what it does.
    operands: names of what it does that to.
    attributes: the rest of the line, from the parenthesis before the operands on.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def bytes(self) -> int:
    """Of the result."""
    return sum(array.bytes for array in self.arrays)

  @property
  def main_bytes(self) -> int:
    """Of what lies in main memory of the result."""
    return sum(array.bytes for array in self.arrays if array.space == 0)

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it runs."""
    names = []
    for match in _CALLED.findall(self.attributes):
      names += match.strip('{}').split(',')
    return tuple(name.strip(' %{}') for name in names)


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order of the schedule.

  Attributes:
    root: the name of the instruction whose result is that of the computation.
  """

  name: str
  instructions: Mapping[str, Instruction]
  root: str

  @property
  def result(self) -> Instruction:
    """The instruction named `root`."""
    return self.instructions[self.root]

  def parameter(self, number: int) -> Instruction | None:
    """The instruction that stands for operand `number` of the caller."""
    for instruction in self.instructions.values():
      if instruction.opcode == 'parameter' and instruction.attributes.startswith(f'({number})'):
        return instruction
    return None


Program = Mapping[str, Computation]


def parse(text: str) -> tuple[Program, str]:
  """The computations of a program by name, and the name of the entry.

  Raises:
    ValueError: a text without an entry computation.
  """
  program: dict[str, Computation] = {}
  entry = name = None
  lines: list[str] = []
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header and '=' not in line.split('(')[0]:
      name, lines = header[2], []
      entry = name if header[1] else entry
    elif _END.match(line) and name is not None:
      program[name] = _computation(name, lines)
      name = None
    elif lines and not _INSTRUCTION.match(line):  # the metadata of a kernel may hold line breaks
      lines[-1] += line
    elif name is not None:
      lines.append(line)
  if entry is None:
    raise ValueError('the text has no ENTRY computation; give that of Compiled.as_text().')
  return program, entry


def _computation(name: str, lines: list[str]) -> Computation:
  instructions, root = {}, ''
  for line in lines:
    match = _INSTRUCTION.match(line)
    if match:
      instruction = _instruction(match[2], _COMMENT.sub('', match[3]))
      instructions[instruction.name] = instruction
      root = instruction.name if match[1] else root
  return Computation(name, instructions, root or next(reversed(instructions), ''))


def _instruction(name: str, rest: str) -> Instruction:
  end = _closing(rest, 0) if rest.startswith('(') else _end_of_array(rest)
  kind, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition('(')
  attributes = rest[len(opcode) :]
  close = _closing(rest, len(opcode)) if '(' in rest else len(rest)
  operands = tuple(_OPERAND.findall(rest[len(opcode) : close]))
  arrays = tuple(_array(*found) for found in _ARRAY.findall(kind))
  return Instruction(name, arrays, opcode.strip(), operands, attributes)


def _array(kind: str, dimensions: str, layout: str) -> Array:
  space = _SPACE.search(layout)
  shape = tuple(int(size.lstrip('<=')) for size in dimensions.split(',') if size)
  return Array(kind, shape, int(space[1]) if space else 0)


def _closing(text: str, start: int) -> int:
  """One past the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if depth == 0 and text[i] == ')':
      return i + 1
  return len(text)


def _end_of_array(text: str) -> int:
  """One past the type at the beginning of a text: the first blank outside of brackets."""
  depth = 0
  for i, character in enumerate(text):
    depth += {'{': 1, '[': 1, '(': 1, '}': -1, ']': -1, ')': -1}.get(character, 0)
    if character == ' ' and depth == 0:
      return i
  return len(text)
