"""Memory that is kept: what is freed and taken again costs no page faults; in processes of their
own, as it is for good.
"""

import os
import subprocess
import sys

PROGRAM = """
import resource
from llm_jax.parallel.cpu import memory
kept = memory.keep() if {keep} else False
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytes([120]) * 200_000_000  # freed at once
before = faults()
bytes([120]) * 200_000_000
print(kept, faults() - before)
"""


def run(keep, **env):
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM.format(keep=keep)],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | env,
  )
  kept, faults = done.stdout.split()
  return kept == 'True', int(faults)


def test_what_is_taken_again_costs_no_faults():
  kept, faults = run(True, JAX_PLATFORMS='cpu')
  assert kept == (sys.platform == 'linux') and (not kept or faults < 200)
  kept, faults = run(False, JAX_PLATFORMS='cpu')
  assert not kept and faults > 1000


def test_beside_an_accelerator_nothing_is_changed(monkeypatch):
  from llm_jax.parallel.cpu import memory

  monkeypatch.setenv('JAX_PLATFORMS', '')
  monkeypatch.setattr(memory, '_ACCELERATORS', (os.path.abspath(__file__),))
  assert not memory.keep()
