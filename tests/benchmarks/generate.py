"""Tokens per second of generation here and in transformers: the same weights and prompts, in one
process, alternating.

    python tests/benchmarks/generate.py [--pairs=5] [--json=FILE]

Greedy, an encoder-decoder by 4 beams, float32, 8 prompts of 32 tokens, 64 new tokens each, prefill
included, compilation not; both with their default number of threads. The tokens must be equal, or
no speed is reported.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.generation import decoding, sampling
from llm_jax.hf import families, folders
from llm_jax.models import decoder, encoder_decoder

ROWS, PROMPT, NEW, BEAMS = 8, 32, 64, 4
CONFIGS = {
  'gpt2_small': transformers.GPT2Config(),
  'llama_small': transformers.LlamaConfig(
    vocab_size=32000,
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=1376,
    max_position_embeddings=256,
  ),
  't5_small': transformers.T5Config(
    d_model=512, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128, decoder_start_token_id=0
  ),
}
MODELS = {'decoder': decoder, 'encoder_decoder': encoder_decoder}


def pair(name):
  """Two functions from prompts to new tokens, [ROWS, NEW] each: theirs and ours."""
  torch.manual_seed(0)
  whole = CONFIGS[name].is_encoder_decoder
  kind = transformers.AutoModelForSeq2SeqLM if whole else transformers.AutoModelForCausalLM
  reference = kind.from_config(CONFIGS[name]).eval()
  with tempfile.TemporaryDirectory() as folder:
    reference.save_pretrained(folder)
    ours = _ours(folder)

  def theirs(prompts):
    ids = torch.tensor(prompts)
    out = reference.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      num_beams=BEAMS if whole else 1,
      max_new_tokens=NEW,
      min_new_tokens=NEW,
      eos_token_id=None,
      pad_token_id=0,
    )
    return out[:, 1 if whole else PROMPT :].numpy()

  return theirs, ours


def _ours(folder):
  """A function from prompts to new tokens with the model in a Hugging Face folder."""
  known = families.known()
  options = folders.model_options(folder, known)
  model = MODELS[options.pop('name')].Model(**options)
  boxed = jax.eval_shape(lambda: {'model': _init(model)})
  infos = params_lib.infos(boxed)
  params = folders.load(folder, known, nn.unbox(boxed), infos).params
  model_infos = {path.removeprefix('model/'): info for path, info in infos.items()}
  generator = decoding.Generator(model, model_infos)
  weights = generator.weights(tree.nest(params)['model'])
  beams = BEAMS if model.reads_source() else 1
  chosen = sampling.Sampling(max_new_tokens=NEW, temperature=0.0, beams=beams)

  def ours(prompts):
    return np.stack(list(generator.tokens(weights, prompts, chosen)), axis=1)

  return ours


def _init(model):
  """All parameters of a model: an untied projection on the vocabulary is made by `table`."""

  def touch(model, batch):
    return model(batch).hidden, model.table()

  batch = {name: jnp.ones((1, 4), jnp.int32) for name in model.inputs}
  return model.init(jax.random.key(0), batch, method=touch)['params']


def measure(name, pairs):
  """Tokens per second of theirs and of ours in each pair; both run once before, to warm up and to
  compare.
  """
  theirs, ours = pair(name)
  prompts = np.random.default_rng(0).integers(0, CONFIGS[name].vocab_size, (ROWS, PROMPT))
  if not np.array_equal(theirs(prompts), ours(prompts)):
    raise AssertionError(f'{name}: not the same tokens.')
  speeds = []
  for _ in range(pairs):
    speeds.append([])
    for run in (theirs, ours):
      began = time.perf_counter()
      run(prompts)
      speeds[-1].append(ROWS * NEW / (time.perf_counter() - began))
  return speeds


def main(argv):
  """Prints a table, and writes the figures where they are wanted."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--pairs', type=int, default=5)
  parser.add_argument('--json')
  options = parser.parse_args(argv)
  found = {
    'machine': platform.processor() or platform.machine(),
    'cores': os.cpu_count(),
    'torch': torch.__version__,
    'transformers': transformers.__version__,
    'jax': jax.__version__,
    'rows': ROWS,
    'prompt': PROMPT,
    'new': NEW,
  }
  print(
    f'{"model":12} {"transformers":>13} {"llm_jax":>9} {"ratio":>6}   tokens/s, medians of '
    f'{options.pairs} pairs'
  )
  for name in CONFIGS:
    speeds = measure(name, options.pairs)
    theirs, ours = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratio = statistics.median(b / a for a, b in speeds)
    print(
      f'{name:12} {theirs:13.1f} {ours:9.1f} {ratio:6.2f}   load {os.getloadavg()[0]:.1f}',
      flush=True,
    )
    found[name] = {'pairs': speeds, 'transformers': theirs, 'llm_jax': ours, 'ratio': ratio}
  if options.json:
    with open(options.json, 'w', encoding='utf-8') as file:
      json.dump(found, file, indent=2)


if __name__ == '__main__':
  main(sys.argv[1:])
