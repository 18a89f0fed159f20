"""A classifier, a decoder that converses, an encoder-decoder and a masked LM, of two steps each,
served by this process.
"""

import contextlib
import json
import threading
import time
import types

import pytest
import uvicorn

import llm_jax
from configs import base, chat, transformer
from llm_jax.core import config as config_lib
from llm_jax.modes import serve
from llm_jax.serving import app as apps
from llm_jax.serving.keys import Keys
from llm_jax.serving.served import Limits
from llm_jax.serving.watch import Watch
from llm_jax.training import loop

SHAPE = dict(dim=32, layers=1, heads=2, mlp_dim=48, max_len=128, dropout=0.0, attention_dropout=0.0)
KEY = 'a-key-of-this-test'
LIMITS = Limits(rows=4, slots=96, batch=4, wait=0.002, waiting=64)


def settings(folder, name):
  tree = base.get_config().to_dict()
  if name not in ('reader', 'filler'):
    tree = {'writer': chat, 'answerer': transformer}[name].get_config().to_dict()
    tree.pop('pretrained', None)
  tree |= dict(steps=2, batch_size=4, seq_len=64, eval_every=2, tokenizer=dict(name='byte'))
  tree |= dict(logging=dict(tensorboard=False), evaluation=dict(rows=4, samples=0), evaluators={})
  tree['data'] = dict(cache=str(folder / 'cache'), workers=1, validation=0.2)
  if name == 'writer':
    tree['model'] = dict(name='decoder', variant='gpt_tiny', remat='none', **SHAPE)
    tree['data'] |= dict(source='chat', path=str(folder / 'dialogues.jsonl'))
  elif name == 'answerer':
    tree['model'] = dict(name='encoder_decoder', variant='t5_1_1_small', head_dim=16, **SHAPE)
    tree['data'] |= dict(source='jsonl', path=str(folder / 'pairs.jsonl'), target='target')
    tree['objective'] |= dict(source_len=64)
  elif name == 'filler':
    tree['model'] = dict(name='encoder', variant='bert_tiny', **SHAPE)
    tree['data'] |= dict(source='jsonl', path=str(folder / 'texts.jsonl'))
    tree['objective'] = dict(name='mlm')
  else:
    # In rows as long, packed texts have other last bits than alone.
    tree |= dict(seq_len=256, batch_size=2)
    shape = SHAPE | dict(max_len=256, dim=64, heads=4)
    tree['model'] = dict(name='encoder', variant='bert_tiny', **shape)
    tree['data'] |= dict(source='jsonl', path=str(folder / 'texts.jsonl'), label='label')
    tree['objective'] = dict(name='classify')
  return config_lib.parse(tree)


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
  """The workdirs of all."""
  folder = tmp_path_factory.mktemp('served')
  texts = [
    {'text': f'{n} some {"good" if n % 2 else "bad"} text', 'label': n % 2} for n in range(40)
  ]
  talks = [
    {
      'messages': [
        {'role': 'user', 'content': f'hello {n}'},
        {'role': 'assistant', 'content': 'hi'},
      ]
    }
    for n in range(40)
  ]
  pairs = [{'text': f'source {n}', 'target': f'target {n}'} for n in range(40)]
  (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
  (folder / 'texts.jsonl').write_text('\n'.join(map(json.dumps, texts)))
  (folder / 'dialogues.jsonl').write_text('\n'.join(map(json.dumps, talks)))
  found = {}
  for name in ('reader', 'writer', 'answerer', 'filler'):
    found[name] = folder / name
    loop.train(loop.prepare(settings(folder, name), found[name]))
  return found


@contextlib.contextmanager
def running(service):
  """The service behind a port of this machine; gives its address."""
  config = uvicorn.Config(apps.create(service), port=0, log_config=None, lifespan='off')
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run, daemon=True)
  thread.start()
  until = time.monotonic() + 30
  while not server.started and time.monotonic() < until:
    time.sleep(0.01)
  port = server.servers[0].sockets[0].getsockname()[1]
  try:
    yield f'http://127.0.0.1:{port}'
  finally:
    server.should_exit = True
    thread.join()


@pytest.fixture(scope='session')
def models(folders):
  """All models, ready."""
  found = {}
  for name, folder in folders.items():
    found |= serve.opened(llm_jax.open(folder), name, LIMITS)
  for model in found.values():
    model.warm()
  yield found
  for model in found.values():
    model.close()


@pytest.fixture
def make(models, tmp_path):
  """A function that gives a service, with a key, or with the keys of a text."""

  def made(keys=KEY, **options):
    path = tmp_path / 'keys'
    path.write_text(keys)
    return apps.Service(models, Keys(path), Watch(list(models.values())), ready=True, **options)

  return made


@pytest.fixture
def serving(models, folders, make):
  return types.SimpleNamespace(
    KEY=KEY, models=models, folders=folders, make=make, running=running, LIMITS=LIMITS
  )
