"""Large blocks in huge pages and kept, in processes of their own: to free and take them again costs
few page faults, or none.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from llm_jax.parallel.cpu import memory

PROGRAM = """
import os, resource, sys
from llm_jax.parallel.cpu import memory
if {wanted}:
  memory.set_up()
if {kept}:
  memory.keep()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytes([120]) * 200_000_000  # freed at once
before = faults()
bytes([120]) * 200_000_000
changed = faults() - before
print(os.environ.get('GLIBC_TUNABLES'), changed, os.getpid(), sys.argv[1:])
"""


def run(wanted, kept=False, **env):
  process = subprocess.Popen(
    [sys.executable, '-c', PROGRAM.format(wanted=wanted, kept=kept), 'an', 'argument'],
    text=True,
    stdout=subprocess.PIPE,
    env=os.environ | env,
  )
  said, _ = process.communicate()
  assert process.returncode == 0
  tunables, faults, pid, rest = said.split(maxsplit=3)
  assert int(pid) == process.pid and rest.strip() == "['an', 'argument']"
  return tunables, int(faults)


@pytest.mark.skipif(not memory._possible(), reason='no huge pages on this machine')
def test_what_is_taken_again_costs_few_faults():
  tunables, faults = run(True, JAX_PLATFORMS='cpu', GLIBC_TUNABLES='glibc.malloc.arena_max=3')
  assert tunables.startswith('glibc.malloc.arena_max=3:glibc.malloc.hugetlb=1')
  assert tunables.count('arena_max') == 1 and faults < 1000
  tunables, faults = run(False, JAX_PLATFORMS='cpu')
  assert tunables == 'None' and faults > 10_000


@pytest.mark.skipif(not memory._possible(), reason='no huge pages on this machine')
def test_what_is_kept_costs_none_where_steps_follow_each_other():
  settled = dict(JAX_PLATFORMS='cpu')
  assert run(True, kept=True, **settled)[1] < 10
  assert run(True, kept=False, **settled)[1] > 50
  assert run(True, kept=True, JAX_CPU_ENABLE_ASYNC_DISPATCH='1', **settled)[1] > 50
  assert run(False, kept=True, **settled)[1] > 10_000


def test_what_is_set_once_is_not_set_again(monkeypatch):
  first = memory._settings({'JAX_PLATFORMS': 'cpu'})
  assert memory._settings({'JAX_PLATFORMS': 'cpu', 'GLIBC_TUNABLES': first}) is None
  monkeypatch.setattr(memory, '_ACCELERATORS', (os.path.abspath(__file__),))
  assert memory._settings({'JAX_PLATFORMS': ''}) is None  # beside an accelerator


@pytest.mark.parametrize('text', ['always madvise [never]', '[always] madvise never', None])
def test_a_system_that_cannot_or_does_it_anyway(monkeypatch, tmp_path, text):
  pages = tmp_path / 'enabled'
  if text is not None:
    pages.write_text(text)
  monkeypatch.setattr(memory, '_HUGE_PAGES', str(pages))
  monkeypatch.setattr(os, 'execve', lambda *_: pytest.fail('started anew'))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  memory.set_up()


@pytest.mark.skipif(not pathlib.Path('/proc/self/status').exists(), reason='needs Linux')
def test_what_is_released_is_given_back():
  def held():
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmRSS'))

  blocks = [bytes([120]) * 100_000 for _ in range(1000)]
  last = bytes([120]) * 100_000  # stands above them
  del blocks
  before = held()
  memory.release()
  assert held() <= before and len(last) == 100_000
