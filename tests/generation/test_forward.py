"""The form in which a decoder's parameters are run, and decoders from outside."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.core import params as params_lib
from llm_jax.generation.sampling import Sampling
from llm_jax.nn.options import Options
from llm_jax.parallel.cpu.products import Transposed


@pytest.mark.slow
def test_bfloat16_keeps_half_the_cache(tiny):
  model = tiny.LLAMA.clone(dtype='bfloat16')
  cache = model.empty_cache(2, 16)
  assert {x.dtype for x in jax.tree.leaves(cache.layers)} == {jnp.dtype('bfloat16')}
  made, params = tiny.generator(model), tiny.random_params(model)
  weights = made.weights(params)
  block = weights.params['stack']['group_0']['block']
  assert block['mlp']['up']['kernel'].weight_OI.dtype == jnp.bfloat16
  assert block['mlp_norm']['scale'].dtype == jnp.float32
  first = next(made.tokens(weights, tiny.PROMPTS, tiny.GREEDY))
  batch = {'tokens': np.array([tiny.PROMPTS[2]])}
  logits = model.apply({'params': params}, batch, method=tiny.logits)
  assert first[2] == np.argmax(logits[0, -1])


def test_only_what_multiplies_is_cast(tiny):
  model = tiny.GPT.clone(dtype='bfloat16', tied=False)
  params = tiny.generator(model).weights(tiny.random_params(model)).params
  embedder = params['embedder']
  assert embedder['token']['embedding'].dtype == params['output']['kernel'].dtype == jnp.bfloat16
  assert embedder['position']['embedding'].dtype == jnp.float32
  assert params['stack']['group_1']['block']['mlp']['up']['bias'].dtype == jnp.float32


def test_a_table_that_is_a_parameter_is_kept_once(tiny):
  for model in (tiny.GPT, tiny.LLAMA):
    weights = tiny.ready(model)[1]
    kept = sum(x.nbytes for x in jax.tree.leaves(weights.params))
    assert kept == sum(x.nbytes for x in jax.tree.leaves(tiny.random_params(model)))
    assert (weights.table_VD is None) == model.tied
  np.testing.assert_array_equal(weights.table_VD, weights.params['output']['kernel'].T)


class Running(nn.Module):
  """One layer: adds a map of the mean of all states so far. Multiplies in its own way."""

  dim: int

  @nn.compact
  def __call__(self, x_BTD, sums_BD, counts_B):
    kernel = params_lib.boxed(nn.initializers.normal(0.4), (None, None), inputs=(0,), decayed=True)
    with params_lib.in_layer(0):
      kernel_DD = self.param('kernel', kernel, (self.dim, self.dim), jnp.float32)
    sums_BTD = jnp.cumsum(x_BTD, axis=1) + sums_BD[:, None]
    counts_BT = jnp.arange(1, x_BTD.shape[1] + 1)[None] + counts_B[:, None]
    x_BTD = x_BTD + jnp.tanh(sums_BTD / counts_BT[..., None]) @ kernel_DD.astype(x_BTD.dtype)
    return x_BTD, sums_BTD


class Outside(contracts.Model, nn.Module):
  """A decoder that has no stack of ours, but a loop over `layers`, and another cache."""

  causal = True
  vocab_size: int = 40
  max_len: int = 64
  dim: int = 12

  @property
  def options(self):
    return Options(dim=self.dim)

  def setup(self):
    self.embedding = self.param('embedding', nn.initializers.normal(0.4), (40, self.dim))
    scanned = nn.scan(
      Running,
      length=2,
      in_axes=(0, nn.broadcast),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      metadata_params={nn.PARTITION_NAME: params_lib.LAYERS},
    )
    self.layers = scanned(self.dim)

  def __call__(self, batch, positions=None, *, train=False, cache=None):
    tokens_BT = batch['tokens']
    B, T = tokens_BT.shape
    past = cache if cache is not None and T == 1 else self.empty_cache(B, 0)
    sums_LBD = jnp.stack([past['layer_0'], past['layer_1']])
    x_BTD, sums_LBTD = self.layers(self.embedding[tokens_BT], sums_LBD, past['counts'])
    real_BT = batch['segments'] > 0 if 'segments' in batch else jnp.ones((B, T), bool)
    lengths_B = jnp.sum(real_BT, axis=1)
    last_LBD = sums_LBTD[:, jnp.arange(B), lengths_B - 1]
    new = dict(counts=past['counts'] + lengths_B, layer_0=last_LBD[0], layer_1=last_LBD[1])
    return contracts.Outputs(x_BTD, cache=None if cache is None else new)

  def table(self):
    return self.embedding

  def empty_cache(self, rows, slots):
    zeros = jnp.zeros((rows, self.dim))
    return dict(counts=jnp.zeros(rows, jnp.int32), layer_0=zeros, layer_1=zeros)


def predict(model, batch):
  return model(batch).hidden @ model.table().T


@pytest.mark.slow
def test_a_model_from_outside(tiny):
  model = Outside()
  made, params = tiny.generator(model, method=predict), tiny.random_params(model, predict)
  weights = made.weights(params)
  assert jax.tree.structure(weights.params) == jax.tree.structure(params)
  assert not isinstance(weights.params['layers']['kernel'], Transposed)
  found = np.stack(list(made.tokens(weights, tiny.PROMPTS, tiny.GREEDY)), axis=1)
  rows = np.zeros((4, 24), int)
  for row, (prompt, new) in enumerate(zip(tiny.PROMPTS, found, strict=True)):
    rows[row, : len(prompt) + 12] = [*prompt, *new]
  logits = model.apply({'params': params}, {'tokens': rows}, method=predict)
  for row, prompt in enumerate(tiny.PROMPTS):
    after = np.argmax(logits[row, len(prompt) - 1 :], axis=-1)
    np.testing.assert_array_equal(found[row], after[:12])
  beams = Sampling(max_new_tokens=6, temperature=0.0, beams=3)
  together = np.stack(list(made.tokens(weights, tiny.PROMPTS, beams)), axis=1)
  alone = [np.stack(list(made.tokens(weights, [p], beams)), axis=1)[0] for p in tiny.PROMPTS]
  np.testing.assert_array_equal(together, alone)


@pytest.mark.slow
def test_rows_join_a_batch_of_a_model_from_outside(tiny):
  model = Outside()
  made = tiny.generator(model, method=predict)
  weights = made.weights(tiny.random_params(model, predict))
  drawn = Sampling(max_new_tokens=8, seed=1)
  plan = [(0, 1, tiny.PROMPTS[0], tiny.GREEDY, 0), (3, 0, tiny.PROMPTS[2], drawn, 1)]
  _, found = tiny.join(made, weights, made.empty(rows=2, slots=24), plan)
  for tokens, (_, _, prompt, sampling, number) in zip(found, plan, strict=True):
    alone = made.tokens(weights, [prompt], sampling, rows=[number])
    assert tokens == [int(ids[0]) for ids in alone]
