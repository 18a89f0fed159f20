"""Folders of adapters: what `peft` saved answers here as there, and what is exported here answers
there.
"""

import json

import numpy as np
import pytest

import llm_jax
from configs import classify
from llm_jax.core import config as config_lib
from llm_jax.core import recipes
from llm_jax.core.tree import flatten
from llm_jax.inference.export import export
from llm_jax.programs import pretrained
from llm_jax.training import loop

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
  save_random(base, tmp_path / 'adapter', task_type='SEQ_CLS', **settings)
  return folder, tmp_path / 'adapter'


def save_random(base, folder, **settings):
  model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, **settings))
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for path, value in model.named_parameters():
      if 'lora_magnitude' in path:
        value.mul_(1 + 0.3 * torch.rand(value.shape, generator=generator))
      elif value.requires_grad:
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
  model.save_pretrained(folder)


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


def without_half(text):
  """Without the bytes at the end that are no whole character."""
  return text.rstrip('\ufffd')


def texts_there(folder, adapter):
  """What a decoder writes after each text, greedily."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  if adapter is not None:
    model = peft.PeftModel.from_pretrained(model, adapter)
  for text in TEXTS:
    given = tokenizer(text, return_tensors='pt', return_token_type_ids=False)
    ids = model.eval().generate(**given, max_new_tokens=6, do_sample=False)[0]
    new = ids[given['input_ids'].shape[1] :]
    yield without_half(tokenizer.decode(new, skip_special_tokens=True))


def test_a_decoder_writes_what_it_writes_there(tiny, tmp_path):
  folder, adapter = tiny.written('Llama', 'CausalLM', tmp_path / 'base'), tmp_path / 'adapter'
  base = transformers.AutoModelForCausalLM.from_pretrained(folder)
  save_random(base, adapter, task_type='CAUSAL_LM', target_modules=['q_proj', 'o_proj'])
  theirs = list(texts_there(folder, adapter))
  assert theirs != list(texts_there(folder, None))
  session = llm_jax.open(adapter)
  ours = session.complete(TEXTS, max_new_tokens=6, temperature=0.0)
  assert list(map(without_half, ours)) == theirs
  export(session, tmp_path / 'again', form='adapter')
  assert list(texts_there(folder, tmp_path / 'again')) == theirs


def started_from(adapter, folder, classes):
  """A run of a config that names the objective."""
  rows = [dict(text=text, label=f'LABEL_{i % classes}') for i, text in enumerate(TEXTS * 4)]
  (folder / 'x.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  tree = classify.get_config().to_dict() | dict(
    init_from=str(adapter), steps=2, batch_size=2, seq_len=32
  )
  tree['data'] = dict(source='jsonl', path=str(folder / 'x.jsonl'), label='label')
  tree['data'] |= dict(validation=0.0, cache=str(folder))
  tree['model'] |= dict(name=None, variant=None)
  tree = recipes.chosen(tree, ()) | dict(logging=dict(tensorboard=False))
  config = pretrained.fill_in(config_lib.parse(tree))
  return loop.prepare(config, folder / 'w')


@pytest.mark.parametrize('saved', ['sentences'], indirect=True)
def test_a_head_of_other_classes_starts_anew(saved, tmp_path, caplog):
  _, adapter = saved
  started, known = started_from(adapter, tmp_path, 2), flatten(llm_jax.open(adapter).params)
  assert 'it is for 3 classes, and this run has 2' in caplog.text
  head = started.state.params['heads_classifier']['dense']['kernel']
  assert head.shape[-1] == 2
  taken = {path: x for path, x in flatten(started.state.params).items() if 'lora' in path}
  assert taken and all(np.array_equal(np.array(x), known[path]) for path, x in taken.items())


@pytest.mark.parametrize('saved', ['sentences'], indirect=True)
def test_training_goes_on_from_it(saved, tmp_path):
  """From the adapter and its head; the base stays."""
  _, adapter = saved
  started = started_from(adapter, tmp_path, 3)
  copied = lambda params: {path: np.array(x) for path, x in flatten(params).items()}
  trained, frozen = copied(started.state.params), copied(started.state.frozen)
  known = flatten(llm_jax.open(adapter).params)  # which answers as peft does
  assert trained.keys() | frozen.keys() == known.keys()
  assert all(np.array_equal(x, known[path]) for path, x in (trained | frozen).items())
  loop.train(started)
  session = llm_jax.open(tmp_path / 'w')
  after = flatten(session.params)
  assert any('lora_a' in path for path in trained)
  assert frozen and all(np.array_equal(x, after[path]) for path, x in frozen.items())
  assert not any(np.array_equal(x, after[path]) for path, x in trained.items())


def without_layer_1(tensors):
  return {name: x for name, x in tensors.items() if 'layer.1.' not in name or 'lora' not in name}


WRONG = {
  r"base_model_name_or_path='nowhere' is no Hugging Face folder": (
    dict(base_model_name_or_path='nowhere'),
    None,
  ),
  r"peft_type='VERA' cannot be read; known: LORA": (dict(peft_type='VERA'), None),
  r"init_lora_weights='pissa': lora does not have it here": (
    dict(init_lora_weights='pissa'),
    None,
  ),
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
