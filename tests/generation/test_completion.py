"""Completions: whole characters, stop strings, batches; a decoder beside one without a cache."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gpt_tiny
from llm_jax.core import config
from llm_jax.data.tokenizers import byte
from llm_jax.generation import completion
from llm_jax.generation.decoding import Generator
from llm_jax.generation.sampling import Sampling
from llm_jax.training import program as programs

SHAPE = dict(dim=16, layers=2, heads=2, mlp_dim=24, max_len=64, dropout=0.0, attention_dropout=0.0)
TOKENIZER = byte.create()
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


class Said:
  """A generator that says what it is told to, token by token, whatever the prompts; it keeps what
  it was asked.
  """

  reads_source = False

  def __init__(self, *texts, eos=True):
    self.rows = [
      [*TOKENIZER.encode(text), *[TOKENIZER.eos_id] * eos] if isinstance(text, str) else text
      for text in texts
    ]
    self.asked, self.taken = [], 0

  def check(self, prompts, samplings):
    assert len(prompts) == len(samplings)

  def tokens(self, weights, prompts, sampling, eos_ids, rows):
    self.asked.append(
      types.SimpleNamespace(
        prompts=[list(map(int, p)) for p in prompts], eos_ids=eos_ids, rows=list(rows)
      )
    )
    said = [self.rows[row] for row in rows]
    for column in range(max(map(len, said))):
      self.taken += 1
      yield np.array([row[column] if column < len(row) else -1 for row in said])


def say(said, count, rows=8, **options):
  pieces = [[] for _ in range(count)]
  completer = completion.Completer(said, TOKENIZER, rows)
  texts = completer(
    None, ['p'] * count, GREEDY, stream=lambda i, piece: pieces[i].append(piece), **options
  )
  assert [''.join(row) for row in pieces] == texts and all(all(row) for row in pieces)
  return texts, pieces


def test_characters_are_whole():
  text = 'aé漢🙂'  # of one to four bytes, a token each
  texts, pieces = say(Said(text), 1)
  assert texts == [text] and pieces == [list(text)]
  cut = Said([*TOKENIZER.encode(text)[:-1]])  # the last character never gets its last byte
  assert say(cut, 1) == (['aé漢'], [list('aé漢')])
  broken = Said(
    [*TOKENIZER.encode('a🙂')[:3], *TOKENIZER.encode('bc')]
  )  # two bytes of a character, then others
  texts, pieces = say(broken, 1)
  assert (
    texts[0] == TOKENIZER.decode(broken.rows[0]) and '\ufffd' in texts[0] and pieces[0][0] == 'a'
  )
  assert TOKENIZER.decode(Said(text).rows[0][:2]).endswith(
    '\ufffd'
  )  # what one that does not wait would print


@pytest.mark.parametrize(
  'said, stop, text, pieces',
  [
    ('one. two', ['. '], 'one', ['o', 'n', 'e']),
    ('aab aac', ['aac'], 'aab ', ['aab', ' ']),  # held back while it may be a stop string
    ('say END', ['\n', 'END'], 'say ', ['s', 'a', 'y', ' ']),
    ('EN', ['END'], 'EN', ['EN']),  # which it was not in the end
    ('xyz', ['yz', 'xyz'], '', []),  # the one that begins first
    ('漢字', ['字'], '漢', ['漢']),
    ('abc', ['d'], 'abc', ['a', 'b', 'c']),
  ],
)
def test_stop_strings(said, stop, text, pieces):
  assert say(Said(said), 1, stop=stop) == ([text], [pieces])


def test_no_more_is_asked_for_when_all_have_stopped():
  said = Said('a.bcdefgh', 'bc.defgh')
  assert say(said, 2, stop=['.'])[0] == ['a', 'bc']
  assert said.taken == 3
  said = Said('a', 'bc.defgh')  # one by EOS, the other by a stop string
  assert say(said, 2, stop=['.'])[0] == ['a', 'bc'] and said.taken == 3
  with pytest.raises(ValueError, match='an empty stop string'):
    say(Said('a'), 1, stop=['', 'b'])


def test_batches_and_what_stands_before_a_prompt():
  said = Said(*'abcde')
  completer = completion.Completer(said, TOKENIZER, rows=2)
  assert completer(None, ['x', '', 'yy', 'z', 'é'], GREEDY) == list('abcde')
  assert [asked.rows for asked in said.asked] == [[0, 1], [2, 3], [4, 4]]
  bos = TOKENIZER.bos_id
  assert said.asked[0].prompts == [[bos, *TOKENIZER.encode('x')], [bos]] and said.asked[
    0
  ].eos_ids == (TOKENIZER.eos_id,)
  other = types.SimpleNamespace(
    encode=TOKENIZER.encode, decode=TOKENIZER.decode, eos_ids=(1, 3), bos_id=2, template=((), (9,))
  )
  said = Said(*'ab')
  completion.Completer(said, other)(None, ['x', ''], GREEDY)
  assert said.asked[0].prompts == [
    [*TOKENIZER.encode('x')],
    [2],
  ]  # nothing before, but there must be something
  assert said.asked[0].eos_ids == (1, 3)


class Spaced:
  """A tokenizer whose decoder takes off the space that the first word of a text begins with, as
  SentencePiece has it.
  """

  template, bos_id, eos_ids, words = None, 0, (1,), ['', '', '\u2581a', '\u2581b', 'c']

  def encode(self, text):
    return np.array([self.words.index(f'\u2581{word}') for word in text.split()], np.int32)

  def decode(self, ids):
    return ''.join(self.words[i] for i in ids).replace('\u2581', ' ').removeprefix(' ')


def test_prompts_draw_by_their_numbers():
  generator = Said(*'abcdefgh')
  complete = completion.Completer(generator, TOKENIZER, rows=3)
  found = complete(None, ['x', 'y'], GREEDY, numbers=[4, 7])
  assert found == ['e', 'h'] and generator.asked[0].rows == [4, 7, 7]  # filled up


def test_a_space_after_the_prompt_stays():
  said = Said([3, 4, 2, 1])
  assert completion.Completer(said, Spaced())(None, ['a a'], GREEDY) == [' bc a']
  assert Spaced().decode([3, 4, 2]) == 'bc a'


def program(module, **changes):
  """A program and parameters away from zero."""
  tree = module.get_config().to_dict()
  tree |= dict(seq_len=32, batch_size=2, tokenizer=dict(name='byte'), model=tree['model'] | SHAPE)
  made = programs.outline(config.parse(tree | changes), jax.devices()[:1])
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype)
  return made, jax.tree.map(draw, made.params)


@pytest.mark.slow
def test_a_decoder_continues():
  made, params = program(gpt_tiny)
  model, prompts, pieces = made.network.model, ['abc', 'xy', 'q'], []
  generator = Generator(model, made.model_infos, made.layout)
  completer, weights = completion.Completer(generator, TOKENIZER, 2), None
  weights = generator.weights(params['model'])
  found = completer(weights, prompts, GREEDY, stream=lambda *piece: pieces.append(piece))
  assert [''.join(piece for i, piece in pieces if i == row) for row in range(3)] == found

  def logits(model, tokens):
    return jnp.einsum('btd,vd->btv', model({'tokens': tokens}).hidden, model.table())

  run = jax.jit(lambda t: model.apply({'params': params['model']}, t, method=logits))
  ids = [TOKENIZER.bos_id, *TOKENIZER.encode('xy')]
  for _ in range(12):  # one row, no cache
    scores = run(np.array([ids + [0] * (20 - len(ids))]))
    ids.append(int(jnp.argmax(scores[0, len(ids) - 1])))
    if ids[-1] == TOKENIZER.eos_id:
      break
  assert found[1] == TOKENIZER.decode(ids[3:]).rstrip('\ufffd')
  with pytest.raises(ValueError, match='max_len=64'):
    completer(weights, ['a' * 60], GREEDY)
