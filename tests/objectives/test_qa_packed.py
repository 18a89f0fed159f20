"""Windows that share a row learn, and are scored, as if each had one of its own; in float64, where
nothing hides. The loss is that of NumPy.
"""

import jax
import numpy as np
import pytest
from exact import TOKENIZER, TOLERANCE, assert_same, filled, network_of, shape

from llm_jax.data.documents import Memory
from llm_jax.models import encoder
from llm_jax.objectives import qa
from llm_jax.programs import network as networks
from llm_jax.training import step

pytestmark = pytest.mark.slow
SEQ_LEN = 32


def records():
  """Seven questions: two with contexts of several windows, one without an answer, one that is not
  learned.
  """
  rng = np.random.default_rng(2)
  made = []
  for size in (4, 60, 9, 3, 33, 7, 5):
    context = ''.join(rng.choice(list('abc '), size))
    start = int(rng.integers(0, size - 2))
    answers = [{'text': context[start : start + 2], 'answer_start': start}]
    made.append({'question': 'abc'[: 1 + size % 3], 'context': context, 'answers': answers})
  made[2]['answers'] = []
  del made[5]['answers']
  return made


def batch_of(packing, count):
  """All rows, filled up to as many as there would be with a row for each window."""
  objective = qa.Objective(
    TOKENIZER, stride=9, packing=packing, no_answer=True, unlabelled='ignore'
  )
  rows = objective.rows(Memory(records(), qa.Objective.encode, TOKENIZER), SEQ_LEN)
  examples = [rows.example(i, np.random.default_rng(0)) for i in range(len(rows))]
  return objective, rows, filled(examples, count)


def windows_of(rows, said):
  """(text, first token of the context) -> scores of the window's first token and its context."""
  found = {}
  for index in range(len(rows)):
    for w in rows.windows(index):
      positions = [w.first, *range(w.context, w.context + w.stop - w.start)]
      found[w.text, w.start] = np.stack(
        [np.asarray(said[name])[index][positions] for name in ('starts', 'ends')]
      )
  return found


def loss_of(rows, windows):
  """The sum of the losses, and how many windows are counted."""
  total = count = 0
  for (text, start), (starts, ends) in windows.items():
    given = rows.given[text]
    if given is None:
      continue
    targets = 0, 0
    if given:
      (answer, begin), *_ = given
      first, last = begin - start, begin + len(answer) - 1 - start
      if first >= 0 and last < len(starts) - 1:
        targets = 1 + first, 1 + last
    for scores, target in zip((starts, ends), targets, strict=True):
      total += (np.log(np.exp(scores).sum()) - scores[target]) / 2
    count += 1
  return total, count


def test_packed_windows_learn_and_are_scored_as_if_alone():
  with jax.enable_x64(True):
    single, each, alone = batch_of('none', 0)
    objective, rows, packed = batch_of('best_fit', len(each))
    assert len(rows) < len(each) and max(len(rows.texts(i)) for i in range(len(rows))) > 1
    assert rows.parts(1) > 2
    packed_slots = packed['span_weight'].shape[1]
    widen = lambda x: np.pad(x, ((0, 0), (0, packed_slots - x.shape[1])))
    for name in ('span_weight', 'text_firsts', 'text_lasts'):
      alone[name] = widen(alone[name])
    model = encoder.Model(vocab_size=TOKENIZER.vocab_size, **shape(SEQ_LEN))
    network, params = network_of(model, objective, packed)

    @jax.jit
    def learn(batch):
      grads, metrics = step.gradient(params, batch, None, network=network)
      said = networks.apply(network, params, batch, method='predict')
      return (metrics['qa'], metrics['qa_span_accuracy'], grads), said

    (wanted, said_alone), (found, said) = learn(alone), learn(packed)
    assert_same(found, wanted)
    moved = found[2]['heads_spans']['dense']
    assert np.abs(moved['kernel']).max() > 1e-6 and np.abs(moved['bias']).max() < 1e-15
    assert objective.no_gradient('heads_spans/dense/bias') is not None
    here, there = windows_of(rows, said), windows_of(each, said_alone)
    assert here.keys() == there.keys() and len(here) == len(each)
    assert_same(here, there)
    total, count = loss_of(rows, here)
    np.testing.assert_allclose(found[0], (total, count), rtol=TOLERANCE)
    one_segment = packed | {'segments': np.minimum(packed['segments'], 1)}
    with pytest.raises(AssertionError):  # windows that see each other
      assert_same(learn(one_segment)[0], wanted)
