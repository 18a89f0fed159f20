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
  memory.Kept(300_000_000)
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
  def faults(wanted, **env):
    return run(wanted, kept=True, JAX_PLATFORMS='cpu', **env)[1]

  assert faults(True) < 10
  assert faults(True, JAX_CPU_ENABLE_ASYNC_DISPATCH='1') > 50  # a step beside another
  assert faults(False) > 10_000


BETWEEN = """
import threading, time
from llm_jax.parallel.cpu import memory
memory.set_up()
kept = memory.Kept(300_000_000)
block = bytes(200_000_000)
def free():
  global block
  time.sleep(0.2)  # as where other programs want the processors
  block = None
thread = threading.Thread(target=free)
thread.start()
kept.wait()
print(block is None)
stays = bytes(200_000_000)
kept.wait()  # as long as it waits at most: what stays is no longer waited for
began = time.monotonic()
kept.wait()
print(time.monotonic() - began < memory.LONGEST / 2)
"""


@pytest.mark.skipif(not memory._possible(), reason='no huge pages on this machine')
def test_waits_for_the_block_of_the_last_step_but_not_for_what_stays():
  said = subprocess.run(
    [sys.executable, '-c', BETWEEN],
    text=True,
    stdout=subprocess.PIPE,
    env=os.environ | dict(JAX_PLATFORMS='cpu'),
    check=True,
  )
  assert said.stdout.split() == ['True', 'True']


HOLES = """
import ctypes, sys
from llm_jax.parallel.cpu import memory
memory.set_up()
memory.ROOM = int(sys.argv[1])
kept = memory.Kept(300_000_000)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = libc.free.argtypes = [ctypes.c_size_t]
blocks = set()
for step in range(20):
  block = libc.malloc(300_000_000)
  blocks.add(block)
  if step == 10:  # an evaluation, which fills most of the room
    libc.malloc(memory.ROOM // 4 * 3)
    kept.renew()
    before, blocks = blocks, set()
  libc.malloc(1_000_000)  # stays
  libc.free(block)
  libc.malloc(1_000_000)
print(max(len(before), len(blocks)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not memory._possible(), reason='no huge pages on this machine')
def test_the_block_of_each_step_lies_where_the_last_ones_was():
  def places(room):
    command = [sys.executable, '-c', HOLES, str(room)]
    env = os.environ | dict(JAX_PLATFORMS='cpu')
    return int(subprocess.check_output(command, text=True, env=env))

  assert places(memory.ROOM) == 1 < places(2**20)


PAUSE = """
import ctypes, sys
from llm_jax.parallel.cpu import memory
memory.set_up()
kept = memory.Kept(300_000_000)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
blocks = set()
def step():
  kept.wait()
  block = libc.malloc(300_000_000)
  libc.memset(block, 1, 300_000_000)
  blocks.add(block)
  libc.free(block)
for _ in range(5):
  step()
before = memory.held('VmRSS')
if sys.argv[1] == 'pause':
  kept.pause()
copies = [bytes([120]) * 40_000_000 for _ in range(5)]
beside = memory.held('VmRSS') - before
kept.renew()
step()
del copies  # late
for _ in range(5):
  step()
print(len(blocks), beside)
"""


@pytest.mark.slow
@pytest.mark.skipif(not memory._possible(), reason='no huge pages on this machine')
def test_what_comes_between_steps_stands_neither_beside_the_block_nor_where_it_was():
  def said(*arguments):
    command = [sys.executable, '-c', PAUSE, *arguments]
    env = os.environ | dict(JAX_PLATFORMS='cpu')
    return map(int, subprocess.check_output(command, text=True, env=env).split())

  places, beside = said('pause')
  assert places == 1 and beside < -90_000_000
  places, _ = said('')
  assert places > 1


ADVICE = """
import pathlib, re
from llm_jax.parallel.cpu import memory
memory.set_up()
kept = memory.Kept(300_000_000)
def advice():
  maps = pathlib.Path('/proc/self/smaps').read_text().split('VmFlags:')
  heap = [i + 1 for i, text in enumerate(maps) if '[heap]' in text]
  flags = [maps[i].splitlines()[0].split() for i in heap]
  return {'huge' if 'hg' in each else 'not' if 'nh' in each else 'none' for each in flags}
said = []
for step in range(2 * memory.WARM):
  kept.wait()
  bytes(100_000_000)
  said.append(advice())
kept.renew()
print(said == [{'huge'}] * memory.WARM + [{'not'}] * memory.WARM, advice() == {'huge'}, said)
"""


@pytest.mark.skipif(not memory._possible(), reason='no huge pages on this machine')
def test_no_more_huge_pages_are_made_once_steps_have_their_block():
  command = [sys.executable, '-c', ADVICE]
  env = os.environ | dict(JAX_PLATFORMS='cpu')
  said = subprocess.check_output(command, text=True, env=env)
  assert said.split()[:2] == ['True', 'True'], said


ROOM_IN_HOLES = """
from llm_jax.parallel.cpu import memory
memory.set_up()
kept = memory.Kept(300_000_000)
before = memory.held('VmRSS')
large, small = [], []
for _ in range(100):
  large.append(bytes([120]) * 3_000_000)
  small.append(bytes([120]) * 100_000)
del large
kept.renew()
print(memory.held('VmRSS') - before)
"""


@pytest.mark.skipif(not memory._possible(), reason='no huge pages on this machine')
def test_making_room_takes_no_memory_where_an_evaluation_left_holes():
  env = os.environ | dict(JAX_PLATFORMS='cpu')
  held = int(subprocess.check_output([sys.executable, '-c', ROOM_IN_HOLES], text=True, env=env))
  assert 0 < held < 40_000_000  # 10 MB in use; with a huge page per block of the room 149 MB


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
