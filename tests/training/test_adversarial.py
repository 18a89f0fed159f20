"""Texts that are moved to learn from them: one gradient however rows are packed and cut, in
float64; the sizes are those of texts, the sections say what is wrong, the costs are those compiled.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import config, contracts
from llm_jax.models import decoder, encoder
from llm_jax.objectives import classify, clm, contrast, mlm, tag
from llm_jax.planning import costs
from llm_jax.programs import assemble
from llm_jax.programs import network as networks
from llm_jax.training import adversarial, step
from llm_jax.training import program as programs

SEQ_LEN, TOLERANCE = 24, 1e-10
LENGTHS, LABELS = [9, 4, 3, 7, 11, 2, 6, 5], ['a', 'b', None, 'c', 'b', 'a', 'c', 'a']
SHAPE = dict(
  vocab_size=50,
  dim=8,
  layers=1,
  heads=2,
  mlp_dim=16,
  max_len=SEQ_LEN,
  dropout=0.0,
  attention_dropout=0.0,
  dtype='float64',
  param_dtype='float64',
)
SINGLE = dict(dtype='float32', param_dtype='float32')
METHODS = {
  'fgm': adversarial.FGM(epsilon=0.7, share=0.4),
  'pgd': adversarial.PGD(epsilon=0.5, step_size=0.3, steps=3, norm='max'),
  'freelb': adversarial.FreeLB(epsilon=0.6, step_size=0.4, steps=2),
  'smart': adversarial.SMART(epsilon=0.2, step_size=0.1, start=0.01, steps=2, weight=3.0),
}


def rows_of(small):
  """An objective, and two batches of the same texts: each in a row of its own, and several to a
  row; 8 rows each, those that are left over of zeros.
  """
  objective = classify.Objective(
    small.Tokenizer(), ('a', 'b', 'c'), dropout=0.0, unlabelled='ignore'
  )
  documents = small.random_documents(LENGTHS, labels=LABELS)
  laid, rng = objective.rows(documents, SEQ_LEN), np.random.default_rng(0)
  packed = [laid.example(index, rng) for index in range(len(laid))]
  alone = [
    objective.lay_out([(documents.array('tokens', i), None)], [LABELS[i]], SEQ_LEN)
    for i in range(len(LENGTHS))
  ]
  packed += [{key: np.zeros_like(x) for key, x in packed[0].items()}] * (8 - len(packed))
  return objective, small.stack(alone), small.stack(packed)


def network_of(model, objective, batch, seed=1):
  network = networks.Network(model, objective.heads(model), objective)
  shapes = nn.meta.unbox(jax.eval_shape(network.init, jax.random.PRNGKey(0), batch)['params'])
  rng = np.random.default_rng(seed)
  return network, jax.tree.map(
    lambda s: jnp.asarray(rng.normal(0.5 if s.ndim < 2 else 0.0, 0.5, s.shape), s.dtype), shapes
  )


def learner(network, method, micro_batches=1):
  run = functools.partial(
    step.gradient, network=network, micro_batches=micro_batches, adversarial=method
  )
  compiled = jax.jit(run)
  return lambda params, batch: jax.device_get(compiled(params, batch, jax.random.PRNGKey(4)))


def assert_close(found, wanted, tolerance=TOLERANCE):
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_packed_rows_and_micro_batches_have_the_gradient_of_texts_alone(small, name, monkeypatch):
  """In either layout other texts are in a micro-batch together."""
  with jax.enable_x64(True):
    method, moved_name = METHODS[name], 'adversarial_classify'
    objective, alone, packed = rows_of(small)
    assert packed['segments'].max() > 2 and alone['segments'].max() == 1
    network, params = network_of(encoder.Model(**SHAPE, unroll=0), objective, packed)
    learn = learner(network, method, 2)
    wanted, means = learn(params, alone)
    assert_close(learn(params, packed), (wanted, means))
    if name != 'fgm':
      moved_name = adversarial.SMOOTHNESS if name == 'smart' else moved_name
      assert means[moved_name][0] > 0 and means[moved_name][1] == 7
      return
    assert means[moved_name][1] == 7 and means[moved_name][0] > means['classify'][0]
    still = dataclasses.replace(method, epsilon=0.0)  # as `parse` leaves out
    plain, clean = learner(network, None)(params, packed)
    unmoved, _ = learner(network, still)(params, packed)
    assert_close(unmoved, plain)
    with pytest.raises(AssertionError):
      assert_close(plain, wanted, 1e-3)
    # Sizes of rows are not those of texts.
    one = lambda x_BT, segments_BT, how: over_text(x_BT, (segments_BT > 0).astype(int), how)
    over_text = adversarial.over_text
    monkeypatch.setattr(adversarial, 'over_text', one)
    crossed, _ = learner(network, method)(params, packed)
    with pytest.raises(AssertionError):
      assert_close(crossed, wanted, 1e-6)


@pytest.mark.slow
def test_any_objective_learns_so_also_one_that_compares(small):
  """A decoder's texts; texts that are compared over the whole batch, which is run in parts: in
  another order other rows are in a part.
  """
  with jax.enable_x64(True):
    tokenizer, method = small.Tokenizer(), METHODS['fgm']
    documents = small.random_documents(LENGTHS)
    pairs = small.Documents(documents.texts, [text[:3] for text in documents.texts])
    cases = [
      (decoder.Model(**SHAPE, unroll=0), clm.Objective(tokenizer, packing='none'), documents),
      (encoder.Model(**SHAPE, unroll=0), contrast.Objective(tokenizer, packing='none'), pairs),
    ]
    for model, objective, texts in cases:
      laid, rng = objective.rows(texts, SEQ_LEN), np.random.default_rng(0)
      batch = small.stack([objective.transform(laid.example(i, rng), rng) for i in range(8)])
      network, params = network_of(model, objective, batch)
      learn = learner(network, method, 2)
      wanted, means = learn(params, batch)
      other = {key: x[[0, 1, 3, 2, 4, 7, 6, 5]] for key, x in batch.items()}
      assert_close(learn(params, other), (wanted, means))
      (term,) = objective.terms
      assert means[f'adversarial_{term}'][0] > means[term][0]


def test_delta_is_bounded_per_text():
  """By a loop over texts, in NumPy; a text without a slope stays, and so does padding."""
  segments = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 0, 0]])
  rng = np.random.default_rng(0)
  delta, slope = rng.normal(size=(2, 2, 6, 3)).astype(np.float32)
  delta[segments == 0] = 0
  slope[1, 1:3] = 0  # a text
  slope[0, :2] *= 1e-25  # whose squares are 0 in float32
  for name, order in (('l2', 2), ('max', np.inf)):
    method = adversarial.PGD(epsilon=0.8, step_size=0.5, norm=name)
    found = method.climbed(jnp.asarray(delta), jnp.asarray(slope), {'segments': segments}, 0.5)
    for row, text in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)):
      at = np.nonzero(segments[row] == text)[0]
      own = slope[row, at].ravel().astype(np.float64)
      size = np.linalg.norm(own, order)
      moved = delta[row, at].ravel() + (0.5 * own / size if size else 0)
      if name == 'l2':
        moved *= min(1, 0.8 / np.linalg.norm(moved))
      wanted = np.clip(moved, -0.8, 0.8).reshape(len(at), 3)
      np.testing.assert_allclose(found[row, at], wanted, rtol=2e-5, atol=1e-6)
    assert not np.any(np.asarray(found)[segments == 0])


@pytest.mark.slow
def test_what_is_drawn_goes_by_the_text_and_the_step():
  model = encoder.Model(**SHAPE | SINGLE)
  network = networks.Network(model, {})
  tokens = {'one': [5, 6, 7], 'other': [5, 7, 6, 6]}

  def draw(rows, seed=0):
    batch = {key: np.zeros((len(rows), 8), np.int32) for key in ('tokens', 'segments', 'positions')}
    for row, texts in enumerate(rows):
      ids = [tokens[text] for text in texts]
      used = sum(map(len, ids))
      batch['tokens'][row, :used] = np.concatenate(ids)
      batch['segments'][row, :used] = np.repeat([1, 2][: len(ids)], list(map(len, ids)))
      batch['positions'][row, :used] = np.concatenate([np.arange(len(x)) for x in ids])
    part = adversarial.Part(network, None, batch, None, jax.random.PRNGKey(seed), *[None] * 4)
    return np.asarray(adversarial.drawn(part, jax.random.normal))

  together, apart, later = (
    draw([('one', 'other')]),
    draw([('other',), ('one',)]),
    draw([('one',)], 1),
  )
  assert np.array_equal(together[0, :3], apart[1, :3])
  assert np.array_equal(together[0, 3:7], apart[0, :4])
  assert not np.any(together[0, 7:])
  assert len(np.unique(together[0, :7])) == 7 * 8  # no number twice
  assert np.abs(later[0, :3] - together[0, :3]).min() > 0
  uniform = adversarial.FreeLB(epsilon=0.6, start=0.5)
  part = adversarial.Part(
    network,
    None,
    dict(tokens=np.arange(64).reshape(2, 32), segments=np.ones((2, 32), int))
    | dict(positions=np.tile(np.arange(32), (2, 1))),
    *(None, jax.random.PRNGKey(0), *[None] * 4),
  )
  scaled = np.asarray(uniform._start(part)) * math.sqrt(32 * 8)
  assert 0.48 < np.abs(scaled).max() <= 0.5 and abs(scaled.mean()) < 0.05


@pytest.mark.parametrize(
  ('section', 'message'),
  [
    (dict(name='fgn'), r"config\.adversarial\.name='fgn' is not known \(did you mean 'fgm'\?\)"),
    (dict(epsilon=1.0), r'config\.adversarial\.epsilon is set, and config\.adversarial\.name is'),
    (dict(name='fgm', epsilom=1.0), r"epsilom is not an option \(did you mean 'epsilon'\?\)"),
    (dict(name='fgm', steps=3), r'config\.adversarial\.steps is not an option.*epsilon, norm'),
    (dict(name='pgd', steps=0), r'config\.adversarial\.steps=0 must be at least 1'),
    (dict(name='pgd', epsilon=-1.0), r'config\.adversarial\.epsilon=-1\.0 must be a number from 0'),
    (dict(name='fgm', epsilon=math.nan), r'epsilon=nan must be a number from 0 on'),
    (dict(name='fgm', share=1.5), r'share=1\.5 must be at least 0 and at most 1'),
    (dict(name='fgm', norm='l3'), r"norm='l3' is not known.*known: l2, max"),
    (dict(name='freelb', start=0.9), r'start=0\.9 must be at least 0 and at most epsilon, 0\.5'),
    (dict(name='smart', start=0.0), r'start=0 stays where it is'),
  ],
)
def test_a_section_that_cannot_be_is_an_error(section, message):
  with pytest.raises(ValueError, match=message):
    adversarial.parse(section)


def test_sections():
  with pytest.raises(TypeError, match=r"config\.adversarial\.epsilon='1' is of type str"):
    adversarial.parse(dict(name='fgm', epsilon='1'))
  assert adversarial.parse({}) is adversarial.parse(dict(name=None, epsilon=None)) is None
  assert adversarial.parse(dict(name='pgd', epsilon=0)) is None
  assert adversarial.parse(dict(name='pgd', epsilon=2)) == adversarial.PGD(epsilon=2.0)
  assert adversarial.options('fgm') == ['epsilon', 'norm', 'share']
  said = adversarial.describe(adversarial.FGM(epsilon=2.0))
  assert said == (
    'Adversarial training by fgm (epsilon=2.0, norm=l2, share=0.5): 2 times the FLOPs of a plain '
    'step.'
  )


def test_smart_needs_an_objective_that_says_how_far_answers_are_apart(small):
  tokenizer, smart = small.Tokenizer(), METHODS['smart']
  words = functools.partial(tag.Objective, tokenizer, ('O', 'B-x'))
  texts = functools.partial(classify.Objective, tokenizer, ('a', 'b'))
  for fine in (words(), texts()):
    smart.check(fine)
  for objective in (words(loss='crf'), texts(mixup=0.2), mlm.Objective(tokenizer)):
    METHODS['pgd'].check(objective)
    with pytest.raises(ValueError, match=r"name='smart' compares the answers.*'fgm', 'pgd'"):
      smart.check(objective)


def test_how_far_answers_are_apart(small):
  """Both divergences, by SciPy-like sums in float64; of equal answers none."""
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 2, 3, 4))
  p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
  both = (p * np.log(p / q) + q * np.log(q / p)).sum(-1)
  weight = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
  texts = classify.Objective(small.Tokenizer(), tuple('abcd'))
  words = tag.Objective(small.Tokenizer(), ('O', 'B-x', 'B-y', 'B-z'))
  for objective, name in ((texts, 'label_weight'), (words, 'tag_weight')):
    value, total = objective.divergence(jnp.asarray(a), jnp.asarray(b), {name: weight})
    assert float(value) == pytest.approx((both * weight).sum(), rel=1e-5) and total == 4
    assert objective.divergence(a, a, {name: weight})[0] == 0
  numbers = classify.Objective(small.Tokenizer(), None, 'regression')
  value, _ = numbers.divergence(a[..., :1], b[..., :1], {'label_weight': weight})
  squares = np.square(a - b)[..., 0]
  assert float(value) == pytest.approx((squares * weight).sum(), rel=1e-5)


class Own(contracts.Model, nn.Module):
  """A model whose vectors nobody can move."""

  vocab_size: int = 50
  max_len: int = SEQ_LEN

  @property
  def options(self):
    return encoder.Model(**SHAPE | SINGLE).options

  @nn.compact
  def __call__(self, batch, positions=None, *, train=False, cache=None):
    x_BTD = nn.Embed(self.vocab_size, self.options.dim)(batch['tokens'])
    return contracts.Outputs(x_BTD[:, :1].repeat(positions.shape[1], 1))


def test_a_model_without_an_embedder_is_refused(small):
  objective, batch, _ = rows_of(small)
  network, params = network_of(Own(), objective, batch)
  with pytest.raises(ValueError, match=r'`nn\.embedder\.Embedder` gives for tokens, and this'):
    learner(network, METHODS['fgm'])(params, batch)


def settings(small, **sections):
  """A config of a classifier that is smaller than any."""
  from configs import classify as config_file

  tree = config_file.get_config().to_dict()
  del tree['pretrained']
  shape = {key: SHAPE[key] for key in ('dim', 'layers', 'heads', 'mlp_dim')}
  tree |= dict(seq_len=SEQ_LEN, batch_size=8, tokenizer=dict(name='byte'))
  tree['model'] |= shape | dict(max_len=64, unroll=0, dtype='float32')
  return config.parse(tree | sections)


@pytest.mark.slow
def test_a_program_learns_beside_lora_and_counts_the_passes(small):
  smart = dict(name='smart', steps=2)
  lora = dict(name='lora', rank=2, targets='attention/.*')
  parsed = settings(small, adversarial=smart, adapter=lora)
  programs.check(parsed)
  wrong = dataclasses.replace(parsed, objective=dict(name='mlm'))
  with pytest.raises(ValueError, match='the objective mlm, as it is set, does not say how far'):
    programs.check(wrong)
  program = programs.outline(parsed, jax.devices()[:1])
  plain = programs.outline(dataclasses.replace(parsed, adversarial={}), jax.devices()[:1])
  forward = 8 * program.network.model.flops(SEQ_LEN, SEQ_LEN)
  options = program.network.model.options
  forward += 2 * 8 * SEQ_LEN * options.layers * 4 * 2 * options.dim * 2  # A and B beside four maps
  assert program.flops == 2 * plain.flops + 4 * forward
  batch = assemble.template(parsed, program.objective, assemble.byte_tokenizer(parsed))
  batch = program.put({key: np.stack([x] * 8) for key, x in batch.items()})
  state = program.init(0)
  for _ in range(2):
    state, metrics = program.train_step(state, batch)
    assert all(math.isfinite(float(value)) for value, _ in metrics.values())
  assert float(metrics['smoothness'][0]) > 0 and int(state.step) == 2


@pytest.mark.slow
@pytest.mark.usefixtures('as_in_use')
def test_the_passes_that_are_counted_are_compiled(small):
  """A pass whose parameters get no gradient has two products where others have three."""
  objective, _, batch = rows_of(small)
  wide = SINGLE | dict(dim=64, mlp_dim=256, unroll=0)
  network, params = network_of(encoder.Model(**SHAPE | wide), objective, batch)

  def flops(method):
    run = functools.partial(step.gradient, network=network, adversarial=method)
    compiled = jax.jit(run).lower(params, batch, jax.random.PRNGKey(0)).compile()
    return costs.costs(compiled.as_text()).flops

  plain = adversarial.Cost(1.0, 2.0)
  method = METHODS['smart']  # has passes of every kind
  assert flops(method) / flops(None) == pytest.approx(method.flops(plain, plain) / 3, rel=0.08)
