"""Rows of a batch that come and go: each text is what it is alone; one that fails is said so."""

import queue

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import params as params_lib
from llm_jax.data.tokenizers import byte
from llm_jax.generation.decoding import Generator
from llm_jax.generation.sampling import Sampling
from llm_jax.models import decoder
from llm_jax.serving.batches import Full
from llm_jax.serving.writing import ERROR, LENGTH, STOP, Order, Writer

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
  return generator, generator.weights(jax.tree.map(draw, nn.unbox(boxed)))


def writer(model, waiting=16):
  return Writer(*model, TOKENIZER, rows=2, slots=40, waiting=waiting)


def order(prompt, count, ends=(), **options):
  """An order, and a queue of what is told of it."""
  told: queue.Queue = queue.Queue()
  sampling = Sampling(max_new_tokens=count, temperature=1.0, seed=len(prompt))
  tell = lambda piece, reason: told.put((piece, reason))
  return Order(prompt, sampling, ends, tell, **options), told


def heard(told):
  """The whole text, and why it is over."""
  text, reason = '', None
  while reason is None:
    piece, reason = told.get(timeout=30)
    text += piece
  return text, reason


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
  found = [heard(told) for _, told in orders]
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
  writing.start()
  long[0][1].get(timeout=30)
  long[0][0].cancelled = True
  last, told = order([7], 2)
  writing.submit(last)
  assert heard(told)[1] == LENGTH and heard(long[1][1])[1] == LENGTH
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
  first, told = order([5], 9)
  writing.submit(first)
  writing.start()
  assert heard(told)[1] == ERROR
  again, told = order([5], 9)
  writing.submit(again)
  assert heard(told)[1] == LENGTH and again.tokens == 9
  writing.close()


def test_what_no_row_can_take(model):
  writing = writer(model)
  for prompt, count, words in (([5] * 30, 11, 'a row here has 40'), ([5], 64, 'max_len=64')):
    with pytest.raises(ValueError, match=words):
      writing.submit(order(prompt, count)[0])
  beams = Order([5], Sampling(temperature=0.0, beams=2), (), lambda *_: None)
  with pytest.raises(ValueError, match='beam search'):
    writing.submit(beams)
  assert writing.room([5] * 30) == 10
