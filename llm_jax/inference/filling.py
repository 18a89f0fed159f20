"""Masked texts to filled ones: an encoder says what a [MASK] hides."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.contracts import Batch, Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.generation.completion import template
from llm_jax.parallel import shapes, sharding
from llm_jax.programs.inference import Inference
from llm_jax.programs.network import Network

MASK = '[MASK]'
TILE = 16  # rows are as long as the longest text, rounded up to this
FEW_MASKS = 8  # masks of a row, where rows have one of few sizes


@dataclasses.dataclass(frozen=True)
class Filled:
  """A text whose masks are filled in.

  Attributes:
    text: with the most likely token at each mask, as the tokenizer spells it.
    masks: for each mask, in order, the most likely tokens and their probabilities; each mask is
      seen by itself.
  """

  text: str
  masks: tuple[tuple[tuple[str, float], ...], ...]


class Filler:
  """Fills in masks with an encoder and its masked-LM head.

  Args:
    program: of an encoder whose network has the head `mlm`.
    tokenizer: that of the model.
    few: whether all batches have the same number of rows, of a length that goes by each text alone,
      and of as many masks: what stands beside a text then changes no bit of its answer, and `warm`
      compiles for all lengths there are.

  Raises:
    ValueError: no such head, or no mask token.
  """

  def __init__(self, program: Inference, tokenizer: Tokenizer, few: bool = False):
    if 'mlm' not in program.network.heads:
      raise ValueError(
        'this model has no masked-LM head (heads_mlm), so it cannot fill in what is masked; open '
        'one that has.'
      )
    if tokenizer.mask_id is None:
      raise ValueError(
        'this tokenizer has no mask token; an encoder that was trained by masking has one.'
      )
    self._program, self._tokenizer, self._few = program, tokenizer, few
    self._functions: dict[int, Any] = {}

  def __call__(self, params: PyTree, texts: Sequence[str], rows: int, top: int = 5) -> list[Filled]:
    """Fills in each text; a mask is written as the tokenizer writes it, or as [MASK].

    Args:
      params: of the network.
      texts: with one mask or several.
      rows: texts that are run at once, where batches are not of few sizes.
      top: how many candidates a mask gets.

    Raises:
      ValueError: a text without a mask, or one longer than the model takes.
    """
    tokenizer, ids = self._tokenizer, list(map(self.ids, texts))
    run = self._function(min(top, tokenizer.vocab_size))
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in ids]
    for (length, masks), asked in self._groups(ids).items():
      rows = (
        shapes.rows(self._program.mesh, length, self._program.config.batch_size)
        if self._few
        else rows
      )
      for first in range(0, len(asked), rows):
        part = asked[first : first + rows]
        batch = _batch(self._program, [(ids[n], at) for n, at in part], rows, length, masks)
        answers = zip(part, *map(np.asarray, run(params, batch)), strict=False)
        for (number, at), p_MC, ids_MC in answers:
          found[number].append((p_MC[: len(at)], ids_MC[: len(at)]))
    return [
      _filled(row, tokenizer, *map(np.concatenate, zip(*answers, strict=True)))
      for row, answers in zip(ids, found, strict=True)
    ]

  def warm(self, params: PyTree, top: int) -> None:
    """Compiles for all lengths of rows, where they are few."""
    run = self._function(min(top, self._tokenizer.vocab_size))
    for length in shapes.lengths(self._program.mesh, self._program.network.longest):
      rows = shapes.rows(self._program.mesh, length, self._program.config.batch_size)
      text = np.zeros(length, np.int32), np.zeros(1, np.int32)
      jax.block_until_ready(run(params, _batch(self._program, [text], rows, length, FEW_MASKS)))

  def _groups(self, ids: Sequence[np.ndarray]) -> '_Groups':
    """The numbers of texts and the indices of masks in them that run together, by the length of
    their rows and the masks of each.
    """
    masks = [np.flatnonzero(row == self._tokenizer.mask_id) for row in ids]
    if not self._few:
      if not ids:
        return {}
      most = 1 << (max(map(len, masks)) - 1).bit_length()
      return {(self._length(max(map(len, ids))), most): list(enumerate(masks))}
    found: _Groups = {}
    for number, (row, indices) in enumerate(zip(ids, masks, strict=True)):
      group = found.setdefault((self._length(len(row)), FEW_MASKS), [])
      firsts = range(0, len(indices), FEW_MASKS)
      group += [(number, indices[first : first + FEW_MASKS]) for first in firsts]
    return found

  def _length(self, longest: int) -> int:
    """Tokens of a row that holds this one."""
    most = self._program.network.longest
    if self._few:
      return shapes.length(self._program.mesh, longest, most)
    return min(-(-longest // TILE) * TILE, most)

  def ids(self, text: str) -> np.ndarray:
    """The ids of a text; ValueError for one without a mask, or longer than the model takes."""
    return _masked(text, self._tokenizer, self._program.network.longest)

  def _function(self, top: int) -> Any:
    if top not in self._functions:
      self._functions[top] = self._program.function(functools.partial(_candidates, top=top))
    return self._functions[top]


_Groups = dict[tuple[int, int], list[tuple[int, np.ndarray]]]


def _candidates(network: Network, batch: Batch, *, top: int) -> tuple[jax.Array, jax.Array]:
  """Probabilities and ids of the most likely tokens of each mask, [B, M, top] each."""
  row = {key: batch[key] for key in ('tokens', 'segments')}
  outputs = network.model(row, batch['mask_positions'])
  x_BMD, bias_V = network.heads['mlm'](outputs.hidden)
  table_VD = network.model.table().astype(x_BMD.dtype)
  wide = jnp.promote_types(x_BMD.dtype, jnp.float32)
  logits_BMV = jnp.einsum('BMD,VD->BMV', x_BMD, table_VD, preferred_element_type=wide)
  logits_BMV += bias_V[None, None]
  p_BMV = jax.nn.softmax(sharding.constrain(logits_BMV, 'batch', None, None))
  return tuple(jax.lax.top_k(p_BMV, top))


def _masked(text: str, tokenizer: Tokenizer, max_len: int) -> np.ndarray:
  """The ids of a text with its special tokens, at least one of them the mask's."""
  before, after = template(tokenizer, causal=False)
  ids = tokenizer.encode(text, special=True)
  if tokenizer.mask_id not in ids:
    # The tokenizer's own name for a mask is another one: <mask>, which takes the space before it.
    parts = [tokenizer.encode(part.removesuffix(' '), special=True) for part in text.split(MASK)]
    join = lambda left, right: np.concatenate([left, [tokenizer.mask_id], right])
    ids = functools.reduce(join, parts)
  if tokenizer.mask_id not in ids:
    raise ValueError(f'{text!r} has no {MASK}; write one where a word is to be filled in.')
  ids = np.concatenate([before, ids, after]).astype(np.int32)
  if len(ids) > max_len:
    raise ValueError(
      f'{text[:40]!r}... has {len(ids)} tokens, and the model takes max_len={max_len}; shorten the '
      'text.'
    )
  return ids


