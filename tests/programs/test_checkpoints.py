import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging

from llm_jax.core import tree
from llm_jax.core.state import TrainState
from llm_jax.programs import checkpoints as checkpoint
from llm_jax.programs.checkpoints import Checkpoints

META = {
  'config': {'steps': 10},
  'tokenizer': {'tokenizer.model': 'AAEC'},
  'patience': [1, None, 2.5],
}


def state(step, seed=0):
  rng = np.random.default_rng(seed)
  params = {
    'model': {
      'layers': {'block': {'kernel': jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)}},
      'norm': {'scale': jnp.asarray(rng.normal(size=8), jnp.bfloat16)},
    }
  }
  tx = optax.partition(
    {'a': optax.adam(1e-3), 'b': optax.sgd(1.0)}, {'model': {'layers': 'a', 'norm': 'b'}}
  )
  return TrainState(
    step=jnp.int32(step), params=params, opt_state=tx.init(params), rng=jax.random.PRNGKey(step)
  )


def abstract(value):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), value)


def assert_same(a, b):
  assert tree.difference(a, b) == '' and jax.tree.structure(a) == jax.tree.structure(b)
  for path, leaf in tree.flatten(a).items():
    assert np.asarray(leaf).tobytes() == np.asarray(tree.flatten(b)[path]).tobytes(), path


@pytest.fixture
def opened(tmp_path):
  made = []

  def open_at(keep=3, directory=tmp_path / 'checkpoints'):
    made.append(Checkpoints(directory, keep))
    return made[-1]

  yield open_at
  for checkpoints in made:
    checkpoints.close()


def fill(checkpoints, steps, losses=None):
  for step in steps:
    assert checkpoints.save(
      step, state(step, seed=step), 10 * step, META, losses and {'loss': losses[step]}
    )
  checkpoints.wait()


