"""Attention maps: those of transformers, in the order of the layers, however the layers run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from configs import bert_tiny, gpt_tiny
from llm_jax.core import config
from llm_jax.data.tokenizers import byte
from llm_jax.inference.attention_maps import AttentionMaps
from llm_jax.nn.attention import xla
from llm_jax.programs import inference as programs

SHAPE = dict(dim=16, layers=4, heads=4, mlp_dim=24, max_len=64)
TOKENIZER = byte.create()


def maps(module, text, **model):
  tree = module.get_config().to_dict()
  tree |= dict(seq_len=32, batch_size=2, tokenizer=dict(name='byte'))
  tree['model'] |= SHAPE | model
  made = programs.outline(config.parse(tree), TOKENIZER, jax.devices()[:1])
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype)
  return AttentionMaps(made, TOKENIZER)(jax.tree.map(draw, made.params), text)


def test_layers_come_in_their_order_with_or_without_a_loop():
  """Every second layer sees only its neighbours."""
  windows = dict(window=2, global_every=2)
  tokens, looped_LNTT = maps(bert_tiny, 'abcdef', **windows)
  _, one_by_one_LNTT = maps(bert_tiny, 'abcdef', unroll=0, **windows)
  assert tokens == ['[CLS]', *'abcdef', '[SEP]'] and looped_LNTT.shape == (4, 4, 8, 8)
  np.testing.assert_allclose(one_by_one_LNTT, looped_LNTT, atol=1e-6)
  np.testing.assert_allclose(looped_LNTT.sum(-1), 1, rtol=1e-5)
  far_TT = np.abs(np.subtract.outer(np.arange(8), np.arange(8))) > 1
  assert [bool(np.any(x_NTT[:, far_TT] > 0)) for x_NTT in looped_LNTT] == [True, False] * 2


def test_a_decoder_looks_back_and_a_long_text_is_cut():
  tokens, maps_LNTT = maps(gpt_tiny, 'a' * 50)
  assert tokens == ['[BOS]', *'a' * 31] and not np.any(np.triu(maps_LNTT, 1))


def test_probabilities_by_the_equation():
  rng = np.random.default_rng(0)
  q_BTNH, k_BTKH = rng.normal(size=(2, 5, 4, 3)), rng.normal(size=(2, 5, 2, 3))
  segments_BT = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
  found = xla.probabilities(jnp.asarray(q_BTNH), jnp.asarray(k_BTKH), segments_BT=segments_BT)
  scores = np.einsum('BTNH,BSNH->BNTS', q_BTNH, np.repeat(k_BTKH, 2, axis=2)) / 3**0.5
  seen = (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
  wanted = np.where(seen, np.exp(scores), 0)
  np.testing.assert_allclose(found, wanted / wanted.sum(-1, keepdims=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parity
def test_as_transformers_has_them(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'cat', 'sat', 'down']
  (tmp_path / 'vocab.txt').write_text('\n'.join(words))
  torch.manual_seed(0)
  sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
  settings = transformers.BertConfig(vocab_size=9, initializer_range=0.5, **sizes)
  settings._attn_implementation = 'eager'
  theirs = transformers.BertModel(settings, add_pooling_layer=False).eval()
  theirs.save_pretrained(tmp_path)
  transformers.BertTokenizer(str(tmp_path / 'vocab.txt')).save_pretrained(tmp_path)
  tokens, found_LNTT = llm_jax.open(tmp_path).attention('a cat sat')
  assert tokens == ['[CLS]', 'a', 'cat', 'sat', '[SEP]']
  with torch.no_grad():
    said = theirs(torch.tensor([[2, 5, 6, 7, 3]]), output_attentions=True)
  wanted_LNTT = np.stack([layer[0].numpy() for layer in said.attentions])
  np.testing.assert_allclose(found_LNTT, wanted_LNTT, atol=1e-5)
