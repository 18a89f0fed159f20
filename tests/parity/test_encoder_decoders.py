"""Folders of encoder-decoders, written by transformers and by us: the same logits, gradients and
bytes on both sides, padding in both rows, and greedy tokens by a cache.

The reference runs in float32 on the CPU with eager attention and no dropout; weights are random,
norms and biases too.
"""

import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.data.tokenizers import byte
from llm_jax.generation.decoding import Generator
from llm_jax.generation.sampling import Sampling
from llm_jax.hf import families
from llm_jax.hf import folders as hf
from llm_jax.inference import export
from llm_jax.models import encoder_decoder
from llm_jax.nn import relative

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
judge = pytest.importorskip('safetensors.torch')
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('as_in_use')]

FAMILIES = families.known()
V, D, S, T = 60, 32, 12, 9
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0)
T5 = IDS | dict(
  vocab_size=V,
  d_model=D,
  d_kv=10,
  d_ff=48,
  num_layers=3,
  num_decoder_layers=2,
  num_heads=4,
  relative_attention_num_buckets=8,
  relative_attention_max_distance=12,
)
BART = IDS | dict(
  forced_eos_token_id=None,
  vocab_size=V,
  d_model=D,
  encoder_layers=3,
  decoder_layers=2,
  encoder_attention_heads=4,
  decoder_attention_heads=4,
  encoder_ffn_dim=48,
  decoder_ffn_dim=48,
  max_position_embeddings=64,
)
GATED = T5 | dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False)
CASES = {
  't5': ('T5ForConditionalGeneration', T5),
  't5_1_1': ('T5ForConditionalGeneration', GATED),
  'mt5': ('MT5ForConditionalGeneration', GATED | dict(feed_forward_proj='gated-silu')),
  'bart': ('BartForConditionalGeneration', BART),
  'mbart': ('MBartForConditionalGeneration', BART | dict(scale_embedding=True)),
  'marian': (
    'MarianMTModel',
    BART | dict(scale_embedding=True, activation_function='swish'),
  ),
}
SOURCE_SEGMENTS = np.array([[1] * S, [1] * 7 + [0] * 5])
SEGMENTS = np.array([[1] * 6 + [0] * 3, [1] * T])
rng = np.random.default_rng(0)
SOURCES = np.where(SOURCE_SEGMENTS > 0, rng.integers(3, V, (2, S)), 0)
TOKENS = np.where(SEGMENTS > 0, rng.integers(3, V, (2, T)), 0)
BATCH = {
  'tokens': TOKENS,
  'segments': SEGMENTS,
  'source_tokens': SOURCES,
  'source_segments': SOURCE_SEGMENTS,
}


def randomised(reference):
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in reference.named_parameters():
      if not value.requires_grad:  # Marian's positions
        continue
      scale = value.ndim == 1 and name.endswith('weight')
      value.copy_(torch.randn(value.shape, generator=generator) * 0.15 + scale)
    if hasattr(reference, 'final_logits_bias'):
      reference.final_logits_bias += torch.randn(1, V, generator=generator)
  return reference.eval()


def run(reference):
  return reference(
    input_ids=torch.tensor(SOURCES),
    attention_mask=torch.tensor(np.int64(SOURCE_SEGMENTS > 0)),
    decoder_input_ids=torch.tensor(TOKENS),
    decoder_attention_mask=torch.tensor(np.int64(SEGMENTS > 0)),
  ).logits


def forward(model, batch):
  """Logits; without them, a projection that is not tied has no parameter."""
  found, bias_V = model.logits(model(batch).hidden), model.table_bias()
  return found if bias_V is None else found + bias_V[None, None]


def logits(model, params, batch):
  return model.apply({'params': tree.nest(params)['model']}, batch, method=forward)


def described(model):
  init = lambda: model.init(jax.random.key(0), BATCH, method=forward)
  boxed = jax.eval_shape(init)['params']
  whole = {'model': boxed}
  return tree.flatten(nn.unbox(whole)), params_lib.infos(whole)


def own_projection(reference, folder):
  """Gives a folder a projection on the vocabulary of its own: transformers 5 ties that of any T5
  that it makes, and opens what is there.
  """
  file = folder / 'model.safetensors'
  tensors = judge.load_file(file)
  generator = torch.Generator().manual_seed(1)
  tensors['lm_head.weight'] = torch.randn(V, D, generator=generator) * 0.15
  judge.save_file(tensors, file, metadata={'format': 'pt'})
  return type(reference).from_pretrained(folder, attn_implementation='eager').eval()


