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
from llm_jax.core.config import Config
from llm_jax.core.tree import flatten, nest
from llm_jax.inference.export import export
from llm_jax.inference.session import open_model
from llm_jax.programs import pretrained
from llm_jax.training import loop

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
safetensors = pytest.importorskip('safetensors.numpy')
peft = pytest.importorskip('peft')
pytestmark = pytest.mark.parity

TEXTS = ('the cat sat on the mat', 'bad', 'it is a very good film and not a slow film')
BERT = ['query', 'value', 'attention.output.dense', 'intermediate.dense', 'word_embeddings']
LSTM = dict(encoder_hidden_size=8, encoder_reparameterization_type='LSTM')
CASES = {
  'bert': ('Bert', 'Lora', dict(target_modules=BERT)),
  'sentences': ('Bert', 'Lora', dict(target_modules=['query'])),
  'roberta': ('Roberta', 'Lora', dict(target_modules=['key', 'value'], use_rslora=True)),
  'llama': ('Llama', 'Lora', dict(target_modules='all-linear', use_dora=True)),
  'gpt2': ('GPT2', 'Lora', dict(target_modules=['c_attn', 'c_fc'], fan_in_fan_out=True)),
  'gpt2 dora': (
    'GPT2',
    'Lora',
    dict(target_modules=['c_attn'], fan_in_fan_out=True, use_dora=True),
  ),
  'modernbert': ('ModernBert', 'Lora', dict(target_modules=['Wqkv', 'Wi', 'attn.Wo'])),
  'bert ia3': ('Bert', 'IA3', {}),  # peft's own choice of maps, two of them by their inputs
  'gpt2 ia3': ('GPT2', 'IA3', {}),
  'llama adalora': ('Llama', 'AdaLora', dict(target_modules=['q_proj', 'k_proj', 'down_proj'])),
  'gpt2 adalora': ('GPT2', 'AdaLora', dict(target_modules=['c_attn', 'mlp.c_proj'])),
  'bert prompt': ('Bert', 'PromptTuning', {}),
  'roberta p_tuning': ('Roberta', 'PromptEncoder', LSTM),
  'llama prompt': ('Llama', 'PromptTuning', {}),
}
MERGED = 'LORA', 'ADALORA', 'IA3'
SETTINGS = {
  'Lora': dict(r=3, lora_alpha=5),
  'AdaLora': dict(init_r=4, target_r=2, lora_alpha=5, total_step=9),
  'IA3': {},
  'PromptTuning': dict(num_virtual_tokens=4),
  'PromptEncoder': dict(num_virtual_tokens=4),
  'PrefixTuning': dict(num_virtual_tokens=4),
}


@pytest.fixture(params=CASES)
def saved(request, tiny, tmp_path):
  """A random classifier, and beside it a random adapter with another head, as peft saves them."""
  name, kind, settings = CASES[request.param]
  folder = tiny.written(name, 'SequenceClassification', tmp_path / 'base')
  if request.param == 'sentences':
    make_sentences(folder)
  base = classifier_of(folder)
  save_random(
    base,
    tmp_path / 'adapter',
    kind,
    request.param == 'llama adalora',
    task_type='SEQ_CLS',
    **settings,
  )
  return folder, tmp_path / 'adapter'


def save_random(base, folder, kind='Lora', pruned=False, **settings):
  config = getattr(peft, f'{kind}Config')(**SETTINGS[kind], **settings)
  model = peft.get_peft_model(base, config)
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for path, value in model.named_parameters():
      if 'lora_magnitude' in path:
        value.mul_(1 + 0.3 * torch.rand(value.shape, generator=generator))
      elif 'ia3' in path:
        value.copy_(1 + 0.5 * torch.randn(value.shape, generator=generator))
      elif value.requires_grad:
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
  if pruned:  # of some maps nothing is left
    rng = np.random.default_rng(1)
    names = [name for name, _ in model.base_model.model.named_parameters() if '.lora_E.' in name]
    config.rank_pattern = {name: (rng.random(4) < rng.integers(3) / 2).tolist() for name in names}
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
  if again['peft_type'] not in MERGED:
    with pytest.raises(ValueError, match='cannot be merged'):
      export(session, tmp_path / 'merged')
    return
  export(session, tmp_path / 'merged')
  np.testing.assert_allclose(answers_there(tmp_path / 'merged', None), theirs, atol=1e-4)


