"""The two ends of a language model, where one dimension is the vocabulary: looking tokens up, and
the loss over all tokens.

Both know how the table lies on the mesh (vocabulary over `tensor`, model dimension over `fsdp`) and
say themselves what is sent: the lookup sends the tokens' vectors, never the table; the loss gathers
the table once, goes through the tokens in chunks, so that logits are never whole, and takes the
gradient on the way, so that nothing is computed twice. A vocabulary that `tensor` does not divide
is padded here, in the computation; parameters keep their size.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from llm_jax.core.contracts import Metrics
from llm_jax.parallel import fsdp, sharding

CHUNK_BYTES = 1 << 28  # of logits at once on a device


class Sums(NamedTuple):
  """Weighted sums over positions, at least float32. Only `loss` has a gradient.

  Attributes:
    loss: what is trained: (1 - label_smoothing) * nll + label_smoothing * (mean of -log p over the
      vocabulary; arXiv:1512.00567, section 7) + z_loss * (log of the sum of exponentials)^2
      (arXiv:2204.02311, section 5).
    nll: the cross-entropy in nats, without either.
    right: how often the target has the highest logit.
  """

  loss: jax.Array
  nll: jax.Array
  right: jax.Array


class _Loss(NamedTuple):
  """What is static of the loss."""

  vocab: int
  label_smoothing: float
  z_loss: float


class _Axes(NamedTuple):
  """Mesh axes that cut the tokens, the vocabulary, and the model dimension of the table; the two
  latter None where whole.

  `line` is that of `llm_jax.parallel.fsdp`.
  """

  tokens: tuple[str, ...] = ()
  vocab: str | None = None
  embed: str | None = None
  line: int | None = None


def lookup(table_VD: jax.Array, ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Vectors of `ids_BT` in `dtype`, [B, T, D]; their gradients are added up in the table's own
  type.
  """
  return _lookup(sharding.current(), dtype, *_padded(table_VD), ids_BT)


def cross_entropy(
  x_BTD: jax.Array,
  table_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  bias_V: jax.Array | None = None,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> Sums:
  """The cross-entropy over the vocabulary, and what is counted beside it.

  Logits are x W^T + b, at least float32. Differentiable by x, table and bias, not by the weights.

  Args:
    x_BTD: hidden states, in the type that products are computed in.
    table_VD: the tied token table, or the transposed kernel of an output layer.
    targets_BT: true ids.
    weights_BT: 0 where a position does not count.
    bias_V: added to the logits; None for none.
    label_smoothing: share of the target's probability that is spread over the vocabulary.
    z_loss: weight of the squared log of the sum of exponentials.
  """
  table, vocab = _padded(table_VD)
  bias = jnp.zeros((vocab,), table.dtype) if bias_V is None else bias_V
  bias = jnp.pad(bias, (0, table.shape[0] - vocab))
  layout = sharding.current()
  cut = 1 if layout is None else layout.mesh.shape['sequence']
  pad = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % cut), *((0, 0),) * (x.ndim - 2)))
  loss = _Loss(vocab, label_smoothing, z_loss)
  return _cross_entropy(layout, loss, pad(x_BTD), table, bias, pad(targets_BT), pad(weights_BT))


