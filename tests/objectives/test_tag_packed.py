"""Words of texts that share a row learn, and are answered, as if each text had one of its own; in
float64, where nothing hides.
"""

import jax
import numpy as np
import pytest
from exact import TOKENIZER, TOLERANCE, answers, assert_same, filled, network_of, shape

from llm_jax.data.documents import Memory
from llm_jax.models import encoder
from llm_jax.objectives import tag
from llm_jax.programs import network as networks
from llm_jax.training import step

pytestmark = pytest.mark.slow
SEQ_LEN, BIO = 24, ('B-x', 'B-y', 'I-x', 'I-y', 'O')


def records():
  """Nine texts of one to six words with tags that IOB2 allows: some of them without characters, one
  text longer than a row, one without tags, one without words.
  """
  rng = np.random.default_rng(4)
  made = []
  for size in (1, 3, 2, 4, 0, 2, 6, 3, 1):
    words = [''.join(rng.choice(list('abc'), rng.integers(0, 5))) for _ in range(size)]
    tags = ['O']
    for _ in words:
      fine = [t for t in BIO if t[0] != 'I' or tags[-1][1:] == t[1:]]
      tags.append(str(rng.choice(fine)))
    made.append({'words': words, 'tags': tags[1:]})
  made[7]['words'] = ['abcabcabc', 'cabcab', 'bcabcabcabca']
  del made[2]['tags']
  return made


def batch_of(loss, packing):
  """All rows, filled up to as many as there would be with a row for each text."""
  objective = tag.Objective(
    TOKENIZER, BIO, loss=loss, packing=packing, dropout=0.0, unlabelled='ignore'
  )
  rows = objective.rows(Memory(records(), tag.Objective.encoding({}), TOKENIZER), SEQ_LEN)
  examples = [rows.example(i, np.random.default_rng(0)) for i in range(len(rows))]
  return objective, rows, filled(examples, 10)


@pytest.mark.parametrize('loss', tag.LOSSES)
def test_packed_texts_learn_and_are_answered_as_if_alone(loss):
  with jax.enable_x64(True):
    objective, rows, packed = batch_of(loss, 'best_fit')
    single, each, alone = batch_of(loss, 'none')
    assert max(len(rows.texts(i)) for i in range(len(rows))) > 2 and len(rows) < len(each) == 9
    model = encoder.Model(vocab_size=TOKENIZER.vocab_size, **shape(SEQ_LEN))
    network, params = network_of(model, objective, packed)

    @jax.jit
    def learn(batch):
      grads, metrics = step.gradient(params, batch, None, network=network)
      said = networks.apply(network, params, batch, method='predict')
      return (metrics['tag'], grads), said

    (wanted, said_alone), (found, said) = learn(alone), learn(packed)
    assert wanted[0][1] == sum(np.count_nonzero(row) for row in alone['tag_weight']) > 10
    assert_same(found, wanted)
    assert all(np.abs(x).max() > 1e-6 for x in jax.tree.leaves(found[1]['heads_tagger']))
    if loss != 'softmax':
      assert all(np.abs(x).max() > 1e-6 for x in jax.tree.leaves(found[1]['heads_moves']))
    here = answers(objective, rows, said)
    there = answers(single, each, said_alone)
    assert here.keys() == there.keys() == set(range(9))
    for text, answer in here.items():
      assert answer['tags'] == there[text]['tags']
      if loss != 'hinge':
        p, q = (np.array(a['probabilities'], float) for a in (answer, there[text]))
        np.testing.assert_allclose(p, q, rtol=TOLERANCE, atol=TOLERANCE)
    one_segment = packed | {'segments': np.minimum(packed['segments'], 1)}
    with pytest.raises(AssertionError):  # texts that see each other
      assert_same(learn(one_segment)[0], wanted)
    if loss != 'softmax':
      joined = packed | {'chain': np.where(packed['chain'] > 0, packed['chain'] & ~2, 0)}
      joined['chain'][:, 1] |= 2
      with pytest.raises(AssertionError):  # chains that are not cut
        assert_same(learn(joined)[0], wanted)
