"""Texts in, texts out: whole characters, stop strings, templates, and masks filled in as the logits
say.
"""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bert_tiny, gpt_tiny
from llm_jax.core import config
from llm_jax.data.tokenizers import byte
from llm_jax.inference import complete
from llm_jax.inference import decoding as generate
from llm_jax.programs import build

SHAPE = dict(dim=16, layers=2, heads=2, mlp_dim=24, max_len=64, dropout=0.0, attention_dropout=0.0)
TOKENIZER = byte.create()
GREEDY = generate.Sampling(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope='module', autouse=True)
def little_care_in_compiling():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


class Said:
  """A generator that says what it is told to, token by token, whatever the prompts; it keeps what
  it was asked.
  """

  def __init__(self, *texts, eos=True):
    self.rows = [
      [*TOKENIZER.encode(text), *[TOKENIZER.eos_id] * eos] if isinstance(text, str) else text
      for text in texts
    ]
    self.asked, self.taken = [], 0

  def tokens(self, weights, prompts, sampling, eos_ids, rows):
    self.asked.append(
      types.SimpleNamespace(
        prompts=[list(map(int, p)) for p in prompts], eos_ids=eos_ids, rows=list(rows)
      )
    )
    said = [self.rows[row] for row in rows]
    for place in range(max(map(len, said))):
      self.taken += 1
      yield np.array([row[place] if place < len(row) else -1 for row in said])


def say(said, count, rows=8, **options):
  pieces = [[] for _ in range(count)]
  completer = complete.Completer(said, TOKENIZER, rows)
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
  completer = complete.Completer(said, TOKENIZER, rows=2)
  assert completer(None, ['x', '', 'yy', 'z', 'é'], GREEDY) == list('abcde')
  assert [asked.rows for asked in said.asked] == [[0, 1], [2, 3], [4, 4]]
  bos = TOKENIZER.bos_id
  assert said.asked[0].prompts == [[bos, *TOKENIZER.encode('x')], [bos]] and said.asked[
    0
  ].eos_ids == [TOKENIZER.eos_id]
  other = types.SimpleNamespace(
    encode=TOKENIZER.encode, decode=TOKENIZER.decode, eos_id=1, bos_id=2, template=((), (9,))
  )
  said = Said(*'ab')
  complete.Completer(said, other)(None, ['x', ''], GREEDY)
  assert said.asked[0].prompts == [
    [*TOKENIZER.encode('x')],
    [2],
  ]  # nothing before, but there must be something


class Spaced:
  """A tokenizer whose decoder takes off the space that the first word of a text begins with, as
  SentencePiece has it.
  """

  template, bos_id, eos_id, words = None, 0, 1, ['', '', '\u2581a', '\u2581b', 'c']

  def encode(self, text):
    return np.array([self.words.index(f'\u2581{word}') for word in text.split()], np.int32)

  def decode(self, ids):
    return ''.join(self.words[i] for i in ids).replace('\u2581', ' ').removeprefix(' ')


def test_a_space_after_the_prompt_stays():
  said = Said([3, 4, 2, 1])
  assert complete.Completer(said, Spaced())(None, ['a a'], GREEDY) == [' bc a']
  assert Spaced().decode([3, 4, 2]) == 'bc a'


def program(module, **changes):
  """A Program and parameters away from zero."""
  tree = module.get_config().to_dict()
  tree |= (
    dict(
      seq_len=32,
      batch_size=2,
      micro_batches=1,
      tokenizer=dict(name='byte'),
      model=tree['model'] | SHAPE,
    )
    | changes
  )
  made = build.outline(config.parse(tree), jax.devices()[:1])
  rng = np.random.default_rng(0)
  return made, jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), made.state.params
  )