def token_nll(
  x_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, bias_V: jax.Array | None = None
) -> jax.Array:
  """The cross-entropy of each token, [B, T], at least float32, for losses that are no sum of it.

  Logits are never whole: they are made in chunks of positions, and once more for the gradient.

  Args:
    x_BTD, table_VD, targets_BT, bias_V: as for `cross_entropy`.
  """
  B, T, D = x_BTD.shape
  dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
  count = min(T, -(-B * T * table_VD.shape[0] * 4 // CHUNK_BYTES))
  size = -(-T // count)
  pad = ((0, 0), (0, size * count - T))
  cut = lambda x: jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)
  parts = cut(jnp.pad(x_BTD, (*pad, (0, 0)))), cut(jnp.pad(targets_BT, pad))

  @jax.checkpoint
  def chunk(part: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, targets = part
    logits = jnp.einsum('BTD,VD->BTV', x, table_VD.astype(x.dtype), preferred_element_type=dtype)
    if bias_V is not None:
      logits += bias_V.astype(dtype)
    right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right

  return jnp.moveaxis(jax.lax.map(chunk, parts), 0, 1).reshape(B, size * count)[:, :T]


class End(NamedTuple):
  """What logits are made of: x W^T + b.

  Attributes:
    x_BTD: hidden states.
    table_VD: as for `cross_entropy`.
    bias_V: likewise; None for none.
  """

  x_BTD: jax.Array
  table_VD: jax.Array
  bias_V: jax.Array | None


def soft_divergence(student: End, teacher: End, temperature: float) -> jax.Array:
  """T^2 KL(teacher || student) of the distributions over the vocabulary at each position, [B, T],
  at least float32 (arXiv:1503.02531). Ids that only one of the two tables has are left out. Nothing
  learns from the teacher's.

  Logits are never whole: they are made in chunks of positions, and once more for the gradient.
  """
  teacher = jax.lax.stop_gradient(teacher)
  B, T, _ = student.x_BTD.shape
  dtype = jnp.promote_types(student.x_BTD.dtype, jnp.float32)
  vocab = min(len(end.table_VD) for end in (student, teacher))
  count = min(T, -(-2 * B * T * vocab * 4 // CHUNK_BYTES))
  size = -(-T // count)
  pad = ((0, 0), (0, size * count - T), (0, 0))
  cut = lambda x: jnp.moveaxis(jnp.pad(x, pad).reshape(B, count, size, x.shape[-1]), 1, 0)

  @jax.checkpoint
  def chunk(part: tuple[jax.Array, jax.Array]) -> jax.Array:
    ours, theirs = (
      _log_softmax(x, end, vocab, temperature, dtype)
      for x, end in zip(part, (student, teacher), strict=True)
    )
    return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)

  parts = cut(student.x_BTD), cut(teacher.x_BTD)
  return jnp.moveaxis(jax.lax.map(chunk, parts), 0, 1).reshape(B, size * count)[:, :T]


def _log_softmax(
  x_BTD: jax.Array, end: End, vocab: int, temperature: float, dtype: DTypeLike
) -> jax.Array:
  table = end.table_VD[:vocab].astype(x_BTD.dtype)
  logits = jnp.einsum('BTD,VD->BTV', x_BTD, table, preferred_element_type=dtype)
  if end.bias_V is not None:
    logits += end.bias_V[:vocab].astype(dtype)
  return jax.nn.log_softmax(logits / temperature)


def check_loss(label_smoothing: float, z_loss: float) -> None:
  """Raises ValueError unless both are what `cross_entropy` may be given by an objective's section
  of the config.
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(
      f'objective.label_smoothing={label_smoothing} must be at least 0 and below 1; 0.1 is usual, '
      '0 none.'
    )
  if not 0 <= z_loss < math.inf:
    raise ValueError(
      f'objective.z_loss={z_loss} must be a number of at least 0; 1e-4 is usual, 0 none.'
    )


def metrics(name: str, sums: Sums, weight: jax.Array) -> Metrics:
  """What an objective of this name returns: its loss, its cross-entropy without smoothing
  (`<name>_nll`), its accuracy.
  """
  return {
    name: (sums.loss, weight),
    f'{name}_nll': (sums.nll, weight),
    f'{name}_accuracy': (sums.right, weight),
  }


def _padded(table_VD: jax.Array) -> tuple[jax.Array, int]:
  """The table with rows of zeros up to a multiple of `tensor`, and V."""
  layout = sharding.current()
  vocab = table_VD.shape[0]
  parts = 1 if layout is None else layout.mesh.shape['tensor']
  if vocab % parts:
    table_VD = jnp.pad(table_VD, ((0, -vocab % parts), (0, 0)))
  return table_VD, vocab


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 3))
def _lookup(
  layout: sharding.Layout | None,
  dtype: DTypeLike,
  table_VD: jax.Array,
  vocab: int,
  ids_BT: jax.Array,
) -> jax.Array:
  del vocab
  run = lambda axes: functools.partial(_gather, axes=axes, dtype=dtype)
  mapped = _on_mesh(layout, run, ids_BT.shape, table_VD.shape, ('table', 'ids'), ('vectors',))
  return mapped(table_VD, ids_BT)


def _lookup_forward(layout, dtype, table_VD, vocab, ids_BT):
  return _lookup(layout, dtype, table_VD, vocab, ids_BT), (ids_BT, jnp.zeros((0,), table_VD.dtype))


def _lookup_backward(layout, dtype, vocab, residuals, g_BTD):
  ids_BT, like = residuals
  parts = 1 if layout is None else layout.mesh.shape['tensor']
  shape = (vocab + -vocab % parts, g_BTD.shape[-1])
  run = lambda axes: functools.partial(
    _scatter, axes=axes, shape=shape, dtype=like.dtype, mesh=layout and layout.mesh
  )
  mapped = _on_mesh(layout, run, ids_BT.shape, shape, ('vectors', 'ids'), ('table',))
  return mapped(g_BTD, ids_BT), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _gather(table_VD: jax.Array, ids_BT: jax.Array, *, axes: _Axes, dtype: DTypeLike) -> jax.Array:
  """On each device: its columns of the vectors of all devices' tokens, sent to whose tokens they
  are.
  """
  if axes.embed:
    ids_BT = jax.lax.all_gather(ids_BT, axes.embed, axis=0, tiled=True)
  x_BTD = table_VD.astype(dtype)
  if axes.vocab:
    local_BT = ids_BT - jax.lax.axis_index(axes.vocab) * table_VD.shape[0]
    inside_BT = (local_BT >= 0) & (local_BT < table_VD.shape[0])
    x_BTD = x_BTD[jnp.where(inside_BT, local_BT, 0)]
    x_BTD = jax.lax.psum(jnp.where(inside_BT[..., None], x_BTD, 0), axes.vocab)
  else:
    x_BTD = x_BTD[ids_BT]
  if axes.embed:
    x_BTD = jax.lax.all_to_all(x_BTD, axes.embed, split_axis=0, concat_axis=2, tiled=True)
  return x_BTD


def _scatter(
  g_BTD: jax.Array,
  ids_BT: jax.Array,
  *,
  axes: _Axes,
  shape: tuple[int, int],
  dtype: DTypeLike,
  mesh: jax.sharding.Mesh,
) -> jax.Array:
  """The transpose of `_gather`, in the table's type."""
  size = lambda axis: mesh.shape[axis] if axis else 1
  if axes.embed:
    ids_BT = jax.lax.all_gather(ids_BT, axes.embed, axis=0, tiled=True)
    g_BTD = jax.lax.all_to_all(g_BTD, axes.embed, split_axis=2, concat_axis=0, tiled=True)
  rows = shape[0] // size(axes.vocab)
  if axes.vocab:
    ids_BT = ids_BT - jax.lax.axis_index(axes.vocab) * rows
    ids_BT = jnp.where(ids_BT < 0, rows, ids_BT)  # what lies outside is dropped
  grad_VD = jnp.zeros((rows, shape[1] // size(axes.embed)), dtype)
  grad_VD = grad_VD.at[ids_BT].add(g_BTD.astype(dtype), mode='drop')
  return _sum(grad_VD, [axis for axis in axes.tokens if axis != axes.embed])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(layout, loss, x_BTD, table_VD, bias_V, targets_BT, weights_BT) -> Sums:
  return Sums(*_losses(layout, loss, False, x_BTD, table_VD, bias_V, targets_BT, weights_BT))


def _cross_entropy_forward(layout, loss, *arrays):
  total, nll, right, *gradients = _losses(layout, loss, True, *arrays)
  return Sums(total, nll, right), tuple(gradients)


def _cross_entropy_backward(layout, loss, gradients, cotangents):
  return (
    *((cotangents.loss * gradient).astype(gradient.dtype) for gradient in gradients),
    None,
    None,
  )


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _losses(layout, loss, gradient, x_BTD, table_VD, *rest):
  run = lambda axes: functools.partial(_local_losses, axes=axes, loss=loss, gradient=gradient)
  out = ('scalar',) * 3 + (('vectors', 'table', 'bias') if gradient else ())
  arrays = ('vectors', 'table', 'bias', 'ids', 'ids')
  return _on_mesh(layout, run, x_BTD.shape[:2], table_VD.shape, arrays, out)(x_BTD, table_VD, *rest)


def _local_losses(
  x_BTD, table_VD, bias_V, targets_BT, weights_BT, *, axes: _Axes, loss: _Loss, gradient: bool
):
  """On each device: its tokens, its part of the vocabulary. With `gradient` also those by x, table
  and bias.
  """
  dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
  part = _vocabulary(table_VD, bias_V, axes, loss, x_BTD.dtype, dtype)
  tokens = x_BTD, targets_BT, weights_BT.astype(dtype)
  row_bytes = len(part.W_VD) * dtype.itemsize
  chunks = tuple(_chunked(x, x_BTD.shape[:2], row_bytes) for x in tokens)
  carry = (jnp.zeros((), dtype),) * 3
  if gradient:
    carry += jnp.zeros(part.W_VD.shape, dtype), jnp.zeros(part.bias_V.shape, dtype)
  run = functools.partial(_chunk, part, axes, loss, gradient)
  if len(chunks[0]) == 1:
    carry, dx_TD = run(carry, tuple(chunk[0] for chunk in chunks))
  else:
    carry, dx_TD = jax.lax.scan(run, carry, chunks)
  sums = tuple(_sum(x, axes.tokens) for x in carry[:3])
  if not gradient:
    return sums
  dx_BTD = dx_TD.reshape(-1, x_BTD.shape[-1])[: math.prod(x_BTD.shape[:2])].reshape(x_BTD.shape)
  dW_VD, others = carry[3], [axis for axis in axes.tokens if axis != axes.embed]
  if axes.embed:
    dW_VD = fsdp.scatter_sum(dW_VD.T, jax.lax.axis_size(axes.embed), axes.line).T
  return (
    *sums,
    _sum(dx_BTD, axes.vocab),
    _sum(dW_VD, others).astype(table_VD.dtype),
    _sum(carry[4], axes.tokens).astype(table_VD.dtype),
  )


class _Part(NamedTuple):
  """A device's part of the vocabulary, its vectors whole: the ids, what the logits of a chunk are
  made of, and how much of the smoothed target each id has.
  """

  ids_V: jax.Array
  W_VD: jax.Array
  bias_V: jax.Array
  spread_V: jax.Array


def _vocabulary(
  table_VD: jax.Array,
  bias_V: jax.Array,
  axes: _Axes,
  loss: _Loss,
  compute: DTypeLike,
  dtype: DTypeLike,
) -> _Part:
  W_VD = table_VD.astype(compute)
  if axes.embed:
    W_VD = jax.lax.all_gather(W_VD, axes.embed, axis=1, tiled=True)
  first = jax.lax.axis_index(axes.vocab) * len(W_VD) if axes.vocab else 0
  ids_V = first + jnp.arange(len(W_VD))
  real_V = ids_V < loss.vocab
  bias_V = jnp.where(real_V, bias_V.astype(dtype), jnp.finfo(dtype).min / 2)
  spread_V = jnp.where(real_V, loss.label_smoothing / loss.vocab, 0).astype(dtype)
  return _Part(ids_V, W_VD, bias_V, spread_V)


def _chunk(part: _Part, axes: _Axes, loss: _Loss, gradient: bool, carry, tokens):
  """The sums over one chunk of tokens added to `carry`, and with `gradient` the one by its x."""
  x_TD, targets_T, weights_T = tokens
  dtype = part.bias_V.dtype
  logits_TV = jnp.einsum('TD,VD->TV', x_TD, part.W_VD, preferred_element_type=dtype)
  logits_TV += part.bias_V[None]
  top_T = _max(jnp.max(logits_TV, axis=-1), axes.vocab)
  total_T = _sum(jnp.sum(jnp.exp(logits_TV - top_T[:, None]), axis=-1), axes.vocab)
  hit_TV = part.ids_V[None] == targets_T[:, None]
  target_T = _sum(jnp.sum(jnp.where(hit_TV, logits_TV, 0), axis=-1), axes.vocab)
  lse_T = top_T + jnp.log(total_T)
  loss_T = nll_T = lse_T - target_T
  d_TV = jnp.exp(logits_TV - lse_T[:, None]) - hit_TV
  if loss.label_smoothing:
    mean_T = _sum(jnp.sum(logits_TV * part.spread_V[None], axis=-1), axes.vocab)
    loss_T = (1 - loss.label_smoothing) * nll_T + loss.label_smoothing * lse_T - mean_T
    d_TV += loss.label_smoothing * hit_TV - part.spread_V[None]
  if loss.z_loss:
    loss_T += loss.z_loss * lse_T**2
    d_TV += 2 * loss.z_loss * lse_T[:, None] * jnp.exp(logits_TV - lse_T[:, None])
  sums = tuple(jnp.sum(x_T * weights_T) for x_T in (loss_T, nll_T, target_T == top_T))
  if not gradient:
    return jax.tree.map(jnp.add, carry, sums), ()
  d_TV *= weights_T[:, None]
  dbias_V = jnp.sum(d_TV, axis=0)
  d_TV = d_TV.astype(x_TD.dtype)
  dW_VD = jnp.einsum('TV,TD->VD', d_TV, x_TD, preferred_element_type=dtype)
  carry = jax.tree.map(jnp.add, carry, (*sums, dW_VD, dbias_V))
  return carry, jnp.einsum('TV,VD->TD', d_TV, part.W_VD)


def _chunked(x: jax.Array, shape_BT: tuple[int, int], row_bytes: int) -> jax.Array:
  """Tokens in equal chunks, [chunks, tokens of a chunk, ...], the last filled up by zeros.

  Args:
    x: [B, T, ...].
    shape_BT: B and T.
    row_bytes: of the logits of one token.
  """
  tokens = math.prod(shape_BT)
  count = max(1, math.ceil(tokens * row_bytes / CHUNK_BYTES))
  size = -(-tokens // count)
  if count > 1:
    size = -(-size // 128) * 128  # whole tiles of a matrix unit
  count = -(-tokens // size)
  x = x.reshape(tokens, *x.shape[2:])
  x = jnp.pad(x, ((0, count * size - tokens), *((0, 0),) * (x.ndim - 1)))
  return x.reshape(count, size, *x.shape[1:])


def _on_mesh(layout, run, tokens_shape, table_shape, arrays, out):
  """`run(axes)` in shard_map over the layout's mesh, or as it is where there is none."""
  if layout is None:
    return run(_Axes())
  tokens = layout.spec(('batch', 'length'), tokens_shape)
  table = layout.parameter_spec(('vocab', 'embed'), table_shape)
  specs = {
    'ids': tokens,
    'vectors': P(*tokens, None),
    'table': table,
    'bias': P(table[0]),
    'scalar': P(),
  }
  cut = tuple(
    axis for entry in tokens for axis in ((entry,) if isinstance(entry, str) else entry or ())
  )
  if table[1] is not None and table[1] not in cut:
    raise ValueError(
      f'{tokens_shape[0]} rows do not divide over the mesh {dict(layout.mesh.shape)}.'
    )
  axes = _Axes(cut, *table, fsdp.line(layout.mesh))
  return jax.shard_map(
    run(axes),
    mesh=layout.mesh,
    in_specs=tuple(specs[name] for name in arrays),
    out_specs=tuple(specs[name] for name in out) if len(out) > 1 else specs[out[0]],
    check_vma=False,
  )


def _sum(x, axes):
  return jax.lax.psum(x, axes) if axes else x


def _max(x, axes):
  return jax.lax.pmax(x, axes) if axes else x
