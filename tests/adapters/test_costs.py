"""A frozen base costs no products for gradients of its weights: FLOPs of the compiled step."""

import jax
import pytest

from configs import classify
from llm_jax.core import config as config_lib
from llm_jax.planning import costs
from llm_jax.training import program as programs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('as_in_use')]
LAYERS, DIM, MLP, ROWS, LENGTH, RANK = 3, 64, 256, 8, 128, 4
SHAPE = dict(variant='bert_base', layers=LAYERS, dim=DIM, heads=2, mlp_dim=MLP, vocab_size=512)


def flops(adapter, unroll):
  settings = classify.get_config().to_dict()
  del settings['pretrained']
  settings |= dict(batch_size=ROWS, seq_len=LENGTH, adapter=adapter)
  settings['model'] |= SHAPE | dict(remat='none', unroll=unroll, attention='xla')
  settings['optimizer'] = dict(name='adamw', learning_rate=1e-3)  # it has no products
  built = programs.outline(config_lib.parse(settings), jax.devices())
  found = costs.costs(built.train_step.lower(built.state, built.batch).compile().as_text())
  assert not found.unknown_loops
  return found.flops, built.flops


@pytest.mark.parametrize('unroll', [0, LAYERS])
def test_a_frozen_base_has_two_thirds_of_the_products_of_its_weights(unroll):
  tokens = ROWS * LENGTH
  weights = 2 * tokens * (4 * DIM**2 + 2 * DIM * MLP) * LAYERS
  attention = 2 * tokens * LENGTH * DIM * 2 * LAYERS
  lora = 2 * tokens * 2 * DIM * RANK * 2 * LAYERS  # beside queries and values
  pool = 2 * tokens * (LENGTH // 4) * DIM  # means of texts
  full, said = flops({}, unroll)
  assert said == 3 * (weights + attention)
  assert full == pytest.approx(3 * (weights + attention) + 2 * pool, rel=0.01)
  method = dict(name='lora', rank=RANK, targets='query|value')
  adapted, said = flops(method, unroll)
  assert adapted <= 2 * weights + 3 * attention + 3 * lora + 2 * pool
  assert adapted > 1.8 * weights + 2 * attention  # the base is there
  assert said == 2 * weights + 3 * attention + 3 * lora
  assert said == pytest.approx(adapted, rel=0.1)  # what nothing below learns from is spared


@pytest.mark.parametrize(('unroll', 'computed'), [(0, LAYERS + 2), (1, 3 * LAYERS)])
def test_model_flops_are_those_of_what_learns(unroll, computed):
  tokens = ROWS * LENGTH
  layer = 2 * tokens * (4 * DIM**2 + 2 * DIM * MLP) + 2 * tokens * LENGTH * DIM * 2
  compiled, said = flops(dict(name='freeze'), unroll)
  assert said == LAYERS * layer == pytest.approx(compiled, rel=0.05)
  compiled, said = flops(dict(name='freeze', layers=1), unroll)
  assert said == (LAYERS + 2) * layer
  assert compiled == pytest.approx(computed * layer, rel=0.05)  # a loop has all of its gradients
