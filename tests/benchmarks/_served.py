"""What the benchmarks of the service share: the service as a process, and clients of it.

Clients write and read HTTP by hand, so that they cost little beside the service on the same cores.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from pydoc_data.topics import topics

from llm_jax.programs import pretrained

ROOT = pathlib.Path(__file__).parents[2]
KEY = 'a-key-of-the-benchmark'
ENDS = re.compile(r'(?<=[.:;])\s+')


def texts(seed, most):
  """A function that draws pieces of the reference of Python, of at most so many characters each."""
  draw = random.Random(seed)
  pieces = [' '.join(piece.split()) for topic in topics.values() for piece in ENDS.split(topic)]
  pieces = [piece for piece in pieces if 3 < len(piece) and piece.isascii()]
  return lambda: draw.choice(pieces)[:most]


@dataclasses.dataclass
class Running:
  """A service that is ready.

  Attributes:
    port: where it listens.
    process: the process.
    log: what it says.
  """

  port: int
  process: subprocess.Popen
  log: pathlib.Path

  def memory(self):
    """MiB that the process holds."""
    status = pathlib.Path(f'/proc/{self.process.pid}/status').read_text()
    return int(re.search(r'VmRSS:\s+(\d+)', status)[1]) / 1024


@contextlib.contextmanager
def running(folder, *flags, work):
  """The service of a model, ended by SIGTERM."""
  (work / 'keys').write_text(KEY)
  given = [sys.executable, '-m', 'llm_jax.main', '--mode=serve', *model(folder)]
  given += [f'--api_keys={work / "keys"}', '--host=127.0.0.1', '--port=0', *flags]
  with started(given, r'answers at http://127.0.0.1:(\d+)\.', work / 'service.log') as found:
    yield found


def model(folder):
  """The flags that name a run, or a Hugging Face folder."""
  if pretrained.is_foreign(pathlib.Path(folder)):
    return ['--config=configs/hf.py', f'--config.init_from={folder}']
  return [f'--workdir={folder}']


@contextlib.contextmanager
def started(command, ready, log):
  """A process that says in its log where it listens."""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  with log.open('w') as file:
    process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=env)
  try:
    while (found := re.search(ready, log.read_text())) is None:
      if process.poll() is not None:
        raise SystemExit(log.read_text()[-3000:])
      time.sleep(0.1)
    yield Running(int(found[1]), process, log)
  finally:
    process.send_signal(signal.SIGTERM)
    process.wait(60)


class Client:
  """One connection, over which one request after the other goes.

  Args:
    port: of the service.
  """

  def __init__(self, port):
    self._port = port
    self._reader = self._writer = None

  async def ask(self, route, body=None):
    """The status of an answer, and its bytes."""
    if self._writer is None or self._reader.at_eof():  # the service closes what is idle
      self.close()
      self._reader, self._writer = await asyncio.open_connection('127.0.0.1', self._port)
    content = b'' if body is None else json.dumps(body).encode()
    method = 'GET' if body is None else 'POST'
    head = f'{method} {route} HTTP/1.1\r\nHost: it\r\nAuthorization: Bearer {KEY}\r\n'
    head += f'Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n'
    self._writer.write(head.encode() + content)
    try:
      return await self._answer()
    except (asyncio.IncompleteReadError, ConnectionError):
      self.close()
      return 0, b''

  async def _answer(self):
    head = (await self._reader.readuntil(b'\r\n\r\n')).decode('latin-1').lower()
    status = int(head.split(' ', 2)[1])
    last = 'connection: close' in head
    try:
      return status, await self._content(head)
    finally:
      if last:
        self.close()

  async def _content(self, head):
    if (length := re.search(r'content-length: (\d+)', head)) is not None:
      return await self._reader.readexactly(int(length[1]))
    content = b''
    while size := int(await self._reader.readline(), 16):
      content += await self._reader.readexactly(size)
      await self._reader.readline()
    await self._reader.readline()
    return content

  def close(self):
    """Leaves, whatever is on its way."""
    if self._writer is not None:
      self._writer.transport.abort()
    self._reader = self._writer = None


async def closed_loop(port, clients, seconds, request):
  """Clients that each ask again as soon as they are answered: answers a second, the times of all,
  and their statuses.
  """
  times, statuses, until = [], [], time.monotonic() + seconds

  async def go():
    client = Client(port)
    while (began := time.monotonic()) < until:
      status, _ = await client.ask(*request())
      times.append(time.monotonic() - began)
      statuses.append(status)
    client.close()

  began = time.monotonic()
  await asyncio.gather(*(go() for _ in range(clients)))
  return len(times) / (time.monotonic() - began), times, statuses


async def open_loop(port, rate, seconds, request, seed=0):
  """Requests that come as they come, `rate` a second (Poisson): (seconds, status) of each."""
  draw, free, found, tasks = random.Random(seed), [], [], []

  async def one(began):
    client = free.pop() if free else Client(port)
    status, _ = await client.ask(*request())
    found.append((time.monotonic() - began, status))
    free.append(client)

  at, until = time.monotonic(), time.monotonic() + seconds
  while at < until:
    await asyncio.sleep(max(0, at - time.monotonic()))
    tasks.append(asyncio.create_task(one(at)))
    at += draw.expovariate(rate)
  await asyncio.gather(*tasks)
  for client in free:
    client.close()
  return found


def percentiles(times):
  """p50, p95 and p99, in milliseconds."""
  ordered = sorted(times)
  return [1000 * ordered[min(len(ordered) - 1, int(len(ordered) * p))] for p in (0.5, 0.95, 0.99)]
