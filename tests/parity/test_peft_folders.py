"""Folders of adapters: what `peft` saved answers here as there, and what is exported here answers
there.
"""

import json

import numpy as np
import pytest

import llm_jax
from llm_jax.inference.export import export

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
safetensors = pytest.importorskip('safetensors.numpy')
peft = pytest.importorskip('peft')
pytestmark = pytest.mark.parity

TEXTS = ('the cat sat on the mat', 'bad', 'it is a very good film and not a slow film')
BERT = ['query', 'value', 'attention.output.dense', 'intermediate.dense']
CASES = {
  'bert': ('Bert', dict(target_modules=BERT)),
  'sentences': ('Bert', dict(target_modules=['query'])),
  'roberta': ('Roberta', dict(target_modules=['key', 'value'], use_rslora=True)),
  'llama': ('Llama', dict(target_modules='all-linear', use_dora=True)),
  'gpt2': ('GPT2', dict(target_modules=['c_attn', 'c_fc'], fan_in_fan_out=True)),
  'gpt2 dora': ('GPT2', dict(target_modules=['c_attn'], fan_in_fan_out=True, use_dora=True)),
  'modernbert': ('ModernBert', dict(target_modules=['Wqkv', 'Wi', 'attn.Wo'])),
}


@pytest.fixture(params=CASES)
def saved(request, tiny, tmp_path):
  """A random classifier, and beside it a random adapter with another head, as peft saves them."""
  name, settings = CASES[request.param]
  folder = tiny.written(name, 'SequenceClassification', tmp_path / 'base')
  if request.param == 'sentences':
    make_sentences(folder)
  base = classifier_of(folder)
  config = peft.LoraConfig(task_type='SEQ_CLS', r=3, lora_alpha=5, **settings)
  model = peft.get_peft_model(base, config)
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for path, value in model.named_parameters():
      if 'lora_magnitude' in path:
        value.mul_(1 + 0.3 * torch.rand(value.shape, generator=generator))
      elif value.requires_grad:
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
  model.save_pretrained(tmp_path / 'adapter')
  return folder, tmp_path / 'adapter'


def make_sentences(folder):
  """Without a head, and with the mean of all tokens as the vector of a text."""
  transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
  kinds = ('', 'Transformer'), ('1_Pooling', 'Pooling')
  modules = [dict(path=path, type=f'sentence_transformers.models.{kind}') for path, kind in kinds]
  (folder / 'modules.json').write_text(json.dumps(modules))
  (folder / '1_Pooling').mkdir()
  (folder / '1_Pooling' / 'config.json').write_text('{"pooling_mode_mean_tokens": true}')


def classifier_of(folder):
  return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


def answers_there(base, adapter):
  tokenizer = transformers.AutoTokenizer.from_pretrained(base)
  model = classifier_of(base)
  if adapter is not None:
    model = peft.PeftModel.from_pretrained(model, adapter)
  with torch.no_grad():
    found = [model.eval()(**tokenizer(text, return_tensors='pt')).logits[0] for text in TEXTS]
  return np.array([torch.softmax(each, -1).numpy() for each in found])


def answers_here(session):
  return np.array([list(answer['probabilities'].values()) for answer in session.predict(TEXTS)])


def test_what_peft_saved_answers_here_and_goes_back(saved, tmp_path):
  base, adapter = saved
  theirs = answers_there(base, adapter)
  assert np.abs(theirs - answers_there(base, None)).max() > 1e-2
  session = llm_jax.open(adapter)
  np.testing.assert_allclose(answers_here(session), theirs, atol=1e-4)
  export(session, tmp_path / 'again', form='adapter')
  again = json.loads((tmp_path / 'again' / 'adapter_config.json').read_text())
  assert (again['task_type'], again['base_model_name_or_path']) == ('SEQ_CLS', str(base))
  np.testing.assert_allclose(answers_there(base, tmp_path / 'again'), theirs, atol=1e-4)
  np.testing.assert_allclose(answers_here(llm_jax.open(tmp_path / 'again')), theirs, atol=1e-4)
  export(session, tmp_path / 'merged')
  np.testing.assert_allclose(answers_there(tmp_path / 'merged', None), theirs, atol=1e-4)


def without_layer_1(tensors):
  return {name: x for name, x in tensors.items() if 'layer.1.' not in name or 'lora' not in name}


WRONG = {
  r"base_model_name_or_path='nowhere' is no Hugging Face folder": (
    dict(base_model_name_or_path='nowhere'),
    None,
  ),
  r"peft_type='VERA' cannot be read; known: LORA": (dict(peft_type='VERA'), None),
  r'lora_bias=True: lora does not have it here': (dict(lora_bias=True), None),
  r'its matrices are not of the rank that adapter_config.json says': (dict(r=4), None),
  r'adapts attention/out in 1 of 2 layers': ({}, without_layer_1),
  r"holds 'base_model.model.extra.weight', which belongs to no parameter": (
    {},
    lambda tensors: tensors | {'base_model.model.extra.weight': np.ones(3, np.float32)},
  ),
  r'adapts bert.pooler.dense, and here adapters stand beside the linear maps of the model alone': (
    {},
    lambda tensors: (
      tensors
      | {f'base_model.model.bert.pooler.dense.lora_{x}.weight': np.ones((3, 3)) for x in 'AB'}
    ),
  ),
}


@pytest.mark.parametrize('saved', ['bert'], indirect=True)
def test_what_cannot_be_read_is_said(saved):
  _, adapter = saved
  config, weights = adapter / 'adapter_config.json', adapter / 'adapter_model.safetensors'
  said, held = json.loads(config.read_text()), safetensors.load_file(weights)
  for message, (changes, change) in WRONG.items():
    config.write_text(json.dumps(said | changes))
    safetensors.save_file(held if change is None else change(held), weights)
    with pytest.raises(ValueError, match=message):
      llm_jax.open(adapter).predict(TEXTS)
