"""The manifest and the image of the service: what refers to what, and the flags that they give."""

import pathlib
import re
import shlex

import pytest
import yaml
from absl import flags

from llm_jax import main  # noqa: F401  the flags of every mode
from llm_jax.modes import serve
from llm_jax.serving import app as apps

ROOT = pathlib.Path(__file__).parents[2]
MANIFEST = (ROOT / 'launch' / 'serve.yaml').read_text()
OBJECTS = {found['kind']: found for found in yaml.safe_load_all(MANIFEST)}
POD = OBJECTS['Deployment']['spec']['template']
(CONTAINER,) = POD['spec']['containers']
DOCKERFILE = (ROOT / 'launch' / 'Dockerfile').read_text()
README = (ROOT / 'launch' / 'README.md').read_text()


def instructions():
  """The instructions of the Dockerfile, each with what stands behind it."""
  lines = re.sub(r'^ *#.*\n', '', DOCKERFILE, flags=re.MULTILINE).replace('\\\n', ' ').splitlines()
  return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def of(name):
  return [rest for word, rest in instructions() if word == name]


def given(words):
  return dict(word.removeprefix('--').split('=', 1) for word in words if '=' in word)


# ---- Kubernetes


def test_the_objects_are_of_versions_that_kubernetes_has():
  assert {kind: one['apiVersion'] for kind, one in OBJECTS.items()} == {
    'Deployment': 'apps/v1',
    'Service': 'v1',
    'HorizontalPodAutoscaler': 'autoscaling/v2',
    'PodDisruptionBudget': 'policy/v1',
  }
  for one in OBJECTS.values():
    assert re.fullmatch(r'[a-z][a-z0-9-]{0,62}', one['metadata']['name'])
    assert one.keys() <= {'apiVersion', 'kind', 'metadata', 'spec'}


def test_all_speak_of_the_same_pods():
  known = POD['metadata']['labels']
  assert OBJECTS['Deployment']['spec']['selector']['matchLabels'] == known
  assert OBJECTS['Service']['spec']['selector'] == known
  assert OBJECTS['PodDisruptionBudget']['spec']['selector']['matchLabels'] == known
  target = OBJECTS['HorizontalPodAutoscaler']['spec']['scaleTargetRef']
  deployment = OBJECTS['Deployment']
  assert target == {
    'apiVersion': deployment['apiVersion'],
    'kind': 'Deployment',
    'name': deployment['metadata']['name'],
  }
  assert 'replicas' not in deployment['spec']  # it would undo what the autoscaler did


def test_as_many_pods_stay_as_the_budget_wants():
  spec = OBJECTS['HorizontalPodAutoscaler']['spec']
  least = OBJECTS['PodDisruptionBudget']['spec']['minAvailable']
  assert least < spec['minReplicas'] < spec['maxReplicas']  # else no node could be emptied
  (metric,) = spec['metrics']
  assert metric['type'] == 'Pods' and metric['pods']['metric']['name'] == 'llm_jax_waiting'
  assert float(metric['pods']['target']['averageValue']) < flags.FLAGS['serve_waiting'].default


def test_probes_ask_the_routes_that_need_no_key():
  (port,) = CONTAINER['ports']
  assert port['containerPort'] == int(given(CONTAINER['args'])['port'])
  assert OBJECTS['Service']['spec']['ports'][0]['targetPort'] == port['name']
  asked = {name: CONTAINER[f'{name}Probe']['httpGet'] for name in ('startup', 'readiness')}
  asked['liveness'] = CONTAINER['livenessProbe']['httpGet']
  assert {name: probe['path'] for name, probe in asked.items()} == {
    'startup': '/ready',
    'readiness': '/ready',
    'liveness': '/health',
  }
  for probe in asked.values():
    assert probe['path'] in apps.OPEN and probe['port'] == port['name']
  startup = CONTAINER['startupProbe']
  assert startup['periodSeconds'] * startup['failureThreshold'] >= 600


def test_a_pod_has_the_time_to_answer_what_it_was_asked():
  waits = CONTAINER['lifecycle']['preStop']['sleep']['seconds']
  assert POD['spec']['terminationGracePeriodSeconds'] >= waits + serve.DRAIN + 10


