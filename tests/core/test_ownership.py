"""One process at a time trains in a folder; its end, however it comes, frees the folder."""

import json
import os
import signal
import subprocess
import sys

import pytest

from llm_jax.core import ownership

HOLDS = """
import pathlib, sys, time
from llm_jax.core import ownership
ownership.take(pathlib.Path(sys.argv[1]))
print('holds', flush=True)
time.sleep(60)
"""


def test_another_process_is_refused_until_the_holder_is_gone(tmp_path):
  with subprocess.Popen(
    [sys.executable, '-c', HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
  ) as holder:
    assert holder.stdout.readline() == 'holds\n'
    for refused in (ownership.check, ownership.take):
      with pytest.raises(ValueError, match=f'another run trains there .process {holder.pid} on '):
        refused(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
  ownership.check(tmp_path)
  ownership.take(tmp_path)
  ownership.take(tmp_path)  # what it holds, it keeps
  ownership.check(tmp_path)
  assert json.loads((tmp_path / ownership.NAME).read_text())['process'] == os.getpid()
  ownership.release(tmp_path)
  ownership.release(tmp_path)


def test_a_folder_that_nobody_trains_in(tmp_path):
  ownership.check(tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
  def refuse(*_):
    raise OSError(ownership.errno.ENOLCK, 'no locks')

  monkeypatch.setattr(ownership.fcntl, 'lockf', refuse)
  ownership.take(tmp_path)
  assert 'make sure that no other run trains there' in caplog.text
  ownership.release(tmp_path)
