"""Every config of `configs/`, with each of its arguments, parses and builds, and its model has the
known size.
"""

import importlib
import math
import pathlib

import jax
import pytest

from llm_jax.core import config
from llm_jax.parallel import topology
from llm_jax.training import program as programs

ROOT = pathlib.Path(__file__).parents[1]
# The published sizes are counted from the reference implementations. BERT's have the heads of both
# its losses: 109,482,240 of encoder and pooler + 624,188, and 335,141,888 + 1,084,220. The tiny
# ones: for widths D, F, layers L, vocabulary V and biased layers, V D + 4 D^2 L + 2 D F L and small
# change.
SIZES = {
  ('bert_base', None): 110_106_428,
  ('bert_large', None): 336_226_108,
  ('bert_tiny', None): 1_338_496,
  ('classify', None): 1_317_890,  # two classes, where the data names none
  ('prompt', None): 1_338_496,  # the head of masked LM
  ('tag', None): 1_317_890,  # two tags, likewise
  ('qa', None): 1_055_746,  # first and last token
  ('contrast', None): 1_317_632,  # the encoder alone
  ('choice', None): 1_317_761,  # one score
  ('rerank', None): 1_317_761,
  ('pair', None): 1_317_761,
  ('relation', None): 1_318_146,  # two classes of two states side by side
  ('events', None): 1_317_890,
  ('gpt_tiny', None): 1_317_632,
  ('gpt2', None): 124_439_808,
  ('gpt2', 'small'): 124_439_808,
  ('gpt2', 'medium'): 354_823_168,
  ('gpt2', 'large'): 774_030_080,
  ('gpt2', 'xl'): 1_557_611_200,
  ('gpt2', 'tiny'): 1_317_632,
  ('code_tiny', None): 1_318_016,  # gpt_tiny, and three ids
  ('llama', None): 1_235_814_400,
  ('llama', 'tiny'): 1_250_432,
  ('llama', '3.2-1b'): 1_235_814_400,
  ('llama', '2-7b'): 6_738_415_616,
  ('transformer', None): 2_045_440,
  ('transformer', 'tiny'): 2_045_440,
  ('transformer', 'base'): 63_082_496,
  ('chat', None): 1_317_632,
  ('dpo', None): 1_317_632,
  ('translate', None): 2_045_440,
  ('summarize', None): 2_045_440,
  # T5 1.1 has 76,961,152, 247,577,856 and 783,150,080 with 28 ids more, in two tables.
  ('t5', None): 2_403_712,
  ('t5', 'tiny'): 2_403_712,
  ('t5', 'small'): 76_961_152 - 2 * 28 * 512,
  ('t5', 'base'): 247_577_856 - 2 * 28 * 768,
  ('t5', 'large'): 783_150_080 - 2 * 28 * 1024,
}


def read(name, argument=None):
  module = importlib.import_module(f'configs.{name}')
  return module.get_config() if argument is None else module.get_config(argument)


def parameters(settings):
  parsed = config.parse(settings.to_dict())
  programs.check(parsed)
  outline = programs.outline(parsed, jax.devices())
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(outline.state.params))


def test_every_config_is_here():
  files = {path.stem for path in (ROOT / 'configs').glob('*.py')}
  without_a_size = {'__init__', 'base', 'hf', 'compress', 'distill'}  # some are of a folder
  assert files - without_a_size == {name for name, _ in SIZES}


@pytest.mark.parametrize(('name', 'argument'), SIZES)
def test_a_config_builds_with_the_known_size(name, argument):
  settings = read(name, argument)
  assert parameters(settings) == SIZES[name, argument]
  parsed = config.parse(settings.to_dict())
  assert config.differences(parsed, config.from_json(config.to_json(parsed))) == ([], [])


@pytest.mark.parametrize(
  ('name', 'argument', 'section', 'option', 'value'),
  [
    ('bert_base', None, 'model', 'dim', 780),
    ('gpt2', 'small', 'model', 'layers', 11),
    ('gpt2', 'small', 'tokenizer', 'vocab_size', 50_258),
    ('llama', '3.2-1b', 'model', 'kv_heads', 4),
    ('llama', '2-7b', 'model', 'mlp_dim', 11_009),
  ],
)
def test_another_shape_has_another_size(name, argument, section, option, value):
  settings = read(name, argument)
  settings[section][option] = value
  assert parameters(settings) != SIZES[name, argument]


@pytest.mark.parametrize('name', ['gpt2', 'llama'])
def test_an_unknown_argument_lists_the_known_ones(name):
  known = [argument for other, argument in SIZES if other == name and argument]
  with pytest.raises(ValueError) as raised:
    read(name, 'hug')
  message = str(raised.value)
  assert f'configs/{name}.py:hug' in message
  assert known and all(argument in message for argument in known)


def test_llama_is_trained_as_its_paper_says():
  """Touvron et al. 2023, arXiv:2307.09288, section 2.2 and table 1."""
  settings = read('llama', '2-7b')
  optimizer = settings.optimizer
  assert (optimizer.name, optimizer.b1, optimizer.b2, optimizer.eps) == ('adamw', 0.9, 0.95, 1e-5)
  assert (optimizer.schedule, optimizer.final_fraction) == ('cosine', 0.1)
  assert (optimizer.warmup_steps, optimizer.warmup_fraction) == (2000, None)
  assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.clip_norm) == (3e-4, 0.1, 1.0)
  tokens_per_step = settings.batch_size * settings.seq_len
  assert settings.seq_len == 4096 and tokens_per_step == pytest.approx(4e6, rel=0.05)
  assert settings.steps * tokens_per_step == pytest.approx(2e12, rel=1e-3)


@pytest.mark.parametrize(
  ('argument', 'slice_name', 'chips'), [('3.2-1b', 'v5e:4x4', 16), ('2-7b', 'v5p:4x4x4', 64)]
)
def test_the_large_ones_are_sharded_over_all_chips(argument, slice_name, chips):
  parsed = config.parse(read('llama', argument).to_dict())
  program = programs.outline(parsed, topology.devices(slice_name))
  assert program.mesh.shape['fsdp'] == chips
  leaves = jax.tree.leaves((program.state.params, program.state.opt_state))
  held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
  assert held == pytest.approx(sum(math.prod(leaf.shape) for leaf in leaves) / chips, rel=0.01)
