"""Every method, from a run to a folder and from there to answers."""

import json
import os
import shutil

import numpy as np
import pytest

import llm_jax
from configs import compress as config
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.inference.export import export
from llm_jax.modes import compress
from llm_jax.modes._command import Command
from llm_jax.programs import checkpoints, workdir

pytestmark = pytest.mark.slow
METHODS = {
  'int8': dict(name='int8'),
  'tensor': dict(name='int8', activations='tensor', vocabulary=False),
  'int4': dict(name='int4', group=4),
  'svd': dict(name='svd', share=0.8),
  'structured': dict(name='structured', heads=0.5, mlp=0.5, layers=2),
  'magnitude': dict(name='magnitude', pattern='2:4'),
}
FORMS = {'int8', 'tensor', 'int4', 'svd'}


def compressed(workdir, target, section, **changes):
  """What the mode writes, and its report."""
  given = config.get_config().to_dict()
  given['compress'] = {name: None for name in given['compress']} | section
  given |= changes
  compress.compress(Command('compress', given, workdir, keep_compiled=False), target)
  return json.loads((target / 'compression.json').read_text())


def said(session, texts):
  if session.causal:
    return session.complete(texts, max_new_tokens=6, temperature=0)
  return [list(answer['probabilities'].values()) for answer in session.predict(texts)]


@pytest.fixture(scope='module', params=['encoder', 'decoder'])
def kind(request):
  return request.param


@pytest.mark.parametrize('method', METHODS)
def test_from_a_run_to_a_folder_and_back(method, kind, runs, tiny, tmp_path):
  parent, target, section = runs(kind), tmp_path / 'small', METHODS[method]
  if method == 'structured' and kind == 'decoder':
    section = section | dict(heads=None)
  report = compressed(parent, target, section)
  numbers = report['numbers']
  score = 'loss' if kind == 'decoder' else 'classify_accuracy'
  assert set(numbers) >= {'bytes on disk', 'bytes in memory', 'rows per second', score}
  assert report['score_lost']['low'] <= report['score_lost']['mean'] <= report['score_lost']['high']
  if method != 'magnitude':
    assert numbers['bytes in memory'][1] < 0.9 * numbers['bytes in memory'][0]
  # It opens, and answers the same again, to the bit.
  first, second = llm_jax.open(target), tiny.opened(target)
  answers = said(first, tiny.texts)
  assert said(second, tiny.texts) == answers
  leaves = params_lib.leaves(first.params)
  forms = {path for path, leaf in leaves.items() if params_lib.is_form(leaf)}
  assert bool(forms) == (method in FORMS) and forms == first.program.formed.keys()
  # Nothing of it is as it was, and the whole of it is what the arrays say.
  before, after = (tree.flatten(s.program.dense(s.params)) for s in (llm_jax.open(parent), first))
  assert any(
    a.shape != before[p].shape or not np.array_equal(a, before[p]) for p, a in after.items()
  )
  whole = first.program.dense(first.params)
  assert not any(map(params_lib.is_form, params_lib.leaves(whole).values()))
  if section.get('heads'):
    with pytest.raises(ValueError, match='these options stand in the way: head_dim'):
      export(first, tmp_path / 'hf')
  else:
    export(first, tmp_path / 'hf')  # whose classes hold arrays
    other = llm_jax.open(tmp_path / 'hf')
    if kind == 'encoder':
      np.testing.assert_allclose(said(other, tiny.texts), answers, atol=1e-4)
    elif method in ('structured', 'magnitude'):
      assert said(other, tiny.texts) == answers
  if method == 'int8':
    with pytest.raises(ValueError, match='in another form already'):
      compressed(target, tmp_path / 'again', METHODS['svd'])
    held = checkpoints.restore_params(target / 'checkpoints', first.program.params)
    assert not forms & held.params.keys()  # not an array of a kernel is on the disk


def test_a_vocabulary_of_what_the_texts_need(runs, tiny, tmp_path):
  folder = tmp_path / 'words'
  folder.mkdir()
  given = tiny.settings('encoder', folder)
  given['tokenizer'] = dict(name='sentencepiece', vocab_size=290)
  tiny.train(given | dict(steps=4, eval_every=4), folder / 'run')
  session = llm_jax.open(folder / 'run')
  # The texts that are looked at have half of the words.
  lines = (folder / 'data.jsonl').read_text().splitlines()
  (folder / 'half.jsonl').write_text('\n'.join(line for line in lines if '"good"' in line))
  data = given['data'] | dict(path=str(folder / 'half.jsonl'), validation=0.0)
  compressed(folder / 'run', folder / 'small', dict(name='vocabulary'), data=data)
  small = llm_jax.open(folder / 'small')
  assert small.tokenizer.vocab_size == small.config.model['vocab_size']
  assert small.tokenizer.vocab_size < session.tokenizer.vocab_size
  half, others = tiny.texts[::2], tiny.texts[1::2]
  assert said(small, half) == said(session, half) and said(small, others)