def perturbed(folder, **adapter):
  """A session on a folder with an adapter; what that adds, and the heads, drawn at random."""
  sections = dict(tokenizer={}, model={}, objective={}, optimizer={}, data={}, adapter=adapter)
  config = Config(steps=9, batch_size=4, init_from=str(folder), **sections)
  session = open_model(None, pretrained.fill_in(config))
  loaded, wanted = pretrained.load_params(session.program, folder), flatten(session.program.params)
  rng = np.random.default_rng(0)
  params = dict(loaded.params)
  for path, leaf in wanted.items():
    if path in loaded.new or path.startswith('heads_'):
      drawn = rng.normal('ia3' in path, 0.3, leaf.shape).astype(np.float32)
      params[path] = drawn + params.get(path, 0)
  session.params = nest(params)
  return session


HERE = {
  'bert': ('Bert', dict(name='p_tuning', length=4, hidden=8)),
  'gpt2': ('GPT2', dict(name='ia3')),  # the queries, in one tensor with keys and values, are not
}


@pytest.mark.parametrize('case', HERE)
def test_what_was_learned_here_answers_there(case, tiny, tmp_path):
  name, adapter = HERE[case]
  base = tiny.written(name, 'SequenceClassification', tmp_path / 'base')
  session = perturbed(base, **adapter)
  ours = answers_here(session)
  export(session, tmp_path / 'adapter', form='adapter')
  np.testing.assert_allclose(answers_there(base, tmp_path / 'adapter'), ours, atol=1e-4)
  assert np.abs(ours - answers_there(base, None)).max() > 1e-2


def test_a_prefix_of_an_mlp_is_written_as_what_it_makes(tiny, tmp_path):
  """And is read as that."""
  base, again = tiny.written('Llama', 'CausalLM', tmp_path / 'base'), tmp_path / 'adapter'
  session = perturbed(base, name='prefix', length=3, hidden=5)
  export(session, again, form='adapter')
  own = {
    p.split('/')[-1]: np.asarray(x) for p, x in flatten(session.params).items() if 'prefix' in p
  }
  hidden_PR = np.tanh(own['prefix_embedding'] @ own['prefix_hidden'] + own['prefix_hidden_bias'])
  made = np.einsum('pr,lrckh->plckh', hidden_PR, own['prefix_up']) + own['prefix_up_bias']
  model = transformers.AutoModelForCausalLM.from_pretrained(base)
  model = peft.PeftModel.from_pretrained(model, again)
  theirs = model.prompt_encoder['default'].embedding.weight.detach().numpy()
  np.testing.assert_allclose(theirs, made.reshape(3, -1), atol=1e-5)
  read = flatten(llm_jax.open(again).params)['model/stack/layers/block/attention/prefix']
  np.testing.assert_allclose(read, np.moveaxis(made, 0, 1), atol=1e-5)


def without_half(text):
  """Without the bytes at the end that are no whole character."""
  return text.rstrip('\ufffd')


