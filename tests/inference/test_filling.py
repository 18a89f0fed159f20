"""Masks filled in, held against the probabilities of one plain pass."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bert_tiny, gpt_tiny
from llm_jax.core import config
from llm_jax.data.tokenizers import byte
from llm_jax.inference.filling import Filler
from llm_jax.training import program as programs

SHAPE = dict(dim=16, layers=2, heads=2, mlp_dim=24, max_len=64, dropout=0.0, attention_dropout=0.0)
TOKENIZER = byte.create()


def program(module, **changes):
  """A program and parameters away from zero."""
  tree = module.get_config().to_dict()
  tree |= dict(seq_len=32, batch_size=2, tokenizer=dict(name='byte'), model=tree['model'] | SHAPE)
  made = programs.outline(config.parse(tree | changes), jax.devices()[:1])
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype)
  return made, jax.tree.map(draw, made.params)


@pytest.mark.slow
def test_masks_are_filled_in():
  made, params = program(bert_tiny, objective=dict(name='mlm'))
  texts = ['a [MASK] c[MASK]', 'xyz [MASK]', '[MASK]']
  found = Filler(made, TOKENIZER)(params, texts, 2, top=3)
  assert [len(f.masks) for f in found] == [2, 1, 1]
  ids = np.array(
    [
      TOKENIZER.cls_id,
      *TOKENIZER.encode('a '),
      TOKENIZER.mask_id,
      *TOKENIZER.encode(' c'),
      TOKENIZER.mask_id,
      TOKENIZER.sep_id,
    ]
  )

  def logits(network, tokens):
    x, bias = network.heads['mlm'](network.model({'tokens': tokens}).hidden)
    return jnp.einsum('btd,vd->btv', x, network.model.table()) + bias[None, None]

  p = np.asarray(
    jax.nn.softmax(made.network.apply({'params': params}, jnp.array([ids]), method=logits))
  )[0]
  indices = np.flatnonzero(ids == TOKENIZER.mask_id)
  for index, candidates in zip(indices, found[0].masks, strict=True):
    best = np.argsort(p[index])[::-1][:3]
    assert [token for token, _ in candidates] == [TOKENIZER.decode([i]).strip() for i in best]
    np.testing.assert_allclose([q for _, q in candidates], p[index][best], rtol=1e-4)
  filled = ids.copy()
  filled[indices] = p[indices].argmax(-1)
  assert found[0].text == TOKENIZER.decode(filled)
  everything = Filler(made, TOKENIZER)(params, texts[1:2], 2, top=10**6)[0].masks[0]
  assert len(everything) == TOKENIZER.vocab_size and math.isclose(
    sum(q for _, q in everything), 1, abs_tol=1e-4
  )


@pytest.mark.slow
def test_in_few_sizes_an_answer_is_the_same_in_any_company_and_nothing_is_compiled():
  made, params = program(bert_tiny, objective=dict(name='mlm'))
  few, usual = Filler(made, TOKENIZER, few=True), Filler(made, TOKENIZER)
  few.warm(params, 3)
  texts = ['a [MASK] c[MASK]', 'xyz [MASK]', '[MASK]' * 20, 'b' * 50 + '[MASK]']
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
  try:
    together = few(params, texts, 2, top=3)
    alone = [few(params, [text], 2, top=3)[0] for text in texts]
  finally:
    jax.monitoring.clear_event_listeners()
  assert together == alone  # to the bit
  assert not [name for name in compiled if 'backend_compile' in name]
  for one, other in zip(together, usual(params, texts, 4, top=3), strict=True):
    assert len(one.masks) == len(other.masks)
    for mine, its in zip(one.masks, other.masks, strict=True):
      np.testing.assert_allclose([p for _, p in mine], [p for _, p in its], rtol=1e-5)
  assert usual(params, [], 2) == few(params, [], 2) == []


def test_masks_that_cannot_be_filled_in():
  made, params = program(bert_tiny, objective=dict(name='mlm'))
  with pytest.raises(ValueError, match=r"'no mask' has no \[MASK\]"):
    Filler(made, TOKENIZER)(params, ['no mask'], 2)
  with pytest.raises(ValueError, match=r'has 72 tokens, and the model takes max_len=64'):
    Filler(made, TOKENIZER)(params, ['a' * 69 + '[MASK]'], 2)
  made, params = program(gpt_tiny)
  with pytest.raises(ValueError, match='no masked-LM head'):
    Filler(made, TOKENIZER)(params, ['[MASK]'], 2)
  made, params = program(bert_tiny, objective=dict(name='mlm'))
  without = types.SimpleNamespace(mask_id=None)
  with pytest.raises(ValueError, match='no mask token'):
    Filler(made, without)(params, ['[MASK]'], 2)
