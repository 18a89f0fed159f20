"""The probabilities of attention (arXiv:1706.03762, eq. 1): where each token of a text looks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import tree
from llm_jax.core.contracts import Batch, Tokenizer
from llm_jax.core.params import LAYERS
from llm_jax.core.tree import PyTree
from llm_jax.generation.completion import template
from llm_jax.nn.block import MAPS
from llm_jax.parallel import sharding
from llm_jax.programs import inference, network
from llm_jax.programs.inference import Inference

TILE = 16  # rows are as long as the text, rounded up to this
SPECIALS = ('cls', 'sep', 'bos', 'eos', 'mask', 'unk', 'pad')


class AttentionMaps:
  """Reads the maps of all layers and heads, whatever computes attention otherwise.

  Args:
    program: of a model; its heads are not used.
    tokenizer: that of the model.
  """

  def __init__(self, program: Inference, tokenizer: Tokenizer):
    self._program, self._tokenizer = program, tokenizer
    whole = sharding.replicated(program.mesh)
    self._run = jax.jit(inference.on_layout(program.layout, self._maps), out_shardings=whole)

  def __call__(self, params: PyTree, text: str) -> tuple[list[str], np.ndarray]:
    """As `Session.attention`.

    Args:
      params: of the network.
      text: any text.

    Raises:
      ValueError: no layer leaves its probabilities.
    """
    program, tokenizer = self._program, self._tokenizer
    before, after = template(tokenizer, program.network.model.causal)
    room = program.config.seq_len - len(before) - len(after)
    ids = [*before, *tokenizer.encode(text)[:room].tolist(), *after] or [tokenizer.bos_id]
    tile = math.lcm(TILE, program.mesh.shape['sequence'])
    length = min(-(-len(ids) // tile) * tile, program.config.seq_len)
    row = {
      'tokens': np.pad(np.array(ids, np.int32), (0, length - len(ids))),
      'segments': np.pad(np.ones(len(ids), np.int32), (0, length - len(ids))),
    }
    maps_LNTT = np.asarray(self._run(params, self._rows(row)))
    return [self._spelled(token) for token in ids], maps_LNTT[..., : len(ids), : len(ids)]

  def _rows(self, row: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The row as often as the mesh has parts of a batch."""
    mesh = self._program.mesh
    by_row = sharding.batch_sharding(mesh)

    def place(x: np.ndarray) -> jax.Array:
      rows = np.tile(x, (sharding.row_shards(mesh), 1))
      return jax.make_array_from_callback(rows.shape, by_row, rows.__getitem__)

    return {name: place(x) for name, x in row.items()}

  def _maps(self, params: PyTree, batch: Batch) -> jax.Array:
    """[L, N, T, T] float32, of the first row."""
    run = functools.partial(network.apply, method=lambda net, batch: net.model(batch))
    _, variables = run(self._program.network, params, batch, mutable=[MAPS])
    maps = tree.flatten(variables.get(MAPS, {}))
    if not maps:
      name = type(self._program.network.model).__name__
      raise ValueError(f'{name} has no layers of nn.block, whose attention could be read.')
    paths = sorted((path for path in maps if f'/{LAYERS}/' in path), key=lambda x: (len(x), x))
    stacked = [maps.pop(path)[:, 0] for path in paths]  # layer g P + j is index g of pattern j
    layers = [x[0] for x in maps.values()]  # a layer that stands by itself is the first
    layers += [x for group in zip(*stacked, strict=True) for x in group]
    return jnp.stack(layers).astype(jnp.float32)

  def _spelled(self, token: int) -> str:
    for name in SPECIALS:
      if token == getattr(self._tokenizer, f'{name}_id'):
        return f'[{name.upper()}]'
    return self._tokenizer.decode([token])
