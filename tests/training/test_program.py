"""Programs: what a config becomes without an array; first losses, model FLOPs, derived options."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from configs import bert_tiny, classify, gpt2, gpt_tiny, prompt
from llm_jax.core import config
from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.programs import assemble
from llm_jax.training import program as programs
from llm_jax.training import step

TOKENIZER = byte.create()


def program(small, module, seq_len=64, batch_size=4, vocab_size=None, devices=None, **model):
  tree = module.get_config().to_dict()
  parsed = config.parse(
    tree | dict(seq_len=seq_len, batch_size=batch_size, model=tree['model'] | model)
  )
  parsed = assemble.resolve(parsed, vocab_size or TOKENIZER.vocab_size)
  parsed = assemble.with_stand_ins(parsed, TOKENIZER)
  objective = assemble.create_objective(parsed, TOKENIZER)
  example = assemble.template(parsed, objective, TOKENIZER)
  return programs.build(parsed, objective, example, devices), example


def stack(example, rows):
  return {key: np.stack([value] * rows) for key, value in example.items()}


def test_building_allocates_nothing(small):
  before = {id(array) for array in jax.live_arrays()}
  made, _ = program(small, bert_tiny, vocab_size=30522, dim=1024, heads=16, layers=24, mlp_dim=4096)
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made.state.params)) > 300e6
  new = [array for array in jax.live_arrays() if id(array) not in before]
  assert sum(array.nbytes for array in new) < 1e6
  assert all(leaf.sharding is not None for leaf in jax.tree.leaves(made.state))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('module', 'model'),
  [
    (bert_tiny, dict(vocab_size=4096)),
    (gpt_tiny, dict(vocab_size=4096)),
    (bert_tiny, dict(variant='bert_base', layers=2, vocab_size=30522)),
    (gpt_tiny, dict(variant='gpt2_small', layers=2, vocab_size=50257)),
  ],
)
def test_loss_at_initialisation_is_that_of_an_even_guess(small, module, model):
  made, example = program(small, module, **model)
  state = made.init(0)
  pairs = made.eval_step(state.params, made.put(stack(example, 4)))
  ((value, weight),) = (pairs[name] for name in made.objective.terms)
  assert float(value / weight) == pytest.approx(math.log(model['vocab_size']), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize('module', [bert_tiny, gpt_tiny])
def test_model_flops_are_those_that_the_compiler_counts(small, module):
  """Unrolled, without remat, XLA counts every product; it also counts what is not a product, and
  causal attention whole.
  """
  made, example = program(
    small,
    module,
    seq_len=128,
    batch_size=8,
    vocab_size=4096,
    dim=256,
    mlp_dim=1024,
    heads=4,
    unroll=0,
    attention_dropout=0.0,
  )
  batch = {
    key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in stack(example, 8).items()
  }
  run = jax.jit(functools.partial(step.gradient, network=made.network), static_argnums=2)
  counted = run.lower(made.state.params, batch, None).compile().cost_analysis()['flops']
  assert made.flops == pytest.approx(counted, rel=0.08)


def test_micro_batches_keep_the_tokens_at_once_moderate(small):
  choose = lambda **changes: assemble.micro_batches(
    dataclasses.replace(config.parse(bert_tiny.get_config().to_dict()), **changes),
    jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ('data', 'fsdp', 'tensor')),
  )
  assert choose(micro_batches=None, batch_size=256, seq_len=512) == 64
  assert choose(micro_batches=None, batch_size=8, seq_len=128) == 1
  assert choose(micro_batches=None, batch_size=7, seq_len=4096) == 7
  assert choose(micro_batches=4, batch_size=8, seq_len=4096) == 4


def test_published_shapes_go_under_what_the_config_says():
  parsed = config.parse(gpt2.get_config('xl').to_dict())
  options = assemble.model_options(parsed, 50257)
  assert (options['dim'], options['layers'], options['vocab_size']) == (1600, 48, 50257)
  changed = dataclasses.replace(parsed, model=parsed.model | {'layers': 3})
  assert assemble.model_options(changed, 50257)['layers'] == 3
  assert assemble.resolve(assemble.resolve(parsed, 7), 7) == assemble.resolve(parsed, 7)


def labelled(config, *labels):
  records = [{'text': 'some text', 'label': label} for label in labels]
  return Memory(records, assemble.encoder(config), TOKENIZER)


def test_classes_reach_the_objective_that_takes_them():
  parsed = config.parse(classify.get_config().to_dict())
  derived = assemble.derive(parsed, [labelled(parsed, 'b', 'a', 'b')])
  assert derived.objective['classes'] == ('a', 'b')
  assert assemble.derive(derived, [labelled(parsed, 'c', 'd')]) == derived
  assert assemble.with_derived(parsed, derived).objective == derived.objective
  regression = dataclasses.replace(parsed, objective=parsed.objective | {'task': 'regression'})
  assert 'classes' not in assemble.derive(regression, [labelled(parsed, 1.0)]).objective
  masked = config.parse(bert_tiny.get_config().to_dict())
  assert assemble.derive(masked, [labelled(masked, 'a')]) == masked


def test_what_a_cross_validation_holds_out_is_not_shown():
  """Its classes are those of all documents, its demonstrations the training documents'."""
  parsed = config.parse(prompt.get_config().to_dict())
  shown = {'demonstrations': 1, 'verbalizers': {'a': 'x', 'b': 'y'}}
  parsed = dataclasses.replace(parsed, objective=parsed.objective | shown)

  def split(*texts):
    records = [{'text': text, 'label': label} for text in texts for label in 'ab']
    return Memory(records, assemble.encoder(parsed), TOKENIZER)

  train, held_out = split('one', 'two'), split(*(f'held {i}' for i in range(50)))
  found = assemble.derive(parsed, [train], [held_out]).objective['shown']
  said = {TOKENIZER.decode(ids).strip() for _, ids in found}
  assert said == {'one', 'two'}
  everything = assemble.derive(parsed, [train, held_out]).objective['shown']
  assert any('held' in TOKENIZER.decode(ids) for _, ids in everything)


def test_classes_reach_the_part_of_a_mix():
  tree = classify.get_config().to_dict()
  parts = {'mlm': {'mask_rate': 0.2}, 'classify': {'unlabelled': 'ignore'}}
  weights = {'mlm': 1.0, 'classify': 1.0}
  mixed = config.parse(
    tree | {'objective': dict(name='mix', rows='classify', weights=weights, parts=parts)}
  )
  derived = assemble.derive(mixed, [labelled(mixed, 'b', 'a')])
  assert derived.objective['parts']['classify']['classes'] == ('a', 'b')
  assert derived.objective['parts']['mlm'] == {'name': 'mlm', 'mask_rate': 0.2}
  assert assemble.create_objective(derived, TOKENIZER).predictor.classes == ('a', 'b')
