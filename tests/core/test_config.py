import dataclasses
import importlib
import json
import pathlib

import pytest

from llm_jax.core import config
from llm_jax.programs import assemble
from llm_jax.training import program

FOLDER = pathlib.Path(__file__).parents[2] / 'configs'
# These are whole only with a folder.
OF_A_FOLDER = {'hf', 'compress', 'distill'}
CONFIGS = sorted({path.stem for path in FOLDER.glob('*.py')} - {'__init__', 'base'} - OF_A_FOLDER)


def tiny(**changes):
  tree = importlib.import_module('configs.bert_tiny').get_config().to_dict()
  return config.parse(tree | changes)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_passes_the_checks(name):
  parsed = config.parse(importlib.import_module(f'configs.{name}').get_config().to_dict())
  program.check(parsed)
  resolved = assemble.resolve(parsed, 7)
  model = assemble.create_model(assemble.with_compute_type(resolved, 'cpu'))
  assert model.dtype == 'float32'
  assert assemble.with_compute_type(resolved, 'tpu').model['dtype'] == 'bfloat16'
  given = dataclasses.replace(resolved, model=resolved.model | {'dtype': 'float16'})
  assert assemble.with_compute_type(given, 'tpu') is given
  assert model.vocab_size == (parsed.model['vocab_size'] or 7)
  assert model.dim > model.heads > 0 and model.dim % model.heads == 0
  assert parsed.seq_len <= model.max_len


def test_placeholders_of_one_section_are_not_tied_together():
  tree = importlib.import_module('configs.bert_tiny').get_config()
  tree.data.path = 'x'
  tree.optimizer.b1 = 0.5
  assert tree.data.text is None and tree.optimizer.b2 is None and tree.model.attention is None


def test_a_config_survives_json():
  sections = (
    'data',
    'validation',
    'test',
    'tokenizer',
    'model',
    'objective',
    'optimizer',
    'adapter',
    'adversarial',
    'compress',
    'distill',
  )
  stored = {name: config._without_none(getattr(tiny(), name)) for name in sections}
  assert config.from_json(config.to_json(tiny())) == dataclasses.replace(tiny(), **stored)


def test_the_config_of_a_run_from_before_adapters_evaluators_and_hooks():
  tree = json.loads(config.to_json(tiny()))
  for section in ('adapter', 'evaluators', 'hooks'):
    assert tree.pop(section) == {}
  old = config.from_json(json.dumps(tree))
  assert old.adapter == old.evaluators == old.hooks == {}
  assert config.differences(old, tiny()) == ([], [])


def test_an_adapter_makes_another_run_and_a_hook_does_not():
  new = tiny(
    adapter={'name': 'lora', 'rank': 8},
    evaluators={'loss': {}},
    hooks={'average': {'name': 'ema', 'every': 10}},
  )
  forbidden, allowed = config.differences(tiny(), new)
  assert forbidden == ["adapter.name: None -> 'lora'", 'adapter.rank: None -> 8']
  assert [line.split(':')[0] for line in allowed] == ['hooks.average.every', 'hooks.average.name']


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'stepz': 3}, r"config\.stepz is not an option \(did you mean 'steps'\?\)"),
    (
      {'data': {'source': 'stdlib', 'validation': 12.0}},
      r'config\.data\.validation=12\.0 must be the share',
    ),
    ({'data': {'source': 'stdlib'}}, r'config\.data\.validation=None must be the share'),
    ({'seed': -1}, r'config\.seed=-1'),
    ({'steps': 0}, r'config\.steps=0 must be at least 1'),
    (
      {'checkpoint': {'evry': 3}},
      r"config\.checkpoint\.evry is not an option \(did you mean 'every'\?\)",
    ),
    ({'checkpoint': {'keep': 0}}, 'at least 1'),
    ({'model': {}}, r"config\.model needs a 'name'"),
    (
      {'objective': {'name': 'mlm', 'mask_rte': 0.2}},
      r"config\.objective\.mask_rte is not an option \(did you mean 'mask_rate'\?\)",
    ),
    (
      {
        'objective': {
          'name': 'mix',
          'rows': 'nsp',
          'weights': {},
          'parts': {'nsp': {'short_rate': 1.0}},
        }
      },
      r'config\.objective\.parts\.nsp\.short_rate is not an option \(did you mean '
      r"'short_seq_rate'\?\)",
    ),
    (
      {'model': {'name': 'encoder', 'dimm': 3}},
      r"config\.model\.dimm is not an option \(did you mean 'dim'\?\)",
    ),
    ({'model': {'name': 'encodr'}}, r"model 'encodr' is not known \(did you mean 'encoder'\?\)"),
    ({'data': {'source': 'text', 'validation': 0.1}}, r'config\.data needs path'),
    (
      {'data': {'source': 'stdlib', 'validation': 0.1, 'path': 'x'}},
      r'config\.data\.path is not an option',
    ),
    ({'data': {'source': 'mixture', 'validation': 0.1}}, r'needs config\.data\.parts'),
    (
      {'optimizer': {'name': 'adamw', 'learning_rate': 0.1, 'momentum': 0.9}},
      r'config\.optimizer\.momentum is not an option',
    ),
    ({'mesh': {'dta': 3}}, r"config\.mesh\.dta is not an option \(did you mean 'data'\?\)"),
  ],
)
def test_a_slip_is_named_with_the_way_out(changes, message):
  with pytest.raises(ValueError, match=message):
    program.check(tiny(**changes))


def test_differences_that_matter_are_told_from_those_that_may_be():
  old = tiny()
  new = tiny(
    steps=7,
    log_every=3,
    batch_size=64,
    model=old.model | {'dim': 128, 'remat': 'full'},
    data=old.data | {'workers': 2},
    optimizer=old.optimizer | {'learning_rate': 0.5},
  )
  forbidden, allowed = config.differences(old, new)
  assert forbidden == ['model.dim: None -> 128']
  assert [line.split(':')[0] for line in allowed] == [
    'batch_size',
    'data.workers',
    'log_every',
    'model.remat',
    'optimizer.learning_rate',
    'steps',
  ]
  assert config.differences(old, old) == ([], [])


@pytest.mark.parametrize(
  'option, old, same, other',
  [('clip_norm', 1.0, 0.5, 0.0), ('clip_norm', None, 0.5, 0.0), ('layer_decay', 0.9, 0.8, 1.0)],
)
def test_what_decides_the_state_of_the_optimizer_may_not_be_switched(option, old, same, other):
  made = [tiny(optimizer=tiny().optimizer | {option: value}) for value in (old, same, other)]
  assert config.differences(made[0], made[1])[0] == []
  for before, after in (made[::2], made[::-2]):
    (line,) = config.differences(before, after)[0]
    assert line.startswith(f'optimizer.{option}: ') and 'state of the optimizer' in line


def test_documents_may_move():
  old = tiny(data=dict(source='text', path='/a/x.txt', validation=0.1))
  assert config.differences(old, tiny(data=old.data | {'path': '/b/y.txt'}))[0] == []
  assert config.differences(old, tiny(data=old.data | {'unit': 'line'}))[0] != []
