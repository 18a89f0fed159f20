"""Tiny runs to be made smaller, each trained once for all tests of this folder."""

import json
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, classify, gpt_tiny
from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.inference import session as sessions
from llm_jax.programs import assemble, inference, pretrained
from llm_jax.training import loop

SHAPE = dict(dim=16, layers=4, heads=4, mlp_dim=32, max_len=48)
SHAPE |= dict(dropout=0.0, attention_dropout=0.0)
WORDS = {'good': 'good fine nice well'.split(), 'bad': 'poor ugly ill worse'.split()}
KINDS = {
  'encoder': (classify, dict(name='encoder', variant='bert_base')),
  'decoder': (gpt_tiny, dict(name='decoder', variant='gpt2_small')),
}


def texts(count=120):
  drawn, labels = random.Random(0), list(WORDS)
  for number in range(count):
    label = labels[number % 2]
    yield {'text': ' '.join(drawn.choice(WORDS[label]) for _ in range(4)), 'label': label}


def settings(kind, folder, **changes):
  """The config of a run of one of `KINDS`, and its data in a folder."""
  (folder / 'data.jsonl').write_text('\n'.join(map(json.dumps, texts())))
  config, model = KINDS[kind]
  found = config.get_config().to_dict()
  found.pop('pretrained', None)
  found['data'] = dict(source='jsonl', path=str(folder / 'data.jsonl'), validation=0.25)
  found['data'] |= dict(cache=str(folder / 'cache'), workers=1)
  if kind == 'encoder':
    found['data'] |= dict(label='label')
    found['objective'] |= dict(pool='cls')
  found['tokenizer'] = dict(name='byte')
  found['model'] = model | dict(remat='none', **SHAPE)
  found['optimizer'] = dict(name='adamw', learning_rate=0.01)
  found |= dict(steps=12, batch_size=8, seq_len=48, log_every=4, eval_every=12)
  found['evaluation'] = dict(samples=0)
  found['checkpoint'] = dict(every=6, keep=2)
  found['logging'] = dict(tensorboard=False)
  return found | changes


def train(given, workdir):
  run = loop.prepare(config_lib.parse(given), workdir)
  loop.train(run)
  return run


@pytest.fixture(scope='session')
def runs(tmp_path_factory):
  """The workdir of a trained run by kind."""
  made = {}

  def run(kind):
    if kind not in made:
      folder = tmp_path_factory.mktemp(kind)
      train(settings(kind, folder), folder / 'run')
      made[kind] = folder / 'run'
    return made[kind]

  return run


def opened(folder, **changes):
  """A folder, opened as the mode `compress` does."""
  given = base.get_config().to_dict()
  given['data'] = given['validation'] = {}
  given |= dict(init_from=str(folder), batch_size=8, seq_len=None, steps=1)
  given |= {name: {} for name in ('model', 'tokenizer', 'objective', 'optimizer')}
  return sessions.open_model(None, pretrained.fill_in(config_lib.parse(given | changes)))


def config(model, objective='clm', **changes):
  """The config of a network without data."""
  given = base.get_config().to_dict()
  given |= dict(steps=4, batch_size=4, seq_len=16, tokenizer=dict(name='byte'))
  given['model'] = dict(vocab_size=264, remat='none') | SHAPE | model | changes
  given['objective'] = dict(name=objective)
  if objective == 'clm':
    given['objective'] |= dict(packing='windows')
  given['optimizer'] = dict(name='adamw', learning_rate=0.01, schedule='constant')
  given['mesh'] |= dict(data=1, fsdp=-1)
  return config_lib.parse(given)


def program(model, objective='clm', **changes):
  """The program of such a network, and parameters drawn for it."""
  made = config(model, objective, **changes)
  tokenizer = assemble.byte_tokenizer(made)
  made = inference.outline(made, tokenizer, jax.devices()[:1])
  rng = np.random.default_rng(0)
  drawn = lambda path, leaf: rng.normal(path.endswith('scale'), 0.1, leaf.shape)
  params = tree.map_with_path(lambda p, x: jnp.asarray(drawn(p, x), x.dtype), made.params)
  return made, params, tokenizer


@pytest.fixture(scope='session')
def tiny():
  return types.SimpleNamespace(
    settings=settings,
    train=train,
    opened=opened,
    program=program,
    texts=[record['text'] for record in texts(8)],
  )