@pytest.mark.parametrize(
  'section, words',
  [
    (dict(name='int9'), "'int9'"),
    (dict(), 'needs config.compress.name'),
    (dict(name='int8', keep=('nowhere',)), "'nowhere' is found in no path"),
    (dict(name='int8', keep=('.',)), 'leaves nothing to change'),
    (dict(name='int8', activations='row'), "activations='row' is not known"),
    (dict(name='svd', rank=16), 'finds no kernel that it can change'),
    (dict(name='int4', group=7, vocabulary=False), 'finds no kernel that it can change'),
    (dict(name='movement', share=0.5), 'is learned: train with it'),
    (dict(name='structured', layers=9), 'fewer than the 4 layers'),
    (dict(name='structured', layers=2, tolerance=-1.0), 'nothing is written'),
  ],
)
def test_what_is_not_possible_is_refused_and_writes_nothing(section, words, runs, tmp_path):
  with pytest.raises(ValueError, match=words):
    compressed(runs('encoder'), tmp_path / 'small', section)
  assert os.listdir(tmp_path) == []


def test_the_folder_must_be_free_and_texts_must_be_there(runs, tmp_path):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'x').touch()
  with pytest.raises(ValueError, match='holds something already'):
    compressed(runs('encoder'), tmp_path / 'full', dict(name='int8'))
  export(llm_jax.open(runs('encoder')), tmp_path / 'hf')
  with pytest.raises(ValueError, match='looks at texts: give config.data'):
    changes = dict(init_from=str(tmp_path / 'hf'))
    compressed(None, tmp_path / 'y', dict(name='structured', heads=0.5), **changes)
  report = compressed(None, tmp_path / 'z', dict(name='int8'), init_from=str(tmp_path / 'hf'))
  assert 'score_lost' not in report and llm_jax.open(tmp_path / 'z').params
  with pytest.raises(ValueError, match='needs a validation set'):
    given = dict(name='int8', tolerance=0.1)
    compressed(None, tmp_path / 'w', given, init_from=str(tmp_path / 'hf'))


def test_the_mixed_mode_leaves_the_product_with_an_outlier_in_floating_point(runs, tiny, tmp_path):
  """One channel of the activations of one product times 100, and its weights a hundredth: the model
  is the same, and 8 bits for all inputs are not enough.
  """
  source = tmp_path / 'outlier'
  shutil.copytree(runs('encoder'), source)
  session = llm_jax.open(source)
  leaves = tree.flatten(session.params)
  prefix = 'model/stack/layers/block/mlp'
  # GELU is linear there: the channel is 300 and more, which hardly anything reads.
  leaves[f'{prefix}/up/bias'] = leaves[f'{prefix}/up/bias'].at[:, 0].set(300.0)
  down = leaves[f'{prefix}/down/kernel'].at[:, 1:].mul(30).at[:, 0].mul(1e-3)
  leaves[f'{prefix}/down/kernel'] = down
  saved = checkpoints.Checkpoints(source / 'checkpoints', 9)
  meta = dict(config={}, tokenizer=workdir.pack_tokenizer(source))
  saved.save(99, {'params': tree.nest(leaves)}, 0, meta, {'loss': -1.0})
  saved.close()
  exact = np.array(said(llm_jax.open(source), tiny.texts))
  lost = {}
  for name, more in [('tensor', {}), ('mixed', dict(sensitive=0.02))]:
    given = dict(name='int8', activations='tensor', vocabulary=False) | more
    compressed(source, tmp_path / name, given)
    small = llm_jax.open(tmp_path / name)
    lost[name] = np.abs(np.array(said(small, tiny.texts)) - exact).max()
  kept = small.config.compress['keep']
  assert f'^{prefix}/down/kernel$' in kept and len(kept) < 6
  assert lost['mixed'] < 0.01 * np.ptp(exact) and lost['tensor'] > 10 * lost['mixed'], lost
