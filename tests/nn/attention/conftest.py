"""Attention by brute force in float64: what every implementation must equal."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

B, T, N, H = 2, 7, 4, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3]], np.int32)


def inputs(kv_heads: int = N, seed: int = 0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(B, T, heads, H)).astype(dtype) for heads in (N, kv_heads, kv_heads)]


def brute_force(q, k, v, segments, causal, window):
  """One query at a time, in float64; a list of visible positions stands for the mask."""
  out = np.zeros(q.shape)
  for b, i, n in np.ndindex(B, T, N):
    seen = [
      j
      for j in range(T)
      if (segments is None or segments[b, i] == segments[b, j])
      and (not causal or j <= i)
      and (window is None or (i - j < window if causal else 2 * abs(i - j) <= window))
    ]
    group = n // (N // k.shape[2])
    scores = np.array([q[b, i, n].astype(np.float64) @ k[b, j, group] for j in seen]) / np.sqrt(H)
    weights = np.exp(scores - scores.max())
    out[b, i, n] = (weights / weights.sum()) @ v[b, seen, group]
  return out


def exact(q, k, v, g, segments, causal, window, bias=None, key_segments=None):
  """The output in float64, and the gradients of its sum weighted by `g`, as the equation and the
  chain rule say; that of the bias last, if there is one.
  """
  q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
  groups, (T, S) = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
  distance = np.arange(T)[:, None] - np.arange(S)
  of_keys = segments if key_segments is None else key_segments
  seen = (
    np.ones((len(q), *distance.shape), bool)
    if segments is None
    else segments[:, :, None] == of_keys[:, None]
  )
  if causal:
    seen &= distance >= 0
  if window is not None:
    seen &= distance < window if causal else 2 * abs(distance) <= window
  k_, v_ = (np.repeat(x, groups, axis=2) for x in (k, v))
  scores = np.einsum('btnh,bsnh->bnts', q, k_) / np.sqrt(q.shape[-1])
  if bias is not None:
    scores += np.asarray(bias, np.float64)[:, distance + T - 1]
  scores = np.where(seen[:, None], scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dp = np.einsum('btnh,bsnh->bnts', g, v_)
  of_bias = ds = p * (dp - (p * dp).sum(-1, keepdims=True))
  ds = ds / np.sqrt(q.shape[-1])
  dk, dv = np.einsum('bnts,btnh->bsnh', ds, q), np.einsum('bnts,btnh->bsnh', p, g)
  per_key = lambda x: x.reshape(*k.shape[:3], groups, -1).sum(3)
  return np.einsum('bnts,bsnh->btnh', p, v_), (
    np.einsum('bnts,bsnh->btnh', ds, k_),
    per_key(dk),
    per_key(dv),
    *[
      np.stack([of_bias[:, :, distance == d].sum((0, 2)) for d in range(1 - T, T)], axis=1)
      for _ in (bias,)
      if bias is not None
    ],
  )


def check(
  run, arrays, segments=None, causal=False, window=None, atol=5e-6, bias=None, key_segments=None
):
  """Compares `run(q, k, v)`, or `run(q, k, v, bias)`, and its gradients with `exact`."""
  g = np.random.default_rng(9).normal(size=arrays[0].shape).astype(np.float32)
  out, gradients = exact(*arrays, g, segments, causal, window, bias, key_segments)
  given = arrays if bias is None else [*arrays, bias]
  found, back = jax.vjp(run, *map(jnp.asarray, given))
  np.testing.assert_allclose(found, out, atol=atol)
  for ours, theirs in zip(back(jnp.asarray(g)), gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=4 * atol)


@pytest.fixture(scope='session')
def reference():
  return types.SimpleNamespace(
    B=B, T=T, N=N, H=H, segments=SEGMENTS, inputs=inputs, brute_force=brute_force, check=check
  )
