"""Explanations: known weights, brute force, completeness."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from llm_jax.core import config
from llm_jax.data.tokenizers import byte
from llm_jax.inference import explanation
from llm_jax.inference.explanation import Explainer, Options
from llm_jax.programs import assemble
from llm_jax.programs import inference as programs
from llm_jax.programs import network as networks

SHAPE = dict(dim=16, layers=2, heads=2, mlp_dim=24, max_len=64)
WIDTH = 0.3
TOKENIZER = byte.create()


@functools.cache
def explainer(model='encoder', pool='cls', **objective):
  """Of a network whose parameters are drawn so widely that its answers are far from linear."""
  tree = base.get_config().to_dict()
  tree |= dict(steps=1, batch_size=4, seq_len=64, tokenizer=dict(name='byte'))
  variant = {'encoder': 'bert_tiny', 'decoder': 'gpt_tiny'}[model]
  tree['model'] = dict(name=model, variant=variant, **SHAPE)
  tree['objective'] = dict(name='classify', classes=('u', 'v', 'w'), pool=pool) | objective
  settings = config.parse(tree)
  program = programs.outline(settings, TOKENIZER, jax.devices()[:1])
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * WIDTH, x.dtype)
  params = jax.tree.map(draw, program.params)
  return Explainer(program, TOKENIZER, assemble.encoder(settings)), program, params


def explain(records, made=None, **options):
  run, _, params = made or explainer()
  return list(run(params, records, Options(**options)))


def test_a_bag_of_words_has_its_own_weights():
  """The score is a sum over tokens, then a function of degree 3 of such a sum."""
  rng = np.random.default_rng(0)
  x_BTD, baseline_BTD = (jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32) for _ in range(2))
  w_D = jnp.asarray(rng.normal(size=4), jnp.float32)
  linear = lambda x_BTD: jnp.einsum('BTD,D->B', x_BTD, w_D)
  weights_BT = jnp.einsum('BTD,D->BT', x_BTD - baseline_BTD, w_D)
  found_BT = explanation.integrated_gradients(linear, x_BTD, baseline_BTD, 1)
  np.testing.assert_allclose(found_BT, weights_BT, rtol=1e-5)
  # Along the line t -> a + t b of one row the gradient is 3 (a + t b)^2 w, whose mean is known.
  found_BT = explanation.integrated_gradients(lambda x: linear(x) ** 3, x_BTD, baseline_BTD, 2)
  a_B, c_B = linear(baseline_BTD), linear(x_BTD)
  mean_B = a_B**2 + a_B * c_B + c_B**2
  np.testing.assert_allclose(found_BT, mean_B[:, None] * weights_BT, rtol=1e-4)
  one_BT = explanation.integrated_gradients(lambda x: linear(x) ** 3, x_BTD, baseline_BTD, 1)
  assert not np.allclose(one_BT, found_BT, rtol=1e-2)


@pytest.mark.slow
def test_gradients_are_complete_the_more_steps_the_better():
  errors = []
  for steps in (1, 32):
    found, empty = explain([{'text': 'some wörds'}, {'text': ''}], ig_steps=steps)
    errors.append(abs(found['sum'] - (found['score'] - found['baseline'])))
  assert errors[1] < 1e-5 < 1e-2 < errors[0]
  assert found['sum'] == pytest.approx(sum(part['score'] for part in found['parts']))
  assert found['baseline'] == pytest.approx(found['deletion']['by_score'][-1], abs=1e-5)
  assert (empty['parts'], empty['sum'], empty['score']) == ([], 0, pytest.approx(empty['baseline']))


@pytest.mark.slow
def test_of_a_decoder_and_of_a_value():
  decoder = explainer('decoder', 'last', task='regression', classes=None)
  (found,) = explain([{'text': 'abc'}], decoder, ig_steps=64)
  assert found['label'] is None and [part['text'] for part in found['parts']] == list('abc')
  assert found['sum'] == pytest.approx(found['score'] - found['baseline'], abs=1e-3)


def answers(rows):
  """[rows, C]: what the network says of rows of ids, each alone."""
  _, program, params = explainer()
  layout = [program.objective.lay_out([(ids, None)], [None], 64) for ids in rows]
  batch = {key: np.stack([row[key] for row in layout]) for key in layout[0]}
  said = networks.apply(program.network, params, batch, method='predict')
  return np.asarray(said['probabilities'])[:, 0]


def test_occlusion_by_brute_force():
  text = 'one and two'
  spans = {'token': [(i, i + 1) for i in range(11)], 'word': [(0, 3), (3, 7), (7, 11)]}
  for unit, wanted in spans.items():
    (found,) = explain([{'text': text}], method='occlusion', unit=unit)
    ids = np.tile(TOKENIZER.encode(text), (len(wanted) + 2, 1))
    for row, (start, stop) in enumerate(wanted):
      ids[row, start:stop] = TOKENIZER.mask_id
    ids[-2] = TOKENIZER.mask_id
    p = answers(ids)
    label = int(np.argmax(p[-1]))
    assert found['label'] == 'uvw'[label]
    np.testing.assert_allclose(found['score'], p[-1, label], atol=1e-5)
    np.testing.assert_allclose(found['baseline'], p[-2, label], atol=1e-5)
    scores = [part['score'] for part in found['parts']]
    np.testing.assert_allclose(scores, p[-1, label] - p[:-2, label], atol=1e-5)
    assert [(part['text'], part['span']) for part in found['parts']] == [
      (text[slice(*span)], [*span]) for span in wanted
    ]
    first = int(np.argmax(scores))  # of 3 words one is masked at a share of 0.2 to 0.4
    if unit == 'word':
      assert found['deletion']['by_score'][3] == pytest.approx(p[first, label], abs=1e-5)
      assert found['deletion']['masked'][3] == pytest.approx(0.3)
  curve = found['deletion']
  for name in ('by_score', 'random'):
    assert curve[name][0] == pytest.approx(found['score'], abs=1e-5)
    assert curve[name][-1] == pytest.approx(found['baseline'], abs=1e-5)


def test_texts_of_a_pair_are_told_apart_and_long_ones_cut():
  pair = {'text': 'ab c', 'pair': 'dé'}
  found, cut = explain(
    [pair, {'text': 'a' * 100, 'pair': 'b' * 9}], method='occlusion', unit='word'
  )
  assert [(part['text'], part['field'], part['span']) for part in found['parts']] == [
    ('ab', 'text', [0, 2]),
    (' c', 'text', [2, 4]),
    ('dé', 'pair', [0, 2]),
  ]
  assert [part['text'] for part in cut['parts']] == ['a' * 52, 'b' * 9]


def test_what_is_not_possible():
  for options, message in (
    (dict(method='lime'), "method='lime' must be one of integrated_gradients, occlusion"),
    (dict(unit='line'), "unit='line' must be"),
    (dict(ig_steps=0), 'ig_steps=0 must be at least 1'),
  ):
    with pytest.raises(ValueError, match=message):
      Options(**options)
  settings = types.SimpleNamespace(objective={'name': 'mlm'})
  program = types.SimpleNamespace(objective=types.SimpleNamespace(predictor=None), config=settings)
  with pytest.raises(ValueError, match='objective mlm gives no label or value'):
    Explainer(program, TOKENIZER, None)
