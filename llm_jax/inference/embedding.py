"""Texts to vectors: the hidden states of each text, pooled; several texts per row.

Reimers and Gurevych 2019, "Sentence-BERT", arXiv:1908.10084, section 3: the mean over the positions
of a text, or its first position.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from llm_jax.core.contracts import Batch, Example, Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.data import pack, pipeline
from llm_jax.generation.completion import template
from llm_jax.nn import heads
from llm_jax.parallel import hosts, shapes, sharding
from llm_jax.programs.inference import Inference
from llm_jax.programs.network import Network

FEWEST = 4  # tokens of a text on average, where rows have one of few sizes
SHARED = 64  # the longest row of these that texts share: in longer ones XLA adds up piece by piece,
# and the last bit of a text's sums depends on where it begins (seen on CPUs at 256)
TILE = 64  # rows are as long as the longest text, rounded up to this: attention costs their square


class Embedder:
  """Makes vectors with the model of a program.

  Args:
    program: of a model; its heads are not used.
    tokenizer: that of the model.
    few: whether all batches have the same number of rows, of a length that goes by each text alone:
      what stands beside a text then changes no bit of its vector, and `warm` compiles for all
      lengths there are. Otherwise batches are as the texts fit best.
  """

  def __init__(self, program: Inference, tokenizer: Tokenizer, few: bool = False):
    self._program, self._tokenizer, self._few = program, tokenizer, few
    self._functions: dict[tuple[str, bool], Callable[[Any, Batch], jax.Array]] = {}

  def __call__(
    self, params: PyTree, texts: Sequence[str], pool: str = 'mean', normalize: bool = True
  ) -> np.ndarray:
    """[texts, D] float32: a vector for each text.

    Args:
      params: of the network.
      texts: any texts.
      pool: one of `heads.POOLS`.
      normalize: whether the vectors have length 1, so that inner products are cosines.

    Raises:
      ValueError: a model that cannot pool so.
    """
    run = self._function(pool, normalize)
    model = self._program.network.model
    ids = _ids(texts, self._tokenizer, model.causal, self._program.config.seq_len)
    vectors = np.zeros((len(ids), model.options.dim), np.float32)
    for length, numbers in self._by_length(ids).items():
      rows = _Rows([ids[number] for number in numbers], length, self._slots(length))
      logging.log_if(
        logging.INFO,
        '%d texts in %d rows of %d tokens: %.0f%% of the positions are used.',
        not self._few,
        rows.count,
        len(rows),
        length,
        100 * rows.tokens / (len(rows) * length),
      )
      vectors[numbers] = self._vectors(run, params, rows)
    return vectors

  def _vectors(self, run: Callable[[Any, Batch], jax.Array], params: PyTree, rows: '_Rows') -> Any:
    """Those of all texts of some rows, in the order of the texts."""
    vectors, index = np.zeros((rows.count, self._program.network.model.options.dim), np.float32), 0
    for batch in self._batches(rows):
      for vectors_GD in np.asarray(run(params, self._program.put(batch))):
        if index < len(rows):  # the last batch is filled up
          numbers = rows.texts(index)
          vectors[numbers] = vectors_GD[: len(numbers)]
        index += 1
    return vectors

  def warm(self, params: PyTree, pool: str, normalize: bool) -> None:
    """Compiles for all lengths of rows, where they are few."""
    run = self._function(pool, normalize)
    for length in shapes.lengths(self._program.mesh, self._program.config.seq_len):
      rows = _Rows([np.zeros(length, np.int32)], length, self._slots(length))
      self._vectors(run, params, rows)

  def _function(self, pool: str, normalize: bool) -> Callable[[Any, Batch], jax.Array]:
    if pool not in heads.POOLS:
      raise ValueError(f'pool={pool!r} must be one of {", ".join(heads.POOLS)}.')
    if self._program.network.model.causal and pool == 'cls':
      raise ValueError(
        "pool='cls' reads the first position, which in a causal model has seen nothing; use "
        "'last' or 'mean'."
      )
    if (pool, normalize) not in self._functions:
      self._functions[pool, normalize] = self._program.function(_pooled(pool, normalize))
    return self._functions[pool, normalize]

  def _row_length(self, longest: int) -> int:
    """Tokens of a row, few lengths for many texts, which the mesh can cut."""
    most = self._program.config.seq_len
    if self._few:
      return shapes.length(self._program.mesh, longest, most)
    tile = math.lcm(TILE, self._program.mesh.shape['sequence'])
    return min(most, tile * -(-longest // tile))

  def _by_length(self, ids: Sequence[np.ndarray]) -> dict[int, list[int]]:
    """The numbers of the texts by the length of their rows."""
    if not self._few:
      return {self._row_length(max(map(len, ids))): list(range(len(ids)))}
    found: dict[int, list[int]] = {}
    for number, text in enumerate(ids):
      found.setdefault(self._row_length(len(text)), []).append(number)
    return found

  def _slots(self, length: int) -> int | None:
    """Texts that a row of this length has room for; None for as many as fit."""
    if not self._few:
      return None
    return length // FEWEST if length <= SHARED else 1

  def _batches(self, rows: '_Rows') -> Iterator[Example]:
    config, shards = self._program.config, sharding.row_shards(self._program.mesh)
    most = config.batch_size * (config.seq_len // rows.seq_len)
    size = min(most, rounded_rows(len(rows), shards))
    if self._few:
      size = shapes.rows(self._program.mesh, rows.seq_len, self._program.config.batch_size)
    return pipeline.padded_batches(rows, size, hosts.rows(self._program.mesh, size))


def rounded_rows(rows: int, shards: int) -> int:
  """A power of two times `shards` that is at least `rows`: few sizes are compiled for."""
  return shards << (-(-rows // shards) - 1).bit_length()


class _Rows:
  """Rows of several texts, as few as they need, or as hold at most `slots` texts each."""

  def __init__(self, ids: Sequence[np.ndarray], seq_len: int, slots: int | None = None):
    self._ids, self.seq_len, self.count = ids, seq_len, len(ids)
    lengths = [len(text) for text in ids]
    self.tokens = sum(lengths)
    self._plan = pack.best_fit(lengths, seq_len, most=slots)
    most = int(np.max(np.diff(self._plan.offsets)))
    self._slots = slots or 1 << (most - 1).bit_length()

  def __len__(self) -> int:
    return len(self._plan)

  def __getitem__(self, index: int) -> Example:
    texts = [self._ids[number] for number in self.texts(index)]
    lengths = [len(ids) for ids in texts]
    return pack.assemble(texts, self.seq_len) | pack.text_bounds(lengths, self._slots)

  def texts(self, index: int) -> list[int]:
    """Which texts a row holds."""
    return [number for number, _, _ in self._plan[index]]


def _pooled(pool: str, normalize: bool) -> Callable[[Network, Batch], jax.Array]:
  """A function of the bound network: [B, G, D] vectors of the texts of each row, at least float32;
  anything where the row has fewer.
  """

  def run(network: Network, batch: Batch) -> jax.Array:
    outputs = network.model(batch, heads.pool_positions(batch, pool))
    x_BGD = heads.pool(outputs.hidden, batch, pool)
    x_BGD = x_BGD.astype(jnp.promote_types(x_BGD.dtype, jnp.float32))
    if normalize:
      x_BGD /= jnp.maximum(jnp.linalg.norm(x_BGD, axis=-1, keepdims=True), 1e-12)
    return x_BGD

  return run


def _ids(
  texts: Sequence[str], tokenizer: Tokenizer, causal: bool, seq_len: int
) -> list[np.ndarray]:
  """The ids of each text with its special tokens, cut to a row."""
  before, after = template(tokenizer, causal)
  room = seq_len - len(before) - len(after)
  found, cut = [], 0
  for text in texts:
    ids = tokenizer.encode(text)
    cut += len(ids) > room
    whole = [*before, *ids[:room], *after] or [tokenizer.bos_id]  # there must be something
    found.append(np.array(whole, np.int32))
  if cut:
    logging.warning(
      '%d of %d texts are longer than seq_len=%d allows; their ends were not read.',
      cut,
      len(found),
      seq_len,
    )
  return found
