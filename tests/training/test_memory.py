"""What a step takes, and the choice of what backpropagation keeps."""

import jax
import numpy as np
import pytest

from configs import bert_tiny
from llm_jax.core import config
from llm_jax.nn.stack import REMAT
from llm_jax.parallel import topology
from llm_jax.training import memory, program

pytestmark = pytest.mark.usefixtures('as_in_use')


def tiny(**model):
  tree = bert_tiny.get_config().to_dict()
  tree |= dict(batch_size=8, seq_len=128, micro_batches=1)
  tree['model'] |= dict(dim=64, layers=16, heads=2, mlp_dim=256) | model
  return config.parse(tree)


def make(settings):
  return program.outline(settings, topology.devices('cpu:1'))


@pytest.fixture(scope='module')
def totals():
  """Bytes of a step by policy, as the compiler has it."""
  return {remat: memory.needed(make(tiny(remat=remat))).total_bytes for remat in memory.REMATS}


@pytest.mark.slow
def test_each_policy_keeps_less_than_the_one_before(totals):
  none, dots, narrow, attention, full = (totals[remat] for remat in memory.REMATS)
  # The last two are equal here, as only kernels name what attention gives.
  assert none > dots > narrow > attention >= full
  assert set(memory.REMATS) == REMAT.keys() - {'offload'}


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'dots', 'narrow'])
def test_auto_takes_the_first_that_fits(monkeypatch, totals, remat):
  monkeypatch.setattr(memory, 'limit', lambda devices: totals[remat])
  made = memory.fitting(tiny(remat='auto'), make)
  assert made.config.model['remat'] == made.network.model.remat == remat
  monkeypatch.setattr(memory, 'needed', lambda program: pytest.fail('compiled'))
  assert memory.fitting(tiny(remat='narrow'), make).network.model.remat == 'narrow'


@pytest.mark.slow
def test_where_none_fits_auto_says_what_may_help(monkeypatch, totals):
  monkeypatch.setattr(memory, 'limit', lambda devices: 1000)
  monkeypatch.setattr(memory, 'needed', lambda program: memory.Need(2**31, None))
  with pytest.raises(
    ValueError,
    match=r"even with remat='full' a step takes 2.00 of 0.00 GiB .*config.micro_batches from 1",
  ):
    memory.fitting(tiny(remat='auto'), make)


@pytest.mark.slow
def test_the_step_that_was_measured_is_the_one_that_runs(caplog):
  made = memory.fitting(tiny(remat='auto', layers=1, dim=32), make)
  assert made.config.model['remat'] == 'none'
  state, batch = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), (made.state, made.batch)
  )
  with jax.log_compiles():
    made.train_step(state, batch)
    seen = caplog.text
    jax.jit(lambda x: x + 1).lower(np.float32(1)).compile()
  assert 'XLA compilation' in caplog.text.removeprefix(seen) and 'train_step' not in seen


def test_offload_is_not_for_cpus():
  with pytest.raises(ValueError, match="remat='offload' moves activations .* Take 'narrow'"):
    memory.fitting(tiny(remat='offload'), make)


def test_the_memory_of_a_device():
  gib = 2**30
  assert memory.limit(topology.devices('v5e:2x2')) == 15.75 * gib
  assert 2 * memory.limit(2 * jax.devices()[:1]) == memory.limit(jax.devices()[:1]) > gib


def test_messages_of_the_compiler():
  gib = 2**30
  assert (
    memory.refused_bytes('Ran out of memory in memory space hbm. Used 24.31G of 15.75G hbm.')
    == 24.31 * gib
  )
  assert (
    memory.refused_bytes('required for HLO temporaries (256.00G) exceeds available HBM (15.75G)')
    == 256 * gib
  )
  with pytest.raises(ValueError, match='names no size'):
    memory.refused_bytes('RESOURCE_EXHAUSTED')
