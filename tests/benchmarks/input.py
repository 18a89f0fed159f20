"""Tokens per second that the token cache feeds from one core; and tokenization against bare
SentencePiece, alternating.

    python tests/benchmarks/input.py [--pairs=5] [--mb=4] [--json=FILE]

The standard library of Python, SentencePiece with 8192 ids. Feeding is what the thread of a run
does: rows in shuffled order out of the memory-mapped cache, packed, masked or with targets, stacked
to batches. Tokenization: a part of the text, document by document, by SentencePiece's own `encode`
alone, and by the cache's builder with hashes, checks and ids in the smallest type that holds them.
All in processor seconds of one thread.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import sentencepiece

from llm_jax.core import contracts
from llm_jax.data import cache, cache_writer, encoding, pipeline
from llm_jax.data.sources import stdlib
from llm_jax.data.tokenizers import sentencepiece as tokenizers
from llm_jax.objectives import clm, mlm

ENCODER = encoding.Encoder([contracts.Objective.encode])  # that of both objectives
FEEDS = {  # what is fed: objective, tokens of a row, rows of a batch
  'clm 1024': (clm.Objective, 1024, 16),
  'clm 128': (clm.Objective, 128, 64),
  'mlm 512': (mlm.Objective, 512, 16),
  'mlm 128': (mlm.Objective, 128, 64),
}


def feed(documents, tokenizer, name, tokens=1_000_000):
  """Tokens per second; all positions of rows count, padding included."""
  objective, length, size = FEEDS[name]
  made = objective(tokenizer)
  rows = pipeline.training_rows([documents], made, length, size)
  examples = pipeline.train_examples(rows, [1.0], made, 0)
  load = pipeline._loader(examples, range(size))
  load(0)
  steps = -(-tokens // (size * length))
  began = time.process_time()
  for step in range(steps):
    load(step * size)
  return steps * size * length / (time.process_time() - began)


class Part:
  """The first documents of a source, up to so many bytes."""

  def __init__(self, source, most):
    self.documents, size = [], 0
    for index in range(len(source)):
      if size < most:
        self.documents.append(source[index])
        size += len(self.documents[-1]['text'].encode())

  def __len__(self):
    return len(self.documents)

  def __getitem__(self, index):
    return self.documents[index]


def tokenize(part, tokenizer, model):
  """Tokens per second by SentencePiece alone, and by the builder of the cache."""
  job = cache_writer.Job(part, tokenizer, ENCODER)
  began = time.process_time()
  tokens = sum(len(model.encode(document['text'])) for document in part.documents)
  between = time.process_time()
  chunk = cache_writer.encode(job, 0, len(part))
  ended = time.process_time()
  ids, _ = chunk.arrays['tokens']
  if len(ids) != tokens:
    raise AssertionError(f'{len(ids)} tokens, not {tokens}.')
  return tokens / (between - began), tokens / (ended - between)


def main(argv):
  """Prints two tables, and writes the figures where they are wanted."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--pairs', type=int, default=5)
  parser.add_argument('--mb', type=float, default=4.0, help='text to tokenize each time')
  parser.add_argument('--json')
  options = parser.parse_args(argv)
  source, found = stdlib.Source(), {}
  with tempfile.TemporaryDirectory() as folder:
    texts = lambda: (source[i]['text'] for i in range(len(source)))
    tokenizer = tokenizers.create(
      texts=texts,
      texts_fingerprint=source.fingerprint,
      cache=folder,
      vocab_size=8192,
      sample_bytes=1_000_000,
    )
    tokenizer.save(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, 'tokenizer.model'))
    documents, _ = cache.build(source, tokenizer, ENCODER, folder).split(0.0)
    print(f'{"fed":16} {"million tokens/s":>16}   medians of {options.pairs}')
    for name in FEEDS:
      speeds = [feed(documents, tokenizer, name) for _ in range(options.pairs)]
      found[name] = {'ours': statistics.median(speeds), 'all': speeds}
      print(
        f'{name:16} {statistics.median(speeds) / 1e6:16.2f}   load {os.getloadavg()[0]:.1f}',
        flush=True,
      )
    pairs = [
      tokenize(Part(source, options.mb * 1e6), tokenizer, model) for _ in range(options.pairs)
    ]
  theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
  ratio = statistics.median(b / a for a, b in pairs)
  found['tokenization'] = {'ratio': ratio, 'ours': ours, 'theirs': theirs, 'pairs': pairs}
  print(
    f'{"tokenized":16} {"sentencepiece":>16} {"llm_jax":>9} {"ratio":>6}   million tokens/s, '
    f'medians of {len(pairs)} pairs'
  )
  print(f'{"":16} {theirs / 1e6:16.3f} {ours / 1e6:9.3f} {ratio:6.3f}')
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == '__main__':
  main(sys.argv[1:])
