"""Modes: each is a module with `run`, found by name; what a mode needs is said before it runs."""

import types

import pytest
from absl import flags

from configs import bert_tiny, choice, llama
from llm_jax import main
from llm_jax.core import plugins
from llm_jax.modes import _command
from llm_jax.modes._command import Command, UsageError, usage_errors
from llm_jax.training import optimizers, program


def test_every_mode_has_a_docstring_and_runs():
  names = plugins.names('mode')
  assert names == [
    'augment',
    'chat',
    'compress',
    'embed',
    'eval',
    'explain',
    'export',
    'generate',
    'plan',
    'predict',
    'serve',
    'train',
  ]
  for name in names:
    module = plugins.load('mode', name)
    assert callable(module.run) and f'`--mode={name}`' in module.__doc__


def test_an_unknown_mode_lists_the_known_ones():
  with pytest.raises(UsageError, match="mode 'trian' is not known .did you mean 'train'"):
    main._mode('trian')


def test_errors_of_use_are_one_message_and_defects_are_not():
  with pytest.raises(UsageError, match='^too large$'), usage_errors():
    raise ValueError('too large')
  with pytest.raises(ZeroDivisionError), usage_errors():
    raise ZeroDivisionError
  with pytest.raises(ValueError), usage_errors((OSError,)):
    raise ValueError('a defect in the loop')


@pytest.mark.parametrize(
  ('suffix', 'folder', 'message'),
  [('.csv', '', 'must be a .npy or .jsonl file'), ('.npy', 'no/', 'in a folder that exists')],
)
def test_an_output_that_is_not_possible(tmp_path, suffix, folder, message):
  with pytest.raises(ValueError, match=message):
    _command.check_output(tmp_path / f'{folder}x{suffix}', ('.npy', '.jsonl'))
  _command.check_output(tmp_path / 'x.npy', ('.npy', '.jsonl'))


def test_flags_that_a_mode_needs(monkeypatch):
  values = {'input': None, 'output': 'y'}
  stand_ins = {name: types.SimpleNamespace(value=value) for name, value in values.items()}
  monkeypatch.setattr(_command.flags, 'FLAGS', stand_ins)
  with pytest.raises(ValueError, match='--mode=x needs --input=a.jsonl and --output=b.jsonl'):
    Command('x', None, None).require('input=a.jsonl', 'output=b.jsonl')
  Command('x', None, None).require('output=b.jsonl')


def test_the_flags_of_all_modes_are_known():
  main._define_flags([])
  assert {'prompt', 'topology', 'pool', 'export_dtype', 'input'} <= set(flags.FLAGS)


def test_a_plug_in_named_by_a_flag_drops_what_the_file_sets_for_the_old_one():
  """bert_tiny sets a vocabulary size for SentencePiece, which the byte tokenizer does not take."""
  settings = bert_tiny.get_config().to_dict()
  settings['tokenizer']['name'] = 'byte'
  named = Command('train', settings, None, frozenset({'tokenizer.name'})).parsed()
  assert 'vocab_size' not in named.tokenizer and named.tokenizer['name'] == 'byte'
  program.check(named)
  asked = frozenset({'tokenizer.name', 'tokenizer.vocab_size'})
  for overrides in (asked, frozenset()):  # a flag's own option is not dropped, nor a file's
    kept = Command('train', settings, None, overrides).parsed()
    with pytest.raises(ValueError, match='config.tokenizer.vocab_size is not an option'):
      program.check(kept)


def test_a_source_named_by_a_flag_drops_what_the_file_sets_for_the_old_one():
  """choice sets how many candidates its own source makes."""
  settings = choice.get_config().to_dict()
  settings['data'] |= dict(source='jsonl', path='x.jsonl', label='answer')
  named = Command('train', settings, None, frozenset({'data.source', 'data.path'})).parsed()
  assert 'candidates' not in named.data and named.data['validation'] == 0.1
  assert named.data['path'] == 'x.jsonl'
  kept = Command('train', settings, None, frozenset({'data.source', 'data.candidates'})).parsed()
  assert kept.data['candidates'] == 4  # to be refused: a flag says so


def test_of_two_options_that_exclude_each_other_the_flag_counts():
  settings = bert_tiny.get_config().to_dict()
  settings['optimizer']['warmup_steps'] = 3  # beside the file's share of all steps
  named = Command('train', settings, None, frozenset({'optimizer.warmup_steps'})).parsed()
  assert optimizers.parse(named.optimizer).warmup_steps == 3
  assert optimizers.parse(named.optimizer).warmup_fraction is None
  settings['optimizer']['warmup_steps'] = None  # a flag that empties one leaves the other
  emptied = Command('train', settings, None, frozenset({'optimizer.warmup_steps'})).parsed()
  assert optimizers.parse(emptied.optimizer).warmup_fraction == 0.05


def test_an_optimizer_named_by_a_flag_drops_the_options_of_the_old_one():
  """LLaMA's config sets b1, b2 and eps of AdamW."""
  settings = llama.get_config('3.2-1b').to_dict()
  for name, kept in (('sgd', set()), ('lion', {'b1', 'b2'})):
    settings['optimizer']['name'] = name
    named = Command('train', settings, None, frozenset({'optimizer.name'})).parsed().optimizer
    assert {'b1', 'b2', 'eps'} & named.keys() == kept and named['weight_decay'] == 0.1
    optimizers.parse(named)
  settings['optimizer']['name'] = 'sdg'
  with pytest.raises(ValueError, match="optimizer.name='sdg'.*did you mean 'sgd'"):
    Command('train', settings, None, frozenset({'optimizer.name'})).parsed()