@pytest.fixture(scope='module', params=CASES)
def made(request, tmp_path_factory):
  kind, config = CASES[request.param]
  factory = getattr(transformers, kind)
  reference = randomised(factory(factory.config_class(**config, attn_implementation='eager')))
  folder = tmp_path_factory.mktemp(request.param)
  reference.save_pretrained(folder)
  if config.get('tie_word_embeddings') is False:
    reference = own_projection(reference, folder)
  options = hf.model_options(folder, FAMILIES)
  assert options.pop('name') == 'encoder_decoder'
  model = encoder_decoder.Model(**options | dict(dropout=0.0, attention_dropout=0.0))
  shapes, infos = described(model)
  return types.SimpleNamespace(
    reference=reference,
    folder=folder,
    model=model,
    shapes=shapes,
    infos=infos,
    loaded=hf.load(folder, FAMILIES, shapes, infos),
  )


def weights(x):
  w = np.random.default_rng(1).normal(size=x.shape).astype(np.float32) / T
  return w * (SEGMENTS > 0)[:, :, None]


def their_gradients(made, folder):
  made.reference.zero_grad()
  x = run(made.reference)
  torch.sum(torch.log_softmax(x, -1) * torch.tensor(weights(x))).backward()
  named = dict(made.reference.named_parameters())
  gradients = {
    name: torch.zeros_like(value) if value.grad is None else value.grad
    for name, value in named.items()
  }
  held = judge.load_file(made.folder / 'model.safetensors')
  gradients |= {name: torch.zeros_like(x) for name, x in held.items() if name not in gradients}
  judge.save_file(
    {k: x.contiguous().clone() for k, x in gradients.items()}, folder / 'model.safetensors'
  )
  config = json.loads((made.folder / 'config.json').read_text())
  config['tie_word_embeddings'] = made.model.tied
  config.setdefault('scale_decoder_outputs', made.model.output_scaled)
  (folder / 'config.json').write_text(json.dumps(config))
  return hf.load(folder, FAMILIES, made.shapes, made.infos).params


def test_logits_and_gradients(made, tmp_path):
  assert made.loaded.new == () and made.loaded.unused == ()

  def loss(params):
    x = logits(made.model, params, BATCH)
    return jnp.sum(jax.nn.log_softmax(x) * weights(x)), x

  grads, ours = jax.jit(jax.grad(loss, has_aux=True))(made.loaded.params)
  theirs = run(made.reference).detach().numpy()
  assert theirs.std() > 0.1
  np.testing.assert_allclose(ours[SEGMENTS > 0], theirs[SEGMENTS > 0], atol=1e-4)
  expected = their_gradients(made, tmp_path)
  for path, found in grads.items():
    if path == 'model/bias':  # a buffer there
      continue
    error, size = np.abs(found - expected[path]).max(), max(np.abs(expected[path]).max(), 1e-3)
    assert error < 1e-3 * size, (path, error, size)


def test_round_trips(made, tmp_path):
  """Their tensors, ours, and theirs again are the same to the bit; what they make of our folder is
  what it was.
  """
  target = tmp_path / 'out'
  args = FAMILIES, 'encoder_decoder', made.model, made.loaded.params, made.infos
  assert hf.save(target, *args, extra=IDS) == ()
  ours, theirs = (judge.load_file(f / 'model.safetensors') for f in (target, made.folder))
  assert set(ours) <= set(theirs) | {'final_logits_bias'}
  assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name in ours)
  again = hf.load(target, FAMILIES, made.shapes, made.infos).params
  assert all(np.array_equal(again[path], value) for path, value in made.loaded.params.items())
  reference, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
    target, attn_implementation='eager', output_loading_info=True
  )
  assert not report['unexpected_keys'] and not report['missing_keys']
  assert torch.equal(run(reference.eval()), run(made.reference))


def test_a_cache_gives_the_states_of_whole_rows(made):
  model, params = made.model, {'params': tree.nest(made.loaded.params)['model']}
  batch = {name: jnp.asarray(x) for name, x in BATCH.items()}
  whole = model.apply(params, batch).hidden
  step = jax.jit(lambda batch, cache: model.apply(params, batch, cache=cache))
  first = batch | {name: batch[name][:, :1] for name in ('tokens', 'segments')}
  outputs = step(first, model.empty_cache(2, 16, source=S + 3))
  hidden = [outputs.hidden]
  for t in range(1, T):
    outputs = step({'tokens': batch['tokens'][:, t : t + 1]}, outputs.cache)
    hidden.append(outputs.hidden)
  np.testing.assert_allclose(
    np.concatenate(hidden, axis=1)[SEGMENTS > 0], whole[SEGMENTS > 0], atol=1e-5
  )


