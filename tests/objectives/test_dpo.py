"""Preferences: losses and gradients of trl on the same log-probabilities, ln 2 where nothing has
been learned, exact gradients, a run whose reference is kept, and what is refused.
"""

import collections
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import assert_same, filled, network_of, shape

from configs import dpo as config
from llm_jax.core import config as config_lib
from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.models import decoder
from llm_jax.nn import vocabulary
from llm_jax.objectives import dpo
from llm_jax.programs import network as networks
from llm_jax.training import loop, step

TOKENIZER = byte.create()
PAIRS = [('a' * n, 'xyz'[:n], 'pq') for n in (1, 3, 2, 1)]


def record(prompt, chosen, rejected):
  return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


def documents(pairs):
  records = [record(*pair) for pair in pairs]
  return Memory(records, dpo.Objective.encoding({'template': 'plain'}), TOKENIZER)


def examples(rows):
  return [rows.example(i, np.random.default_rng(0)) for i in range(len(rows))]


def theirs(kind, beta, log_p, reference, mask):
  """What trl makes of log-probabilities of tokens, the chosen answers before the rejected ones, and
  its gradient.
  """
  torch = pytest.importorskip('torch')
  from trl.experimental.cpo import cpo_trainer
  from trl.experimental.orpo import orpo_trainer
  from trl.trainer import dpo_trainer

  given = torch.tensor(log_p, requires_grad=True)
  masked = given * torch.tensor(mask)
  same = lambda x: x
  accelerator = types.SimpleNamespace(device='cpu', gather=same, gather_for_metrics=same)
  if kind in ('simpo', 'orpo'):
    sides = (masked.sum(1) / torch.tensor(mask).sum(1)).chunk(2)
    own = dict(alpha=0.0, beta=beta, loss_type='simpo', simpo_gamma=0.4, label_smoothing=0.1)
    stub = types.SimpleNamespace(accelerator=accelerator, **own)
    if kind == 'simpo':
      loss = cpo_trainer.CPOTrainer.cpo_loss(stub, *sides)[0].mean()
    else:
      loss = -orpo_trainer.ORPOTrainer.odds_ratio_loss(stub, *sides)[0].mean() / beta
  else:
    zeros = torch.zeros(masked.shape)
    outputs = types.SimpleNamespace(
      log_probs=masked, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
    )
    stub = types.SimpleNamespace(
      model=types.SimpleNamespace(training=False),
      accelerator=accelerator,
      aux_loss_enabled=False,
      ld_alpha=None,
      precompute_ref_logps=True,
      f_divergence_type='reverse_kl',
      beta=beta,
      loss_types=[{'dpo': 'sigmoid', 'ipo': 'ipo'}[kind]],
      loss_weights=[1.0],
      use_weighting=False,
      _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
      _total_train_tokens=0,
      _tp_size=1,
    )
    ids = torch.ones((len(mask), mask.shape[1] + 1), dtype=torch.long)
    completion = torch.nn.functional.pad(torch.tensor(mask).long(), (1, 0))
    before = dict(
      zip(('ref_chosen_logps', 'ref_rejected_logps'), torch.tensor(reference).T, strict=True)
    )
    inputs = dict(input_ids=ids, attention_mask=ids, completion_mask=completion) | before
    found = Graph(outputs)
    loss = dpo_trainer.DPOTrainer._compute_loss(stub, found, inputs, return_outputs=False)
  loss.backward()
  return loss.item(), given.grad.numpy()


class Graph:
  """A model that gives what it holds."""

  def __init__(self, outputs):
    self.outputs = outputs

  def __call__(self, **inputs):
    return self.outputs


@pytest.mark.parity
@pytest.mark.parametrize(
  ('kind', 'options'),
  [
    ('dpo', dict(beta=0.3)),
    ('ipo', dict(beta=0.2)),
    ('simpo', dict(beta=2.0, gamma=0.4, label_smoothing=0.1)),
    ('orpo', dict(beta=0.5)),
  ],
)
def test_losses_and_gradients_are_those_of_trl(kind, options):
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 9, 6)
  mask = (np.arange(9)[None] < lengths[:, None]).astype(np.float32)
  log_p = -rng.exponential(2.0, (6, 9)).astype(np.float32)
  reference = -rng.exponential(9.0, (3, 2)).astype(np.float32)
  wanted, wanted_grads = theirs(kind, options['beta'], log_p, reference, mask)
  objective = dpo.Objective(TOKENIZER, loss=kind, **options)
  sides = lambda x: jnp.stack([x[:3], x[3:]], axis=-1)[None]

  def ours(log_p):
    sums, counts = (sides(jnp.sum(x, axis=1)) for x in (log_p * mask, mask))
    batch = {'pair_weight': jnp.ones((1, 3)), 'reference': jnp.asarray(reference)[None]}
    objective._sums = lambda *_: (sums, counts)
    value, weight = objective.loss(None, None, batch)['preference']
    return value / weight

  value, grads = jax.value_and_grad(ours)(jnp.asarray(log_p))
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  np.testing.assert_allclose(grads, wanted_grads, rtol=1e-4, atol=1e-7)
  assert np.abs(wanted_grads).max() > 1e-3


