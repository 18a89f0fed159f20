"""Which weights are left out, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.compress import _masks, magnitude, movement
from llm_jax.core.params import LAYERS, Info

UP = Info((LAYERS, 'embed', 'mlp'), inputs=(0,), layer=0, formable=True)
OUT = Info(('heads', 'head_dim', 'embed'), inputs=(0, 1), layer=0, formable=True)


def drawn(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_smallest_of_each_layer_go():
  scores = np.abs(drawn((2, 6, 10)))
  mask = np.asarray(_masks.Sparsity(0.35, None, ()).mask(jnp.asarray(scores), UP, 0.35))
  for layer in range(2):
    order = np.argsort(scores[layer], axis=None)
    wanted = np.ones(60, bool)
    wanted[order[:21]] = False
    np.testing.assert_array_equal(mask[layer].ravel(), wanted)
  assert np.all(_masks.Sparsity(0.35, None, ()).mask(jnp.asarray(scores), UP, 0.0))


@pytest.mark.parametrize('info, shape, axis', [(UP, (2, 8, 6), 1), (OUT, (2, 8, 6), 1)])
def test_of_every_few_inputs_some_stay(info, shape, axis):
  scores = np.abs(drawn(shape))
  mask = np.asarray(_masks.Sparsity(None, '1:4', ()).mask(jnp.asarray(scores), info, 0.75))
  groups = np.moveaxis(mask, axis, -1).reshape(-1, 4)
  values = np.moveaxis(scores, axis, -1).reshape(-1, 4)
  assert np.all(groups.sum(-1) == 1)
  np.testing.assert_array_equal(groups.argmax(-1), values.argmax(-1))


def test_the_share_grows_by_the_cubic_curve():
  for done, wanted in [(0.0, 0.0), (0.2, 0.0), (0.4, 0.6 * (1 - 0.5**3)), (0.6, 0.6), (1.0, 0.6)]:
    assert float(_masks.share_at(jnp.float32(done), 0.2, 0.6, 0.6)) == pytest.approx(wanted)


@pytest.mark.parametrize(
  'options, said',
  [
    (dict(), 'give one of the two'),
    (dict(share=0.5, pattern='2:4'), 'give one of the two'),
    (dict(share=1.0), 'above 0 and below 1'),
    (dict(pattern='4:2'), "n:m, n of every m stay, such as '2:4'"),
    (dict(share=0.5, begin=0.8), 'the former below the latter'),
    (dict(share=0.5, every=0), 'at least 1'),
  ],
)
def test_what_is_not_possible_is_refused(options, said):
  for method in (magnitude, movement):
    with pytest.raises(ValueError, match=said):
      method.Compression(**options)


def test_a_mask_that_masks_nothing_is_refused():
  infos = {'w/kernel': UP}
  shapes = {'w/kernel': jax.ShapeDtypeStruct((2, 4, 2), jnp.float32)}
  with pytest.raises(ValueError, match='of the 8 weights of w/kernel is none'):
    magnitude.Compression(share=0.1).check(infos, shapes)
  with pytest.raises(ValueError, match="'query' is found in no path"):
    magnitude.Compression(share=0.5, keep=('query',)).check(infos, shapes)
  with pytest.raises(ValueError, match='do not divide by 3'):
    magnitude.Compression(pattern='1:3').check(infos, shapes)


def test_movement_follows_the_paper():
  """Two steps by hand: scores by equation 3, with the gradient at the masked weights."""
  method = movement.Compression(steps=4, share=0.5, begin=0.0, end=0.5, every=1)
  w, g = drawn((1, 4, 3)), drawn((1, 4, 3), 1)
  params, infos = {'w': {'kernel': jnp.asarray(w)}}, {'w/kernel': UP}
  extras = method.extras(params, infos)
  grads, extras = method.before_update({'w': {'kernel': jnp.asarray(g)}}, params, extras, 0.0)
  np.testing.assert_array_equal(grads['w']['kernel'], g)  # nothing is masked yet
  params, extras = method.after_update(params, extras, jnp.float32(0.5), infos)
  scores = -w * g
  kept = scores > np.sort(scores, axis=None)[5]
  np.testing.assert_allclose(params['w']['kernel'], np.where(kept, w, 0))
  np.testing.assert_allclose(extras[movement.ASIDE]['w']['kernel'], np.where(kept, 0, w))
  again = drawn((1, 4, 3), 2)
  given = {'w': {'kernel': jnp.asarray(again)}}
  grads, extras = method.before_update(given, params, extras, 0.5)
  np.testing.assert_allclose(grads['w']['kernel'], np.where(kept, again, 0))
  np.testing.assert_allclose(
    extras[movement.SCORES]['w']['kernel'], scores - w * again, rtol=1e-5, atol=1e-6
  )
