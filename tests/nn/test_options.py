"""Options: what is wrong is refused, and what is left out is filled in."""

import dataclasses

import jax.numpy as jnp
import pytest

from llm_jax.nn.options import Options

BASE = Options(dim=12, layers=2, heads=2, mlp_dim=8)


def options(**changes):
  return dataclasses.replace(BASE, **{'head_dim': None} | changes)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(heads=5), 'heads=5 must divide dim=12; try heads=4, or give head_dim'),
    (dict(kv_heads=3), 'kv_heads=3 must divide heads=2; try kv_heads=2'),
    (dict(dim=0), 'dim=0 must be at least 1'),
    (dict(mlp_dim=0), 'mlp_dim=0 must be at least 1'),
    (dict(norm='layer_norm'), "norm='layer_norm' is not known .did you mean 'layernorm'"),
    (dict(norm='rmsnorm'), "norm_bias=True needs norm='layernorm'"),
    (dict(activation='gelu_new'), "activation='gelu_new' is not known"),
    (dict(dropout=1.0), 'dropout=1.0 must be at least 0 and below 1'),
    (dict(dtype='bf16'), "dtype='bf16' is not known .did you mean 'bfloat16'"),
    (dict(dtype='float64'), "dtype='float64' needs"),
    (dict(init_distribution='uniform'), "init_distribution='uniform' is not known"),
    (dict(attention='flash'), "attention='flash' is not known"),
  ],
)
def test_wrong_options(changes, message):
  with pytest.raises(ValueError, match=message):
    options(**changes)


def test_a_model_from_outside_gives_its_width_alone():
  plain = Options(dim=64)
  assert plain.heads * plain.head_dim == 64 and plain.mlp_dim == 256
  assert hash(plain) == hash(Options(dim=64)) and plain != Options(dim=32)
  half = Options(dim=64, dtype='bfloat16')
  assert half.compute_dtype == jnp.bfloat16 and half.accumulation_dtype == jnp.float32
