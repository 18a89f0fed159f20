"""Beam search against all texts there are, and what its numbers compile."""

import dataclasses
import itertools

import numpy as np
import pytest

from llm_jax.generation.sampling import Sampling


def best(tiny, model, prompt, eos, length, penalty):
  """The new tokens of the highest score among all texts, ended by `eos` or by their length."""
  V, found = model.vocab_size, (-np.inf, None)
  texts = np.array(list(itertools.product(range(V), repeat=length)))
  rows = np.concatenate([np.broadcast_to(prompt, (len(texts), len(prompt))), texts], axis=1)
  params = tiny.random_params(model)
  logits = model.apply({'params': params}, {'tokens': rows}, method=tiny.logits)
  logits = np.asarray(logits, np.float64)[:, len(prompt) - 1 : -1]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for text, scores in zip(texts, np.take_along_axis(log_p, texts[..., None], -1), strict=True):
    ends = np.flatnonzero(text == eos)
    count = ends[0] + 1 if len(ends) else length
    score = scores[:count].sum() / count**penalty
    if score > found[0]:
      found = score, text[:count].tolist()
  return found[1]


@pytest.mark.slow
@pytest.mark.parametrize('penalty', [0.0, 1.0, 3.0])
def test_as_many_beams_as_texts_find_the_best(tiny, penalty):
  model = tiny.GPT.clone(vocab_size=5)
  sampling = Sampling(max_new_tokens=3, temperature=0.0, beams=25, length_penalty=penalty)
  expected = [best(tiny, model, prompt, 3, 3, penalty) for prompt in ([1, 2], [4])]
  found = tiny.run(model, [[1, 2], [4]], sampling, eos=[3])
  assert [[token for token in row if token >= 0] for row in found] == expected


@pytest.mark.slow
def test_other_numbers_compile_nothing(tiny):
  made, weights = tiny.generator(tiny.GPT), tiny.ready(tiny.GPT)[1]
  base = Sampling(max_new_tokens=12, temperature=0.0, beams=3)
  changed = [
    dataclasses.replace(base, **options)
    for options in (
      dict(max_new_tokens=11),
      dict(length_penalty=2.5),
      dict(repetition_penalty=1.8),
      dict(repetition_penalty=1.1, length_penalty=0.1),
    )
  ]

  def tokens(sampling, eos=(9,)):
    return np.stack(list(made.tokens(weights, tiny.PROMPTS, sampling, eos)), axis=1).tolist()

  assert tiny.compilations(lambda: tokens(base)) >= 2
  assert tiny.compilations(lambda: list(map(tokens, changed))) == 0
  assert tiny.compilations(lambda: tokens(base, eos=(11,))) == 0
  assert tiny.compilations(lambda: tokens(dataclasses.replace(base, beams=2))) > 0
