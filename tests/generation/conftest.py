"""Two small decoders and an encoder-decoder, their weights, and how tests run them."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import params as params_lib
from llm_jax.generation.decoding import Generator
from llm_jax.generation.sampling import Sampling
from llm_jax.models import decoder, encoder_decoder

TINY = dict(
  vocab_size=40,
  dim=16,
  heads=4,
  mlp_dim=24,
  layers=2,
  max_len=64,
  dropout=0.0,
  attention_dropout=0.0,
)
GPT = decoder.Model(**TINY)
LLAMA = decoder.Model(**decoder.VARIANTS['llama_2_7b'] | TINY | dict(kv_heads=2, window=5))
T5 = encoder_decoder.Model(**encoder_decoder.VARIANTS['t5_1_1_small'] | TINY | dict(head_dim=4))
MODELS = {'learned': GPT, 'rotary': LLAMA.clone(window=None), 'window': LLAMA, 'both': T5}
PROMPTS = [[3, 9, 4, 1, 5], [2], [7, 8, 9, 10, 11, 12, 13, 14, 15], [6, 30, 2]]
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


def logits(model, batch, **kwargs):
  outputs = model(batch, **kwargs)
  logits_BTV = model.logits(outputs.hidden)
  return (logits_BTV, outputs.cache) if 'cache' in kwargs else logits_BTV


def boxed_params(model, method=logits):
  batch = {name: jnp.ones((1, 4), jnp.int32) for name in model.inputs}
  init = functools.partial(model.init, method=method)
  return jax.eval_shape(lambda: init(jax.random.key(0), batch))['params']


def random_params(model, method=logits):
  rng = np.random.default_rng(0)
  shapes = nn.unbox(boxed_params(model, method))
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), shapes)


def generator(model, layout=None, method=logits):
  return Generator(model, params_lib.infos(boxed_params(model, method)), layout)


@functools.cache
def ready(model):
  """A generator, and weights for it, that tests share: what one has compiled the next need not."""
  made = generator(model)
  return made, made.weights(random_params(model))


def run(model, prompts, sampling, eos=(), rows=None):
  made, weights = ready(model)
  return np.stack(list(made.tokens(weights, prompts, sampling, eos, rows)), axis=1).tolist()


def admit_in_pieces(made, weights, state, row, prompt, sampling, number):
  """As `Generator.admit`, the prompt in pieces of four tokens."""
  cache = made.opened(state.slots)
  for begun in range(0, len(prompt), 4):
    cache, logits_1V = made.read(weights, cache, prompt[begun : begun + 4], begun)
  return made.enter(state, row, cache, logits_1V, prompt, sampling, number)


def join(made, weights, state, plan, pieces=False):
  """Admits each (steps before, row, prompt, sampling, number) of a plan at its time, in pieces or
  at once, and steps until all are over; returns the state, and the tokens of each.
  """
  admit = admit_in_pieces if pieces else Generator.admit
  tokens, step = [[] for _ in plan], 0
  while any(len(got) < entry[3].max_new_tokens for got, entry in zip(tokens, plan, strict=True)):
    for got, (start, row, prompt, sampling, number) in zip(tokens, plan, strict=True):
      if start == step:
        state, first = admit(made, weights, state, row, prompt, sampling, number)
        got.append(int(first))
    state, ids = made.step(weights, state)
    for got, (start, row, _, sampling, _) in zip(tokens, plan, strict=True):
      if start <= step and len(got) < sampling.max_new_tokens:
        got.append(int(ids[row]))
    step += 1
  return state, tokens


def compilations(function):
  """How many programs are compiled while a function runs."""
  seen = []
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: seen.append(name))
  try:
    function()
  finally:
    jax.monitoring.clear_event_listeners()
  return sum(name == '/jax/core/compile/backend_compile_duration' for name in seen)


@pytest.fixture(scope='session')
def tiny():
  return types.SimpleNamespace(
    MODELS=MODELS,
    GPT=GPT,
    LLAMA=LLAMA,
    PROMPTS=PROMPTS,
    GREEDY=GREEDY,
    logits=logits,
    random_params=random_params,
    generator=generator,
    ready=ready,
    run=run,
    join=join,
    compilations=compilations,
  )
