"""Samples: what a decoder in training shows."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gpt_tiny
from llm_jax.core import config
from llm_jax.core.state import TrainState
from llm_jax.data.tokenizers import byte
from llm_jax.inference import samples as samples_lib
from llm_jax.inference.samples import Samples
from llm_jax.training import program as programs

SHAPE = dict(dim=16, layers=2, heads=2, mlp_dim=24, max_len=64, dropout=0.0, attention_dropout=0.0)
TOKENIZER = byte.create()


def program(module, **changes):
  """A program and parameters away from zero."""
  tree = module.get_config().to_dict()
  tree |= dict(seq_len=32, batch_size=2, tokenizer=dict(name='byte'), model=tree['model'] | SHAPE)
  made = programs.outline(config.parse(tree | changes), jax.devices()[:1])
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype)
  return made, jax.tree.map(draw, made.params)


def test_text_is_shown_as_it_is():
  text = 'it\'s "学而"\té\n👩\u200d🚀'
  assert samples_lib.shown('', text) == f' -> {text}'.replace('\n', '\n    ')
  assert samples_lib.shown('a\x1b[2J', 'b\r\x85\u2028') == r'a\x1b[2J -> b\r\x85\u2028'


@pytest.mark.slow
def test_samples_are_the_same_each_time_and_stand_in_log_and_file(small, tmp_path):
  made, params = program(gpt_tiny)
  texts = [[], TOKENIZER.encode('hello world'), TOKENIZER.encode('bye')]
  lines, boards, path = [], [], tmp_path / 'samples.txt'
  log = types.SimpleNamespace(
    say=lambda *line: lines.append(line), text=lambda *text: boards.append(text)
  )
  samples = Samples(made, TOKENIZER, [small.Documents(texts)], 3, path, 2, log)
  first = samples.texts(params)
  assert [beginning for beginning, _ in first] == ['', 'hello wo', 'bye']
  assert samples.texts(params) == first
  assert samples.texts(jax.tree.map(lambda x: 1.5 * x, params)) != first
  state = TrainState(step=2, params=params, opt_state=(), rng=None)
  samples(2, state, {})
  samples(4, state, {})
  assert [line[1] for line in lines] == [2] * 3 + [4] * 3
  shown = [samples_lib.shown(*sample) for sample in first]
  assert [line[2] for line in lines[:3]] == shown
  assert boards == [(i, 'samples', '\n'.join(shown)) for i in (2, 4)]
  assert path.read_text() == ''.join(
    f'step {i}\n' + ''.join(f'  {s}\n' for s in shown) for i in (2, 4)
  )
