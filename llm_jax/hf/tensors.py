"""Which tensor of a Hugging Face folder is which parameter of ours: names and axes, as data.

Their tensors hold the numbers of ours under other names and with other axes: the weight of a linear
layer is [out, in], heads are not an axis of their own, queries, keys and values may be one matrix.
`Tensor` says so by letters. Reading copies out of a view of their array, writing fills the same
view.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.hf import safetensors

LINEAR = ('OI->IO', 'O->O')  # axes of a weight, and of its bias
HEADS_OUT = ('(NH)D->DNH', '(NH)->NH')
HEADS_IN = ('D(NH)->NHD', 'D->D')

TOKEN = 'model/embedder/token/embedding'
POSITION = 'model/embedder/position/embedding'
OUTPUT = 'model/output/kernel'  # the projection on the vocabulary, where it is not tied
TABLE_BIAS = 'model/bias'  # what is added to its logits
CLASSIFIER = 'heads_classifier/dense/kernel'
TAGGER = 'heads_tagger/dense/kernel'

CLASSIFIES, TAGS = 'ForSequenceClassification', 'ForTokenClassification'
ANSWERS, CHOOSES = 'ForQuestionAnswering', 'ForMultipleChoice'
"""Ends of the names of their classes."""
AMBIGUOUS = (CLASSIFIES, TAGS, CHOOSES)  # whose last layers may have the same name

FLOATS = {
  safetensors.DTYPES[code].name: safetensors.DTYPES[code] for code in ('F32', 'BF16', 'F16', 'F64')
}
"""The types that parameters are read from and written in, by name."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of theirs, and the parameter or parameters of ours that it holds.

  Attributes:
    name: theirs, without the prefix of the model's body; {} is the number of a layer.
    axes: 'theirs->ours', one letter per axis. Letters in brackets are one axis of theirs; S cuts
      theirs into equal parts, one per path; 1 is one of theirs of length one.
    paths: ours; where the name has {}, the path within a layer.
    needs: a head, or another module, that must be there too for this tensor to hold the parameter;
      None: no condition.
    of: the end of the names of the classes whose tensor it is, where others of `AMBIGUOUS` have
      another of the same name; '' for all.
  """

  name: str
  axes: str
  paths: tuple[str, ...]
  needs: str | None = None
  of: str = ''

  @property
  def layered(self) -> bool:
    """Whether there is one per layer."""
    return '{}' in self.name

  def held_by(self, architectures: Sequence[str]) -> bool:
    """Whether models of these classes may have it: none of them is one that has another."""
    others = [kind for kind in AMBIGUOUS if kind != self.of]
    return not self.of or not any(kind in name for name in architectures for kind in others)

  def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
    """Their shape, where one of our parameters (in one layer) has the shape `ours`."""
    sizes = self._sizes(ours)
    axes = re.findall(r'\(\w+\)|\w', self._theirs)
    return tuple(math.prod(sizes[letter] for letter in axis.strip('()')) for axis in axes)

  def part(self, theirs: np.ndarray, path: str, ours: Sequence[int]) -> np.ndarray:
    """The view of their array that is the parameter `path`, of the shape `ours`.

    What is assigned to the view is written into their array.
    """
    sizes = self._sizes(ours)
    letters = re.sub(r'[()1]', '', self._theirs)
    x = theirs.reshape([sizes[letter] for letter in letters])
    if 'S' in letters:
      before = (slice(None),) * letters.index('S')
      x = x[(*before, self.paths.index(path))]
      letters = letters.replace('S', '')
    return x.transpose([letters.index(letter) for letter in self._ours])

  @property
  def _theirs(self) -> str:
    return self.axes.split('->')[0]

  @property
  def _ours(self) -> str:
    return self.axes.split('->')[1]

  def _sizes(self, ours: Sequence[int]) -> dict[str, int]:
    return dict(zip(self._ours, ours, strict=True)) | {'S': len(self.paths), '1': 1}


class Location(NamedTuple):
  """Where a folder holds a parameter.

  Attributes:
    tensor: the kind of tensor that it is, or is a part of.
    path: which of the tensor's `paths`.
    names: their names, without prefix: one per layer where the parameter is stacked, else one.
    stacked: whether axis 0 of the parameter counts layers.
  """

  tensor: Tensor
  path: str
  names: tuple[str, ...]
  stacked: bool

  def in_layer(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one layer of a parameter of this shape; the shape itself without a stack."""
    return tuple(shape[1:] if self.stacked else shape)


def table(name: str, path: str) -> tuple[Tensor, ...]:
  """Their embedding `name`."""
  return (Tensor(f'{name}.weight', 'VD->VD', (f'{path}/embedding',)),)


def linear(
  name: str,
  *paths: str,
  axes: tuple[str, str] = LINEAR,
  needs: str | None = None,
  of: str = '',
) -> tuple[Tensor, ...]:
  """Weight and bias of their linear layer `name`, which holds one of ours, or several."""
  weight, bias_ = axes
  return (
    Tensor(f'{name}.weight', weight, tuple(f'{path}/kernel' for path in paths), needs, of),
    Tensor(f'{name}.bias', bias_, tuple(f'{path}/bias' for path in paths), needs, of),
  )


def norm(name: str, path: str) -> tuple[Tensor, ...]:
  """Weight and bias of their norm `name`."""
  return (
    Tensor(f'{name}.weight', 'D->D', (f'{path}/scale',)),
    Tensor(f'{name}.bias', 'D->D', (f'{path}/bias',)),
  )


def bias(name: str, path: str) -> tuple[Tensor, ...]:
  """A bias over the vocabulary that belongs to no linear layer of ours."""
  return (Tensor(name, 'V->V', (path,)),)


def vocabulary(name: str) -> tuple[Tensor, ...]:
  """Their projection on the vocabulary, where it is not tied."""
  return (Tensor(name, 'VD->DV', (OUTPUT,)),)