@pytest.mark.parametrize(
  ('variant', 'kind'),
  [
    ('transformer_tiny', 'MBartForConditionalGeneration'),
    ('transformer_base', 'MarianMTModel'),
    ('t5_small', 'T5ForConditionalGeneration'),
    ('t5_1_1_small', 'T5ForConditionalGeneration'),
    ('bart_base', 'BartForConditionalGeneration'),
  ],
)
def test_models_from_scratch(variant, kind, tmp_path):
  tiny = dict(vocab_size=V, dim=D, heads=4, mlp_dim=48, layers=2, max_len=16, head_dim=8)
  options = encoder_decoder.VARIANTS[variant] | tiny | dict(dropout=0.0, attention_dropout=0.0)
  model = encoder_decoder.Model(**options)
  shapes, infos = described(model)
  rng = np.random.default_rng(0)
  params = {
    path: (rng.normal(size=leaf.shape) * 0.15 + path.endswith('scale')).astype(np.float32)
    for path, leaf in shapes.items()
  }
  target = tmp_path / 'out'
  assert hf.save(target, FAMILIES, 'encoder_decoder', model, params, infos, extra=IDS) == ()
  reference, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
    target, attn_implementation='eager', output_loading_info=True
  )
  assert type(reference).__name__ == kind
  assert not report['unexpected_keys'] and not report['missing_keys']
  ours, theirs = logits(model, params, BATCH), run(reference.eval()).detach().numpy()
  assert theirs.std() > 0.1
  np.testing.assert_allclose(ours[SEGMENTS > 0], theirs[SEGMENTS > 0], atol=1e-4)


BY_BEAMS = dict(
  no_repeat_ngram_size=2, min_new_tokens=40, num_return_sequences=3, length_penalty=0.7
)


@pytest.mark.parametrize('beams', [1, 4])
def test_generated_tokens(made, beams):
  """Sources of unequal length in one batch: greedy; and by beams with all rules, three of each."""
  infos = {k.removeprefix('model/'): v for k, v in made.infos.items()}
  generator = Generator(made.model, infos, start=(IDS['decoder_start_token_id'],))
  sources = [row[:n].tolist() for row, n in zip(SOURCES, SOURCE_SEGMENTS.sum(1), strict=True)]
  new = min(60, made.model.max_len - 1)
  weights = generator.weights(tree.nest(made.loaded.params)['model'])
  chosen = dict(max_new_tokens=new)  # without further rules random weights say one token
  chosen |= BY_BEAMS if beams > 1 else dict(repetition_penalty=20.0)
  forced = dict(forced_bos=7, forced_eos=2) if beams > 1 else {}
  sampling = Sampling(temperature=0, beams=beams, **chosen, **forced)
  columns = np.stack(list(generator.tokens(weights, sources, sampling, eos_ids=(2,))))
  theirs = made.reference.generate(
    input_ids=torch.tensor(SOURCES),
    attention_mask=torch.tensor(np.int64(SOURCE_SEGMENTS > 0)),
    generation_config=transformers.GenerationConfig(
      **IDS,
      **chosen,
      **{f'{name}_token_id': token for name, token in forced.items()},
      do_sample=False,
      num_beams=beams,
    ),
  ).numpy()[:, 1:]
  for ours, row in zip(columns.T, theirs, strict=True):
    kept = ours[ours >= 0]
    assert len(set(kept)) > 1 and kept.tolist() == row[: len(kept)].tolist()
    assert set(row[len(kept) :]) <= {0, 2}


def test_a_lora_of_peft_beside_a_t5(tmp_path):
  """What peft saved opens here, writes what its merged model does there, and goes back."""
  peft = pytest.importorskip('peft')
  tokenizer = byte.create()
  config = transformers.T5Config(**T5 | dict(vocab_size=tokenizer.vocab_size))
  reference = randomised(transformers.T5ForConditionalGeneration(config))
  reference.save_pretrained(tmp_path / 'base')
  shown = dict(causal=False, closed=True, max_len=64, token_types=False)
  tokenizer.export(str(tmp_path / 'base'), **shown)
  base = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / 'base')
  lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules=['q', 'v'], task_type='SEQ_2_SEQ_LM')
  theirs = peft.get_peft_model(base, lora)
  with torch.no_grad():
    for name, value in theirs.named_parameters():
      if 'lora_B' in name:
        value.normal_(0, 0.3)
  theirs.save_pretrained(tmp_path / 'adapter')
  session = llm_jax.open(tmp_path / 'adapter')
  assert session.config.objective['name'] == 'seq2seq'
  export.export(session, tmp_path / 'merged')
  export.export(session, tmp_path / 'back', form='adapter')
  merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / 'merged').eval()
  again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / 'base')
  again = peft.PeftModel.from_pretrained(again, tmp_path / 'back').eval()
  there = peft.PeftModel.from_pretrained(
    transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / 'base'),
    tmp_path / 'adapter',
  ).eval()
  with torch.no_grad():
    wanted, plain, *found = (run(model).numpy() for model in (there, reference, merged, again))
  assert np.abs(wanted - plain).max() > 0.1
  for each in found:
    np.testing.assert_allclose(each, wanted, atol=1e-4)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize(('buckets', 'farthest'), [(32, 128), (8, 12), (16, 20)])
def test_buckets_of_distances(causal, buckets, farthest):
  distances = np.arange(-1000, 1001)
  theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
    torch.tensor(-distances), bidirectional=not causal, num_buckets=buckets, max_distance=farthest
  )
  np.testing.assert_array_equal(relative.bucket(distances, buckets, farthest, causal), theirs)
