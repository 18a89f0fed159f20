import jax
import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.models import encoder
from llm_jax.objectives import classify, clm, mix, mlm, nsp
from llm_jax.programs.network import Network


def bert(small, **weights):
  parts = {'mlm': mlm.Objective(small.Tokenizer()), 'nsp': nsp.Objective(small.Tokenizer())}
  return mix.Objective(parts=parts, rows='nsp', weights={'mlm': 1.0, 'nsp': 1.0} | weights)


def batch_of(small, objective, documents, seq_len=16, rows=4):
  laid, rng = objective.rows(documents, seq_len), np.random.default_rng(0)
  return small.stack([objective.transform(laid.example(i, rng), rng) for i in range(rows)])


def test_the_bert_loss(small):
  objective = bert(small, mlm=0.5, nsp=2)
  assert objective.terms == {'mlm': 0.5, 'nsp': 2.0} == objective.terms_at(0.3)
  moving = bert(small, mlm=(1.0, 0.0)).terms_at(0.25)
  assert moving == {'mlm': 0.75, 'nsp': 1.0}
  batch = batch_of(small, objective, small.random_documents([60, 40]))
  assert {'mask_positions', 'nsp_label', 'token_types'} <= batch.keys() and (
    batch['mask_weights'].sum(-1) > 0
  ).all()
  hidden = np.random.default_rng(1).normal(size=(4, 16, 6)).astype(np.float32)
  net = small.network(nsp=2)
  metrics = objective.loss(net, small.read(objective, hidden, batch), batch)
  for part in objective.parts.values():
    for name, (value, weight) in part.loss(net, small.read(part, hidden, batch), batch).items():
      assert float(metrics[name][0]) == float(value) and float(metrics[name][1]) == float(weight)
  assert metrics.keys() == {'mlm', 'mlm_nll', 'mlm_accuracy', 'nsp', 'nsp_accuracy'}
  assert objective.summary({'mlm_nll': 0.0, 'nsp': 1.0}) == {'perplexity': 1.0}
  np.testing.assert_array_equal(objective.targets(batch)[0], batch['mask_targets'])


@pytest.mark.slow
def test_unlabelled_rows_count_for_mlm_only(small):
  documents = small.Documents([np.arange(10, 20), np.arange(20, 30)], labels=['b', None])
  tokenizer = small.Tokenizer()
  parts = {
    'mlm': mlm.Objective(tokenizer),
    'labels': classify.Objective(tokenizer, ('a', 'b'), unlabelled='ignore'),
  }
  objective = mix.Objective(parts=parts, rows='labels', weights={'mlm': 1, 'labels': 1})
  batch = batch_of(small, objective, documents, rows=2)
  metrics = objective.loss(
    small.network(classifier=2), small.read(objective, np.ones((2, 16, 6)), batch), batch
  )
  assert (
    float(metrics['classify'][1]) == 1 and float(metrics['mlm'][1]) == 4
  )  # round(0.15 * 10) in each of the rows


def test_a_part_that_reads_all_makes_the_others_find_their_own(small):
  tokenizer = small.Tokenizer()
  documents = small.random_documents([60, 40], labels=['a', 'b'])
  parts = {
    'mlm': mlm.Objective(tokenizer),
    'labels': classify.Objective(tokenizer, ('a', 'b'), pool='mean'),
  }
  objective = mix.Objective(parts=parts, rows='labels', weights={'mlm': 1, 'labels': 1})
  batch = batch_of(small, objective, documents, rows=2)
  assert objective.positions(batch) is None and parts['mlm'].positions(batch) is not None
  hidden, net = (
    np.random.default_rng(1).normal(size=(2, 16, 6)).astype(np.float32),
    small.network(classifier=2),
  )
  metrics = objective.loss(net, hidden, batch)
  for part in parts.values():
    for name, (value, _) in part.loss(net, small.read(part, hidden, batch), batch).items():
      assert float(metrics[name][0]) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.slow