@pytest.mark.slow
def test_log_probabilities_of_tokens():
  rng = np.random.default_rng(0)
  x, table = rng.normal(size=(2, 7, 4)), rng.normal(size=(11, 4))
  targets, bias = rng.integers(0, 11, (2, 7)), rng.normal(size=11)
  logits = x @ table.T + bias
  wanted = (
    np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  )
  given = (jnp.asarray(a, jnp.float32) for a in (x, table))
  arrays = (*given, jnp.asarray(targets), jnp.asarray(bias, jnp.float32))
  np.testing.assert_allclose(vocabulary.token_nll(*arrays), wanted, rtol=1e-5)
  for chunk in (400, 1 << 28):  # several chunks, the last one filled up; one
    old, vocabulary.CHUNK_BYTES = vocabulary.CHUNK_BYTES, chunk
    try:
      summed = lambda x, w, t, b: jnp.sum(vocabulary.token_nll(x, w, t, b))
      grads = jax.grad(summed, argnums=(0, 1, 3))(*arrays)
    finally:
      vocabulary.CHUNK_BYTES = old
    plain = lambda x, w, t, b: vocabulary.cross_entropy(x, w, t, jnp.ones((2, 7)), b).nll
    loss = lambda *a: vocabulary.cross_entropy(*a[:3], jnp.ones((2, 7)), a[3]).loss
    np.testing.assert_allclose(summed(*arrays), plain(*arrays), rtol=1e-5)
    for ours, theirs in zip(grads, jax.grad(loss, argnums=(0, 1, 3))(*arrays), strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dpo', 'ipo', 'simpo', 'orpo'])
def test_packed_pairs_learn_as_if_alone(kind):
  """Whatever a row holds and in however many parts a batch is run, to 1e-10; and where the model is
  its own reference, DPO is ln 2.
  """
  with jax.enable_x64(True):
    model = decoder.Model(vocab_size=TOKENIZER.vocab_size, **shape(192))
    results = []
    for packing in ('none', 'best_fit'):
      objective = dpo.Objective(TOKENIZER, loss=kind, packing=packing)
      rows = objective.rows(documents(PAIRS), 192)
      batch = filled(examples(rows), 4)
      network, params = network_of(model, objective, batch)
      if objective.needs_reference:
        own = networks.apply(network, params, batch, method=scored)
        batch['reference'] = np.asarray(own)
        said = networks.apply(network, params, batch)['preference']
        equal = np.log(2.0) if kind == 'dpo' else (1 / (2 * 0.1)) ** 2
        np.testing.assert_allclose(said[0] / said[1], equal, rtol=1e-12)
        batch['reference'] = np.asarray(own) * 0.9
      for count in (1, 2):
        results.append(step.gradient(params, batch, None, network=network, micro_batches=count))
    assert len(rows) < 4
    grads, metrics = results[0]
    assert metrics['preference'][1] == 4
    for other, said in results[1:]:
      assert_same(other, grads)
      assert_same(said, metrics)


def scored(network, batch):
  hidden = network.model(batch).hidden
  return network.objective.of_reference(network.net(), hidden, batch)


def test_only_the_answer_counts():
  """Earlier turns of the assistant are part of the question."""
  before = [
    {'role': 'user', 'content': 'q'},
    {'role': 'assistant', 'content': 'early'},
    {'role': 'user', 'content': 'r'},
  ]
  said = record(before, 'yes', 'no')
  listed = record(None, *([*before, {'role': 'assistant', 'content': x}] for x in ('yes', 'no')))
  found = [dpo.encode(each, TOKENIZER, dpo.chat_template.PLAIN) for each in (said, listed)]
  for name, array in found[0].items():
    np.testing.assert_array_equal(array, found[1][name])
  for name, answer in (('chosen', 'yes'), ('rejected', 'no')):
    ids = found[0][f'{name}_tokens'][found[0][f'{name}_learned'] > 0]
    assert TOKENIZER.decode(ids) == answer and ids[-1] == TOKENIZER.eos_id


@pytest.mark.slow
def test_a_run_begins_at_ln_2_and_keeps_what_its_reference_thinks(tmp_path):
  (tmp_path / 'pairs.jsonl').write_text(
    '\n'.join(json.dumps(record(f'say {a}', a * 3, b * 2)) for a in 'abcdef' for b in 'xyz')
  )
  settings = config.get_config().to_dict()
  settings.pop('pretrained')
  settings['data'] = dict(source='chat', path=str(tmp_path / 'pairs.jsonl'), validation=0.2)
  settings['data'] |= dict(cache=str(tmp_path / 'cache'), workers=1)
  settings['tokenizer'] = dict(name='byte')
  sizes = dict(dim=16, layers=1, heads=2, mlp_dim=24, max_len=128)
  settings['model'] = dict(name='decoder', variant='gpt_tiny', remat='none', **sizes)
  settings |= dict(steps=2, batch_size=4, seq_len=128, log_every=1, eval_every=2)
  settings |= dict(checkpoint=dict(every=2, keep=1), logging=dict(tensorboard=False))
  first = loop.prepare(config_lib.parse(settings), tmp_path / 'first')
  loop.train(first)
  settings['init_from'] = str(tmp_path / 'first')
  settings['objective'] = settings['objective'] | dict(loss='dpo')
  settings['adapter'] = dict(name='lora', rank=2, alpha=4)
  run = loop.prepare(config_lib.parse(settings), tmp_path / 'second')
  values = loop.train(run)
  lines = [json.loads(line) for line in (tmp_path / 'second' / 'metrics.jsonl').open()]
  assert lines[0]['preference'] == pytest.approx(np.log(2), abs=1e-6)
  assert lines[1]['preference'] != lines[0]['preference'] and values['reward_accuracy'] >= 0
  (kept,) = (tmp_path / 'cache' / 'references').iterdir()
  time = kept.stat().st_mtime_ns
  again = loop.prepare(config_lib.parse(settings), tmp_path / 'third')
  assert kept.stat().st_mtime_ns == time
  np.testing.assert_array_equal(again.train[0]['reference'], run.train[0]['reference'])
  assert (run.train[0]['reference'][0] < 0).all()
  for changed, said in (
    (dict(init_from=None, adapter={}), 'give config.init_from, or config.objective.reference'),
    (dict(adapter=dict(name='prompt', length=3), seq_len=120), 'puts virtual tokens before each'),
  ):
    with pytest.raises(ValueError, match=said):
      loop.prepare(
        config_lib.parse(settings | changed), tmp_path / f'wrong{len(changed)}{said[:4]}'
      )


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    (dict(loss='ppo'), "objective.loss='ppo' must be one of dpo, ipo, simpo, orpo"),
    (dict(beta=0.0), 'objective.beta=0.0 must be above 0'),
    (dict(gamma=1.0), 'objective.gamma is for simpo, and the loss is dpo'),
    (dict(loss='orpo', reference='x'), 'objective.reference is for dpo and ipo'),
    (dict(loss='ipo', label_smoothing=0.1), 'label_smoothing is for dpo and simpo'),
    (dict(label_smoothing=0.5), 'label_smoothing=0.5 must be at least 0 and below 0.5'),
    (dict(long='cut'), "objective.long='cut' must be one of error, drop"),
  ],
)
def test_options_that_cannot_be(options, said):
  with pytest.raises(ValueError, match=said):
    dpo.Objective(TOKENIZER, **options)


@pytest.mark.parametrize(
  ('pair', 'said'),
  [
    (('q', 'a', 'a'), 'the chosen answer is equal to the rejected one'),
    (('q', 'a', ''), 'a record has no rejected, only prompt, chosen'),
    (([{'role': 'assistant', 'content': 'x'}], 'a', 'b'), 'must begin with system or user'),
    (('q', [{'role': 'user', 'content': 'a'}], 'b'), 'of user and follows on one of user'),
  ],
)
def test_records_that_are_no_preference(pair, said):
  with pytest.raises(ValueError, match=said):
    documents([pair])


def test_pairs_that_are_too_long():
  pairs = [*PAIRS, ('q' * 90, 'a', 'b')]
  with pytest.raises(ValueError, match='document 4: both .* 226 tokens, a row 96; 1 of 5'):
    dpo.Objective(TOKENIZER).rows(documents(pairs), 96)
  rows = dpo.Objective(TOKENIZER, long='drop').rows(documents(pairs), 96)
  assert sorted(n for i in range(len(rows)) for n in rows.texts(i)) == [0, 1, 2, 3]
