"""Folders of Hugging Face's models, written by transformers and by us: the same logits, gradients
and bytes on both sides.

The reference runs in float32 on the CPU with eager attention and no dropout; weights are random,
norms and biases too, so that none can hide behind its initial value. Two rows, one of them padded.
The gradients of transformers are read through the same map as its weights.
"""

import dataclasses
import shutil
import types
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.hf import families, safetensors
from llm_jax.hf import folders as hf
from llm_jax.models import decoder, encoder
from llm_jax.nn import heads

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
judge = pytest.importorskip('safetensors.torch')
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('as_in_use')]

FAMILIES = families.known()
MODELS = {'encoder': encoder.Model, 'decoder': decoder.Model}
V, D, N, F, T, C = 60, 32, 4, 48, 12, 3
THEIRS = dict(
  vocab_size=V,
  hidden_size=D,
  num_attention_heads=N,
  intermediate_size=F,
  num_hidden_layers=2,
  max_position_embeddings=16,
  pad_token_id=0,
  bos_token_id=1,
  eos_token_id=2,
)
GPT2 = dict(
  vocab_size=V,
  n_embd=D,
  n_head=N,
  n_inner=F,
  n_layer=2,
  n_positions=16,
  pad_token_id=0,
  bos_token_id=1,
  eos_token_id=2,
)
SEGMENTS = np.array([[1] * T, [1] * 8 + [0] * 4])
TOKENS = np.where(SEGMENTS > 0, np.random.default_rng(0).integers(3, V, (2, T)), 0)
TYPES = np.where(SEGMENTS > 0, np.arange(T)[None] // 5 % 2, 0)
LLAMA3 = dict(
  rope_type='llama3',
  rope_theta=500.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)
LINEAR = dict(rope_type='linear', rope_theta=10000.0, factor=2.0)
NEOX = dict(
  rope_parameters=dict(rope_type='default', rope_theta=10000.0, partial_rotary_factor=1.0),
  use_parallel_residual=False,
  hidden_act='gelu_new',
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A class of transformers', its config, the heads that our network gets, and what else is
  compared.
  """

  kind: str
  config: dict
  heads: tuple[str, ...] = ()
  types: bool = False
  shard: str = '5GB'
  gradients: bool = True


def classifier(kind, config, heads=('pooler', 'classifier')):
  return Case(
    f'{kind}ForSequenceClassification', config | dict(num_labels=C), heads, gradients=False
  )


ESM = THEIRS | dict(position_embedding_type='rotary', emb_layer_norm_before=False)
ROBERTA = THEIRS | dict(pad_token_id=1, max_position_embeddings=18, type_vocab_size=1)
CASES = {
  'bert': Case('BertForPreTraining', THEIRS, ('mlm', 'pooler', 'nsp'), types=True, shard='20KB'),
  'bert_classifier': classifier('Bert', THEIRS | dict(hidden_act='relu')),
  'bert_untied': Case(
    'BertForMaskedLM', THEIRS | dict(tie_word_embeddings=False), ('mlm',), gradients=False
  ),
  'roberta': Case('RobertaForMaskedLM', ROBERTA, ('mlm',)),
  'roberta_classifier': classifier('Roberta', ROBERTA),
  'modernbert': Case(
    'ModernBertForMaskedLM', THEIRS | dict(num_hidden_layers=4, local_attention=4), ('mlm',)
  ),
  'modernbert_biased': Case(
    'ModernBertForMaskedLM',
    THEIRS
    | dict(
      num_hidden_layers=5,
      local_attention=4,
      layer_types=['full_attention', 'sliding_attention'] * 2 + ['full_attention'],
      attention_bias=True,
      mlp_bias=True,
      classifier_bias=True,
      norm_bias=True,
    ),
    ('mlm',),
    gradients=False,
  ),
  'esm': Case('EsmForMaskedLM', ESM, ('mlm',)),
  'esm_classifier': classifier('Esm', ESM),
  'gpt2': Case('GPT2LMHeadModel', GPT2, shard='20KB'),
  'gpt2_classifier': classifier('GPT2', GPT2, ('classifier',)),
  'llama': Case(
    'LlamaForCausalLM',
    THEIRS
    | dict(
      num_key_value_heads=2,
      rope_parameters=LLAMA3,
      tie_word_embeddings=True,
      max_position_embeddings=64,
    ),
  ),
  'llama_untied': Case(
    'LlamaForCausalLM', THEIRS | dict(rope_parameters=LINEAR, attention_bias=True, mlp_bias=True)
  ),
  'llama_classifier': classifier('Llama', THEIRS, ('classifier',)),
  'mistral': Case(
    'MistralForCausalLM', THEIRS | dict(num_key_value_heads=2, head_dim=8, sliding_window=4)
  ),
  'qwen2': Case('Qwen2ForCausalLM', THEIRS | dict(num_key_value_heads=2)),
  'qwen3': Case('Qwen3ForCausalLM', THEIRS | dict(num_key_value_heads=2, head_dim=16)),
  'gpt_neox': Case('GPTNeoXForCausalLM', THEIRS | NEOX),
}
AUTO = {
  'PreTraining': transformers.AutoModelForPreTraining,
  'MaskedLM': transformers.AutoModelForMaskedLM,
  'SequenceClassification': transformers.AutoModelForSequenceClassification,
  'LM': transformers.AutoModelForCausalLM,
}


class Network(nn.Module):
  """A model and heads under the names that training gives them; logits by head."""

  model: nn.Module
  heads: Mapping[str, nn.Module]

  def __call__(self, batch):
    x_BTD = self.model(batch).hidden
    found = {}
    if 'mlm' in self.heads:
      h_BTD, bias_V = self.heads['mlm'](x_BTD)
      found['mlm'] = self.project(h_BTD) + bias_V[None, None]
    if 'pooler' in self.heads:
      pooled_BD = self.heads['pooler'](x_BTD[:, 0])
    else:
      pooled_BD = x_BTD[np.arange(2), SEGMENTS.sum(1) - 1]
    for name in ('nsp', 'classifier'):
      if name in self.heads:
        found[name] = self.heads[name](pooled_BD)
    return found or {'clm': self.project(x_BTD)}

  def project(self, x_BTD):
    """Logits, at least float32. Without them, a projection that is not tied has no parameter."""
    table_VD = self.model.table().astype(x_BTD.dtype)
    return jnp.einsum('BTD,VD->BTV', x_BTD, table_VD, preferred_element_type=jnp.float32)


def network(model, names):
  made = {
    'mlm': heads.MLMHead(model.options, model.vocab_size),
    'pooler': heads.Pooler(model.options),
    'nsp': heads.PairHead(model.options),
    'classifier': heads.ClassifierHead(model.options, C, bias=not model.causal),
  }
  return Network(model, {name: made[name] for name in names})


def batch_of(types=False):
  batch = {'tokens': jnp.asarray(TOKENS), 'segments': jnp.asarray(SEGMENTS)}
  return batch | ({'token_types': jnp.asarray(TYPES)} if types else {})


def described(net):
  """The shapes of a network's parameters, and what each is, by path."""
  boxed = jax.eval_shape(lambda: net.init(jax.random.key(0), batch_of()))['params']
  return tree.flatten(nn.unbox(boxed)), params_lib.infos(boxed)


def opened_model(folder, **changes):
  """Our model of a folder, and its name."""
  options = hf.model_options(folder, FAMILIES)
  name = options.pop('name')
  return MODELS[name](**options | changes), name


def logits(net, params, types=False):
  return net.apply({'params': tree.nest(params)}, batch_of(types))


def compiled(function, *args):
  """What a jitted function gives, compiled with little care."""
  quick = {
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
    'xla_cpu_use_fusion_emitters': False,
  }
  return jax.jit(function).lower(*args).compile(quick)(*args)


def randomised(reference):
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in reference.named_parameters():
      scale = value.ndim == 1 and name.endswith('weight')
      value.copy_(torch.randn(value.shape, generator=generator) * 0.15 + scale)
  return reference.eval()


def run(reference, types=False):
  """Their logits by our heads' names."""
  inputs = {'token_type_ids': torch.tensor(TYPES)} if types else {}
  kind = type(reference).__name__
  if 'Roberta' in kind:  # it counts padding by the id, and id 1 is an ordinary token here
    inputs['position_ids'] = torch.arange(T).repeat(2, 1) + reference.config.pad_token_id + 1
  output = reference(
    input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(np.int64(SEGMENTS > 0)), **inputs
  )
  if 'PreTraining' in kind:
    return {'mlm': output.prediction_logits, 'nsp': output.seq_relationship_logits}
  if 'MaskedLM' in kind:
    return {'mlm': output.logits}
  return {'classifier' if 'Classification' in kind else 'clm': output.logits}


def opened(folder, kind, **options):
  """What transformers' Auto class for the head opens in a folder, and its report on the tensors."""
  auto = next(auto for head, auto in AUTO.items() if head in kind)
  reference, report = auto.from_pretrained(
    folder, attn_implementation='eager', output_loading_info=True, **options
  )
  return reference.eval(), report


@pytest.fixture(scope='module', params=CASES)
def made(request, tmp_path_factory):
  """For each case: their model and its folder, our network, the shapes and descriptions of its
  parameters, and what was read.
  """
  case = CASES[request.param]
  kind = getattr(transformers, case.kind)
  reference = randomised(kind(kind.config_class(**case.config, attn_implementation='eager')))
  folder = tmp_path_factory.mktemp(request.param)
  reference.save_pretrained(folder, max_shard_size=case.shard)
  model, name = opened_model(folder, dropout=0.0, attention_dropout=0.0)
  net = network(model, case.heads)
  shapes, infos = described(net)
  return types.SimpleNamespace(
    case=case,
    reference=reference,
    folder=folder,
    name=name,
    net=net,
    shapes=shapes,
    infos=infos,
    loaded=hf.load(folder, FAMILIES, shapes, infos),
  )


def files(folder):
  """The tensors of a folder by today's names, as the reference implementation of the format reads
  them.
  """
  found = {}
  for file in sorted(folder.glob('*.safetensors')):
    found |= judge.load_file(file)
  return {
    name.replace('LayerNorm.gamma', 'LayerNorm.weight').replace(
      'LayerNorm.beta', 'LayerNorm.bias'
    ): value
    for name, value in found.items()
  }


def constant(name):
  """Whether one of ESM's tensors is no parameter of its language model."""
  return 'contact_head' in name or 'inv_freq' in name


def real(x):
  """Logits at positions that are not padding."""
  return np.asarray(x)[SEGMENTS > 0] if x.ndim == 3 else np.asarray(x)


def weights(x):
  w = np.random.default_rng(1).normal(size=x.shape).astype(np.float32) / T
  return w * (SEGMENTS > 0)[:, :, None] if x.ndim == 3 else w


def loss(net, params, types):
  """A weighted sum of log-probabilities, and the logits."""
  found = logits(net, params, types)
  return sum(jnp.sum(jax.nn.log_softmax(x) * weights(x)) for x in found.values()), found


def their_gradients(made, theirs, folder):
  """The gradients of the same sum in their model, through a folder, as ours."""
  made.reference.zero_grad()
  sum(
    torch.sum(torch.log_softmax(x, -1) * torch.tensor(weights(x))) for x in theirs.values()
  ).backward()
  gradients = {
    name: torch.zeros_like(value) if value.grad is None else value.grad
    for name, value in made.reference.named_parameters()
  }
  judge.save_file(
    {name: value.contiguous().clone() for name, value in gradients.items()},
    folder / 'model.safetensors',
  )
  shutil.copy(made.folder / 'config.json', folder)
  return hf.load(folder, FAMILIES, made.shapes, made.infos).params


def test_logits_and_gradients(made, tmp_path):
  assert made.loaded.new == ()
  expected_unused = ('pooler', 'embeddings.position_embeddings')
  for name in made.loaded.unused:
    assert any(part in name for part in expected_unused), name
  theirs = run(made.reference, made.case.types)
  if made.case.gradients:
    grad = jax.grad(lambda params: loss(made.net, params, made.case.types), has_aux=True)
    grads, ours = compiled(grad, made.loaded.params)
    expected = their_gradients(made, theirs, tmp_path)
    for path, found in grads.items():
      error = np.abs(found - expected[path]).max()
      # A key's bias moves all scores of a query alike: its gradient is zero but for rounding, hence
      # the floor.
      size = max(np.abs(expected[path]).max(), 1e-3)
      assert error < 1e-3 * size, (path, error, size)
  else:
    ours = compiled(lambda params: logits(made.net, params, made.case.types), made.loaded.params)
  assert set(ours) == set(theirs)
  for name, x in theirs.items():
    assert x.std() > 0.1
    np.testing.assert_allclose(real(ours[name]), real(x.detach()), atol=1e-4)


def test_bfloat16(made, tmp_path):
  """A bfloat16 file keeps its values in float32 parameters; with them our bfloat16 is near to their
  float32.
  """
  judge.save_file(
    {name: value.to(torch.bfloat16) for name, value in files(made.folder).items()},
    tmp_path / 'model.safetensors',
  )
  shutil.copy(made.folder / 'config.json', tmp_path)
  params = hf.load(tmp_path, FAMILIES, made.shapes, made.infos).params
  for path, value in params.items():
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(
      value, np.asarray(made.loaded.params[path]).astype(jnp.bfloat16).astype(np.float32)
    )
  if not made.case.gradients:
    return
  half = made.net.clone(model=made.net.model.clone(dtype='bfloat16'))
  ours = compiled(lambda params: logits(half, params, made.case.types), params)
  reference, _ = opened(tmp_path, made.case.kind, dtype=torch.float32)
  for name, x in run(reference, made.case.types).items():
    x = real(x.detach())
    assert np.abs(real(ours[name]) - x).max() < 2e-2 * max(np.abs(x).max(), 1.0)


def test_round_trips(made, tmp_path, monkeypatch):
  """Their tensors, ours, and theirs again are the same to the bit; what they make of our folder is
  what it was.
  """
  monkeypatch.setattr(safetensors, 'SHARD_BYTES', 20_000)
  target, model = tmp_path / 'out', made.net.model
  pad = {'pad_token_id': made.reference.config.pad_token_id}
  left_out = hf.save(target, FAMILIES, made.name, model, made.loaded.params, made.infos, extra=pad)
  assert left_out == ()
  theirs, ours = files(made.folder), files(target)
  state = made.reference.state_dict()
  for name in ours:
    # An untied BERT has this bias too, and does not read it.
    if model.tied or name != 'cls.predictions.bias':
      assert torch.equal(ours[name], theirs[name] if name in theirs else state[name]), name
  assert all(name in made.loaded.unused or constant(name) for name in set(theirs) - set(ours))
  again = hf.load(target, FAMILIES, made.shapes, made.infos).params
  assert again.keys() == made.loaded.params.keys()
  assert all(np.array_equal(again[path], value) for path, value in made.loaded.params.items())
  reference, report = opened(target, made.case.kind)
  assert type(reference) is type(made.reference)
  assert not report['unexpected_keys'] and all(constant(name) for name in report['missing_keys'])
  for name, x in run(made.reference, made.case.types).items():
    assert torch.equal(run(reference, made.case.types)[name], x)


@pytest.mark.parametrize(
  ('made', 'change'),
  [
    ('mistral', dict(window=5)),
    ('modernbert', dict(window=6)),
    ('llama', dict(rope_scaling=(8.0, 1.0, 4.0, 16.0))),
    ('llama_untied', dict(rope_scaling=None)),
  ],
  indirect=['made'],
)
def test_the_comparison_can_fail(made, change):
  other = made.net.clone(model=made.net.model.clone(**change))
  ours = compiled(lambda params: logits(other, params), made.loaded.params)
  for name, x in run(made.reference).items():
    assert np.abs(real(ours[name]) - real(x.detach())).max() > 1e-3


TINY = dict(vocab_size=V, dim=D, heads=N, mlp_dim=F, max_len=16, dropout=0.0, attention_dropout=0.0)
OURS = {
  'bert_tiny': ('encoder', dict(layers=3), ('mlm',), 'EsmForMaskedLM'),
  'bert_base': ('encoder', dict(layers=2), ('mlm', 'pooler', 'nsp'), 'BertForPreTraining'),
  'roberta_base': (
    'encoder',
    dict(layers=2),
    ('mlm',),
    'BertForMaskedLM',  # for its pad id is 0 here, and its positions count from 0
  ),
  'modernbert_base': ('encoder', dict(layers=4, window=4), ('mlm',), 'ModernBertForMaskedLM'),
  'gpt_tiny': ('decoder', dict(layers=3), (), 'GPTNeoXForCausalLM'),
  'gpt2_small': ('decoder', dict(layers=2), (), 'GPT2LMHeadModel'),
  'llama_tiny': ('decoder', dict(layers=3, kv_heads=2), (), 'LlamaForCausalLM'),
}


@pytest.mark.parametrize('variant', OURS)
def test_models_from_scratch(variant, tmp_path):
  name, changes, heads_, kind = OURS[variant]
  module = {'encoder': encoder, 'decoder': decoder}[name]
  net = network(MODELS[name](**module.VARIANTS[variant] | TINY | changes), heads_)
  shapes, infos = described(net)
  rng = np.random.default_rng(0)
  params = {
    path: (rng.normal(size=leaf.shape) * 0.15 + path.endswith('scale')).astype(np.float32)
    for path, leaf in shapes.items()
  }
  ids = {'pad_token_id': 0, 'eos_token_id': 2}
  assert hf.save(tmp_path / 'out', FAMILIES, name, net.model, params, infos, extra=ids) == ()
  reference, report = opened(tmp_path / 'out', kind)
  assert type(reference).__name__ == kind
  assert reference.config.eos_token_id == 2 and reference.config.pad_token_id == 0
  assert not report['unexpected_keys'] and all(constant(name) for name in report['missing_keys'])
  ours = compiled(lambda params: logits(net, params), params)
  for name, x in run(reference).items():
    assert x.std() > 0.1
    np.testing.assert_allclose(real(ours[name]), real(x.detach()), atol=1e-4)


def test_checkpoints_without_heads(tmp_path):
  """Names without prefix, a projection that is not there, a head that is new."""
  reference = transformers.BertModel(transformers.BertConfig(**THEIRS))
  reference.save_pretrained(tmp_path / 'bert')
  model, _ = opened_model(tmp_path / 'bert')
  net = network(model, ('mlm', 'pooler', 'nsp'))
  loaded = hf.load(tmp_path / 'bert', FAMILIES, *described(net))
  assert loaded.unused == ()
  assert {path.split('/')[0] for path in loaded.new} == {'heads_mlm', 'heads_nsp'}
  kernel = reference.encoder.layer[1].attention.self.query.weight.detach().numpy()
  ours = loaded.params['model/stack/layers/block/attention/query/kernel'][1]
  np.testing.assert_array_equal(ours.reshape(D, D), kernel.T)
  transformers.LlamaModel(transformers.LlamaConfig(**THEIRS)).save_pretrained(tmp_path / 'llama')
  model, _ = opened_model(tmp_path / 'llama')
  loaded = hf.load(tmp_path / 'llama', FAMILIES, *described(network(model, ())))
  assert loaded.new == ('model/output/kernel',)


def test_heads_that_are_not_asked_for(tmp_path):
  reference = transformers.BertForPreTraining(transformers.BertConfig(**THEIRS))
  reference.save_pretrained(tmp_path)
  model, _ = opened_model(tmp_path)
  net = network(model, ('pooler', 'classifier'))
  loaded = hf.load(tmp_path, FAMILIES, *described(net))
  assert {path.split('/')[0] for path in loaded.new} == {'heads_classifier'}
  assert all(name.startswith('cls.') for name in loaded.unused) and len(loaded.unused) == 7
