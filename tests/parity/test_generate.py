"""Generation beside transformers': token for token where nothing is drawn, beam search too, in batches of unequal prompts.

Both run in float32 on the CPU, from the same folder of random weights, which are large enough for the logits to tell tokens apart.
"""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import generate, hf, tree
from llm_jax.models import decoder

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

FAMILIES = {kind: ('decoder', family) for kind, family in decoder.HF.items()}
V, D, N, F, NEW = 97, 32, 4, 48, 100
THEIRS = dict(vocab_size=V, hidden_size=D, num_attention_heads=N, num_key_value_heads=2, intermediate_size=F, num_hidden_layers=2,
              max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None)
LLAMA3 = dict(rope_type='llama3', rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
CONFIGS = {
    'gpt2': transformers.GPT2Config(vocab_size=V, n_embd=D, n_head=N, n_inner=F, n_layer=2, n_positions=128, pad_token_id=0,
                                    bos_token_id=1, eos_token_id=None),
    'llama': transformers.LlamaConfig(**THEIRS, rope_parameters=LLAMA3),
    'mistral': transformers.MistralConfig(**THEIRS, sliding_window=12, head_dim=8),
}
PROMPTS = [np.random.default_rng(i).integers(3, V, n) for i, n in enumerate((5, 17, 1, 9))]


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
  reference = randomised(transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation='eager'))
  folder = tmp_path_factory.mktemp(request.param)
  reference.save_pretrained(folder)
  model = decoder.Model(**{k: v for k, v in hf.model_options(folder, FAMILIES).items() if k != 'name'})
  shapes = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32), method=predict)))
  params = hf.load(folder, FAMILIES, {f'model/{path}': leaf for path, leaf in tree.flatten(shapes['params']).items()}).params
  made = generate.Generator(model)
  return types.SimpleNamespace(reference=reference, made=made, weights=made.weights(tree.nest(params)['model']))


def predict(model, tokens_BT):
  return model.logits(model(tokens_BT))


def theirs(reference, prompts, **options):
  """The new tokens of each prompt, as transformers makes them in one batch, padded on the left."""
  longest = max(map(len, prompts))
  ids = torch.tensor(np.stack([np.pad(p, (longest - len(p), 0)) for p in prompts]))
  mask = torch.tensor(np.stack([np.arange(longest) >= longest - len(p) for p in prompts]).astype(int))
  made = reference.generate(ids, attention_mask=mask, pad_token_id=0, do_sample=False, **options)[:, longest:].numpy()
  return [cut(row, options.get('eos_token_id')) for row in made]


def cut(row, eos):
  ends = np.flatnonzero(np.isin(row, [] if eos is None else eos))
  return row[:ends[0] + 1].tolist() if len(ends) else row.tolist()


def ours(pair, prompts, eos=(), rows=None, **options):
  columns = np.stack(list(pair.made.tokens(pair.weights, prompts, generate.Sampling(**options), eos, rows)), axis=1)
  return [row[row >= 0].tolist() for row in columns]


def test_greedy_is_transformers_token_for_token(pair):
  expected = theirs(pair.reference, PROMPTS, max_new_tokens=NEW)
  found = ours(pair, PROMPTS, max_new_tokens=NEW, temperature=0.0)
  assert found == expected
  assert len(set(map(tuple, expected))) == len(PROMPTS) and len(set(sum(expected, []))) > 20
