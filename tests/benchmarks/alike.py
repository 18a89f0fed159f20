"""Whether the service answers every request as if it were alone, and as the command line does.

    python tests/benchmarks/alike.py [--count=640]

One model for each route, of two steps each, in one service. Requests of all kinds, of one character
to as many as the models take, are asked one after the other; then all of them again, by 64 clients
at once; and the same of `llm_jax.open`, in this process, as the modes of the command line use it.
Alone and in company the answers must be the same to the bit, and nothing is compiled meanwhile; of
the command line they must have the texts, labels and spans, and the numbers up to rounding.
"""

import argparse
import asyncio
import collections
import json
import math
import pathlib
import random
import subprocess
import sys

import _served

import llm_jax

CLIENTS = 64
LONGEST, PROMPT, NEW = 240, 180, 60  # characters, which are tokens here
NEAR = 1e-4
MODELS = ('classify', 'tag', 'qa', 'rerank', 'pair', 'bert_tiny', 'chat')
SMALL = {
  'steps': 2,
  'eval_every': 2,
  'seq_len': 256,
  'batch_size': 4,
  'micro_batches': 1,
  'tokenizer.name': 'byte',
  'checkpoint.every': 2,
  'evaluation.rows': 8,
  'model.layers': 2,
}


def main(argv):
  """Prints what was compared; the exit status is 1 where anything differs."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=640)
  parser.add_argument('--work', type=pathlib.Path, default=pathlib.Path('/tmp/llm_jax_alike'))
  options = parser.parse_args(argv)
  options.work.mkdir(parents=True, exist_ok=True)
  folders = {name: trained(name, options.work) for name in MODELS}
  others = ','.join(f'{name}={folder}' for name, folder in folders.items() if name != MODELS[0])
  draw = requests(random.Random(0))
  asked = [draw() for _ in range(options.count)]
  flags = f'--serve_models={others}', '--serve_slots=256', '--serve_waiting=1024'
  with _served.running(folders[MODELS[0]], *flags, work=options.work) as running:
    alone = asyncio.run(answers(running.port, asked, 1))
    together = asyncio.run(answers(running.port, asked, CLIENTS))
    compiled = asyncio.run(compilations(running.port))
  sessions = {name: llm_jax.open(folder) for name, folder in folders.items()}
  wrong = [*unlike(asked, alone, together), *apart(asked, alone, sessions)]
  if compiled:
    wrong.append(f'{compiled} programs were compiled after the service was ready')
  for line in wrong[:20]:
    print('WRONG:', line)
  sys.exit(bool(wrong))


def trained(name, work):
  """The workdir of a run of two steps."""
  folder = work / name
  if not (folder / 'metrics.jsonl').exists():
    given = [f'--config=configs/{name}.py', f'--workdir={folder}', f'--config.data.cache={work}']
    given += [f'--config.{key}={value}' for key, value in SMALL.items()]
    subprocess.run([sys.executable, '-m', 'llm_jax.main', *given], check=True, cwd=_served.ROOT)
  return folder


def requests(draw):
  """A function that draws a route, a model and what else a body has."""

  def text(most=LONGEST):
    letters = draw.choices('abc def ghi. JKL\n', k=draw.randint(1, most))
    return ''.join(letters).strip() or 'a'

  def writing():
    return {'max_tokens': draw.randint(1, NEW), 'seed': draw.randrange(2**16)}

  makers = {
    '/v1/embeddings': lambda: ('classify', {'input': text()}),
    '/classify': lambda: ('classify', {'inputs': [text()]}),
    '/tag': lambda: ('tag', {'inputs': [text()]}),
    '/qa': lambda: ('qa', {'inputs': [{'question': text(40), 'context': text(180)}]}),
    '/rerank': lambda: (
      'rerank',
      {'inputs': [{'text': text(60), 'passages': [text(120) for _ in range(draw.randint(2, 5))]}]},
    ),
    '/similarity': lambda: ('pair', {'inputs': [[text(110), text(110)]]}),
    '/fill': lambda: ('bert_tiny', {'inputs': [f'{text(120)}[MASK]{text(100)}'], 'top': 3}),
    '/v1/completions': lambda: ('chat', {'prompt': text(PROMPT), **writing()}),
    '/v1/chat/completions': lambda: (
      'chat',
      {'messages': [{'role': 'user', 'content': text(PROMPT - 40)}], **writing()},
    ),
    '/tokenize': lambda: ('chat', {'input': text()}),
  }

  def request():
    route = draw.choice(list(makers))
    model, body = makers[route]()
    return route, {'model': model} | body

  return request


async def answers(port, asked, clients):
  """What each request is answered, by so many clients."""
  found, left = [None] * len(asked), iter(range(len(asked)))

  async def go():
    client = _served.Client(port)
    for number in left:
      status, content = await client.ask(*asked[number])
      found[number] = status, said(json.loads(content))
    client.close()

  await asyncio.gather(*(go() for _ in range(clients)))
  return found


def said(answer):
  """Without what is another in each answer."""
  return {key: value for key, value in answer.items() if key not in ('id', 'created')}


async def compilations(port):
  """Programs that were compiled after the service was ready."""
  client = _served.Client(port)
  _, text = await client.ask('/metrics')
  client.close()
  (line,) = [one for one in text.decode().splitlines() if 'compiled_programs_total ' in one]
  return float(line.split()[-1])


def unlike(asked, alone, together):
  """What differs between requests alone and in company."""
  counts = collections.Counter(route for route, _ in asked)
  for (route, body), one, other in zip(asked, alone, together, strict=True):
    if one[0] != 200 or one != other:
      yield f'{route} {body}: alone {one}, beside others {other}'
      counts[route] -= 1
  print('the same alone and among 64 clients, to the bit:', dict(counts))


def apart(asked, alone, sessions):
  """What differs from the command line."""
  most = 0.0
  for (route, body), (_, answer) in zip(asked, alone, strict=True):
    one, other = leaves(mine(route, answer)), leaves(theirs(route, body, sessions[body['model']]))
    if len(one) != len(other):
      yield f'{route} {body}: {one} and {other}'
      continue
    for x, y in zip(one, other, strict=True):
      if isinstance(x, float) and isinstance(y, float):
        most = max(most, abs(x - y))
        if not math.isclose(x, y, rel_tol=NEAR, abs_tol=NEAR):
          yield f'{route} {body}: {x} and {y}'
      elif x != y:
        yield f'{route} {body}: {x!r} and {y!r}'
  print(f'beside the command line numbers differ by at most {most:.1e}')


def mine(route, answer):
  """What is compared of an answer."""
  if route == '/v1/embeddings':
    return answer['data'][0]['embedding']
  if route == '/v1/completions':
    return answer['choices'][0]['text']
  if route == '/v1/chat/completions':
    return answer['choices'][0]['message']['content']
  return answer['tokens'][0] if route == '/tokenize' else answer['outputs'][0]


def theirs(route, body, session):
  """The same by the command line's own means."""
  if route == '/v1/embeddings':
    return session.embed([body['input']])[0].tolist()
  if route == '/tokenize':
    return session.tokenizer.encode(body['input']).tolist()
  if route == '/fill':
    filled = session.fill(body['inputs'], body['top'])[0]
    return {'text': filled.text, 'masks': filled.masks}
  if 'inputs' in body:
    (one,) = body['inputs']
    return session.predict([tuple(one) if isinstance(one, list) else one])[0]
  numbers = {'max_new_tokens': body['max_tokens'], 'seed': body['seed']}
  if route == '/v1/chat/completions':
    return session.chat(body['messages'], **numbers)
  return session.complete([body['prompt']], **numbers)[0]


def leaves(value):
  """The values of an answer, in their order."""
  if isinstance(value, dict):
    return [leaf for key in sorted(value) for leaf in [key, *leaves(value[key])]]
  if isinstance(value, list | tuple):
    return [leaf for one in value for leaf in leaves(one)]
  return [value]


if __name__ == '__main__':
  main(sys.argv[1:])
