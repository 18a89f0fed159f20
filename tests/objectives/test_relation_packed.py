"""Spans of texts that share a row learn, and are answered, as if each text had one of its own; in
float64, where nothing hides.
"""

import jax
import numpy as np
import pytest
from exact import TOKENIZER, answers, assert_same, filled, network_of, shape

from llm_jax.data.documents import Memory
from llm_jax.models import decoder, encoder
from llm_jax.objectives import relation
from llm_jax.programs import network as networks
from llm_jax.training import step

pytestmark = pytest.mark.slow
SEQ_LEN, ROWS = 40, 8

CASES = [(encoder, 'markers'), (decoder, 'closing')]


def records():
  """Eight texts, one of them longer than a row, one without a label."""
  rng, made = np.random.default_rng(4), []
  for size in (4, 7, 5, 9, 3, 60, 6, 8):
    text = ''.join(rng.choice(list('abc'), size))
    head = int(rng.integers(0, 2))
    made.append({'text': text, 'head': [head, head + 1], 'tail': [2, 3], 'label': 'xyz'[size % 3]})
  del made[2]['label']
  return made


def batch_of(pool, packing, rows=ROWS):
  objective = relation.Objective(
    TOKENIZER,
    tuple('xyz'),
    pool=pool,
    dropout=0.0,
    packing=packing,
    unlabelled='ignore',
    class_weights=(1.0, 2.0, 0.5),
    label_smoothing=0.1,
  )
  laid = objective.rows(Memory(records(), relation.Objective.encode, TOKENIZER), SEQ_LEN)
  examples = [laid.example(i, None) for i in range(len(laid))]
  return objective, laid, filled(examples, rows)


@pytest.mark.parametrize(('module', 'pool'), CASES)
def test_packed_texts_learn_and_are_answered_as_if_alone(module, pool):
  with jax.enable_x64(True):
    objective, rows, packed = batch_of(pool, 'best_fit')
    single, each, alone = batch_of(pool, 'none')
    assert len(rows) < len(each) == ROWS
    model = module.Model(vocab_size=TOKENIZER.vocab_size, **shape(SEQ_LEN))
    network, params = network_of(model, objective, packed)

    @jax.jit
    def learn(batch):
      grads, metrics = step.gradient(params, batch, None, network=network)
      hidden_BTD = network.model.apply({'params': params['model']}, batch).hidden
      said = networks.apply(network, params, batch, method='predict')
      return (metrics['relation'], grads), said, hidden_BTD

    (wanted, said_alone, hidden_BTD), (found, said, _) = learn(alone), learn(packed)
    labels = [record['label'] for record in records() if 'label' in record]
    assert wanted[0][1] == sum({'x': 1.0, 'y': 2.0, 'z': 0.5}[label] for label in labels)
    assert_same(found, wanted)
    dense = found[1]['heads_relation']['dense']
    assert dense['kernel'].shape == (2 * model.options.dim, 3)
    assert all(np.abs(x).max() > 1e-6 for x in jax.tree.leaves(dense))
    assert_same(probabilities(objective, rows, said), probabilities(single, each, said_alone))
    signs = [ord('@') + 7, ord('#') + 7]
    for row, marked in enumerate(alone['markers'][:, 0]):
      assert alone['tokens'][row, marked].tolist() == signs
      p_C = by_hand(params['heads_relation']['dense'], hidden_BTD[row, marked])
      np.testing.assert_allclose(said_alone['probabilities'][row, 0], p_C, rtol=1e-9)
    if pool == 'closing':
      return
    one_segment = packed | {'segments': np.minimum(packed['segments'], 1)}
    with pytest.raises(AssertionError):  # texts that see each other
      assert_same(learn(one_segment)[0], wanted)
    swapped = packed | {'markers': packed['markers'][..., ::-1]}
    with pytest.raises(AssertionError):  # the tail in place of the head
      assert_same(learn(swapped)[0], wanted)


def probabilities(objective, rows, said):
  found = answers(objective, rows, said)
  return [list(found[text]['probabilities'].values()) for text in range(len(found))]


def by_hand(dense, states_2D):
  """Two states side by side, through the last layer, in NumPy."""
  logits_C = np.asarray(states_2D).reshape(-1) @ np.asarray(dense['kernel'])
  p_C = np.exp(logits_C + np.asarray(dense['bias']))
  return p_C / p_C.sum()
