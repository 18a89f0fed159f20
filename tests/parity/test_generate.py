"""Generation beside transformers': token for token where nothing is drawn, beam search too, in
batches of unequal prompts.

Both run in float32 on the CPU, from the same folder of random weights, so large that no two tokens
are equally likely.
"""

import types

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.generation import sampling
from llm_jax.generation.decoding import Generator
from llm_jax.generation.sampling import Sampling
from llm_jax.hf import families
from llm_jax.hf import folders as hf
from llm_jax.models import decoder

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

FAMILIES = families.known()
V, D, N, F, NEW = 97, 32, 4, 48, 100
THEIRS = dict(
  vocab_size=V,
  hidden_size=D,
  num_attention_heads=N,
  num_key_value_heads=2,
  intermediate_size=F,
  num_hidden_layers=2,
  max_position_embeddings=128,
  pad_token_id=0,
  bos_token_id=1,
  eos_token_id=None,
)
LLAMA3 = dict(
  rope_type='llama3',
  rope_theta=500.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)
CONFIGS = {
  'gpt2': transformers.GPT2Config(
    vocab_size=V,
    n_embd=D,
    n_head=N,
    n_inner=F,
    n_layer=2,
    n_positions=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
  ),
  'llama': transformers.LlamaConfig(**THEIRS, rope_parameters=LLAMA3),
  'mistral': transformers.MistralConfig(**THEIRS, sliding_window=12, head_dim=8),
}
PROMPTS = [np.random.default_rng(i).integers(3, V, n) for i, n in enumerate((5, 12, 1, 9))]


def randomised(reference):
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in reference.named_parameters():
      scale = value.ndim == 1 and name.endswith('weight')
      value.copy_(torch.randn(value.shape, generator=generator) * 0.4 + scale)
  return reference.eval()


@pytest.fixture(scope='module', params=CONFIGS)
def pair(request, tmp_path_factory):
  """Their model, our generator, and its weights."""
  reference = randomised(
    transformers.AutoModelForCausalLM.from_config(
      CONFIGS[request.param], attn_implementation='eager'
    )
  )
  folder = tmp_path_factory.mktemp(request.param)
  reference.save_pretrained(folder)
  options = hf.model_options(folder, FAMILIES)
  assert options.pop('name') == 'decoder'
  model = decoder.Model(**options)
  batch = {'tokens': jnp.ones((1, 4), jnp.int32)}
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method=predict))['params']
  params = loaded(folder, boxed)['model']
  made = Generator(model, params_lib.infos(boxed))
  return types.SimpleNamespace(reference=reference, made=made, weights=made.weights(params))


def loaded(folder, boxed):
  """The parameters of a network that has this model and nothing else."""
  network = {'model': boxed}
  params = hf.load(
    folder, FAMILIES, tree.flatten(nn.meta.unbox(network)), params_lib.infos(network)
  ).params
  return tree.nest(params)


def predict(model, batch):
  return model.logits(model(batch).hidden)


def theirs(reference, prompts, **options):
  """The new tokens of each prompt, as transformers makes them in one batch, padded on the left."""
  longest = max(map(len, prompts))
  ids = torch.tensor(np.stack([np.pad(p, (longest - len(p), 0)) for p in prompts]))
  mask = torch.tensor(
    np.stack([np.arange(longest) >= longest - len(p) for p in prompts]).astype(int)
  )
  made = reference.generate(ids, attention_mask=mask, pad_token_id=0, do_sample=False, **options)
  return [cut(row, options.get('eos_token_id')) for row in made[:, longest:].numpy()]


def cut(row, eos):
  ends = np.flatnonzero(np.isin(row, [] if eos is None else eos))
  return row[: ends[0] + 1].tolist() if len(ends) else row.tolist()


def ours(pair, prompts, eos=(), rows=None, **options):
  columns = pair.made.tokens(pair.weights, prompts, Sampling(**options), eos, rows)
  return [row[row >= 0].tolist() for row in np.stack(list(columns), axis=1)]


def test_greedy_is_transformers_token_for_token(pair):
  expected = theirs(pair.reference, PROMPTS, max_new_tokens=NEW)
  found = ours(pair, PROMPTS, max_new_tokens=NEW, temperature=0.0)
  assert found == expected
  assert len(set(map(tuple, expected))) == len(PROMPTS) and len(set(sum(expected, []))) > 20


def test_unequal_prompts_get_what_each_gets_alone(pair):
  together = ours(pair, PROMPTS, max_new_tokens=20, temperature=0.0)
  assert together == [
    ours(pair, [prompt], max_new_tokens=20, temperature=0.0)[0] for prompt in PROMPTS
  ]


