"""Ring attention (arXiv:2310.01889): rows are cut over the mesh axis `sequence`; queries stay, keys
and values travel around.

Each device sees one block of keys and values at a time, and sums up as FlashAttention does
(arXiv:2205.14135): running maximum, sum, and mixed values, in float32. The backward pass computes
the probabilities of each block again from the log of the sums, and the gradients of keys and values
travel along with them. A device never holds more scores than those of a tile of its queries with
one block of keys. A window makes the ring shorter: only blocks within it are sent. In causal rows
blocks that are masked wholly are computed all the same: the device of the last positions needs all
blocks, and the others would only wait for it.

Letters are those of `llm_jax.nn.options`; here T and S are the positions on one device, I is the
number of tiles that the queries are dealt with in, and t the positions of one.

On one device the ring is of one, and this is blockwise attention for any device.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llm_jax.nn.attention.masks import RESIDUALS, by_distance, visible
from llm_jax.nn.dropout import dropout
from llm_jax.parallel import sharding

AXIS = 'sequence'
TILE = 1024  # queries at a time; fewer have too little to do while keys are sent
BLOCK = 128  # the same where nothing is sent


@dataclasses.dataclass(frozen=True)
class _Ring:
  """What is static.

  Attributes:
    layout: in force; None for one device.
    size: devices around.
    rows, heads: the mesh axes that cut these, as PartitionSpec writes it.
    causal, window, dropout_rate: as in `attention`.
    tile: the most queries at a time.
  """

  layout: sharding.Layout | None
  size: int
  rows: sharding.Axes
  heads: sharding.Axes
  causal: bool
  window: int | None
  dropout_rate: float
  tile: int


def refusal(q_BTNH: jax.Array, k_BSKH: jax.Array) -> str | None:
  """Why these queries and keys cannot be cut over the ring; None where they can. Without a layout
  the ring is of one device.
  """
  layout = sharding.current()
  size = 1 if layout is None else layout.mesh.shape[AXIS]
  for length in (q_BTNH.shape[1], k_BSKH.shape[1]):
    if length % size:
      return f'rows of {length} tokens do not divide by mesh.{AXIS}={size}'
  return None


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  bias_ND: jax.Array | None = None,
  segments_BT: jax.Array | None = None,
  key_segments_BS: jax.Array | None = None,
  open_BS: jax.Array | None = None,
  causal: bool = False,
  window: int | None = None,
  dropout_rate: float = 0.0,
  dropout_rng: jax.Array | None = None,
  tile: int = TILE,
) -> jax.Array:
  """As `llm_jax.nn.attention.dispatch.attention`, for what `refusal` has nothing against; T and S
  are the positions of whole rows here.

  Rows and heads are cut as the layout in force says. Which probabilities are dropped depends on how
  they are cut. `tile`: the most queries of a device at a time.
  """
  layout, rate = sharding.current(), 0.0 if dropout_rng is None else dropout_rate
  given = _Given(segments_BT, key_segments_BS, open_BS, dropout_rng)
  if layout is None:
    ring = _Ring(None, 1, None, None, causal, window, rate, tile)
    return _attend(ring, q_BTNH, k_BSKH, v_BSKH, bias_ND, given)
  k_BSKH, v_BSKH = (sharding.divisible_heads(x, q_BTNH.shape[2]) for x in (k_BSKH, v_BSKH))
  rows, _, heads, _ = layout.spec(('batch', 'length', 'heads', None), q_BTNH.shape)
  ring = _Ring(layout, layout.mesh.shape[AXIS], rows, heads, causal, window, rate, tile)
  return _attend(ring, q_BTNH, k_BSKH, v_BSKH, bias_ND, given)


class _Given(NamedTuple):
  """What has no gradient: segments of queries and of keys that are of another row, which keys are
  seen from before them, and the key of the dropout."""

  segments_BT: jax.Array | None
  key_segments_BS: jax.Array | None
  open_BS: jax.Array | None
  key: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, q_BTNH, k_BSKH, v_BSKH, bias_ND, given) -> jax.Array:
  return _attend_forward(ring, q_BTNH, k_BSKH, v_BSKH, bias_ND, given)[0]


def _attend_forward(ring, *arrays):
  out_BTNH, lse_BTN = _on_mesh(ring, _forward, 'xxxbg', 'xl')(*arrays)
  out_BTNH, lse_BTN = (checkpoint_name(x, RESIDUALS) for x in (out_BTNH, lse_BTN))
  return out_BTNH, (*arrays, out_BTNH, lse_BTN)


def _attend_backward(ring, residuals, dout_BTNH):
  return *_on_mesh(ring, _backward, 'xxxbgxlx', 'xxxb')(*residuals, dout_BTNH), None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_mesh(ring, function, arrays, out):
  """`function` in shard_map; a letter for each argument: x [B, T, N, H], l [B, T, N], b [N, D], g
  what is `_Given`.
  """
  run = functools.partial(function, ring=ring)
  if ring.layout is None:
    return run
  specs = {
    'x': P(ring.rows, AXIS, ring.heads, None),
    'l': P(ring.rows, AXIS, ring.heads),
    'b': P(ring.heads, None),
    'g': _Given(*[P(ring.rows, AXIS)] * 3, P()),
  }
  return jax.shard_map(
    run,
    mesh=ring.layout.mesh,
    in_specs=tuple(specs[a] for a in arrays),
    out_specs=tuple(specs[a] for a in out),
    check_vma=False,
  )


def _forward(q_BTNH, k_BSKH, v_BSKH, bias_ND, given, *, ring):
  """On each device: its output, and the log of the sums of exponentials of its scores."""
  dtype, K = jnp.promote_types(q_BTNH.dtype, jnp.float32), k_BSKH.shape[2]
  queries = _tiles(ring.tile, q_BTNH, K), _tiles(ring.tile, given.segments_BT)
  mixed_IBKGtH = jnp.zeros(queries[0].shape, dtype)
  total_IBKGt = jnp.zeros(mixed_IBKGtH.shape[:-1], dtype)
  # Finite: a block may be masked wholly.
  top_IBKGt = jnp.full_like(total_IBKGt, jnp.finfo(dtype).min / 2)

  def see(sums, keys, block):

    def tile(part):
      number, (q_BKGtH, segments_Bt), (mixed_BKGtH, total_BKGt, top_BKGt) = part
      s_BKGtS, _ = _scores(ring, q_BKGtH, segments_Bt, keys, bias_ND, number, block)
      new_BKGt = jnp.maximum(top_BKGt, jnp.max(s_BKGtS, axis=-1))
      p_BKGtS = jnp.exp(s_BKGtS - new_BKGt[..., None])
      shrink_BKGt = jnp.exp(top_BKGt - new_BKGt)
      total_BKGt = shrink_BKGt * total_BKGt + jnp.sum(p_BKGtS, axis=-1)
      p_BKGtS = _dropped(ring, given.key, p_BKGtS, number, block).astype(v_BSKH.dtype)
      new_BKGtH = jnp.einsum(
        'BKGTS,BSKH->BKGTH', p_BKGtS, keys.v_BSKH, preferred_element_type=dtype
      )
      return shrink_BKGt[..., None] * mixed_BKGtH + new_BKGtH, total_BKGt, new_BKGt

    return jax.lax.map(tile, (jnp.arange(len(mixed_IBKGtH)), queries, sums))

  sums, keys = (mixed_IBKGtH, total_IBKGt, top_IBKGt), _keys(k_BSKH, v_BSKH, given)
  mixed_IBKGtH, total_IBKGt, top_IBKGt = _around(ring, see, sums, keys)
  out_IBKGtH = (mixed_IBKGtH / total_IBKGt[..., None]).astype(q_BTNH.dtype)
  return _rows(out_IBKGtH), _rows(top_IBKGt + jnp.log(total_IBKGt))


def _backward(q_BTNH, k_BSKH, v_BSKH, bias_ND, given, out_BTNH, lse_BTN, dout_BTNH, *, ring):
  """On each device: the gradients of its queries, keys and values, and of the bias of its heads."""
  dtype, K = lse_BTN.dtype, k_BSKH.shape[2]
  # Of the gradients of the probabilities.
  mean_BTN = jnp.sum(out_BTNH.astype(dtype) * dout_BTNH, axis=-1)
  queries = [_tiles(ring.tile, x, K) for x in (q_BTNH, dout_BTNH, lse_BTN, mean_BTN)]
  queries = *queries, _tiles(ring.tile, given.segments_BT)
  product = functools.partial(jnp.einsum, preferred_element_type=dtype)

  def see(gradients, keys, block):
    dq_IBKGtH, dbias_ND, dkeys = gradients

    def tile(sums, part):
      dbias_ND, dkeys = sums
      number, (q_BKGtH, do_BKGtH, lse_BKGt, mean_BKGt, segments_Bt), dq_BKGtH = part
      s_BKGtS, of_bias = _scores(ring, q_BKGtH, segments_Bt, keys, bias_ND, number, block)
      p_BKGtS = jnp.exp(s_BKGtS - lse_BKGt[..., None])
      dropped_BKGtS = _dropped(ring, given.key, p_BKGtS, number, block).astype(do_BKGtH.dtype)
      dp_BKGtS = product('BKGTH,BSKH->BKGTS', do_BKGtH, keys.v_BSKH)
      dp_BKGtS = _dropped(ring, given.key, dp_BKGtS, number, block)
      ds_BKGtS = p_BKGtS * (dp_BKGtS - mean_BKGt[..., None])
      if bias_ND is not None:
        dbias_ND += of_bias(ds_BKGtS)
      ds_BKGtS = (ds_BKGtS * q_BTNH.shape[-1] ** -0.5).astype(q_BKGtH.dtype)
      dk_BSKH = dkeys[0] + product('BKGTS,BKGTH->BSKH', ds_BKGtS, q_BKGtH)
      dv_BSKH = dkeys[1] + product('BKGTS,BKGTH->BSKH', dropped_BKGtS, do_BKGtH)
      dq_BKGtH += product('BKGTS,BSKH->BKGTH', ds_BKGtS, keys.k_BSKH)
      return (dbias_ND, (dk_BSKH, dv_BSKH)), dq_BKGtH

    tiles = jnp.arange(len(dq_IBKGtH)), queries, dq_IBKGtH
    (dbias_ND, dkeys), dq_IBKGtH = jax.lax.scan(tile, (dbias_ND, dkeys), tiles)
    return dq_IBKGtH, dbias_ND, _sent(ring, dkeys, 1)

  dkeys = jnp.zeros(k_BSKH.shape, dtype), jnp.zeros(v_BSKH.shape, dtype)
  dbias_ND = None if bias_ND is None else jnp.zeros(bias_ND.shape, dtype)
  zeros = jnp.zeros(queries[0].shape, dtype), dbias_ND, dkeys
  dq_IBKGtH, dbias_ND, dkeys = _around(ring, see, zeros, _keys(k_BSKH, v_BSKH, given))
  first, count = _blocks(ring, k_BSKH.shape[1])
  dk_BSKH, dv_BSKH = _sent(ring, dkeys, -first - count)  # home
  return (
    _rows(dq_IBKGtH).astype(q_BTNH.dtype),
    dk_BSKH.astype(k_BSKH.dtype),
    dv_BSKH.astype(v_BSKH.dtype),
    None if bias_ND is None else _summed(ring, dbias_ND).astype(bias_ND.dtype),
  )


class _Keys(NamedTuple):
  """What travels."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array
  segments_BS: jax.Array | None
  open_BS: jax.Array | None