def child(code, *arguments, **environment):
  """Runs code in a process of its own, with this module's names."""
  here = pathlib.Path(__file__)
  prelude = (
    f'import sys\nsys.path.insert(0, {str(here.parent)!r})\nfrom test_checkpoints import *\n'
  )
  program = prelude + textwrap.dedent(code)
  return subprocess.run(
    [sys.executable, '-c', program, *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=120,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment,
  )


def test_round_trip_is_exact(opened):
  checkpoints = opened()
  assert checkpoints.restore(abstract(state(1))) is None and checkpoints.best_step() is None
  fill(checkpoints, [1])
  for reader in (checkpoints, opened()):
    restored = reader.restore(abstract(state(0)))
    assert_same(restored.state, state(1, seed=1))
    assert (restored.position, restored.meta, restored.step) == (10, META, 1)


def test_a_step_is_saved_once(opened):
  checkpoints = opened()
  assert checkpoints.save(25, state(25), 0, META)
  assert not checkpoints.save(25, state(25, seed=1), 0, META)
  checkpoints.wait()
  assert checkpoints.steps() == [25]
  assert_same(checkpoints.restore(abstract(state(0))).state, state(25))


def test_keeps_the_newest_and_the_best(opened):
  checkpoints = opened(keep=2)
  fill(checkpoints, range(1, 7), losses={1: 3.0, 2: 1.0, 3: float('nan'), 4: 1.5, 5: 2.0, 6: 1.25})
  assert checkpoints.steps() == [2, 5, 6] and checkpoints.best_step() == 2
  fill(checkpoints, [7], losses={7: 0.5})
  assert checkpoints.steps() == [6, 7] and checkpoints.best_step() == 7
  fill(checkpoints, [8, 9, 10])
  assert checkpoints.steps() == [7, 9, 10]
  assert sorted(child.name for child in checkpoints._directory.iterdir()) == ['10', '7', '9']


def test_donated_buffers_are_safe(opened):
  checkpoints = opened()
  step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  value = {'big': jnp.arange(2_000_000, dtype=jnp.float32), 'small': jnp.arange(5.0)}
  wanted = abstract(value)
  expected = jax.tree.map(lambda x: np.array(x, copy=True), value)
  checkpoints.save(1, value, 0, META)
  for _ in range(3):
    value = step(value)
  checkpoints.wait()
  assert_same(checkpoints.restore(wanted).state, expected)


def damages(path):
  """Ways to damage a file: cut short, gone, one bit changed."""
  content = path.read_bytes()
  yield lambda p: p.write_bytes(content[: len(content) // 2])
  yield lambda p: p.unlink()
  yield lambda p: p.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.slow
def test_damage_to_any_file_falls_back_to_the_one_before(opened, tmp_path, monkeypatch):
  fill(opened(), [1, 2])
  whole = tmp_path / 'checkpoints'
  errors = []
  monkeypatch.setattr(logging, 'error', lambda message, *args: errors.append(message % args))
  names = [path.relative_to(whole) for path in sorted((whole / '2').rglob('*')) if path.is_file()]
  expected = {'2/seal.json', '2/meta/metadata', '2/state/_METADATA'}
  assert len(names) > 8 and expected <= set(map(str, names))
  for name in names:
    for damage in damages(whole / name):
      copy = tmp_path / 'copy'
      shutil.copytree(whole, copy)
      damage(copy / name)
      restored = opened(directory=copy).restore(abstract(state(0)))
      assert restored.step == 1, name
      assert_same(restored.state, state(1, seed=1))
      lost_seal = name.name == 'seal.json' and not (copy / 'damaged').exists()
      aside = 'unfinished' if lost_seal else 'damaged'
      assert (copy / aside / '2').is_dir() and not (copy / '2').exists()
      assert len(errors) == 1 and 'CHECKPOINT OF STEP 2 IS NOT USED' in errors.pop()
      shutil.rmtree(copy)
  assert opened().restore(abstract(state(0))).step == 2


def test_nothing_whole_left_is_an_error_and_stays_one(opened, tmp_path):
  fill(opened(), [1, 2])
  for step in (1, 2):
    next((tmp_path / 'checkpoints' / str(step) / 'state' / 'd').iterdir()).unlink()
  for _ in range(2):
    with pytest.raises(ValueError, match='No whole checkpoint is left.*damaged/'):
      opened().restore(abstract(state(0)))
  assert sorted(p.name for p in (tmp_path / 'checkpoints' / 'damaged').iterdir()) == ['1', '2']


def test_a_second_damaged_checkpoint_of_a_step_is_kept_too(opened, tmp_path):
  for _ in range(2):
    fill(opened(), [3])
    (tmp_path / 'checkpoints' / '3' / 'seal.json').write_text('{')
    with pytest.raises(ValueError, match='No whole'):
      opened().restore(abstract(state(0)))
  assert sorted(p.name for p in (tmp_path / 'checkpoints' / 'damaged').iterdir()) == ['3', '3.1']


def test_another_model_is_a_mismatch_and_not_damage(opened, tmp_path):
  fill(opened(), [1, 2])
  params = {
    'model': {
      'layers': {'block': {'kernel': jnp.zeros((2, 8, 32))}},
      'extra': {'scale': jnp.zeros(3)},
    }
  }
  wanted = abstract(state(0).replace(params=params))
  with pytest.raises(ValueError) as caught:
    opened().restore(wanted)
  assert str(caught.value).splitlines()[1:] == [
    '- params/model/extra/scale float32[3]',
    '+ params/model/norm/scale bfloat16[8]',
    '! params/model/layers/block/kernel: expected float32[2, 8, 32], found float32[2, 8, 16]',
  ]
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['1', '2']


def test_parameters_of_another_run(opened, tmp_path):
  fill(opened(), [1, 2, 3], losses={1: 2.0, 2: 1.0, 3: 1.5})
  directory = tmp_path / 'checkpoints'
  wanted = abstract(
    {
      'model': {'norm': {'scale': jnp.zeros(8, jnp.bfloat16)}},
      'heads_classify': {'bias': jnp.zeros(3)},
    }
  )
  loaded = checkpoint.restore_params(directory, wanted)
  assert (loaded.step, loaded.new) == (2, ['heads_classify/bias'])
  assert loaded.unused == ['model/layers/block/kernel']
  scale = state(2, seed=2).params['model']['norm']['scale']
  assert_same(loaded.params, {'model/norm/scale': scale})
  assert checkpoint.restore_params(directory, wanted, which='latest').step == 3
  assert checkpoint.read_meta(directory) == (META, 3)
  assert checkpoint.read_meta(directory, 'best') == (META, 2)
  (directory / '2' / 'state' / '_METADATA').unlink()
  before = sorted(directory.rglob('*'))
  assert checkpoint.restore_params(directory, wanted).step == 3
  assert sorted(directory.rglob('*')) == before
  with pytest.raises(
    ValueError, match=r'! model/norm/scale: expected float32\[9\], found bfloat16\[8\]'
  ):
    checkpoint.restore_params(directory, abstract({'model': {'norm': {'scale': jnp.zeros(9)}}}))
  kernel = state(3, seed=3).params['model']['layers']['block']['kernel']
  narrow = {'model': {'layers': {'block': {'kernel': kernel.astype(jnp.bfloat16)}}}}
  rounded = checkpoint.restore_params(directory, abstract(narrow), which='latest').params
  assert_same(rounded, {'model/layers/block/kernel': narrow['model']['layers']['block']['kernel']})
  with pytest.raises(ValueError, match=r'scale: expected float32\[8\], found bfloat16\[8\]'):
    checkpoint.restore_params(directory, abstract({'model': {'norm': {'scale': jnp.zeros(8)}}}))
  with pytest.raises(ValueError, match='holds no whole checkpoint'):
    checkpoint.restore_params(tmp_path / 'nowhere', wanted)
  with pytest.raises(ValueError, match="'best', 'latest' or a step"):
    checkpoint.read_meta(directory, 'newest')


def test_parameters_of_a_run_that_trained_a_part_of_them(opened, tmp_path):
  whole = state(1, seed=1)
  model = whole.params['model']
  split = whole.replace(
    params={'model': {'norm': model['norm']}},
    frozen={'model': {'layers': model['layers']}},
    extras={'average': {'model': model}},
  )
  checkpoints = opened()
  checkpoints.save(1, split, 0, META)
  checkpoints.wait()
  assert_same(checkpoints.restore(abstract(split)).state, split)
  loaded = checkpoint.restore_params(tmp_path / 'checkpoints', abstract(whole.params))
  assert loaded.new == loaded.unused == []
  assert_same(tree.nest(loaded.params), whole.params)


def test_leaves_without_sharding_are_refused(opened):
  fill(opened(), [1])
  with pytest.raises(ValueError, match='step has no sharding'):
    opened().restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0)))


