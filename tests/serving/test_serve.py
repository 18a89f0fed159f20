"""`--mode=serve` as a process: it gets ready, answers, and ends when it is asked to."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import httpx2
import pytest

ROOT = pathlib.Path(__file__).parents[2]
READY = r'Ready: writer, vectors answers at (\S+)\.\n'
pytestmark = pytest.mark.slow


def command(folder, *flags):
  given = [sys.executable, '-m', 'llm_jax.main', '--mode=serve', f'--workdir={folder}', *flags]
  return given, dict(cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, text=True)


def test_it_answers_until_it_is_asked_to_end(serving, tmp_path):
  (tmp_path / 'keys').write_text(serving.KEY)
  newest = tmp_path / 'newest'
  newest.symlink_to(serving.folders['reader'])
  flags = ['--port=0', '--serve_rows=2', '--serve_slots=64', '--host=127.0.0.1']
  flags.append(f'--serve_models=vectors={newest}')
  given, options = command(serving.folders['writer'], f'--api_keys={tmp_path / "keys"}', *flags)
  log = tmp_path / 'log'
  with log.open('w') as file:
    process = subprocess.Popen(given, stdout=file, stderr=file, **options)
  try:
    until = time.monotonic() + 120
    while not (found := re.search(READY, log.read_text())):
      assert process.poll() is None and time.monotonic() < until, log.read_text()
      time.sleep(0.1)
    headers = {'Authorization': f'Bearer {serving.KEY}'}
    with httpx2.Client(base_url=found[1], headers=headers, timeout=60) as client:
      check_new_versions(client, process, newest)
      body = dict(prompt='a secret', max_tokens=50, stream=True)
      with client.stream('POST', '/v1/completions', json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == 'data: [DONE]'  # what was begun is ended
      with contextlib.suppress(httpx2.TransportError):
        assert client.get('/ready').status_code == 503
    assert process.wait(60) == 0, log.read_text()
  finally:
    process.kill()
  assert 'secret' not in log.read_text() and serving.KEY not in log.read_text()


def check_new_versions(client, process, newest):
  """At SIGHUP, while somebody asks all the time: one that cannot be opened leaves the old one."""
  body = dict(model='vectors', input='some text')
  vector = client.post('/v1/embeddings', json=body).json()['data'][0]['embedding']
  good = newest.readlink()
  for number, folder in enumerate((newest / 'nowhere', good), 1):
    newest.unlink()
    newest.symlink_to(folder)
    process.send_signal(signal.SIGHUP)
    until, counted = time.monotonic() + 120, 0
    while counted < number:
      said = client.post('/v1/embeddings', json=body)
      assert said.status_code == 200 and said.json()['data'][0]['embedding'] == vector
      done = client.post('/v1/completions', json=dict(prompt='a', max_tokens=2))
      assert done.status_code == 200
      loads = re.findall(r'loads_total{(.*model="vectors".*)} (\S+)', client.get('/metrics').text)
      counted = sum(float(value) for _, value in loads)
      assert time.monotonic() < until
    results = {label.split('"')[-2]: float(value) for label, value in loads}
    assert results == {'failed': 1, 'ok': number - 1} or 'ok' in str(loads)


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--host=0.0.0.0'], 'nobody needs a key; give --api_keys=FILE'),
    (['--api_keys=/nowhere/keys'], '/nowhere/keys'),
    (['--port=70000'], 'port'),
    (['--serve_models=other'], '--serve_models=other must be NAME=FOLDER'),
    (['--serve_models=writer=/x'], '--serve_models names writer, as --workdir is called'),
    (['--serve_models=other=/nowhere'], '/nowhere'),
  ],
)
def test_what_is_wrong_is_said_before_anything_is_read(serving, flags, words):
  given, options = command(serving.folders['writer'], *flags)
  done = subprocess.run(given, capture_output=True, check=False, **options)
  assert done.returncode != 0 and words in done.stderr and 'Traceback' not in done.stderr