def texts_there(folder, adapter):
  """What a decoder writes after each text, greedily; peft's `generate` knows no prefix any more."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  if adapter is not None:
    model = peft.PeftModel.from_pretrained(model, adapter)
  for text in TEXTS:
    ids = tokenizer(text)['input_ids']
    new = []
    while len(new) < 6 and tokenizer.eos_token_id not in new:
      logits = model.eval()(input_ids=torch.tensor([ids + new])).logits
      new.append(int(logits[0, -1].argmax()))
    yield without_half(tokenizer.decode(new, skip_special_tokens=True))


DECODERS = {
  'Lora': dict(target_modules=['q_proj', 'o_proj', 'embed_tokens']),
  'PrefixTuning': dict(prefix_projection=True, encoder_hidden_size=8),
}


@pytest.mark.parametrize('kind', DECODERS)
def test_a_decoder_writes_what_it_writes_there(kind, tiny, tmp_path):
  folder, adapter = tiny.written('Llama', 'CausalLM', tmp_path / 'base'), tmp_path / 'adapter'
  base = transformers.AutoModelForCausalLM.from_pretrained(folder)
  save_random(base, adapter, kind, task_type='CAUSAL_LM', **DECODERS[kind])
  theirs = list(texts_there(folder, adapter))
  assert theirs != list(texts_there(folder, None))
  session = llm_jax.open(adapter)
  ours = session.complete(TEXTS, max_new_tokens=6, temperature=0.0)
  assert list(map(without_half, ours)) == theirs
  export(session, tmp_path / 'again', form='adapter')
  assert list(texts_there(folder, tmp_path / 'again')) == theirs
  first, again = (
    safetensors.load_file(tmp_path / name / 'adapter_model.safetensors')
    for name in ('adapter', 'again')
  )
  copied = {name for name in first if name.endswith('embed_tokens.base_layer.weight')}
  assert first.keys() - again.keys() == copied
  assert all(np.array_equal(x, first[name]) for name, x in again.items())


def test_a_tagger_reads_the_words_behind_its_prompt(tiny, tmp_path):
  folder, adapter = (
    tiny.written('Bert', 'TokenClassification', tmp_path / 'base'),
    tmp_path / 'adapter',
  )
  base = transformers.AutoModelForTokenClassification.from_pretrained(folder)
  save_random(base, adapter, 'PromptTuning', task_type='TOKEN_CLS')
  given = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS[2], return_tensors='pt')
  firsts = [given.word_ids().index(word) for word in range(len(TEXTS[2].split()))]
  with torch.no_grad():
    logits = peft.PeftModel.from_pretrained(base, adapter).eval()(**given).logits[0, 4:]
  expected = torch.softmax(logits[firsts], -1).max(-1)
  (answer,) = llm_jax.open(adapter).predict([TEXTS[2]])
  np.testing.assert_allclose(answer['probabilities'], expected.values, atol=1e-4)
  assert answer['tags'] == [f'LABEL_{i}' for i in expected.indices]


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


TABLES = 'base_model.model.bert.embeddings'


def without_layer_1(tensors):
  return {name: x for name, x in tensors.items() if 'layer.1.' not in name or 'lora' not in name}


WRONG = {
  r"base_model_name_or_path='nowhere' is no Hugging Face folder": (
    dict(base_model_name_or_path='nowhere'),
    None,
  ),
  r"peft_type='VERA' cannot be read; known: ADALORA, IA3, LORA": (dict(peft_type='VERA'), None),
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
  r'word_embeddings.base_layer.weight is not what the base has': (
    {},
    lambda tensors: tensors | {f'{TABLES}.word_embeddings.base_layer.weight': np.ones((74, 32))},
  ),
  r'adapts bert.embeddings.position_embeddings, .* and of its tables beside that of tokens': (
    {},
    lambda tensors: (
      tensors | {f'{TABLES}.position_embeddings.lora_embedding_{x}': np.ones((3, 3)) for x in 'AB'}
    ),
  ),
  r'adapts bert.pooler.dense, and here adapters stand beside the linear maps of the model alone': (
    {},
    lambda tensors: (
      tensors
      | {f'base_model.model.bert.pooler.dense.lora_{x}.weight': np.ones((3, 3)) for x in 'AB'}
    ),
  ),
}

WRONG_PROMPT = {
  'task_type=QUESTION_ANS: peft refuses it, or computes there what is not computed here': (
    dict(task_type='QUESTION_ANS')
  ),
  r'num_transformer_submodules=2: prompt does not have it here': dict(num_transformer_submodules=2),
  r'prompt_embeddings must be of shape \[7, 32\] for this model, and is \[4, 32\]': (
    dict(num_virtual_tokens=7)
  ),
}


@pytest.mark.parametrize('saved', ['bert prompt'], indirect=True)
def test_what_a_prompt_cannot_be_is_said(saved):
  _, adapter = saved
  config = adapter / 'adapter_config.json'
  said = json.loads(config.read_text())
  for message, changes in WRONG_PROMPT.items():
    config.write_text(json.dumps(said | changes))
    with pytest.raises(ValueError, match=message):
      llm_jax.open(adapter).predict(TEXTS)


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
