"""FLOPs of the matrix products and convolutions of a compiled program: 2 per multiply and add.

The TPU compiler writes many products as convolutions, with padding and dilation that leave most of
the window empty; what meets no input does not count.
"""

import functools
import math
import re

from llm_jax.planning.hlo_text import Computation, Instruction


def flops(computation: Computation, instruction: Instruction) -> float:
  """FLOPs of a `dot` or `convolution`."""
  left, right = (
    computation.instructions[name].arrays[0].shape for name in instruction.operands[:2]
  )
  result = instruction.arrays[0].shape
  if instruction.opcode == 'dot':
    return _dot(instruction.attributes, left, result)
  return _convolution(instruction.attributes, left, right, result)


def _dot(attributes: str, left: tuple[int, ...], result: tuple[int, ...]) -> float:
  match = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', attributes)
  contracted = match[1].split(',') if match else []
  summed = [left[int(d)] for d in contracted if d]
  return 2.0 * math.prod(result) * math.prod(summed)


def _convolution(
  attributes: str, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]
) -> float:
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes)
  if labels is None:
    raise ValueError(f'a convolution names no dimensions: {attributes[:200]}')
  lefts = dict(zip(labels[1], left, strict=True))
  rights = dict(zip(labels[2], right, strict=True))
  results = dict(zip(labels[3], result, strict=True))
  window = _window(attributes, sum(label.isdigit() for label in labels[1]))
  meetings = 1
  for d, axis in enumerate(window):
    meetings *= _meetings(lefts[str(d)], rights[str(d)], results[str(d)], *axis)
  whole = 2.0 * results['b'] * results['f'] * rights['i'] * meetings
  batches = re.search(r'batch_group_count=(\d+)', attributes)
  if 'feature_group_count=' in attributes or batches is None:
    return whole
  return whole / int(batches[1])


def _window(attributes: str, dimensions: int) -> list[tuple[int, int, int, int]]:
  """(stride, padding before, dilation of the left side, of the right side) of each spatial
  dimension.
  """
  match = re.search(r'window=\{([^}]*)\}', attributes)
  fields = dict(part.split('=') for part in match[1].split()) if match else {}

  def numbers(name: str, default: int) -> list[int]:
    if name not in fields:
      return [default] * dimensions
    return [int(part.split('_')[0]) for part in fields[name].split('x')]

  strides, pads = numbers('stride', 1), numbers('pad', 0)
  lefts, rights = numbers('lhs_dilate', 1), numbers('rhs_dilate', 1)
  return list(zip(strides, pads, lefts, rights, strict=True))


@functools.cache
def _meetings(
  length: int, kernel: int, out: int, stride: int, pad: int, left: int, right: int
) -> int:
  """How often, along one spatial dimension, a kernel element meets an input element, over all
  output elements.
  """
  if kernel == 1 and out == 1 and pad == 0:
    return 1
  last = (length - 1) * left
  count = 0
  for o in range(out):
    for k in range(kernel):
      index = o * stride + k * right - pad
      count += 0 <= index <= last and index % left == 0
  return count
