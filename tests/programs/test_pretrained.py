"""What a run starts from: a folder of Hugging Face, or of another run. Runs go out to such folders
and come back the same.
"""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest

import llm_jax
from configs import base, classify, hf
from llm_jax.core import config as config_lib
from llm_jax.core import params as params_lib
from llm_jax.core import recipes, tree
from llm_jax.data.tokenizers import byte
from llm_jax.generation import completion
from llm_jax.generation.sampling import Sampling
from llm_jax.inference import session
from llm_jax.inference.export import export
from llm_jax.modes.embed import embed
from llm_jax.modes.eval import evaluate
from llm_jax.modes.generate import generate
from llm_jax.programs import pretrained
from llm_jax.training import logs, loop

SHAPES = {
  'mlm': ('encoder', dict(dim=16, layers=2, heads=2, mlp_dim=32, max_len=64)),  # BERT's
  'clm': (
    'decoder',
    dict(variant='llama_tiny', dim=16, layers=2, heads=4, kv_heads=2, mlp_dim=32, max_len=64),
  ),
}


def settings(folder, objective, **changes):
  """A run over letters, of a model with SHAPES."""
  name, shape = SHAPES[objective]
  config = base.get_config().to_dict() | dict(
    steps=2, batch_size=4, seq_len=48, log_every=1, eval_every=2
  )
  config |= dict(
    tokenizer=dict(name='byte'),
    objective=dict(name=objective),
    logging=dict(tensorboard=False),
    model=dict(name=name, **shape),
    checkpoint=dict(every=2, keep=1),
  )
  config['data'] = dict(
    source='text',
    path=str(folder / 'letters.txt'),
    unit='line',
    validation=0.2,
    cache=str(folder / 'cache'),
  )
  return config | changes


def start(config, workdir):
  return loop.prepare(config_lib.parse(config), workdir)