def test_the_first_save_interrupted_is_a_run_that_has_not_begun(opened, tmp_path):
  for _ in range(2):
    fill(opened(), [3])
    (tmp_path / 'checkpoints' / '3' / 'seal.json').unlink()
    assert opened().restore(abstract(state(0))) is None
  folder = tmp_path / 'checkpoints'
  assert [str(path.relative_to(folder)) for path in folder.glob('*/*')] == ['unfinished/3']


KILLED = """
  checkpoints = Checkpoints(sys.argv[1], 3)
  fill(checkpoints, [1])
  big = state(2, seed=2)
  big.params['more'] = jnp.asarray(np.random.default_rng(0).normal(size=3_000_000), jnp.float32)
  if sys.argv[2] == 'seal':
    checkpoint._seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
  checkpoints.save(2, big, 20, META)
  if sys.argv[2] == 'write':
    os.kill(os.getpid(), signal.SIGKILL)
  checkpoints.wait()
"""


@pytest.mark.parametrize('when', ['write', 'seal'])
def test_a_save_that_was_killed_is_as_if_never_begun(opened, tmp_path, when):
  assert child(KILLED, tmp_path / 'checkpoints', when).returncode == -signal.SIGKILL
  left = sorted(p.name for p in (tmp_path / 'checkpoints').iterdir())
  assert len(left) == 2 and ('orbax-checkpoint-tmp' in left[1]) == (when == 'write')
  checkpoints = opened()
  restored = checkpoints.restore(abstract(state(0)))
  assert restored.step == 1
  assert_same(restored.state, state(1, seed=1))
  fill(checkpoints, [2])
  assert checkpoints.steps() == [1, 2]


FULL = """
  import resource
  checkpoints = Checkpoints(sys.argv[1], 3)
  fill(checkpoints, [1])
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
  big = {'more': jnp.asarray(np.random.default_rng(0).normal(size=1_000_000), jnp.float32)}
  checkpoints.save(2, big, 20, META)
  try:
    checkpoints.wait()
  except OSError as error:
    print(error)
  else:
    sys.exit('no error')
"""


def test_a_disk_that_is_full_is_an_error_and_earlier_checkpoints_stay(opened, tmp_path):
  done = child(FULL, tmp_path / 'checkpoints')
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'Saving the checkpoint of step 2' in done.stdout
  assert 'newest good checkpoint is that of step 1' in done.stdout
  restored = opened().restore(abstract(state(0)))
  assert restored.step == 1
  assert_same(restored.state, state(1, seed=1))


OTHER_MESH = """
  mesh = jax.make_mesh((4, 2), ('data', 'fsdp'))
  spec = lambda x: jax.P(None, 'fsdp', 'data') if x.ndim == 3 else jax.P()
  sharding = lambda x: jax.NamedSharding(mesh, spec(x))
  wanted = tree.with_shardings(state(0), jax.tree.map(sharding, state(0)))
  checkpoints = Checkpoints(sys.argv[1], 3)
  restored = checkpoints.restore(wanted)
  assert_same(restored.state, state(1, seed=1))
  kernel = restored.state.params['model']['layers']['block']['kernel']
  assert kernel.sharding.is_equivalent_to(sharding(kernel), 3)
  assert kernel.addressable_shards[0].data.shape == (2, 4, 4)
  assert len(jax.devices()) == 8
  checkpoints.save(2, restored.state, 20, META)
  checkpoints.close()
"""


@pytest.mark.slow
def test_other_meshes(opened, tmp_path):
  fill(opened(), [1])
  done = child(
    OTHER_MESH, tmp_path / 'checkpoints', XLA_FLAGS='--xla_force_host_platform_device_count=8'
  )
  assert done.returncode == 0, done.stderr[-2000:]
  restored = opened().restore(abstract(state(0)))
  assert restored.step == 2
  assert_same(restored.state, state(1, seed=1))


def test_the_seal_covers_every_file(opened, tmp_path):
  fill(opened(), [1], losses={1: 2.5})
  folder = tmp_path / 'checkpoints' / '1'
  seal = json.loads((folder / 'seal.json').read_text())
  assert seal['metrics'] == {'loss': 2.5}
  written = {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}
  assert set(seal['files']) == written - {'seal.json'}
