"""Models on a mesh of four devices: they answer as on one, whole and in company, and nothing is
compiled once they are ready.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
MESHES = {
  'reader': dict(data=2, fsdp=2),
  'writer': dict(data=2, tensor=2),
  'answerer': dict(fsdp=4),
}
TEXTS = ['good text', 'some bad text', 'a' * 100, 'b']
PROMPTS = ['hello', 'a longer prompt than the other one', 'x', 'hello again', 'and one more']


def opened(folder, mesh):
  """A model that is ready, on a mesh."""
  from llm_jax.inference import session
  from llm_jax.modes import serve
  from llm_jax.programs import workdir
  from llm_jax.serving.served import Limits

  config = workdir.read_config(folder)
  whole = dict.fromkeys(('data', 'fsdp', 'sequence', 'tensor'), 1)
  config = dataclasses.replace(config, mesh=dict(config.mesh) | whole | mesh)
  found = session.Session(folder, config, workdir.load_tokenizer(config, folder))
  limits = Limits(rows=4, slots=96, batch=4)
  (model,) = serve.opened(found, folder.name, limits).values()
  model.warm()
  return model


def asked(folders):
  """What the models answer on their meshes, and how many programs were compiled meanwhile."""
  models = {name: opened(pathlib.Path(folders[name]), mesh) for name, mesh in MESHES.items()}
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
  reader = models['reader']
  with concurrent.futures.ThreadPoolExecutor(9) as pool:
    vectors = [reader.embeds.submit([text]) for text in TEXTS]
    classes = [reader.answers.submit([{'text': text}]) for text in TEXTS]
    texts = {
      name: list(pool.map(lambda prompt, name=name: written(models[name], prompt), PROMPTS))
      for name in ('writer', 'answerer')
    }
  found = dict(
    vectors=[one.result()[0].tolist() for one in vectors],
    classes=[one.result()[0]['probabilities'] for one in classes],
    **texts,
    compiled=sum('backend_compile' in name for name in compiled),
  )
  for model in models.values():
    model.close()
  return found


def written(model, prompt):
  """The text behind a prompt."""
  import queue

  from llm_jax.generation.sampling import Sampling

  said, (ids, ends) = queue.Queue(), model.prompt(prompt)
  sampling = Sampling(max_new_tokens=9, temperature=0.0)
  model.write(ids, sampling, ends, (), 0, lambda *given: said.put(given))
  text, reason = '', None
  while reason is None:
    piece, reason, _ = said.get(timeout=120)
    text += piece
  return text


@pytest.mark.slow
def test_models_on_meshes_answer_as_on_one_device(folders, models):
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
  }
  given = [sys.executable, __file__, json.dumps({name: str(one) for name, one in folders.items()})]
  done = subprocess.run(given, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['compiled'] == 0
  session = models['reader'].session
  np.testing.assert_allclose(found['vectors'], session.embed(TEXTS), atol=1e-5)
  classes = [one['probabilities'] for one in session.predict(TEXTS)]
  for one, other in zip(found['classes'], classes, strict=True):
    assert one == pytest.approx(other, abs=1e-5)
  for name in ('writer', 'answerer'):
    assert found[name] == [written(models[name], prompt) for prompt in PROMPTS]


if __name__ == '__main__':
  print(json.dumps(asked(json.loads(sys.argv[1]))))