BEAMS = [('gpt2', 1.0), ('llama', 0.5), ('mistral', -0.5)]


@pytest.mark.parametrize(
  'pair, length_penalty',
  BEAMS,
  ids=[f'{name}, {penalty}' for name, penalty in BEAMS],
  indirect=['pair'],
)
def test_beam_search_is_transformers(pair, length_penalty):
  eos = sorted(
    {
      row[4 + 5 * i]
      for i, row in enumerate(theirs(pair.reference, PROMPTS, max_new_tokens=20, num_beams=4))
    }
  )
  options = dict(max_new_tokens=20, length_penalty=length_penalty)
  expected = theirs(
    pair.reference, PROMPTS, num_beams=4, eos_token_id=eos, early_stopping=False, **options
  )
  options |= dict(beams=4, temperature=0.0)
  assert ours(pair, PROMPTS, eos, **options) == expected
  assert len(set(map(len, expected))) > 1  # some have ended by themselves
  assert ours(pair, PROMPTS[1:2], eos, **options) == expected[1:2]
  assert ours(pair, PROMPTS, eos, max_new_tokens=20, temperature=0.0) != expected


@pytest.mark.parametrize('pair', ['gpt2'], indirect=True)
def test_beam_search_without_an_end_and_with_a_penalty(pair):
  options = dict(max_new_tokens=30, repetition_penalty=1.3)
  prompts = [
    prompt[:5] for prompt in PROMPTS if len(prompt) > 4
  ]  # of one length: padding would be punished too
  expected = theirs(pair.reference, prompts, num_beams=4, **options)
  assert ours(pair, prompts, beams=4, temperature=0.0, **options) == expected
  assert theirs(pair.reference, prompts, num_beams=4, max_new_tokens=30) != expected


PROCESSED = jax.jit(sampling.processed)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  st.integers(0, 2**32 - 1),
  st.sampled_from([0.3, 1.0, 4.0]),
  st.sampled_from([0.5, 1.0, 1.7]),
  st.sampled_from([0, 1, 5, 200]),
  st.sampled_from([0.05, 0.6, 0.95, 1.0]),
  st.sampled_from([0.0, 0.02, 0.4, 1.0]),
  st.sampled_from([0.7, 1.0, 1.5]),
  st.sampled_from([0, 1, 2, 3]),
  st.sampled_from(['', 'early', 'first', 'last']),
)
def test_processors_are_transformers(
  seed, spread, temperature, top_k, top_p, min_p, penalty, ngram, where
):
  rng = np.random.default_rng(seed)
  length = 1 if where == 'first' else 12
  logits, ids = (spread * rng.normal(size=(3, V))).astype(np.float32), rng.integers(0, 4, (3, 12))
  t = transformers.generation.logits_process
  steps = [
    (penalty != 1, t.RepetitionPenaltyLogitsProcessor, (penalty,)),
    (ngram > 0, t.NoRepeatNGramLogitsProcessor, (ngram,)),
    (where == 'early', t.MinNewTokensLengthLogitsProcessor, (1, 15, [7, 9])),
    (where == 'first', t.ForcedBOSTokenLogitsProcessor, (5,)),
    (where == 'last', t.ForcedEOSTokenLogitsProcessor, (length + 1, 7)),
    (temperature != 1, t.TemperatureLogitsWarper, (temperature,)),
    (top_k > 0, t.TopKLogitsWarper, (top_k,)),
    (top_p < 1, t.TopPLogitsWarper, (top_p,)),
    (min_p > 0, t.MinPLogitsWarper, (min_p,)),
  ]
  expected = torch.tensor(logits)
  for used, processor, options in steps:
    if used:
      expected = processor(*options)(torch.tensor(ids[:, :length]), expected)
  chosen = Sampling(
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    repetition_penalty=penalty,
    no_repeat_ngram_size=ngram,
    min_new_tokens=15 if where == 'early' else 0,
    forced_bos=5 if where == 'first' else None,
    forced_eos=7 if where == 'last' else None,
    max_new_tokens=12 if where == 'last' else 20,
  )
  numbers = sampling.numbers([chosen] * 3, range(3), [1] * 3, [7, 9])
  lengths = jnp.full(3, length)
  found = np.asarray(PROCESSED(jnp.asarray(logits), jnp.asarray(ids), lengths, numbers))
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
  assert np.isfinite(found).any(axis=1).all()
