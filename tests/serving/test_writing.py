"""Rows of a batch that come and go: each text is what it is alone; one that fails is said so."""

import contextlib
import json
import queue

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import params as params_lib
from llm_jax.data.tokenizers import byte
from llm_jax.generation.decoding import Generator
from llm_jax.generation.guides import Guides
from llm_jax.generation.sampling import Sampling
from llm_jax.models import decoder
from llm_jax.serving.batches import Full
from llm_jax.serving.writing import ERROR, LENGTH, STOP, UNGUIDED, Order, Writer

TOKENIZER = byte.create()
SHAPE = dict(dim=16, heads=2, mlp_dim=24, layers=1, max_len=64, dropout=0.0, attention_dropout=0.0)


@pytest.fixture(scope='module')
def model():
  """A generator of a drawn model, and its weights."""
  made = decoder.Model(vocab_size=TOKENIZER.vocab_size, **SHAPE)
  batch = {name: jnp.ones((1, 4), jnp.int32) for name in made.inputs}
  boxed = jax.eval_shape(lambda: made.init(jax.random.key(0), batch))['params']
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype)
  generator = Generator(made, params_lib.infos(boxed))
  params = jax.tree.map(draw, nn.unbox(boxed))
  generator.drawn = made, params  # what tests compare with
  return generator, generator.weights(params)


def writer(model, waiting=16, **options):
  return Writer(*model, TOKENIZER, rows=2, slots=40, waiting=waiting, **options)


def order(prompt, count, ends=(), **options):
  """An order, and a queue of what is said of it."""
  said: queue.Queue = queue.Queue()
  sampling = Sampling(max_new_tokens=count, temperature=1.0, seed=len(prompt))
  return Order(prompt, sampling, ends, lambda *given: said.put(given), **options), said


def heard(said, likely=None):
  """The whole text, and why it is over; its tokens are added to a list."""
  text, reason = '', None
  while reason is None:
    piece, reason, tokens = said.get(timeout=30)
    text += piece
    (likely if likely is not None else []).extend(tokens)
  return text, reason


@contextlib.contextmanager
def started(writing):
  writing.start()
  yield writing
  writing.close()


def alone(model, one):
  """What the generator writes for an order, a batch of its own."""
  generator, weights = model
  found = generator.tokens(weights, [one.prompt], one.sampling, one.ends, rows=[one.number])
  return [int(ids[0]) for ids in found if ids[0] >= 0]


@pytest.mark.slow
def test_each_text_is_what_it_is_alone(model):
  writing = writer(model)
  writing.warm()
  prompts = [[7, 8, 9], [20], [30, 31] * 9, [40, 41, 42, 43]]
  orders = [order(prompt, 4 + 3 * i, number=i) for i, prompt in enumerate(prompts)]
  ends = alone(model, orders[3][0])[5:6]
  orders[3] = order(prompts[3], 13, ends, number=3)
  for one, _ in orders:
    writing.submit(one)
  writing.start()
  found = [heard(said) for _, said in orders]
  for (one, _), (text, reason) in zip(orders, found, strict=True):
    ids = alone(model, one)
    known = TOKENIZER.decode(one.prompt)
    assert TOKENIZER.decode([*one.prompt, *ids]).rstrip('\ufffd').startswith(known + text)
    assert one.tokens == len(ids) and reason == (STOP if one.ends else LENGTH)
  writing.close()
  with pytest.raises(Full):
    writing.submit(orders[0][0])


def test_one_that_nobody_wants_any_more_makes_room(model):
  writing = writer(model, waiting=3)
  long = [order([5], 39) for _ in range(2)]
  for one, _ in long:
    writing.submit(one)
  dropped, _ = order([6], 39)
  writing.submit(dropped)
  with pytest.raises(Full):
    writing.submit(order([6], 2)[0])
  dropped.cancelled = True
  writing.submit(order([6], 2)[0])  # in its place
  writing.start()
  long[0][1].get(timeout=30)
  long[0][0].cancelled = True
  last, said = order([7], 2)
  writing.submit(last)
  assert heard(said)[1] == LENGTH and heard(long[1][1])[1] == LENGTH
  writing.close()
  assert long[0][0].tokens < 39 and dropped.tokens == 0
  assert writing.writing == writing.waiting == 0


