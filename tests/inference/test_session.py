"""Sessions: what a run answers through `llm_jax.open`, call after call, without an optimizer."""

import json
import random
import shutil

import jax
import numpy as np
import pytest

import llm_jax
from configs import base
from llm_jax.core import config as config_lib
from llm_jax.generation.sampling import Sampling
from llm_jax.inference import prediction
from llm_jax.inference.export import export
from llm_jax.training import loop, optimizers

pytestmark = pytest.mark.slow  # all tests share runs that are trained
SHAPE = dict(dim=16, layers=1, heads=2, mlp_dim=24, max_len=64)


def data(folder, **fields):
  path, cache = str(folder / 'x.jsonl'), str(folder / 'cache')
  return dict(source='jsonl', path=path, validation=0.2, cache=cache, workers=1) | fields


def settings(folder, **changes):
  tree = base.get_config().to_dict()
  tree |= dict(steps=2, batch_size=4, seq_len=32, eval_every=2, tokenizer=dict(name='byte'))
  tree |= dict(logging=dict(tensorboard=False), evaluation=dict(rows=4, samples=0))
  tree['data'] = data(folder)
  return config_lib.parse(tree | changes)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A classifier of pairs, a masked encoder and a decoder of two steps each, opened."""
  folder, rng = tmp_path_factory.mktemp('session'), random.Random(0)
  with open(folder / 'x.jsonl', 'w') as file:
    for number in range(60):
      text, pair = (''.join(rng.choices('abcd ', k=rng.randrange(3, 20))) for _ in range(2))
      record = {'text': f'{number} {text}', 'pair': pair, 'label': 'ab'[number % 2]}
      file.write(json.dumps(record) + '\n')
  encoder = dict(name='encoder', variant='bert_tiny', **SHAPE)
  decoder = dict(name='decoder', variant='gpt_tiny', **SHAPE)
  kinds = {
    'pairs': dict(
      model=encoder,
      objective=dict(name='classify'),
      data=data(folder, pair='pair', label='label'),
    ),
    'masked': dict(model=encoder, objective=dict(name='mlm')),
    'decoder': dict(model=decoder, objective=dict(name='clm')),
  }
  opened = {}
  for name, changes in kinds.items():
    loop.train(loop.prepare(settings(folder, **changes), folder / name))
    opened[name] = llm_jax.open(folder / name)
  return opened


@pytest.fixture(autouse=True)
def no_optimizer(request, monkeypatch):
  request.getfixturevalue('runs')  # which are trained, and then no more

  def refused(*_):
    raise AssertionError('an optimizer was made')

  monkeypatch.setattr(optimizers, 'create', refused)


class Compilations:
  """Counts the programs that are compiled while it is open."""

  def __enter__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._note)
    return self

  def _note(self, event, *_, **__):
    self.count += event == '/jax/core/compile/backend_compile_duration'

  def __exit__(self, *_):
    jax.monitoring.unregister_event_duration_listener(self._note)


def test_answers_come_in_order_and_pairs_are_read(runs):
  session = runs['pairs']
  texts = [('aa', 'bb'), {'text': 'cc d', 'pair': 'a'}, ('a' * 60, 'b' * 40)]
  answers = session.predict(texts)
  known = {'label', 'probability', 'probabilities', 'entropy', 'margin'}
  assert [set(answer) for answer in answers] == [known] * 3
  assert all(sum(answer['probabilities'].values()) == pytest.approx(1) for answer in answers)
  for text, answer in zip(texts, answers, strict=True):
    (alone,) = session.predict([text])
    assert alone['probabilities'] == pytest.approx(answer['probabilities'], abs=1e-5)
  unread = session.predict([('aa', 'dd d')])[0]  # the second text is read too
  assert unread['probabilities'] != answers[0]['probabilities']


def test_a_run_of_a_pod_opens_here(runs, tmp_path, caplog):
  """A mesh that other devices had: all that are here share the parameters."""
  shutil.copytree(runs['pairs'].origin, tmp_path / 'run')
  path = tmp_path / 'run' / 'config.json'
  config = json.loads(path.read_text())
  config['mesh'] |= dict(data=2, fsdp=16, tensor=3, dcn_data=2)
  path.write_text(json.dumps(config))
  with caplog.at_level('INFO', 'absl'):
    session = llm_jax.open(tmp_path / 'run')
  assert 'is for other devices; here: fsdp=-1' in caplog.text
  texts = [('aa', 'bb'), ('cc d', 'a')]
  for answer, wanted in zip(session.predict(texts), runs['pairs'].predict(texts), strict=True):
    assert answer['probabilities'] == pytest.approx(wanted['probabilities'], abs=1e-5)
  config['mesh'] |= dict(rules='none such')  # another error stays one
  path.write_text(json.dumps(config))
  with pytest.raises(ValueError, match="rules='none such' is not known"):
    llm_jax.open(tmp_path / 'run')


def test_blocks_of_a_stream_are_answered_as_they_are_read(runs, monkeypatch):
  session = runs['pairs']
  monkeypatch.setattr(prediction, 'LEAST_BLOCK', 4)
  monkeypatch.setattr(prediction, 'BLOCK_BATCHES', 1)
  reopened = llm_jax.open(session.origin)
  records = [{'text': 'ab ' * (i % 7), 'pair': str(i)} for i in range(11)]
  streamed = list(reopened.answers(iter(records)))
  for one, other in zip(streamed, session.predict(records), strict=True):
    assert one['probabilities'] == pytest.approx(other['probabilities'], abs=1e-5)


def test_a_second_call_compiles_nothing(runs):
  calls = [
    lambda: runs['pairs'].predict([('a', 'b')]),
    lambda: runs['pairs'].explain([('a', 'b')]),
    lambda: runs['pairs'].explain([('a', 'b')], method='occlusion'),
    lambda: runs['masked'].embed(['a b', 'c']),
    lambda: runs['masked'].fill(['a [MASK]']),
    lambda: runs['decoder'].complete(['a', 'bc'], max_new_tokens=4, temperature=0.0),
  ]
  for call in calls:
    call()
    with Compilations() as compiled:
      call()
    assert compiled.count == 0
  with Compilations() as compiled:
    runs['decoder'].complete(['a', 'bc'], max_new_tokens=4, temperature=0.7, top_k=5, seed=3)
    runs['decoder'].complete(['d', 'e'], max_new_tokens=4, temperature=1.3, top_p=0.9)
  assert compiled.count == 0


def test_vectors_have_length_one_and_do_not_depend_on_their_neighbours(runs):
  session = runs['masked']
  vectors = session.embed(['ab', 'a longer text', 'c'])
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(session.embed(['a longer text'])[0], vectors[1], atol=1e-5)
  assert session.embed([]).shape == (0, 16)
  assert np.linalg.norm(session.embed(['ab'], normalize=False)) != pytest.approx(1, abs=1e-3)


def test_completions_are_those_of_each_prompt_alone(runs):
  session, numbers = runs['decoder'], dict(max_new_tokens=6, temperature=0.0)
  together = session.complete(['ab', 'c', ''], **numbers)
  assert together == [session.complete([text], **numbers)[0] for text in ('ab', 'c', '')]
  assert session.complete([]) == []
  assert session.complete(['ab'], sampling=Sampling(**numbers)) == together[:1]


@pytest.mark.parametrize(
  ('name', 'call', 'message'),
  [
    ('masked', lambda s: s.predict(['a']), 'gives no labels to texts; fine-tune the run first'),
    ('masked', lambda s: s.explain(['a']), 'gives no label or value that could be explained'),
    ('pairs', lambda s: s.explain(['a'], method='lime'), "method='lime' must be one of"),
    ('masked', lambda s: s.complete(['a']), 'this model is an encoder'),
    ('decoder', lambda s: s.fill(['a [MASK]']), 'has no masked-LM head'),
    ('decoder', lambda s: s.embed(['a'], pool='cls'), 'has seen nothing'),
    ('decoder', lambda s: s.complete(['a'], sampling=Sampling(), seed=1), 'either sampling or'),
    ('masked', lambda s: s.embed(['a'], pool='max'), "pool='max' must be one of"),
  ],
)
def test_what_a_model_is_not_for_is_said(runs, name, call, message):
  with pytest.raises(ValueError, match=message):
    call(runs[name])


def test_a_folder_that_is_none(tmp_path):
  with pytest.raises(ValueError, match='holds no run'):
    llm_jax.open(tmp_path)


def test_a_hugging_face_folder_opens_without_a_config(runs, tmp_path):
  export(runs['decoder'], tmp_path / 'hf')
  opened, numbers = llm_jax.open(tmp_path / 'hf'), dict(max_new_tokens=6, temperature=0.0)
  assert opened.complete(['ab'], **numbers) == runs['decoder'].complete(['ab'], **numbers)
  assert opened.config.data == opened.config.optimizer == {}
