"""The table of what an adapter trains, and the gradients that it shows."""

import types

import numpy as np
import pytest

from llm_jax.adapters import lora
from llm_jax.core import contracts
from llm_jax.training import adapted


def numbers(least):
  return adapted.Gradient(np.float32(0.5), np.float32(least))


class Program:
  """What the table reads of a program."""

  def __init__(self, adapter, part=False):
    leaf = lambda *shape: np.zeros(shape, np.float32)
    trained = {'model': {'q': {'lora_a': leaf(8, 2), 'lora_b': leaf(2, 4)}}}
    whole = {'model': {'q': trained['model']['q'] | {'kernel': leaf(8, 12)}}}
    self.network = types.SimpleNamespace(adapter=adapter)
    self.objective = contracts.Objective()
    self.config = types.SimpleNamespace(adapter={'name': 'lora'})
    self.layers = {'model/q/lora_a': np.array([True] * 3 + [False] * 5)} if part else {}
    self.params, self.state = whole, types.SimpleNamespace(params=trained)


FOUND = {'model/q/lora_a': numbers(0.0), 'model/q/lora_b': numbers(0.1)}


def test_the_table_counts_and_names_the_zeros_of_the_method():
  text = adapted.table(Program(lora.Adapter(rank=2)), FOUND)
  lines = text.splitlines()
  assert 'lora_b is 0' in lines[1] and '16' in lines[1] and '0.5' in lines[2]
  assert lines[-1].startswith('24 of 120 parameters are trained (20.00%), in 2 arrays')
  part = adapted.table(Program(lora.Adapter(rank=2), part=True), FOUND)
  assert part.splitlines()[-1].startswith('14 of 120 parameters')


def test_a_parameter_without_gradient_is_an_error():
  program = Program(lora.Adapter(rank=2))
  adapted.check(program, FOUND)
  for least in (0.0, np.nan):
    with pytest.raises(ValueError, match='(?s)does not depend on.*model/q/lora_b'):
      adapted.check(program, FOUND | {'model/q/lora_b': numbers(least)})
  program.objective.no_gradient = lambda path: 'hidden' if path.endswith('lora_b') else None
  adapted.check(program, FOUND | {'model/q/lora_b': numbers(0.0)})
