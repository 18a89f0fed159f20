"""Texts that share a row learn, and are answered, as if each had one of its own; in float64, where
nothing hides.

The case on a mesh runs in a process of its own (this file as a script), for which the number of CPU
devices is set at the start.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from exact import TOLERANCE, network_of

from configs import classify as config_file
from llm_jax.core import config, tree
from llm_jax.data.tokenizers import byte
from llm_jax.models import decoder, encoder
from llm_jax.objectives import classify
from llm_jax.programs import assemble
from llm_jax.programs import network as networks
from llm_jax.training import program as programs
from llm_jax.training import step

LENGTHS, PAIR_LENGTHS = [9, 4, 0, 3, 7, 11, 2, 6, 1, 5, 28], [3, 5, 1, 0, 4, 2, 6, 12, 1, 2, 9]
SEQ_LEN, DEVICES = 32, 4
SHAPE = dict(
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
MODELS = {
  'bert': (encoder, dict(unroll=0)),
  'gpt': (decoder, dict(unroll=0)),
  'roberta': (encoder, dict(position_offset=2, token_types=1)),
  'modernbert': (
    encoder,
    dict(positions='rope', window=6, global_every=2, token_types=0, layers=2),
  ),
}
CASES = [
  ('bert', 'cls', 'multiclass', True),
  ('bert', 'mean', 'multilabel', True),
  ('roberta', 'cls', 'binary', False),
  ('modernbert', 'mean', 'regression', False),
  ('gpt', 'last', 'multiclass', False),
  ('gpt', 'last', 'regression', True),
]


def corpus(small, task, paired):
  """Eleven texts, two of them unlabelled, one too long for a row."""
  rng = np.random.default_rng(3)
  documents = small.random_documents(LENGTHS)
  pairs = [rng.integers(7, 50, n) for n in PAIR_LENGTHS] if paired else None
  names = rng.integers(0, 2 if task == 'binary' else 3, len(LENGTHS))
  labels = {
    'regression': rng.normal(size=len(LENGTHS)).tolist(),
    'multilabel': [['a', 'b', 'c'][:n] for n in names],
  }.get(task, ['abc'[n] for n in names])
  labels[1] = labels[7] = None
  return small.Documents(documents.texts, pairs, labels)


def made(small, task, pool, packing, **options):
  classes = {'regression': None, 'binary': ('a', 'b')}.get(task, ('a', 'b', 'c'))
  options = dict(dropout=0.0, pool=pool, unlabelled='ignore', packing=packing) | options
  return classify.Objective(small.Tokenizer(), classes, task, **options)


def batch_of(small, rows, multiple=1):
  """All rows as a batch, filled up with rows of zeros to a multiple, and the texts of each row."""
  batch = small.stack([rows.example(i, np.random.default_rng(0)) for i in range(len(rows))])
  fill = -len(rows) % multiple
  batch = {
    key: np.concatenate([value, np.zeros((fill, *value.shape[1:]), value.dtype)])
    for key, value in batch.items()
  }
  return batch, [rows.texts(i) for i in range(len(rows))]


def by_text(values, texts):
  """[texts, ...] from [B, G, ...]."""
  slots = {}
  for row, shared in enumerate(texts):
    for slot, text in enumerate(shared):
      slots[text] = row, slot
  return np.stack([np.asarray(values)[slots[text]] for text in range(len(slots))])


def learner(network, params):
  """From a batch to the sum and weight of its loss, the gradient, and the predictions."""

  @functools.partial(jax.jit, static_argnums=1)
  def learn(batch, micro_batches=1):
    grads, metrics = step.gradient(
      params, batch, None, network=network, micro_batches=micro_batches
    )
    predictions = networks.apply(network, params, batch, method='predict')
    return metrics['classify'], grads, *predictions.values()

  return learn


def assert_same(found, wanted):
  for x, y in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(wanted[:2]), strict=True):
    np.testing.assert_allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'pool', 'task', 'paired'), CASES)
def test_packed_texts_learn_and_are_answered_as_if_alone(small, model, pool, task, paired):
  with jax.enable_x64(True):
    documents = corpus(small, task, paired)
    alone, each = batch_of(small, made(small, task, pool, 'none').rows(documents, SEQ_LEN))
    objective = made(small, task, pool, 'best_fit')
    packed, texts = batch_of(small, objective.rows(documents, SEQ_LEN), 2)
    assert max(map(len, texts)) > 2 and len(packed['tokens']) <= 6 < len(alone['tokens']) == len(
      LENGTHS
    )
    module, options = MODELS[model]
    network, params = network_of(module.Model(vocab_size=50, **SHAPE | options), objective, packed)
    learn = learner(network, params)
    wanted, found = learn(alone), learn(packed)
    assert wanted[0][1] == len(LENGTHS) - 2
    assert_same(found, wanted)
    answers = by_text(found[2], texts)
    np.testing.assert_allclose(answers, by_text(wanted[2], each), rtol=TOLERANCE, atol=TOLERANCE)
    if task == 'multiclass':
      assert_same(learn(packed, 2), wanted)  # micro-batches whose weights differ

    row = int(np.argmax(list(map(len, texts))))
    changed = packed | {'tokens': packed['tokens'].copy()}
    second = packed['text_firsts'][row, 1]  # where the row's second text begins
    changed['tokens'][row, second + 1] = 8
    after = by_text(learn(changed)[2], texts)
    moved = [text for text in range(len(after)) if np.any(after[text] != answers[text])]
    assert moved == [texts[row][1]]  # the others by exactly nothing

    one_segment = np.minimum(packed['segments'], 1)  # texts that see each other
    crossed = learn(packed | {'segments': one_segment})
    assert np.abs(by_text(crossed[2], texts) - answers).max() > 1e-4
    with pytest.raises(AssertionError):
      assert_same(crossed, wanted)


@pytest.mark.slow
def test_self_training_is_that_of_texts_alone(small):
  """Micro-batches hold other numbers of unlabelled texts, sure or not; all count together."""
  task, options = 'multiclass', dict(unlabelled='learn', self_training=3.0)
  with jax.enable_x64(True):
    documents = corpus(small, task, False)
    labels = [None if i in (1, 4, 7, 9, 10) else x for i, x in enumerate(documents.values('label'))]
    documents = small.Documents(documents.texts, labels=labels)
    alone, packed = (
      batch_of(small, made(small, task, 'mean', packing, **options).rows(documents, SEQ_LEN), 4)[0]
      for packing in ('none', 'best_fit')
    )
    parts = packed['unlabelled'].sum(1).reshape(2, -1).sum(1)
    assert parts[0] != parts[1] and not np.any(packed['unlabelled'] * packed['label_weight'])
    model = encoder.Model(vocab_size=50, unroll=0, **SHAPE)
    network, params = network_of(model, made(small, task, 'mean', 'none', **options), alone)
    predict = jax.jit(lambda batch: networks.apply(network, params, batch, method='predict'))
    p_BGC = np.asarray(predict(alone)['probabilities'])
    sure = np.sort(p_BGC[alone['unlabelled'] > 0].max(-1))
    options['confidence'] = float(sure[1:3].mean())  # three of five are sure
    network = network.clone(objective=made(small, task, 'mean', 'best_fit', **options))

    @functools.partial(jax.jit, static_argnums=1)
    def learn(batch, micro_batches):
      key = jax.random.PRNGKey(0)  # it trains, without dropout
      return step.gradient(params, batch, key, network=network, micro_batches=micro_batches)

    (wanted, numbers), (found, others) = learn(alone, 1), learn(packed, 2)
    assert tuple(map(float, numbers['self_training_share'])) == (3, 5)
    assert numbers['classify'][1] == 6 and numbers['self_training'][1] == 5
    assert numbers['self_training'][0] > 0.01
    for name in ('classify', 'self_training', 'self_training_share'):
      np.testing.assert_allclose(others[name], numbers[name], rtol=TOLERANCE, atol=TOLERANCE)
    assert_same((0, found), (0, wanted))
    one_less = packed | {'unlabelled': packed['unlabelled'].copy()}
    one_less['unlabelled'][tuple(np.argwhere(packed['unlabelled'])[0])] = 0
    with pytest.raises(AssertionError):  # each of them counts, sure or not
      assert_same((0, learn(one_less, 2)[0]), (0, wanted))


def program(small, packing, devices):
  """Of fewer devices or more, packed or not: the Program, and its batch of all texts. It learns by
  FreeLB, whose passes are those of a plain step; what it draws and moves must not depend on the
  layout either.
  """
  parsed, several = config_file.get_config().to_dict(), devices > 1
  parsed |= dict(
    seq_len=SEQ_LEN,
    batch_size=8 if several else len(LENGTHS),
    micro_batches=2 if several else 1,
    mesh=dict(data=2, fsdp=2) if several else dict(data=1),
    adversarial=dict(name='freelb', epsilon=2.0, step_size=1.0),
    model=parsed['model'] | SHAPE | dict(variant='bert_base'),
    objective=parsed['objective']
    | dict(
      pool='cls',
      dropout=0.0,
      unlabelled='ignore',
      packing=packing,
      classes=('a', 'b', 'c'),
    ),
    optimizer=dict(name='adamw', learning_rate=1e-3, clip_norm=0.0),
  )
  tokenizer = byte.create()
  parsed = assemble.resolve(config.parse(parsed), tokenizer.vocab_size)
  objective = assemble.create_objective(parsed, tokenizer)
  rows = objective.rows(corpus(small, 'multiclass', True), SEQ_LEN)
  batch, texts = batch_of(small, rows, parsed.batch_size)
  built = programs.build(parsed, objective, rows.example(0, None), jax.devices()[:devices])
  return built, batch, texts


def trained(small, packing, devices):
  """Loss, gradient (ten times AdamW's first moment after a step) and answers by text, from the
  compiled steps of a Program.
  """
  built, batch, texts = program(small, packing, devices)
  rng = np.random.default_rng(1)
  state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), built.state)
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: rng.normal('scale' in str(path[-1]), 0.2, leaf.shape).astype(leaf.dtype),
    state.params,
  )
  state = jax.tree.map(
    lambda array, leaf: jax.device_put(array, leaf.sharding),
    state.replace(params=params),
    built.state,
  )
  answers = by_text(built.predict_step(state.params, built.put(batch))['probabilities'], texts)
  state, metrics = built.train_step(state, built.put(batch))
  moments = tree.flatten(optax.tree_utils.tree_get(state.opt_state, 'mu'))
  return (
    float(metrics['loss'][0]),
    {path: 10 * np.asarray(value) for path, value in moments.items()},
    answers,
  )


def deviations(small):
  """How far four devices, packed and in micro-batches, are off one device with a text per row."""
  loss, gradient, answers = trained(small, 'none', 1)
  other_loss, other, other_answers = trained(small, 'best_fit', DEVICES)
  return dict(
    loss=abs(loss - other_loss),
    answers=float(np.abs(answers - other_answers).max()),
    devices=jax.device_count(),
    gradient=float(max(np.abs(other[path] - value).max() for path, value in gradient.items())),
    size=float(max(np.abs(value).max() for value in gradient.values())),
  )


@pytest.mark.slow
def test_packed_rows_on_a_mesh():
  root = pathlib.Path(__file__).parents[2]
  env = os.environ | {
    'PYTHONPATH': f'{root}:{root / "tests"}',
    'JAX_PLATFORMS': 'cpu',
    'JAX_ENABLE_X64': '1',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={DEVICES}',
  }
  done = subprocess.run(
    [sys.executable, __file__], capture_output=True, text=True, check=False, cwd=root, env=env
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  assert found['devices'] == DEVICES and found['size'] > 1e-3
  assert max(found['loss'], found['answers'], found['gradient']) < TOLERANCE, found


@pytest.mark.slow
def test_mixed_texts_have_one_gradient_however_they_are_laid_out(small):
  """Packed or not, at once or in parts; partners come from the whole batch."""
  with jax.enable_x64(True):
    labels = list('abcabcabcab')
    labels[3] = None
    documents = small.random_documents(LENGTHS, labels=labels)
    objective = classify.Objective(
      small.Tokenizer(), ('a', 'b', 'c'), dropout=0.0, unlabelled='ignore', mixup=0.4
    )
    rows, rng = objective.rows(documents, SEQ_LEN), np.random.default_rng(2)
    drawn = [objective.transform({'label': np.zeros(1)}, rng) for _ in LENGTHS]
    shared = [rows.texts(i) for i in range(len(rows))]
    packed, alone = (
      mixed_rows(small, objective, documents, labels, texts, drawn)
      for texts in (shared, [[text] for text in range(len(LENGTHS))])
    )
    model = encoder.Model(vocab_size=50, **SHAPE, unroll=0)
    network, params = network_of(model, objective, packed)

    def learner(count, key):
      run = functools.partial(step.gradient, network=network, micro_batches=count)
      return jax.jit(lambda batch: run(params, batch, key))

    key = jax.random.PRNGKey(0)  # as in training; there is no dropout
    learn, in_parts = learner(1, key), learner(2, key)
    wanted = learn(alone)
    for found in (learn(packed), in_parts(packed), in_parts(alone)):
      assert_same(found, wanted)
    assert wanted[1]['classify'][1] == 10
    evaluated = learner(1, None)(alone)[1]
    assert abs(evaluated['loss'][0] - wanted[1]['loss'][0]) > 1e-3
    assert evaluated['classify_accuracy'][0] == wanted[1]['classify_accuracy'][0]
    half = np.arange(12)[:, None] % 2
    halves = [learn(alone | {'label_weight': alone['label_weight'] * x}) for x in (half, 1 - half)]
    shares = [metrics['classify'][1] / 10 for _, metrics in halves]
    summed = jax.tree.map(lambda a, b: shares[0] * a + shares[1] * b, *(g for g, _ in halves))
    with pytest.raises(AssertionError):  # partners from a half of the batch are others
      assert_same((summed,), wanted[:1])


def mixed_rows(small, objective, documents, labels, rows, drawn):
  """A batch of 12 rows of given texts, each of which is mixed as it is said for it."""
  made = []
  for texts in [*rows, *[[]] * (12 - len(rows))]:
    ids = [(documents.array('tokens', text)[: SEQ_LEN - 2], None) for text in texts]
    row = objective.lay_out(ids, [labels[text] for text in texts], SEQ_LEN)
    for key in ('mix_rank', 'mix_share'):
      row[key] = np.zeros(row['label_weight'].shape, drawn[0][key].dtype)
      row[key][: len(texts)] = [drawn[text][key][0] for text in texts]
    made.append(row)
  return small.stack(made)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(mixup=-1.0), r'mixup=-1\.0 must be a number'),
    (dict(mixup=0.2, r_drop=1.0), 'contradict each other'),
  ],
)
def test_mixing_that_cannot_be_is_an_error(small, options, message):
  with pytest.raises(ValueError, match=message):
    classify.Objective(small.Tokenizer(), ('a', 'b'), **options)


if __name__ == '__main__':
  import conftest

  print(json.dumps(deviations(conftest)))
