import dataclasses

import pytest

from llm_jax.core import plugins


@dataclasses.dataclass
class Thing:
  rate: float
  size: int = 3
  names: tuple[str, ...] = ()
  label: str | None = None
  flag: bool = False


def test_options_become_arguments_in_the_types_of_the_signature():
  thing = plugins.construct(
    'thing', Thing, {'rate': 1, 'names': ['a', 'b'], 'label': None}, size=5, unknown=7
  )
  assert thing == Thing(rate=1.0, size=5, names=('a', 'b')) and isinstance(thing.rate, float)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'rate': 0.1, 'szie': 3},
      r"config\.thing\.szie is not an option \(did you mean 'size'\?\); allowed: flag, label, "
      r'names, rate, size\.',
    ),
    ({}, r'config\.thing needs rate\.'),
  ],
)
def test_a_wrong_name_is_an_error_with_the_nearest(options, message):
  with pytest.raises(ValueError, match=message):
    plugins.construct('thing', Thing, options)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('rate', '0.1'),
    ('rate', True),
    ('size', 1.5),
    ('size', True),
    ('names', 'ab'),
    ('label', 3),
    ('flag', 1),
  ],
)
def test_a_wrong_type_is_an_error_that_names_the_value(key, value):
  with pytest.raises(
    TypeError,
    match=rf'config\.thing\.{key}={value!r} is of type {type(value).__name__}; it must be ',
  ):
    plugins.construct('thing', Thing, {'rate': 1.0, key: value})


def test_what_the_program_gives_is_no_option():
  with pytest.raises(ValueError, match='size is not an option'):
    plugins.construct('thing', Thing, {'rate': 1.0, 'size': 4}, size=5)


def test_known_names_are_the_modules():
  assert plugins.names('objective') == [
    'chat',
    'choice',
    'classify',
    'clm',
    'contrast',
    'denoise',
    'dpo',
    'mix',
    'mlm',
    'nsp',
    'pair',
    'prefix_lm',
    'prompt',
    'qa',
    'relation',
    'rerank',
    'seq2seq',
    'sop',
    'tag',
  ]  # not the folder `shared`
  assert {'train', 'eval', 'predict', 'plan'} <= set(plugins.names('mode'))
  assert plugins.names('source') == [
    'chat',
    'conll',
    'conllu',
    'csv',
    'defaults',
    'docstrings',
    'first_sentences',
    'functions',
    'headings',
    'jsonl',
    'parquet',
    'preferences',
    'squad',
    'stdlib',
    'summaries',
    'text',
    'tfds',
    'word_tag',
  ]
  with pytest.raises(
    ValueError, match=r"objective 'mln' is not known \(did you mean 'mlm'\?\); known: chat, "
  ):
    plugins.load('objective', 'mln')


def test_a_dotted_name_is_a_module_of_ones_own():
  import os.path

  assert plugins.load('source', 'os.path') is os.path