def test_a_decoder_goes_on():
  made, params = program(gpt_tiny)
  texts = ['abc', 'xy', 'q']
  pieces = []
  found = complete.complete(
    made, params, TOKENIZER, texts, GREEDY, stream=lambda *piece: pieces.append(piece)
  )
  assert [''.join(piece for i, piece in pieces if i == row) for row in range(3)] == found
  model, ids = made.network.model, [TOKENIZER.bos_id, *TOKENIZER.encode('xy')]
  run = jax.jit(
    lambda t: model.apply({'params': params['model']}, t, method=lambda m, t: m.logits(m(t)))
  )
  for _ in range(12):  # one row, no cache
    logits = run(np.array([ids + [0] * (20 - len(ids))]))
    ids.append(int(jnp.argmax(logits[0, len(ids) - 1])))
    if ids[-1] == TOKENIZER.eos_id:
      break
  assert found[1] == TOKENIZER.decode(ids[3:]).rstrip('\ufffd')
  with pytest.raises(ValueError, match='max_len=64'):
    complete.complete(made, params, TOKENIZER, ['a' * 60], GREEDY)


def test_samples_are_the_same_each_time(small):
  made, params = program(gpt_tiny)
  documents = [small.Documents([[], TOKENIZER.encode('hello world'), TOKENIZER.encode('bye')])]
  samples = complete.Samples(made, TOKENIZER, documents, 3)
  first = samples(params)
  assert [beginning for beginning, _ in first] == ['', 'hello wo', 'bye']
  assert samples(params) == first
  assert samples(jax.tree.map(lambda x: 1.5 * x, params)) != first


def test_masks_are_filled_in():
  made, params = program(bert_tiny, objective=dict(name='mlm'))
  texts = ['a [MASK] c[MASK]', 'xyz [MASK]', '[MASK]']
  found = complete.fill(made, params, TOKENIZER, texts, top=3)
  assert [len(f.masks) for f in found] == [2, 1, 1]
  ids = np.array(
    [
      TOKENIZER.cls_id,
      *TOKENIZER.encode('a '),
      TOKENIZER.mask_id,
      *TOKENIZER.encode(' c'),
      TOKENIZER.mask_id,
      TOKENIZER.sep_id,
    ]
  )

  def logits(net, tokens):
    x, bias = net.heads['mlm'](net.hidden({'tokens': tokens, 'segments': jnp.ones_like(tokens)}))
    return net.model.logits(x) + bias[None, None]

  p = np.asarray(
    jax.nn.softmax(made.network.apply({'params': params}, jnp.array([ids]), method=logits))
  )[0]
  places = np.flatnonzero(ids == TOKENIZER.mask_id)
  for place, candidates in zip(places, found[0].masks, strict=True):
    best = np.argsort(p[place])[::-1][:3]
    assert [token for token, _ in candidates] == [TOKENIZER.decode([i]).strip() for i in best]
    np.testing.assert_allclose([q for _, q in candidates], p[place][best], rtol=1e-4)
  filled = ids.copy()
  filled[places] = p[places].argmax(-1)
  assert found[0].text == TOKENIZER.decode(filled)
  everything = complete.fill(made, params, TOKENIZER, texts[1:2], top=10**6)[0].masks[0]
  assert len(everything) == TOKENIZER.vocab_size and math.isclose(
    sum(q for _, q in everything), 1, abs_tol=1e-4
  )


def test_masks_that_cannot_be_filled_in():
  made, params = program(bert_tiny, objective=dict(name='mlm'))
  with pytest.raises(ValueError, match=r"'no mask' has no \[MASK\]"):
    complete.fill(made, params, TOKENIZER, ['no mask'])
  with pytest.raises(ValueError, match=r'has 72 tokens, and the model takes max_len=64'):
    complete.fill(made, params, TOKENIZER, ['a' * 69 + '[MASK]'])
  made, params = program(gpt_tiny)
  with pytest.raises(ValueError, match='no masked-LM head'):
    complete.fill(made, params, TOKENIZER, ['[MASK]'])
  made, params = program(bert_tiny, objective=dict(name='mlm'))
  without = types.SimpleNamespace(mask_id=None)
  with pytest.raises(ValueError, match='no mask token'):
    complete.fill(made, params, without, ['[MASK]'])