def test_a_step_that_fails_is_said_and_the_next_text_is_written(model, monkeypatch):
  generator, weights = model
  writing, step, failed = writer(model), generator.step, []

  def fails_once(*args):
    if not failed:
      failed.append(True)
      raise RuntimeError('the device is gone')
    return step(*args)

  monkeypatch.setattr(generator, 'step', fails_once)
  first, said = order([5], 9)
  writing.submit(first)
  writing.start()
  assert heard(said)[1] == ERROR
  again, said = order([5], 9)
  writing.submit(again)
  assert heard(said)[1] == LENGTH and again.tokens == 9
  writing.close()


@pytest.mark.slow
def test_prompts_that_begin_alike_share_what_was_read(model, monkeypatch):
  """And get the same to the bit, as their probabilities show."""
  monkeypatch.setattr('llm_jax.serving.writing.PIECE', 8)
  begin = np.random.default_rng(1).integers(7, 200, 20).tolist()
  prompts = [begin, [*begin[:17], 9, 9, 9, 9, 9, 9, 9], begin[:8], begin]

  def written(prefixes):
    found = []
    with started(writer(model, prefixes=prefixes)) as writing:
      for prompt in prompts:
        one, said = order(prompt, 6, likely=3)
        writing.submit(one)
        found.append((heard(said, tokens := []), tokens))
    return found, writing.reused

  whole, none = written(0)
  shared, reused = written(2)
  assert shared == whole and (none, reused) == (0, 16 + 0 + 16)
  for prompt, (_, tokens) in zip(prompts, whole, strict=True):
    ids = alone(model, order(prompt, 6)[0])
    assert [one.token for one in tokens] == ids


@pytest.mark.slow
def test_what_is_said_of_tokens_is_what_the_model_gives(model):
  prompt = [20, 30, 40]
  with started(writer(model)) as writing:
    one, said = order(prompt, 5, likely=2)
    writing.submit(one)
    heard(said, tokens := [])
  made, params = model[0].drawn
  rows = jnp.array([[*prompt, *(one.token for one in tokens)]])
  hidden = made.apply({'params': params}, {'tokens': rows}).hidden[0]
  table = made.apply({'params': params}, method='table')
  log = jax.nn.log_softmax(hidden @ table.T)[len(prompt) - 1 :]
  for number, one in enumerate(tokens):
    np.testing.assert_allclose(one.logprob, log[number, one.token], atol=1e-5)
    best = np.argsort(-log[number])[:2].tolist()
    assert [token for token, _ in one.others] == best
    np.testing.assert_allclose([x for _, x in one.others], log[number, best], atol=1e-5)


@pytest.mark.slow
def test_a_guide_changes_its_own_text_alone(model):
  generator = model[0]
  guides = Guides(TOKENIZER, generator.vocab_size, TOKENIZER.eos_ids)
  schema = {'enum': [{'good': True}, {'good': False}, {'none': 3}]}
  with started(writer(model)) as writing:
    free, heard_free = order([20, 21], 30)
    writing.submit(free)
    for number in range(3):
      one, said = order([30 + number], 30, likely=0, guide=guides('json', schema))
      writing.submit(one)
      text, reason = heard(said, tokens := [])
      assert json.loads(text) in schema['enum'] and reason == STOP
      assert b''.join(TOKENIZER.spelling(one.token) for one in tokens).decode() == text
    ids = alone(model, free)
    assert heard(heard_free)[0] == TOKENIZER.decode(ids).rstrip('\ufffd')
    banned, said = order([30], 30, ends=[31], guide=guides('regex', 'a{40}'))
    writing.submit(banned)
    assert heard(said) == ('a' * 30, LENGTH)


def test_a_text_that_its_guide_does_not_take_is_given_up(model):
  guides = Guides(TOKENIZER, model[0].vocab_size, TOKENIZER.eos_ids)
  lost = guides('regex', 'ab')
  lost.add(TOKENIZER.encode('a')[0])
  with started(writer(model)) as writing:
    one, said = order([30], 5, guide=lost)
    lost.allowed_W = np.zeros_like(lost.allowed_W)  # as if nothing led on
    writing.submit(one)
    assert heard(said)[1] == UNGUIDED
    writing.submit((again := order([30], 5))[0])
    assert heard(again[1])[1] == LENGTH


def test_what_no_row_can_take(model):
  writing = writer(model)
  for prompt, count, words in (([5] * 30, 11, 'a row here has 40'), ([5], 64, 'max_len=64')):
    with pytest.raises(ValueError, match=words):
      writing.submit(order(prompt, count)[0])
  beams = Order([5], Sampling(temperature=0.0, beams=2), (), lambda *_: None)
  with pytest.raises(ValueError, match='beam search'):
    writing.submit(beams)
  assert writing.room([5] * 30) == 10
