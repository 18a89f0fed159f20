"""Generation through an adapter writes what its merged model writes."""

import numpy as np
import pytest

from llm_jax.core import tree
from llm_jax.generation.decoding import Generator
from llm_jax.generation.sampling import Sampling

pytestmark = pytest.mark.slow
PROMPTS = [[9, 12, 33], [40, 41]]
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)
ADAPTERS = {
  'dora': dict(name='lora', rank=2, targets='attention/.*|mlp/.*', dora=True),
  'adalora': dict(name='adalora', rank=2, target_rank=1),
  'ia3': dict(name='ia3'),
  'bottleneck': dict(name='bottleneck', size=4),
  'prefix': dict(name='prefix', length=3),
  'prefix_mlp': dict(name='prefix', length=3, hidden=5),
  'p_tuning': dict(name='p_tuning', length=3, hidden=5),
}


def prompts(program):
  """Those above, behind the virtual tokens of the adapter."""
  adapter = program.network.adapter
  virtual = 64 + np.arange(adapter.tokens if adapter else 0)
  return [[*virtual.tolist(), *prompt] for prompt in PROMPTS]


def written(program, params):
  network = program.network
  made = Generator(network.model, program.model_infos, program.layout, network.adapter)
  tokens = made.tokens(made.weights(params['model']), prompts(program), GREEDY)
  return np.stack(list(tokens), axis=1).tolist()


def greedy(tiny, program, params):
  """The same by whole forward passes of one prompt after the other."""
  run = program.function(lambda network, batch: network.model.logits(network.model(batch).hidden))
  for prompt in prompts(program):
    ids = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
      row = np.zeros((1, 16), np.int32)
      row[0, : len(ids)] = ids
      segments = (np.arange(16) < len(ids)).astype(np.int32)[None]
      found = run(params, {'tokens': row, 'segments': segments})
      ids.append(int(np.argmax(found[0, len(ids) - 1])))
    yield ids[len(prompt) :]


@pytest.mark.parametrize('name', ADAPTERS)
def test_it_writes_what_whole_passes_give(tiny, name):
  program = tiny.known('llama', ADAPTERS[name])
  rng = np.random.default_rng(0)

  def drawn(path, x):
    return rng.normal(path.endswith('scale'), 0.4, x.shape).astype(np.float32)

  params = tree.map_with_path(drawn, program.params)
  expected = list(greedy(tiny, program, params))
  assert written(program, params) == expected
  base = tiny.known('llama')
  leaves = tree.flatten(params)
  plain = tree.nest({path: leaves[path] for path in base.base})
  assert written(base, plain) != expected