def test_a_real_network_starts_at_the_loss_of_guessing(small):
  """ln V for the words and ln 2 for the sentences; heads stand beside the model, `pooler` once."""
  vocab_size = 97
  model = encoder.Model(vocab_size=vocab_size, dim=16, layers=1, heads=2, mlp_dim=32, max_len=32)
  objective = bert(small)
  network = Network(model=model, heads=objective.heads(model), objective=objective)
  batch = batch_of(small, objective, small.random_documents([300, 200], 50), seq_len=32, rows=8)
  params = jax.jit(network.init)(jax.random.PRNGKey(0), batch)['params']
  assert set(params) == {'model', 'heads_mlm', 'heads_pooler', 'heads_nsp'}
  metrics = jax.jit(network.apply)({'params': params}, batch)
  assert abs(float(metrics['mlm'][0] / metrics['mlm'][1]) / np.log(vocab_size) - 1) < 0.03
  assert abs(float(metrics['nsp'][0] / metrics['nsp'][1]) / np.log(2) - 1) < 0.03


def test_what_is_passed_on_to_the_parts(small):
  """FLOPs add up; evaluators and the predictor are those of the parts; records are encoded by the
  parts' own functions.
  """
  tokenizer = small.Tokenizer()
  parts = {
    'mlm': mlm.Objective(tokenizer),
    'labels': classify.Objective(tokenizer, ('a', 'b')),
    'nsp': nsp.Objective(tokenizer),
  }
  objective = mix.Objective(parts=parts, rows='nsp', weights=dict.fromkeys(parts, 1))
  assert objective.evaluators == ('loss', 'classification')
  assert objective.predictor is parts['labels'] and bert(small).predictor is None
  assert bert(small).evaluators == ('loss',)
  model = small.network(dim=6, vocab_size=50).model
  batch = {'mask_positions': np.zeros((4, 3), np.int32), 'targets': np.zeros((4, 16), np.int32)}
  by_hand = 4 * 3 * 2 * (6 * 6 + 50 * 6)
  assert objective.flops(model, batch) == by_hand == parts['mlm'].flops(model, batch)
  both = mix.Objective(
    {'mlm': parts['mlm'], 'clm': clm.Objective(tokenizer)}, 'clm', {'mlm': 1, 'clm': 1}
  )
  assert both.flops(model, batch) == by_hand + 4 * 16 * 2 * 50 * 6
  assert mix.Objective.encode is contracts.Objective.encode


def test_refuses(small):
  part, other = mlm.Objective(small.Tokenizer()), nsp.Objective(small.Tokenizer())
  with pytest.raises(ValueError, match="rows='npp'.*mlm, nsp"):
    mix.Objective({'mlm': part, 'nsp': other}, 'npp', {'mlm': 1.0, 'nsp': 1.0})
  with pytest.raises(ValueError, match='weights has mlm; it must have one for each part: mlm, nsp'):
    mix.Objective({'mlm': part, 'nsp': other}, 'nsp', {'mlm': 1.0})
  for weight in (0.0, -1.0, float('nan'), True, '1', (1.0,), (0, 0.0), (1.0, -1.0)):
    with pytest.raises(ValueError, match='weights.nsp=.*above 0'):
      mix.Objective({'mlm': part, 'nsp': other}, 'nsp', {'mlm': 1.0, 'nsp': weight})
  with pytest.raises(ValueError, match='parts.again.*mlm'):
    mix.Objective({'mlm': part, 'again': part}, 'mlm', {'mlm': 1.0, 'again': 1.0})
  two = mix.Objective(
    {'mlm': part, 'clm': clm.Objective(small.Tokenizer())}, 'mlm', {'mlm': 1.0, 'clm': 1.0}
  )
  with pytest.raises(ValueError, match="rows='clm'"):
    batch_of(small, two, small.random_documents([30, 30]))