def _batch(
  program: Inference,
  texts: Sequence[tuple[np.ndarray, np.ndarray]],
  rows: int,
  length: int,
  masks: int,
) -> dict[str, jax.Array]:
  """Texts and the indices of masks in them, filled up to so many rows, tokens and masks."""
  batch = {name: np.zeros((rows, length), np.int32) for name in ('tokens', 'segments')}
  batch['mask_positions'] = np.zeros((rows, masks), np.int32)
  for i, (row, indices) in enumerate(texts):
    batch['tokens'][i, : len(row)] = row
    batch['segments'][i, : len(row)] = 1
    batch['mask_positions'][i, : len(indices)] = indices
  by_row = sharding.batch_sharding(program.mesh)
  place = lambda x: jax.make_array_from_callback(x.shape, by_row, x.__getitem__)
  return {name: place(x) for name, x in batch.items()}


def _filled(row: np.ndarray, tokenizer: Tokenizer, p_MC: np.ndarray, ids_MC: np.ndarray) -> Filled:
  indices = np.flatnonzero(row == tokenizer.mask_id)
  whole = row.copy()
  whole[indices] = ids_MC[: len(indices), 0]
  masks = []
  for ids, ps in zip(ids_MC[: len(indices)], p_MC[: len(indices)], strict=True):
    tokens = [tokenizer.decode([token]).strip() for token in ids]
    masks.append(tuple(zip(tokens, map(float, ps), strict=True)))
  return Filled(tokenizer.decode(whole), tuple(masks))
