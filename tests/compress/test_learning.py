"""Runs that get used to a smaller form: what they train, keep, answer, and go on from."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.params import Info
from llm_jax.core.state import COMPRESSED
from llm_jax.nn.forms import int4, int8

pytestmark = pytest.mark.slow
METHODS = {
  'int8': dict(name='int8', activations='token'),
  'int4': dict(name='int4', group=4),
  'magnitude': dict(name='magnitude', share=0.6, every=2),
  'movement': dict(name='movement', pattern='2:4', every=2),
}


@pytest.fixture(scope='module', params=['encoder', 'decoder'])
def kind(request):
  return request.param


def bits(x):
  return jax.tree.map(lambda leaf: (str(leaf.dtype), np.asarray(leaf).tobytes()), x)


def said(session, texts):
  if session.causal:
    return session.complete(texts, max_new_tokens=6, temperature=0)
  return [list(answer['probabilities'].values()) for answer in session.predict(texts)]


@pytest.mark.parametrize('method', METHODS)
def test_a_run_learns_in_its_smaller_form_and_resumes_to_the_bit(method, kind, tiny, tmp_path):
  given = tiny.settings(kind, tmp_path, compress=METHODS[method])
  run = tiny.train(given, tmp_path / 'run')
  params = tree.flatten(run.state.params)
  kernels = [p for p, i in run.program.infos.items() if i.formable and (i.layer or 0) >= 0]
  inner = [p for p in kernels if i_layer(run, p)]
  zeros = {path: float(np.mean(np.asarray(params[path]) == 0)) for path in inner}
  if method in ('magnitude', 'movement'):
    wanted = 0.6 if method == 'magnitude' else 0.5
    assert all(abs(share - wanted) < 0.02 for share in zeros.values()), zeros
    masks = tree.flatten(run.state.extras[COMPRESSED]['mask'])
    assert all(np.all((np.asarray(params[p]) == 0) >= ~np.asarray(m)) for p, m in masks.items())
  else:
    assert max(zeros.values()) < 0.01 and not run.state.extras[COMPRESSED]
  # What was said of the validation set is what the folder says: in the smaller form.
  session = llm_jax.open(tmp_path / 'run')
  forms = {p for p, x in params_lib.leaves(session.params).items() if params_lib.is_form(x)}
  assert bool(forms) == (method in ('int8', 'int4'))
  answers = said(session, tiny.texts)
  # Killed after six steps, it ends with the same bits.
  shutil.copytree(tmp_path / 'run', tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '12')
  again = tiny.train(given, tmp_path / 'again')
  assert bits(again.state) == bits(run.state)
  assert said(llm_jax.open(tmp_path / 'again'), tiny.texts) == answers


def i_layer(run, path):
  layer = run.program.infos[path].layer
  return layer is not None and layer >= 0


@pytest.mark.parametrize(
  'scheme', [int8.Scheme(), int8.Scheme(4), int8.Scheme(None, 'token'), int4.Scheme(4)]
)
def test_what_stands_for_a_kernel_in_training_multiplies_as_the_form_and_learns_as_the_kernel(
  scheme,
):
  info = Info(('embed', 'mlp'), inputs=(0,), layer=0, formable=True)
  rng = np.random.default_rng(0)
  w, x = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((16, 12), (3, 5, 16)))
  spec = '...D,DF->...F'

  def product(weight, x):
    if params_lib.is_form(weight):
      return weight.product(spec, x, jnp.float32, jnp.float32)
    return jnp.einsum(spec, x, weight)

  learned = lambda w, x: jnp.sum(jnp.sin(product(scheme.trained(w, info), x)))
  np.testing.assert_allclose(
    product(scheme.trained(w, info), x), product(scheme.form(w, info), x), atol=1e-4
  )
  # By the formula of the straight-through estimator: the slope at the rounded values.
  y = product(scheme.form(w, info), x)
  dense = scheme.form(w, info).dense(jnp.float32)
  slope = jnp.cos(y)
  dw, dx = jax.grad(learned, (0, 1))(w, x)
  rounded = x
  if getattr(scheme, 'activations', 'none') == 'token':
    step = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    rounded = jnp.round(x / step) * step
  np.testing.assert_allclose(dw, jnp.einsum('btd,btf->df', rounded, slope), atol=1e-3)
  np.testing.assert_allclose(dx, jnp.einsum('btf,df->btd', slope, dense), atol=1e-3)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(compress=dict(name='svd', share=0.5)), 'is for --mode=compress'),
    (dict(compress=dict(name='structured', layers=2)), 'is for --mode=compress'),
    (dict(compress=dict(name='int8'), adapter=dict(name='lora')), 'do not go together'),
    (dict(compress=dict(name='int8'), adversarial=dict(name='fgm')), 'do not go together'),
    (dict(compress=dict(name='int8', activations='tensor')), "train with 'token'"),
    (dict(compress=dict(share=0.5)), 'config.compress.share is set, and config.compress.name'),
  ],
)
def test_what_does_not_go_together_is_refused(changes, words, tiny, tmp_path):
  with pytest.raises(ValueError, match=words):
    tiny.train(tiny.settings('encoder', tmp_path, **changes), tmp_path / 'run')
  assert not (tmp_path / 'run' / 'checkpoints' / '6').exists()
