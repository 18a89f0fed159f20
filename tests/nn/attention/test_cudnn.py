"""cuDNN's kernel: what it is asked for, and that programs for GPUs hold it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn.attention import cudnn, dispatch
from llm_jax.nn.attention.dispatch import attention


@pytest.mark.parametrize(
  ('causal', 'window', 'segmented'), [(True, None, True), (False, 4, True), (True, 3, False)]
)
def test_cudnn_matches_the_chain_rule(reference, causal, window, segmented):
  # What the kernel is asked for, by XLA in its place: there is no GPU here.
  segments = (
    np.sort(np.random.default_rng(0).integers(1, 4, (reference.B, reference.T)), axis=1).astype(
      np.int32
    )
    if segmented
    else None
  )
  run = functools.partial(
    cudnn.attention,
    segments_BT=segments,
    causal=causal,
    window=window,
    implementation='xla',
  )
  reference.check(run, reference.inputs(2), segments, causal, window)
  with pytest.raises(AssertionError):
    reference.check(run, reference.inputs(2), segments, not causal, window)


def test_a_program_for_gpus_holds_the_kernel(reference, monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as cudnn  # it asks the GPU that is not here

  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91200)
  monkeypatch.setattr(cudnn, 'check_compute_capability', lambda version: True)
  monkeypatch.setattr(cudnn, 'is_cuda_compute_capability_equal', lambda version: False)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(dispatch.sharding, 'platform', lambda: 'gpu')
  shape = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
  segments = np.ones((2, 128), np.int32)

  def text(**options):
    run = lambda *arrays: attention(*arrays, segments_BT=segments, **options).sum()
    traced = jax.jit(jax.grad(run, (0, 1, 2))).trace(shape, shape, shape)
    return traced.lower(lowering_platforms=('cuda',)).as_text()

  assert (
    text().count('__cudnn$fmha')
    == text(implementation='cudnn', causal=True).count('__cudnn$fmha')
    == 2
  )  # and back
  assert '__cudnn' not in text(
    dropout_rate=0.1, dropout_rng=jax.random.key(0)
  )  # what it cannot do is done without it
  with pytest.raises(
    ValueError, match=r"'cudnn' cannot do this: it drops no .* What can: 'ring', 'blockwise', 'xla'"
  ):
    text(implementation='cudnn', dropout_rate=0.1, dropout_rng=jax.random.key(0))
