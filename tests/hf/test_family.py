"""What a family does with options and names, whichever it is."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.params import EMBEDDINGS, LAYERS, Info
from llm_jax.hf import families, family
from llm_jax.models import decoder, encoder, encoder_decoder

BERT = families.known()['bert'][1]
KERNEL = 'attention/query/kernel'
NAME = 'encoder.layer.{}.attention.self.query.weight'


def shapes(*paths):
  return {path: jnp.zeros((2, 4, 2, 2)) for path in paths}


def test_options_that_decide_what_a_model_computes():
  """All but those of initialisation, dropout, types and speed: the two models' own fields."""
  shared = {
    *('vocab_size', 'dim', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp_dim', 'max_len'),
    *('positions', 'rope_theta', 'norm', 'norm_order', 'norm_bias', 'norm_eps', 'bias', 'qkv_bias'),
    *('qk_norm', 'activation', 'gated', 'scaled', 'window', 'tied'),
  }
  own = {'position_offset', 'rope_local_theta', 'token_types', 'embedding_norm', 'global_every'}
  assert set(family.decisive(encoder.Model)) == shared | own
  assert set(family.decisive(decoder.Model)) == shared | {'rope_scaling'}
  both = {'encoder_layers', 'position_offset', 'buckets', 'farthest'}
  both |= {'embedding_norm', 'embedding_scaled', 'output_scaled', 'output_biased'}
  assert set(family.decisive(encoder_decoder.Model)) == shared | both
  model = encoder.Model(vocab_size=9)
  assert family.decisive(model) == family.decisive(encoder.Model)


def test_an_option_of_a_model_of_ones_own_is_decisive():
  class Model(encoder.Model):
    slopes: bool = False

  assert 'slopes' in family.decisive(Model)
  one, other = Model(vocab_size=9), Model(vocab_size=9, slopes=True)
  assert family.differences(other, one) == ['slopes=True']
  assert family.differences(one, one.clone(dropout=0.5, dtype='bfloat16', remat='full')) == []


def test_options_without_effect_do_not_differ():
  learned = encoder.Model(vocab_size=9)
  assert family.differences(learned, learned.clone(rope_theta=7.0)) == []
  rotary = learned.clone(positions='rope')
  assert family.differences(rotary, rotary.clone(rope_theta=7.0)) == ['rope_theta=10000.0']
  assert family.differences(rotary, rotary.clone(rope_local_theta=7.0, position_offset=2)) == []


def test_layers_are_those_that_the_parameters_name():
  """Layer 0 by itself, then 1, 3 and 2, 4 in two stacks, whatever their modules are called."""
  first, odd, even = (f'model/tower/{name}/{KERNEL}' for name in ('bottom', 'a', 'b'))
  infos = {
    first: Info((None,) * 4, layer=0),
    odd: Info((LAYERS, None, None, None), layer=1, period=2),
    even: Info((LAYERS, None, None, None), layer=2, period=2),
  }
  found = BERT.locations(shapes(first, odd, even), infos)
  names = {path: each.names for path, (each,) in found.items()}
  expected = {first: (0,), odd: (1, 3), even: (2, 4)}
  assert names == {path: tuple(map(NAME.format, numbers)) for path, numbers in expected.items()}
  assert [found[path][0].stacked for path in (first, odd, even)] == [False, True, True]
  assert found[odd][0].in_layer((2, 4, 2, 2)) == (4, 2, 2)


def test_parameters_outside_of_layers_go_by_their_whole_path():
  token = 'model/embedder/token/embedding'
  other = f'model/other/{token}'
  infos = {token: Info((None, None), layer=EMBEDDINGS), other: Info((None, None))}
  found = BERT.locations({path: np.zeros((5, 4)) for path in infos}, infos)
  assert found[other] == [] and found[token][0].names == ('embeddings.word_embeddings.weight',)


def test_two_parameters_are_not_one_tensor():
  a, b = f'model/a/{KERNEL}', f'model/b/{KERNEL}'
  infos = dict.fromkeys((a, b), Info((LAYERS, None, None, None), layer=0))
  with pytest.raises(ValueError, match=f'{a} and {b} would both be encoder.layer.0.attention'):
    BERT.locations(shapes(a, b), infos)


def test_names_in_a_layer():
  known = {'mlp/up/kernel', 'cross/mlp/up/kernel'}
  assert family.within_layer('model/stack/layers/block_1/mlp/up/kernel', known) == 'mlp/up/kernel'
  assert family.within_layer('x/cross/mlp/up/kernel', known) == 'cross/mlp/up/kernel'
  assert family.within_layer('x/othermlp/up/kernel', known) == 'x/othermlp/up/kernel'
  path, both = (
    'model/decoder/layers/block/mlp/up/kernel',
    {'encoder/mlp/up/kernel', 'decoder/mlp/up/kernel'},
  )
  assert family.within_layer(path, both, 'decoder/') == 'decoder/mlp/up/kernel'


def test_the_lowest_rank_comes_first():
  ranks = [held.rank for _, held in families.known().values()]
  assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)
  assert family.Family.rank > max(ranks)  # one of the user's own comes last