def test_a_pod_may_do_nothing_but_answer():
  spec, own = POD['spec'], CONTAINER['securityContext']
  assert spec['securityContext']['runAsNonRoot'] and spec['securityContext']['runAsUser'] > 0
  assert own['readOnlyRootFilesystem'] and not own['allowPrivilegeEscalation']
  assert own['capabilities']['drop'] == ['ALL'] and not spec['automountServiceAccountToken']
  needed, most = (CONTAINER['resources'][name] for name in ('requests', 'limits'))
  assert needed['memory'] == most['memory'] and 'cpu' in needed
  assert ':latest' not in CONTAINER['image']


def test_everything_that_is_read_is_mounted_and_only_tmp_is_written_to():
  mounts = {mount['name']: mount for mount in CONTAINER['volumeMounts']}
  volumes = {volume['name']: volume for volume in POD['spec']['volumes']}
  assert mounts.keys() == volumes.keys()
  said = given(CONTAINER['args'])
  assert pathlib.Path(said['workdir']).is_relative_to(mounts['data']['mountPath'])
  assert pathlib.Path(said['api_keys']).parent == pathlib.Path(mounts['keys']['mountPath'])
  assert volumes['keys']['secret']['secretName'] in MANIFEST.split('apiVersion')[0]
  written = {name for name, mount in mounts.items() if not mount.get('readOnly')}
  assert written == {'tmp'} and 'emptyDir' in volumes['tmp']
  for variable in CONTAINER['env']:
    assert pathlib.Path(variable['value']).is_relative_to(mounts['tmp']['mountPath'])


# ---- the image


def test_what_is_copied_is_there_and_all_that_is_installed_is_copied():
  sources = [word for rest in of('COPY') for word in shlex.split(rest)[:-1]]
  assert all((ROOT / source).exists() for source in sources)
  assert {'setup.py', 'pyproject.toml', 'README.md', 'llm_jax', 'configs'} <= set(sources)


def test_the_image_is_small_pinned_and_runs_as_nobody_in_particular():
  (base,) = of('FROM')
  assert re.fullmatch(r'python:3\.\d+-slim', base)
  (user,) = of('USER')
  assert user.split(':') == [str(POD['spec']['securityContext']['runAsUser'])] * 2
  assert f'--uid {user.split(":")[0]} ' in DOCKERFILE
  assert not of('HEALTHCHECK') and not of('ADD')
  names = [word for word, _ in instructions()]
  assert names.index('USER') > max(i for i, name in enumerate(names) if name == 'RUN')


def test_every_extra_is_one_that_the_package_has():
  (default,) = of('ARG')
  named = set(default.split('=')[1].split(',')) | {'cuda'}
  extras = re.findall(r"^    '(\w+)': \[", (ROOT / 'setup.py').read_text(), re.MULTILINE)
  assert {'serve', 'trace'} <= named <= set(extras)


@pytest.mark.parametrize(
  'words',
  [yaml.safe_load(of('ENTRYPOINT')[0])[1:], CONTAINER['args']],
  ids=['Dockerfile', 'serve.yaml'],
)
def test_every_flag_is_one_that_the_program_has(words):
  for name in given(words):
    assert name in flags.FLAGS, name


def test_the_entrypoint_is_the_command_of_the_package():
  command = yaml.safe_load(of('ENTRYPOINT')[0])
  assert f"{command[0]} = llm_jax.main:cli'" in (ROOT / 'setup.py').read_text()
  assert given(command[1:]) == {'mode': 'serve', 'host': '0.0.0.0'}
  assert of('EXPOSE') == [str(CONTAINER['ports'][0]['containerPort'])]


# ---- what the documentation says


def test_the_files_that_prometheus_is_given_can_be_read():
  found = [yaml.safe_load(text) for text in re.findall(r'```yaml\n(.*?)```', README, re.DOTALL)]
  scraped, adapted = found
  (job,) = scraped['scrape_configs']
  assert job['job_name'] == 'llm_jax' and scraped['rule_files'] == ['alerts.yml']
  assert job.get('metrics_path', '/metrics') == '/metrics' and job['authorization']
  (rule,) = adapted['rules']
  assert rule['seriesQuery'].startswith('llm_jax_waiting')
  assert 'llm_jax_waiting' == rule['name']['as']