def _keys(k_BSKH, v_BSKH, given: _Given) -> _Keys:
  own = given.key_segments_BS is not None
  segments_BS = given.key_segments_BS if own else given.segments_BT
  return _Keys(k_BSKH, v_BSKH, segments_BS, given.open_BS)


def _around(ring, see, state, keys):
  """The state after `state = see(state, keys, number of their block)` for each block; the next is
  sent while one is seen.
  """
  first, count = _blocks(ring, keys.k_BSKH.shape[1])
  number = lambda distance: (_index(AXIS if ring.size > 1 else None) - distance) % ring.size

  def step(carry, distance):
    state, keys = carry
    coming = _sent(ring, keys, 1)
    return (see(state, keys, number(distance)), coming), None

  carry = state, _sent(ring, keys, first)
  if count > 1:
    carry, _ = jax.lax.scan(step, carry, first + jnp.arange(count - 1))
  return see(*carry, number(first + count - 1))


def _blocks(ring, length: int) -> tuple[int, int]:
  """Which blocks are seen: how far before the device's own the first is (negative: after it), and
  how many, each one earlier.
  """
  if ring.window is None:
    return 0, ring.size
  reach = -(-(ring.window - 1 if ring.causal else ring.window // 2) // length)
  first, count = (0, reach + 1) if ring.causal else (-reach, 2 * reach + 1)
  return (first, count) if count < ring.size else (0, ring.size)


def _sent(ring, tree, by: int):
  """All that is in `tree`, sent `by` devices on."""
  if by % ring.size == 0:
    return tree
  return jax.lax.ppermute(tree, AXIS, [(i, (i + by) % ring.size) for i in range(ring.size)])


def _summed(ring, x):
  """The sum over all devices that have rows, or positions, of their own."""
  rows = (ring.rows,) if isinstance(ring.rows, str) else ring.rows or ()
  return x if ring.layout is None else jax.lax.psum(x, (*rows, AXIS))


def _scores(ring, q_BKGtH, segments_Bt, keys, bias_ND, number, block):
  """Scaled and masked scores of one tile of queries with one block of keys, at least float32; and
  the function from their gradient to that of the bias, None where there is none.

  Where keys are of another row, the indices of both decide nothing.
  """
  dtype = jnp.promote_types(q_BKGtH.dtype, jnp.float32)
  (_, K, G, t, H), S = q_BKGtH.shape, keys.k_BSKH.shape[1]
  s_BKGtS = jnp.einsum('BKGTH,BSKH->BKGTS', q_BKGtH, keys.k_BSKH, preferred_element_type=dtype)
  s_BKGtS = s_BKGtS * H**-0.5
  first = _index(AXIS if ring.size > 1 else None) * S + number * t
  segments = None if segments_Bt is None else (segments_Bt, keys.segments_BS)
  indices_t, indices_S = first + jnp.arange(t), block * S + jnp.arange(S)
  of_bias = None
  if bias_ND is not None:
    added = functools.partial(by_distance, indices_T=indices_t, indices_S=indices_S)
    bias_1NtS, back = jax.vjp(added, bias_ND.astype(dtype))
    s_BKGtS += bias_1NtS.reshape(1, K, G, t, S)
    of_bias = lambda ds_BKGtS: back(jnp.sum(ds_BKGtS, axis=0).reshape(1, K * G, t, S))[0]
  mask = visible(indices_t, indices_S, segments, ring.causal, ring.window, keys.open_BS)
  if mask is not None:
    s_BKGtS = jnp.where(mask, s_BKGtS, jnp.finfo(dtype).min / 2)
  return s_BKGtS, of_bias


def _dropped(ring, key, x_BKGtS, number, block):
  """Zero where the dropout is, the rest larger; the same ones for the same tile and block."""
  if not ring.dropout_rate:
    return x_BKGtS
  device = ring.rows, ring.heads, AXIS if ring.size > 1 else None
  for index in (*map(_index, device), number, block):
    key = jax.random.fold_in(key, index)
  return dropout(x_BKGtS, ring.dropout_rate, key)


def _index(axes) -> jax.Array | int:
  return 0 if axes is None else jax.lax.axis_index(axes)


def _tiles(most: int, x, kv_heads: int | None = None):
  """[B, T] as [I, B, t], or, with `kv_heads`, [B, T, N, ...] as [I, B, K, G, t, ...]; t the longest
  divisor of T up to `most`.
  """
  if x is None:
    return None
  B, T = x.shape[:2]
  t = next(size for size in range(min(T, most), 0, -1) if T % size == 0)
  heads = () if kv_heads is None else (kv_heads, x.shape[2] // kv_heads)
  x = jnp.moveaxis(x.reshape(B, T // t, t, *heads, *x.shape[3:]), 1, 0)
  return jnp.moveaxis(x, 2, 4) if heads else x


def _rows(x):
  """[I, B, K, G, t, ...] as [B, T, N, ...]."""
  tiles, B, K, G, t = x.shape[:5]
  return jnp.moveaxis(x, (0, 4), (1, 2)).reshape(B, tiles * t, K * G, *x.shape[5:])
