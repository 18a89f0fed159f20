"""A decoder fine-tuned on a toy dialogue: it answers in its format, and stops; in a session, in the
terminal, and from the folder that it was exported to.
"""

import json

import pytest

import llm_jax
from configs import chat as config
from llm_jax.core import config as config_lib
from llm_jax.generation.sampling import Sampling
from llm_jax.inference.export import export
from llm_jax.modes import chat
from llm_jax.training import loop

pytestmark = pytest.mark.slow
NAMES = ['ada', 'bob', 'cleo', 'dan']
GREEDY = Sampling(max_new_tokens=24, temperature=0)
SHAPE = dict(dim=48, layers=2, heads=2, mlp_dim=96, max_len=160)


def asked(name):
  return {'role': 'user', 'content': f'I am {name}'}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chatting')
  lines = []
  for first in NAMES:
    for second in NAMES:
      turns = [
        {'role': role, 'content': text}
        for name in (first, second)
        for role, text in (('user', f'I am {name}'), ('assistant', f'Hello, {name}!'))
      ]
      lines += [json.dumps({'messages': turns})] * 3
  (folder / 'dialogues.jsonl').write_text('\n'.join(lines))
  settings = config.get_config().to_dict()
  settings.pop('pretrained')
  settings['data'] = dict(source='chat', path=str(folder / 'dialogues.jsonl'), validation=0.1)
  settings['data'] |= dict(cache=str(folder / 'cache'), workers=1)
  settings['tokenizer'] = dict(name='byte')
  settings['model'] = dict(name='decoder', variant='gpt_tiny', remat='none', **SHAPE)
  settings |= dict(steps=90, batch_size=8, seq_len=128, log_every=30, eval_every=90)
  settings['optimizer'] = dict(name='muon', learning_rate=2e-2, schedule='linear')
  settings['checkpoint'] = dict(every=90, keep=1)
  settings['logging'] = dict(tensorboard=False)
  settings['evaluators'] = dict(loss={}, generation=dict(max_new_tokens=24))
  loop.train(loop.prepare(config_lib.parse(settings), folder / 'run'))
  return folder / 'run'


@pytest.fixture(scope='module')
def session(workdir):
  return llm_jax.open(workdir)


def test_it_answers_in_its_format_and_stops(workdir, session):
  for name in NAMES:
    assert session.chat([asked(name)], sampling=GREEDY) == f'Hello, {name}!'
  pieces = []
  before = [asked('ada'), {'role': 'assistant', 'content': 'Hello, ada!'}, asked('dan')]
  assert session.chat(before, sampling=GREEDY, stream=pieces.append) == 'Hello, dan!'
  assert ''.join(pieces) == 'Hello, dan!' and len(pieces) > 5
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  last = [line for line in lines if line['split'] == 'validation'][-1]
  assert last['exact_match'] == 1.0 and last['chat_accuracy'] > 0.99
  page = (workdir / 'report.html').read_text()
  assert 'What is learned' in page and 'Hello, ' in page


def test_a_conversation_in_the_terminal(session, tmp_path):
  said, saved = [], tmp_path / 'said.jsonl'
  lines = [
    'I am bob\n',
    '',
    'I am cleo',
    f'/save {saved}',
    '/help',
    '/reset',
    'I am ada',
    '/exit',
    'x',
  ]
  left = chat.chat(session, GREEDY, None, lines, said.append)
  assert left == [asked('ada'), {'role': 'assistant', 'content': 'Hello, ada!'}]
  shown = ''.join(said).splitlines()
  assert shown == [
    'Hello, bob!',
    'Hello, cleo!',
    f'(4 messages saved to {saved})',
    'commands: /reset, /save FILE, /exit',
    '(a new conversation)',
    'Hello, ada!',
  ]
  (line,) = saved.read_text().splitlines()
  assert [m['content'] for m in json.loads(line)['messages']][-1] == 'Hello, cleo!'


def test_history_that_fits(session):
  """The model takes 160 positions, the answer 24 of them."""
  said = []
  lines = ['I am bob', 'I am cleo', 'I am dan', 'I am ada', 'I am ' + 'x' * 200, 'I am bob']
  left = chat.chat(session, GREEDY, 'Hi', lines, said.append)
  assert left[0] == {'role': 'system', 'content': 'Hi'} and len(left) < 9
  text = ''.join(said)
  assert 'earlier messages no longer fit' in text and 'error: a prompt of' in text
  assert left[-2] == asked('bob')
  with pytest.raises(ValueError, match='the last message is of assistant; an answer follows on'):
    session.chat(left, sampling=GREEDY)
  with pytest.raises(ValueError, match='num_return_sequences=2: a conversation goes on with one'):
    session.chat([asked('bob')], max_new_tokens=4, num_return_sequences=2)


def test_its_folder_answers_the_same(session, tmp_path):
  export(session, tmp_path / 'out')
  again = llm_jax.open(tmp_path / 'out')
  assert again.config.objective['name'] == 'clm'
  assert again.chat([asked('cleo')], sampling=GREEDY) == 'Hello, cleo!'
  (tmp_path / 'out' / 'chat_template.jinja').unlink()
  with pytest.raises(ValueError, match='has no chat template'):
    chat.chat(llm_jax.open(tmp_path / 'out'), GREEDY, None, iter(['never read']))
  with pytest.raises(ValueError, match='has no chat template; fine-tune it by configs/chat.py'):
    llm_jax.open(tmp_path / 'out').chat([asked('cleo')], sampling=GREEDY)