def run(config, workdir):
  started = start(config, workdir)
  loop.train(started)
  return started


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A corpus; a run of each objective over it, `run-mlm` and `run-clm`; and what they are exported
  to, `hf-mlm` and `hf-clm`.
  """
  folder, rng = tmp_path_factory.mktemp('pretrained'), random.Random(0)
  lines = [
    f'{number} {"".join(rng.choices("abcdefgh ", k=rng.randrange(4, 40)))}' for number in range(200)
  ]
  (folder / 'letters.txt').write_text('\n'.join(lines))
  for objective in SHAPES:
    run(settings(folder, objective), folder / f'run-{objective}')
    export(session.open_model(folder / f'run-{objective}'), folder / f'hf-{objective}')
  return folder


def of_folder(path, **changes):
  """configs/hf.py with init_from."""
  config = hf.get_config().to_dict() | dict(init_from=str(path))
  return pretrained.fill_in(config_lib.parse(config | changes))


def bit_identical(a, b):
  return a.keys() == b.keys() and all(
    np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes() for path in a
  )


@pytest.mark.slow
@pytest.mark.parametrize('objective', SHAPES)
def test_an_exported_run_is_the_same_model(folder, objective):
  data = config_lib.parse(settings(folder, objective)).data
  opened = session.open_model(
    None, of_folder(folder / f'hf-{objective}', data=data, batch_size=4, seq_len=48)
  )
  before, after = evaluate(session.open_model(folder / f'run-{objective}')), evaluate(opened)
  assert after['loss'] == pytest.approx(before['loss'], abs=1e-6) and after.keys() == before.keys()
  assert (
    opened.config.model['name'] == SHAPES[objective][0]
    and opened.config.objective['name'] == objective
  )


@pytest.mark.slow
@pytest.mark.parametrize('objective', SHAPES)
def test_out_and_in_and_out_is_the_same_to_the_last_bit(folder, objective, tmp_path):
  export(session.open_model(None, of_folder(folder / f'hf-{objective}')), tmp_path / 'again')
  first, again = (
    sorted(path.glob('*')) for path in (folder / f'hf-{objective}', tmp_path / 'again')
  )
  assert [path.name for path in first] == [path.name for path in again] and len(first) >= 4
  for a, b in zip(first, again, strict=True):
    read = (
      (lambda path: json.loads(path.read_text())) if a.suffix == '.json' else type(a).read_bytes
    )
    assert read(a) == read(b), a.name


@pytest.mark.slow
def test_a_run_starts_from_a_folder_and_goes_on_without_it(folder, tmp_path):
  shutil.copytree(folder / 'hf-mlm', tmp_path / 'hf')
  config = settings(
    folder,
    'mlm',
    model=dict(name='encoder', variant='bert_tiny'),
    tokenizer=dict(name='sentencepiece'),
    init_from=str(tmp_path / 'hf'),
  )
  started = start(config, tmp_path / 'w')
  exported = session.load_params(started.program, folder / 'run-mlm')
  assert bit_identical(tree.flatten(started.state.params), tree.flatten(exported))
  assert started.program.config.model['dim'] == 16 and 'variant' not in started.program.config.model
  loop.train(started)
  changed = tree.flatten(started.state.params)
  assert not bit_identical(changed, tree.flatten(exported))
  shutil.rmtree(tmp_path / 'hf')
  values = evaluate(session.open_model(tmp_path / 'w'))  # the workdir has all that it needs
  last = [line for line in logs.read(tmp_path / 'w') if line['split'] == 'validation'][-1]
  assert values['loss'] == pytest.approx(last['loss'], abs=1e-6)
  on = run(config | dict(steps=3), tmp_path / 'w')
  assert int(on.state.step) == 3 and on.program.config.model == started.program.config.model
  # A config for another kind of model gives way to the folder at each start, not at the first only.
  other = config | dict(steps=3, model=dict(name='decoder', variant='gpt_tiny'))
  assert loop.prepare(config_lib.parse(other), tmp_path / 'w').program.config.model == (
    started.program.config.model
  )
  with pytest.raises(ValueError, match='model.dim=32 is not what .*hf has, 16'):
    run(config | dict(steps=4, model=config['model'] | dict(dim=32)), tmp_path / 'w')


@pytest.mark.slow
def test_a_run_fills_what_is_left_open(folder):
  config = of_folder(folder / 'run-clm')
  assert (
    config.model['kv_heads'] == 2 and config.objective['name'] == 'clm' and config.seq_len == 48
  )
  assert config.tokenizer['name'] == 'byte'
  assert of_folder(folder / 'hf-clm').seq_len == 64  # as long as the model takes


@pytest.mark.slow
def test_what_the_config_says_goes_first_or_is_refused(folder):
  model = hf.get_config().to_dict()['model']
  assert (
    of_folder(folder / 'hf-mlm', model=model | dict(dtype='bfloat16', dropout=0.3)).model['dropout']
    == 0.3
  )
  assert of_folder(folder / 'hf-mlm', seq_len=32).seq_len == 32
  for more in (dict(dim=32), dict(name='encoder', variant='bert_tiny', dim=32)):
    with pytest.raises(
      ValueError, match=r'config.model.dim=32 is not what .*hf-mlm has, 16; leave it unset'
    ):
      of_folder(folder / 'hf-mlm', model=model | more)
  with pytest.raises(ValueError, match=r'model.window=8 is not what .*hf-mlm has, None'):
    of_folder(folder / 'hf-mlm', model=model | dict(window=8))


@pytest.mark.parametrize('path', ['nowhere', 'letters.txt', ''])
def test_a_folder_that_is_none(tmp_path, path):
  (tmp_path / 'letters.txt').write_text('a b c')
  with pytest.raises(
    ValueError, match='is the folder neither of a run nor of a Hugging Face model'
  ):
    of_folder(tmp_path / path)


@pytest.mark.slow
def test_a_classifier_reads_a_model_as_its_folder_says(folder, tmp_path):
  shutil.copytree(folder / 'hf-mlm', tmp_path / 'sentences')
  (tmp_path / 'sentences' / '1_Pooling').mkdir()
  pooling = {'pooling_mode_mean_tokens': True}
  (tmp_path / 'sentences' / '1_Pooling' / 'config.json').write_text(json.dumps(pooling))
  modules = [{'idx': 0, 'path': '1_Pooling', 'type': 'sentence_transformers.models.Pooling'}]
  (tmp_path / 'sentences' / 'modules.json').write_text(json.dumps(modules))

  def pool(path, **objective):
    tree = classify.get_config().to_dict() | dict(init_from=str(path))
    tree['model'] |= dict(name=None, variant=None)
    tree = recipes.chosen(tree, ())
    tree['objective'] |= objective
    filled = pretrained.fill_in(config_lib.parse(tree))
    assert filled.optimizer['learning_rate'] == pytest.approx(1e-4 * (384 / 16) ** 1.6, rel=0.05)
    return filled.objective['pool']

  assert pool(tmp_path / 'sentences') == 'mean' and pool(folder / 'hf-mlm') == 'cls'
  assert pool(folder / 'hf-clm') == 'last' and pool(folder / 'run-clm') == 'last'
  assert pool(folder / 'run-mlm') == 'mean' and pool(tmp_path / 'sentences', pool='cls') == 'cls'


@pytest.mark.parametrize(
  'width, rate', [(128, 5.8e-4), (384, 1e-4), (768, 3.3e-5), (1024, 2.1e-5), (4096, 2e-5)]
)
def test_the_rate_of_fine_tuning_goes_by_width(width, rate):
  tree = base.get_config().to_dict() | dict(steps=1, batch_size=1, seq_len=8)
  tree |= dict(model=dict(name='encoder', dim=width), objective=dict(name='mlm'))
  tree['optimizer']['learning_rate'] = 'auto'
  assert pretrained.fill_in(config_lib.parse(tree)).optimizer['learning_rate'] == rate


@pytest.mark.slow
def test_a_tokenizer_of_another_model(folder, tmp_path):
  shutil.copytree(folder / 'hf-mlm', tmp_path / 'hf')
  config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config | dict(vocab_size=100)))
  with pytest.raises(ValueError, match='has 263 ids, and the model only 100'):
    session.open_model(None, of_folder(tmp_path / 'hf'))


@pytest.mark.slow
def test_a_model_without_the_head_that_is_needed(folder):
  config = of_folder(folder / 'hf-mlm')
  config = dataclasses.replace(config, objective=dict(name='classify', classes=('a', 'b')))
  opened = session.Session(folder / 'hf-mlm', config, byte.create())
  assert opened.embed(['a text']).shape == (1, 16)  # which needs no head
  with pytest.raises(
    ValueError, match='lacks parameters that this needs:\n  heads_classifier/dense/bias'
  ):
    opened.predict(['a text'])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('objective', 'pool'), [('mlm', 'mean'), ('mlm', 'cls'), ('clm', 'last'), ('clm', 'mean')]
)
def test_vectors_are_those_of_each_text_alone(folder, objective, pool, tmp_path):
  texts = ['one', 'a longer text of several words', 'b', 'and then the one that is cut' * 4]
  (tmp_path / 'x.jsonl').write_text(
    '\n'.join(json.dumps({'text': text, 'number': i}) for i, text in enumerate(texts))
  )
  opened = session.open_model(None, of_folder(folder / f'hf-{objective}'))
  embed(opened, tmp_path / 'x.jsonl', tmp_path / 'v.npy', pool, normalize=False)
  embed(opened, tmp_path / 'x.jsonl', tmp_path / 'v.jsonl', pool)
  vectors, lines = (
    np.load(tmp_path / 'v.npy'),
    [json.loads(line) for line in open(tmp_path / 'v.jsonl')],
  )
  model, params = opened.program.network.model, opened.params['model']
  before, after = completion.template(opened.tokenizer, model.causal)
  for text, vector, line in zip(texts, vectors, lines, strict=True):
    ids = np.array(
      [*before, *opened.tokenizer.encode(text)[: 64 - len(before) - len(after)], *after]
    )
    hidden = np.asarray(
      model.apply({'params': params}, {'tokens': ids[None]}).hidden[0], np.float64
    )
    expected = {'mean': hidden.mean(0), 'cls': hidden[0], 'last': hidden[-1]}[pool]
    np.testing.assert_allclose(vector, expected, atol=2e-5)
    np.testing.assert_allclose(line['embedding'], expected / np.linalg.norm(expected), atol=2e-5)
    assert line['text'] == text
  assert np.abs(vectors[0] - vectors[2]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
  ('source', 'target', 'pool', 'message'),
  [
    ('nothing.jsonl', 'v.npy', 'mean', 'must be a file that exists'),
    ('x.txt', 'v.doc', 'mean', 'must be a .npy or .jsonl'),
    ('x.txt', 'no/v.npy', 'mean', 'in a folder that exists'),
    ('x.txt', 'v.npy', 'cls', "pool='cls' reads the first position, which in a causal model"),
  ],
)
def test_what_cannot_be_embedded(folder, tmp_path, source, target, pool, message):
  (tmp_path / 'x.txt').write_text('a text\n')
  with pytest.raises(ValueError, match=message):
    embed(
      session.open_model(None, of_folder(folder / 'hf-clm')),
      tmp_path / source,
      tmp_path / target,
      pool,
    )
  assert not (tmp_path / 'v.npy').exists()


@pytest.mark.slow
def test_a_folder_of_sentence_transformers_says_how_its_vectors_are_made(folder, tmp_path):
  shutil.copytree(folder / 'hf-mlm', tmp_path / 'hf')
  texts = ['one', 'A longer text of SEVERAL words', '']

  def vectors(modules, pooling, options):
    write = lambda name, content: (tmp_path / 'hf' / name).write_text(json.dumps(content))
    (tmp_path / 'hf' / '1_Pooling').mkdir(exist_ok=True)
    paths = {'Pooling': '1_Pooling'}
    write(
      'modules.json',
      [
        {'idx': i, 'path': paths.get(name, ''), 'type': f'sentence_transformers.models.{name}'}
        for i, name in enumerate(modules)
      ],
    )
    write('1_Pooling/config.json', {'word_embedding_dimension': 16, **dict.fromkeys(pooling, True)})
    write('sentence_bert_config.json', options)
    return llm_jax.open(tmp_path / 'hf').embed(texts)

  plain = llm_jax.open(folder / 'hf-mlm')
  found = vectors(['Transformer', 'Pooling'], ['pooling_mode_cls_token'], {'max_seq_length': 12})
  whole = plain.embed(texts, 'cls', False)
  np.testing.assert_allclose(found[[0, 2]], whole[[0, 2]], atol=1e-5)
  np.testing.assert_allclose(found[1], plain.embed([texts[1][:10]], 'cls', False)[0], atol=1e-5)
  assert np.abs(found[1] - whole[1]).max() > 1e-3
  lower = {'do_lower_case': True}
  modules = ['Transformer', 'Pooling', 'Normalize']
  found = vectors(modules, ['pooling_mode_mean_tokens'], lower)
  wanted = plain.embed([text.lower() for text in texts])
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  assert np.abs(found[1] - plain.embed(texts)[1]).max() > 1e-3


@pytest.mark.slow
def test_texts_go_on_from_prompts(folder, tmp_path, capsys):
  opened = session.open_model(None, of_folder(folder / 'hf-clm'))
  (tmp_path / 'x.txt').write_text('12 ab\n7\n')
  sampling = Sampling(max_new_tokens=6, temperature=0.0)
  generate(opened, None, tmp_path / 'x.txt', tmp_path / 'y.jsonl', sampling)
  first, second = (json.loads(line) for line in open(tmp_path / 'y.jsonl'))
  assert first['prompt'] == '12 ab' and len(first['text']) > 1 and second['prompt'] == '7'
  generate(opened, ['12 ab'], None, None, sampling)
  generate(opened, ['12 ab', '7'], None, None, sampling)
  assert (
    capsys.readouterr().out
    == f'12 ab{first["text"]}\n' + f'12 ab{first["text"]}\n7{second["text"]}\n'
  )
  stop = first['text'][-2:]
  generate(opened, ['12 ab'], None, tmp_path / 'z.jsonl', sampling, stop=[stop])
  assert (
    json.loads((tmp_path / 'z.jsonl').read_text())['text']
    == first['text'].partition(stop)[0]
    != first['text']
  )


@pytest.mark.slow
def test_masks_are_filled_in(folder, tmp_path, capsys):
  opened = session.open_model(None, of_folder(folder / 'hf-mlm'))
  generate(opened, ['1 ab[MASK]d'], None, tmp_path / 'y.jsonl', Sampling())
  answer = json.loads((tmp_path / 'y.jsonl').read_text())
  generate(opened, ['1 ab[MASK]d'], None, None, Sampling())
  said = capsys.readouterr().out.splitlines()
  assert said[0] == answer['text'] and len(answer['masks']) == 1 and len(answer['masks'][0]) == 5
  best, p = answer['masks'][0][0]
  assert said[1].startswith(f'  {best} {p:.3f}  ') and 0 < p < 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ('prompts', 'source', 'target', 'message'),
  [
    (None, None, None, "needs either --prompt='...' or --input=prompts.txt"),
    (['a'], 'x.txt', None, 'needs either'),
    (None, 'x.csv', None, 'must be a file that exists'),
    (['a'], None, 'y.txt', 'must be a .jsonl or .csv'),
    (['a' * 60], None, None, 'max_new_tokens=128 are 189'),
  ],
)
def test_what_cannot_be_gone_on_from(folder, tmp_path, prompts, source, target, message):
  opened = session.open_model(None, of_folder(folder / 'hf-clm'))
  with pytest.raises(ValueError, match=message):
    generate(
      opened,
      prompts,
      source and tmp_path / source,
      target and tmp_path / target,
      Sampling(),
    )


@pytest.mark.slow
def test_a_head_of_other_classes_is_not_taken(tmp_path, caplog):
  """By their names and their order; names that say nothing fit as many."""
  lines = [json.dumps(dict(text=f'{kind} {i}', kind=kind)) for i in range(60) for kind in 'abc']
  (tmp_path / 'x.jsonl').write_text('\n'.join(lines))
  config = settings(tmp_path, 'mlm', seq_len=16)
  config['objective'] = dict(name='classify', pool='cls')
  config['data'] |= dict(source='jsonl', path=str(tmp_path / 'x.jsonl'), label='kind')
  del config['data']['unit']
  loop.train(start(config, tmp_path / 'first'))
  export(session.open_folder(tmp_path / 'first'), tmp_path / 'hf')
  said = json.loads((tmp_path / 'hf' / 'config.json').read_text())

  def new(*names):
    path = tmp_path / 'hf' / 'config.json'
    path.write_text(json.dumps(said | dict(id2label=dict(enumerate(names)), label2id=None)))
    caplog.clear()
    trained = start(config | dict(init_from=str(tmp_path / 'hf'), model={}), tmp_path / 'second')
    loaded = pretrained.load_params(trained.program, tmp_path / 'hf')
    warned = 'The last layer of' in caplog.text
    assert warned == bool(loaded.new)
    return sorted(loaded.new)

  assert said['id2label'] == {'0': 'a', '1': 'b', '2': 'c'}
  assert new('a', 'b', 'c') == new('LABEL_0', 'LABEL_1', 'LABEL_2') == []
  head = [f'heads_classifier/dense/{name}' for name in ('bias', 'kernel')]
  assert new('c', 'b', 'a') == new('a', 'b') == new('x', 'y', 'z', 'w') == head


def test_layers_from_the_top_start_anew():
  """Of a stack its last layers, of layers apart the last ones; embeddings and heads are loaded."""
  names = params_lib.LAYERS, 'embed'
  infos = {
    'model/layers/kernel': params_lib.Info(names, layer=0),
    'model/apart/scale': params_lib.Info(('norm',), layer=3),
    'model/embedder/table': params_lib.Info(('vocab', 'embed'), layer=params_lib.EMBEDDINGS),
    'heads_mlm/bias': params_lib.Info(('vocab',)),
  }
  shapes = {path: (3, 2) if 'layers' in path else (2,) * len(infos[path].names) for path in infos}
  drawn = {path: jax.numpy.zeros(shape) for path, shape in shapes.items()}
  found = {path: jax.numpy.ones(shape) for path, shape in shapes.items()}
  loaded = pretrained.Loaded(found, [], [], None)
  for count, kept in ((1, [1, 1, 1, 1]), (2, [1, 1, 0, 0]), (4, [0, 0, 0, 0])):
    new = pretrained.without_top(loaded, tree.nest(drawn), infos, count).params
    values = [*new['model/layers/kernel'].mean(axis=1), new['model/apart/scale'].mean()]
    assert values == [*kept[:3], 0]
    assert new['model/embedder/table'].min() == new['heads_mlm/bias'].min() == 1
  with pytest.raises(ValueError, match='reinit_layers=5 is more than the 4 layers'):
    pretrained.without_top(loaded, tree.nest(drawn), infos, 5)


def test_new_layers_need_weights_and_no_adapter():
  settings = classify.get_config().to_dict() | dict(reinit_layers=1)
  with pytest.raises(ValueError, match='reinit_layers=1 is a number .* where config.init_from is'):
    config_lib.parse(settings)
  adapter = dict(name='lora')
  with pytest.raises(ValueError, match="reinit_layers=1 makes layers .* adapter 'lora' stands"):
    config_lib.parse(settings | dict(init_from='x', adapter=adapter))
