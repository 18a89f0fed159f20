"""How often the loops of a compiled program run.

XLA may write the number beside the loop. Where it does not, it follows from the condition
`counter < limit`, the counter's first value and what an iteration adds to it, all constants.
"""

import math
import re

from llm_jax.planning.hlo_text import Computation, Instruction, Program

_MOVES = ('copy', 'copy-done', 'copy-start', 'bitcast')  # the value stays the same
_KNOWN = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
  """How often a while loop runs its body; None where that cannot be read.

  Args:
    program: all computations by name.
    computation: the one in which the loop is.
    loop: its `while` instruction.
  """
  known = _KNOWN.search(loop.attributes)
  if known:
    return int(known[1])
  found = _comparison(program, _called_as(program, loop, 'condition'))
  if found is None:
    return None
  index, limit, direction = found
  start = _first_value(computation, loop, index)
  step = _step(program, _called_as(program, loop, 'body'), index)
  if direction not in ('LT', 'NE', 'LE') or not step:
    return None
  return max(0, math.ceil((limit + (direction == 'LE') - start) / step))


def _called_as(program: Program, loop: Instruction, role: str) -> Computation:
  name = re.search(rf'{role}=%?([\w.\-]+)', loop.attributes)
  if name is None:
    raise ValueError(f'the loop {loop.name} names no {role}; its line is not of a known form.')
  return program[name[1]]


def _comparison(program: Program, condition: Computation) -> tuple[int, int, str] | None:
  """(tuple index of the counter, limit, direction) of a loop's condition; None where it compares
  something else. The comparison may be inside of a fusion.
  """
  root, inner, arguments = condition.result, condition, None
  while root.opcode == 'fusion':
    arguments = [condition.instructions[name] for name in root.operands]
    inner = program[root.called[0]]
    root = inner.result
  if root.opcode != 'compare' or len(root.operands) != 2:
    return None
  left, right = (_outside(inner, name, arguments) for name in root.operands)
  index, limit = _tuple_index(left), _constant(right)
  direction = re.search(r'direction=(\w+)', root.attributes)
  if index is None or limit is None or direction is None:
    return None
  return index, limit, direction[1]


def _first_value(computation: Computation, loop: Instruction, index: int) -> int:
  """The counter's value before the loop; 0, where `lax.scan` begins, if it is no constant."""
  initial = computation.instructions.get(loop.operands[0]) if loop.operands else None
  if initial is None or initial.opcode != 'tuple' or index >= len(initial.operands):
    return 0
  value = computation.instructions.get(initial.operands[index])
  while value is not None and value.opcode in _MOVES and value.operands:
    value = computation.instructions.get(value.operands[0])
  return _constant(value) or 0


def _step(program: Program, body: Computation, index: int) -> int:
  """What an iteration adds to the counter; 1 where that is no constant."""
  root = body.result
  if root.opcode != 'tuple' or index >= len(root.operands):
    return 1
  value = body.instructions.get(root.operands[index])
  inner, arguments = body, None
  while value is not None and value.opcode in (*_MOVES, 'fusion'):
    if value.opcode == 'fusion':
      arguments = [body.instructions[name] for name in value.operands]
      inner = program[value.called[0]]
      value = inner.result
    else:
      value = inner.instructions.get(value.operands[0])
  if value is None or value.opcode != 'add':
    return 1
  constants = [_constant(_outside(inner, name, arguments)) for name in value.operands]
  return next((constant for constant in constants if constant), 1)


def _outside(inner: Computation, name: str, arguments: list[Instruction] | None) -> Instruction:
  """The instruction of a name; for a parameter of a fusion, what the fusion was given for it."""
  instruction = inner.instructions[name]
  if instruction.opcode != 'parameter' or arguments is None:
    return instruction
  number = re.search(r'\((\d+)\)', instruction.attributes)
  return arguments[int(number[1])] if number else instruction


def _tuple_index(instruction: Instruction) -> int | None:
  if instruction.opcode != 'get-tuple-element':
    return None
  match = re.search(r'index=(\d+)', instruction.attributes)
  return int(match[1]) if match else None


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != 'constant':
    return None
  match = re.match(r'\((-?\d+)\)', instruction.attributes)
  return int(match[1]) if match else None
