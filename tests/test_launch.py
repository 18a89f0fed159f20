"""The launchers: environment, and one command that reaches the program word for word. Stand-ins for
clouds note their words.
"""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in ('.sh', '.sbatch'))
HARD = [
  "--config.data.path=/my data/it's/*.txt",
  '--config.data.text=a "b" $HOME `id` \\',
  '--config.data.name=ü;x|y&z>w',
]
FLAGS = ['--config=configs/bert_tiny.py', '--workdir=/tmp/a run', *HARD]
COMMAND = ['-m', 'llm_jax.main', *FLAGS]
POD = ['--tpu=my-pod', '--zone=us-west4-a']

NOTE = """#!PYTHON
import json, os, signal, sys, time
with open(os.path.join('FOLDER', os.path.basename(sys.argv[0]) + '.json'), 'a') as file:
  print(json.dumps(sys.argv[1:]), file=file)
if os.environ.get('STAYS'):  # until SIGTERM, which it takes as the program does
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  time.sleep(60)
if os.environ.get('STATUS'):
  sys.exit(int(os.environ['STATUS']))
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
  """Puts stand-ins first on the PATH; returns a function from a name to the words of its calls."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  for name in ('gcloud', 'srun', 'scontrol', 'python', 'python3'):
    stand_in(folder / name, tmp_path)
  monkeypatch.setenv('PATH', f'{folder}:/usr/bin:/bin')
  for name in ('PYTHON', 'REMOTE_DIR', 'REMOTE_PYTHON', 'STAYS', 'STATUS'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('SLURM_JOB_ID', '77')

  def calls(name):
    file = tmp_path / f'{name}.json'
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

  return calls


def stand_in(path, folder, note=NOTE):
  path.write_text(note.replace('PYTHON', sys.executable).replace('FOLDER', str(folder)))
  path.chmod(0o755)
  return path


def bash(*words, **environment):
  return subprocess.run(
    ['bash', *map(str, words)],
    capture_output=True,
    text=True,
    env=os.environ | environment,
    check=False,
  )


@pytest.fixture
def manifest():
  return yaml.safe_load((LAUNCH / 'gke.yaml').read_text())


def gke_command(manifest):
  return manifest['spec']['replicatedJobs'][0]['template']['spec']['template']['spec'][
    'containers'
  ][0]['command']


def test_the_shell_finds_no_fault(tmp_path, manifest):
  assert [path.name for path in SCRIPTS] == ['local.sh', 'slurm.sbatch', 'tpu_vm_pod.sh']
  check = [pathlib.Path(sys.executable).parent / 'shellcheck', '--shell=bash']
  (tmp_path / 'gke.sh').write_text(gke_command(manifest)[2])
  done = subprocess.run(
    [*check, *SCRIPTS, tmp_path / 'gke.sh'], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout
  (tmp_path / 'bad.sh').write_text('#!/usr/bin/env bash\nrm -rf $1/x\n')
  assert (
    subprocess.run([*check, tmp_path / 'bad.sh'], capture_output=True, check=False).returncode == 1
  )


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run_and_are_strict(script):
  assert os.access(script, os.X_OK) and '\nset -euo pipefail\n' in script.read_text()


def test_every_launcher_runs_the_same_command():
  for path in (*SCRIPTS, LAUNCH / 'gke.yaml'):
    assert '-m llm_jax.main' in re.sub(r'^ *#.*', '', path.read_text(), flags=re.MULTILINE), path


@pytest.mark.parametrize(
  ('script', 'words'),
  [
    ('tpu_vm_pod.sh', FLAGS),
    ('tpu_vm_pod.sh', [*POD, '--config=x']),
    ('tpu_vm_pod.sh', [*POD, '--workdir=x']),
    ('tpu_vm_pod.sh', ['--tpu=', '--zone=z', *FLAGS]),
    ('slurm.sbatch', []),
    ('slurm.sbatch', ['--config=x']),
    ('slurm.sbatch', ['--workdir=x', '--config=']),
  ],
)
def test_used_wrongly(stand_ins, script, words):
  done = bash(LAUNCH / script, *words)
  assert (
    done.returncode == 2 and done.stderr.startswith('usage: ') and f'launch/{script}' in done.stderr
  )
  assert not stand_ins('gcloud') and not stand_ins('srun')


# ---- a pod of TPU VMs


def test_a_pod_gets_the_command_word_for_word(stand_ins, tmp_path):
  assert (
    bash(
      LAUNCH / 'tpu_vm_pod.sh', *POD, *FLAGS, REMOTE_DIR='my code', REMOTE_PYTHON='python3'
    ).returncode
    == 0
  )
  *words, remote = stand_ins('gcloud')[0]
  assert words == [
    'compute',
    'tpus',
    'tpu-vm',
    'ssh',
    'my-pod',
    '--zone=us-west4-a',
    '--worker=all',
  ]
  (tmp_path / 'my code').mkdir()
  done = subprocess.run(
    ['bash', '-c', remote.removeprefix('--command=')],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )  # as ssh does on each host, in the home folder
  assert done.returncode == 0, done.stderr
  assert stand_ins('python3') == [COMMAND]


def test_a_pod_passes_on_the_status(stand_ins):
  assert bash(LAUNCH / 'tpu_vm_pod.sh', *POD, *FLAGS, STATUS='5').returncode == 5


def test_a_pod_dry(stand_ins):
  done = bash(LAUNCH / 'tpu_vm_pod.sh', '--dry_run', *POD, *FLAGS)
  assert done.returncode == 0 and not stand_ins('gcloud')
  assert bash(LAUNCH / 'tpu_vm_pod.sh', *POD, *FLAGS).returncode == 0
  assert printed(done) == ['gcloud', *stand_ins('gcloud')[0]]


def printed(done):
  """The words of a printed command, as the shell reads them."""
  return json.loads(
    subprocess.run(
      [
        'bash',
        '-c',
        f'show() {{ {shlex.quote(sys.executable)} -c "import json, sys; '
        f'print(json.dumps(sys.argv[1:]))" "$@"; }}; show {done.stdout}',
      ],
      capture_output=True,
      text=True,
      check=True,
    ).stdout
  )


def test_local_dry(tmp_path):
  flags = ['--config=configs/bert_tiny.py', f'--workdir={tmp_path / "a run"}', *HARD]
  python = str(fake_python(tmp_path))
  done = bash(LAUNCH / 'local.sh', '--dry_run', '-n', '2', *flags, PYTHON=python)
  assert done.returncode == 0 and not (tmp_path / 'a run').exists()
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert len(lines) == 2
  for i, words in enumerate(lines):
    assert words[words.index('-m') :][: 2 + len(flags)] == ['-m', 'llm_jax.main', *flags]
    assert words[-2:] == ['--num_processes=2', f'--process_id={i}']


# ---- Slurm


def test_slurm_runs_the_command_word_for_word(stand_ins):
  assert bash(LAUNCH / 'slurm.sbatch', *FLAGS).returncode == 0
  assert stand_ins('srun') == [['--kill-on-bad-exit=1', 'python', *COMMAND]]
  assert not stand_ins('scontrol')  # the run is over
  done = bash(LAUNCH / 'slurm.sbatch', '--dry_run', *FLAGS)
  assert printed(done) == ['srun', *stand_ins('srun')[0]] and len(stand_ins('srun')) == 1


def test_slurm_passes_on_the_status(stand_ins):
  assert bash(LAUNCH / 'slurm.sbatch', *FLAGS, STATUS='3').returncode == 3 and not stand_ins(
    'scontrol'
  )


def test_slurm_options():
  options = dict(
    re.findall(r'^#SBATCH --([\w-]+)=(\S+)', (LAUNCH / 'slurm.sbatch').read_text(), re.MULTILINE)
  )
  assert (
    options['gres'] == f'gpu:{options["ntasks-per-node"]}'
  )  # a process a GPU: how JAX reads Slurm
  assert options['signal'].startswith('B:TERM@')  # to this script, which passes it on


def stopped(command, calls, waits_for, **environment):
  """Starts a command, sends it SIGTERM once its stand-in runs; gives the status."""
  process = subprocess.Popen(command, env=os.environ | {'STAYS': '1'} | environment)
  deadline = time.time() + 30
  while not calls(waits_for) and time.time() < deadline:
    time.sleep(0.02)
  time.sleep(0.3)  # until the stand-in listens
  process.send_signal(signal.SIGTERM)
  return process.wait(timeout=30)


def test_slurm_queues_a_stopped_run_again(stand_ins, tmp_path):
  stand_in(tmp_path / 'bin' / 'scontrol', tmp_path, NOTE.replace("'STAYS'", "'NEVER'"))
  assert stopped(['bash', LAUNCH / 'slurm.sbatch', *FLAGS], stand_ins, 'srun') == 0
  assert stand_ins('scontrol') == [['requeue', '77']]


# ---- GKE


def test_gke_is_a_jobset_for_all_hosts_of_a_slice(manifest):
  assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  assert manifest['spec']['failurePolicy']['maxRestarts'] > 0
  (job,) = manifest['spec']['replicatedJobs']
  job, pod = job['template']['spec'], job['template']['spec']['template']['spec']
  rows, columns = map(int, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
  (container,) = pod['containers']
  chips = container['resources']['limits']['google.com/tpu']
  assert job['completions'] == job['parallelism'] == rows * columns // chips == 4
  assert (
    job['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'
  )  # all hosts start again, never one
  assert pod['terminationGracePeriodSeconds'] >= 120  # time to save
  mounts = {mount['mountPath'] for mount in container['volumeMounts']}
  (workdir,) = (
    flag.removeprefix('--workdir=') for flag in container['args'] if flag.startswith('--workdir=')
  )
  assert str(pathlib.Path(workdir).parent) in mounts  # shared, and outlives the pods
  assert {mount['name'] for mount in container['volumeMounts']} == {
    volume['name'] for volume in pod['volumes']
  }
  assert any(
    (ROOT / flag.removeprefix('--config=')).is_file()
    for flag in container['args']
    if flag.startswith('--config=')
  )


def test_gke_runs_the_command_word_for_word(stand_ins, manifest):
  command = gke_command(manifest)
  assert subprocess.run([*command, *FLAGS], check=False).returncode == 0
  assert stand_ins('python') == [COMMAND]
  assert (
    subprocess.run([*command, *FLAGS], env=os.environ | {'STATUS': '9'}, check=False).returncode
    == 9
  )


def test_gke_starts_a_stopped_run_again(stand_ins, manifest):
  assert stopped([*gke_command(manifest), *FLAGS], stand_ins, 'python') == 128 + signal.SIGTERM


# ---- this machine


def test_local_starts_each_process_with_the_command_word_for_word(stand_ins, tmp_path):
  flags = [flag.replace('/tmp/a run', str(tmp_path / 'a run')) for flag in FLAGS]
  done = bash(LAUNCH / 'local.sh', '-n', '3', *flags, PYTHON=str(fake_python(tmp_path)))
  assert done.returncode == 0, done.stderr
  started = [words[2:] for words in stand_ins('fake') if words[:2] == ['-m', 'llm_jax.main']]
  assert all(words[: len(flags)] == flags for words in started)
  added = sorted(words[len(flags) :] for words in started)
  assert [words[1:] for words in added] == [
    ['--num_processes=3', f'--process_id={i}'] for i in range(3)
  ]
  assert {words[0] for words in added} == {'--coordinator=127.0.0.1:4321'}


def test_local_alone_adds_nothing(stand_ins, tmp_path):
  bash(
    LAUNCH / 'local.sh',
    '-n',
    '1',
    '--config=x',
    f'--workdir={tmp_path / "w"}',
    PYTHON=str(fake_python(tmp_path)),
  )
  assert stand_ins('fake')[-1] == [
    '-m',
    'llm_jax.main',
    '--config=x',
    f'--workdir={tmp_path / "w"}',
  ]


def fake_python(folder):
  """Says 4321 where it is asked for a free port."""
  return stand_in(folder / 'fake', folder, NOTE + 'print(4321)\n')
