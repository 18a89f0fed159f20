"""Answers in batches of few shapes: those of any batches up to rounding, to the bit the same in any
company, and compiled before the first record comes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bert_tiny
from llm_jax.core import config
from llm_jax.data.tokenizers import byte
from llm_jax.inference.prediction import Labeller
from llm_jax.programs import assemble
from llm_jax.training import program as programs

SHAPE = dict(dim=32, layers=1, heads=2, mlp_dim=32, max_len=256, dropout=0.0, attention_dropout=0.0)
TOKENIZER = byte.create()
TASKS = {
  'classify': dict(classes=('a', 'b')),
  'tag': dict(tags=('a', 'b'), loss='crf'),
  'qa': dict(),
  'rerank': dict(),
  'choice': dict(),
  'pair': dict(range=(0.0, 1.0)),
}


def labellers(name):
  """One of few shapes and one of any, their parameters, and records of unequal lengths."""
  tree = bert_tiny.get_config().to_dict()
  tree |= dict(seq_len=256, batch_size=4, tokenizer=dict(name='byte'), model=tree['model'] | SHAPE)
  tree['objective'] = dict(name=name, packing='none') | TASKS[name]
  parsed = config.parse(tree)
  made, rng = programs.outline(parsed, jax.devices()[:1]), np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype)
  params = jax.tree.map(draw, made.params)
  encoder = assemble.encoder(parsed)
  sample = type(made.objective).sample_records(parsed.objective)[0]
  known = {key: x for key, x in sample.items() if key not in ('label', 'labels', 'answers')}
  records = [longer(known, times) for times in (1, 4, 2, 9, 1)]
  few, usual = (Labeller(made, TOKENIZER, encoder, few=few) for few in (True, False))
  return few, usual, params, records


def longer(record, times):
  """Its texts so many times."""
  grown = {key: ' '.join([x] * times) for key, x in record.items() if isinstance(x, str)}
  return record | grown


def numbers(answer):
  """All numbers of an answer, in their order."""
  return [x for x in jax.tree.leaves(answer) if isinstance(x, float)]


@pytest.mark.slow
@pytest.mark.parametrize('name', TASKS)
def test_in_few_shapes_company_changes_no_bit_and_nothing_is_compiled(name):
  few, usual, params, records = labellers(name)
  few.warm(params, records[0])
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
  try:
    together = list(few(params, records))
    alone = [next(few(params, [record])) for record in records]
  finally:
    jax.monitoring.clear_event_listeners()
  assert together == alone
  assert not [one for one in compiled if 'backend_compile' in one]
  for one, other in zip(together, usual(params, records), strict=True):
    assert one.keys() == other.keys()
    np.testing.assert_allclose(numbers(one), numbers(other), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_text_that_is_cut_is_said_in_few_shapes_too(caplog):
  few, _, params, records = labellers('classify')
  list(few(params, [records[0], longer(records[0], 99)]))
  assert '1 of 2 texts are longer than seq_len=256 allows' in caplog.text
