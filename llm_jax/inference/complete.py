"""Texts in, texts out: a decoder goes on from prompts, an encoder fills in what is masked.

Text comes in whole characters: where a character's bytes are spread over several tokens, it waits
  for the last of them.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.core.contracts import Documents, Tokenizer
from llm_jax.inference import use
from llm_jax.inference.decoding import Generator, Sampling
from llm_jax.parallel import hosts, sharding
from llm_jax.programs import build
from llm_jax.programs.build import Program

MASK = '[MASK]'
# tokens of the prompt that new ones are decoded with: a space may depend on what stands before it
CONTEXT = 8
BROKEN = '\ufffd'  # what bytes that are no character are decoded to
TILE = 16  # rows of an encoder are as long as the longest text, rounded up to this

SAMPLE_TOKENS, SAMPLE_PROMPT = (
  48,
  8,
)  # of what a decoder in training shows: new tokens, and given ones
SAMPLE_TEMPERATURE = 0.8

Stream = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True)
class Filled:
  """A text whose masks are filled in.

  Attributes:
    text: with the most likely token at each mask, as the tokenizer spells it.
    masks: for each mask, in order, the most likely tokens and their probabilities; each mask is
      seen by itself.
  """

  text: str
  masks: tuple[tuple[tuple[str, float], ...], ...]


class Completer:
  """Goes on from prompts with a decoder.

  Args:
    generator: of the decoder.
    tokenizer: that of the model.
    rows: prompts that are run at once.
  """

  def __init__(self, generator: Generator, tokenizer: Tokenizer, rows: int = 8):
    self.generator, self._tokenizer, self._rows = generator, tokenizer, rows

  def __call__(
    self,
    weights: Any,
    texts: Sequence[str],
    sampling: Sampling,
    stop: Sequence[str] = (),
    stream: Stream | None = None,
  ) -> list[str]:
    """What comes after each text; the texts themselves are left out.

    A text stands after the ids that the tokenizer's template has before one, else after BOS; it
    ends with EOS.

    Args:
      weights: as `Generator.weights` makes them.
      texts: the prompts; an empty one asks for any text.
      sampling: how tokens are chosen.
      stop: strings before which a text ends, wherever tokens begin and end.
      stream: called with the number of a text and the next piece of what comes after it, as soon as
        that is certain.

    Raises:
      ValueError: an empty stop string; whatever `Generator.tokens` raises.
    """
    before = use.template(self._tokenizer, causal=True)[0]
    prompts = [
      [*before, *self._tokenizer.encode(text)] or [self._tokenizer.bos_id] for text in texts
    ]
    return self.continued(weights, prompts, sampling, stop, stream)

  def continued(
    self,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Sequence[str] = (),
    stream: Stream | None = None,
  ) -> list[str]:
    """The same from ids."""
    if '' in stop:
      raise ValueError('an empty stop string would end every text before it begins; leave it out.')
    rows = [_Text(self._tokenizer, prompt, stop) for prompt in prompts]
    for first in range(0, len(rows), self._rows):
      numbers = list(range(first, min(first + self._rows, len(rows))))
      # the last batch is filled up with its own last row: another number of rows would have to be
      # compiled
      if first:
        numbers += numbers[-1:] * (self._rows - len(numbers))
      columns = self.generator.tokens(
        weights, [prompts[i] for i in numbers], sampling, [self._tokenizer.eos_id], rows=numbers
      )
      _write(columns, {i: rows[i] for i in numbers}, stream or (lambda *_: None))
    return [row.text for row in rows]


def _write(columns: Iterator[np.ndarray], rows: dict[int, '_Text'], stream: Stream) -> None:
  """Gives each row its tokens, until all are over."""
  for ids in columns:
    for (number, row), token in zip(rows.items(), ids, strict=False):
      if not row.over and (piece := row.add(int(token)) if token >= 0 else row.finish()):
        stream(number, piece)
    if all(row.over for row in rows.values()):
      break
  for number, row in rows.items():
    if piece := row.finish():
      stream(number, piece)


class _Text:
  """The text of a row that grows: whole characters only, and nothing that may yet turn out to be a
  stop string.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
    self._tokenizer, self._stop = tokenizer, stop
    self._ids = [int(token) for token in prompt[-CONTEXT:]]
    self._from, self._read = (
      0,
      len(self._ids),
    )  # tokens that decoding begins with, and those whose text is known
    self.text, self._given, self.over = '', 0, False

  def add(self, token: int) -> str:
    """Takes a token; returns what is certain now and was not before."""
    self._ids.append(token)
    new = self._decoded()
    if not new.endswith(BROKEN):
      self._take(new)
    return self._certain()

  def finish(self) -> str:
    """Ends the text; returns what was held back. Bytes that are no whole character are left out."""
    if not self.over:
      self._take(self._decoded().rstrip(BROKEN))
      self.over = True
    piece, self._given = self.text[self._given :], len(self.text)
    return piece

  def _decoded(self) -> str:
    known = self._tokenizer.decode(self._ids[self._from : self._read])
    return self._tokenizer.decode(self._ids[self._from :])[len(known) :]

  def _take(self, new: str) -> None:
    self._from, self._read = self._read, len(self._ids)
    self.text += new
    found = [place for stop in self._stop if (place := self.text.find(stop, self._given)) >= 0]
    if found:
      self.text, self.over = self.text[: min(found)], True

  def _certain(self) -> str:
    """The new part of the text but for an end with which a stop string begins."""
    held = 0
    if not self.over:
      held = max(
        (n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
        default=0,
      )
    end = max(len(self.text) - held, self._given)
    piece, self._given = self.text[self._given : end], end
    return piece


def run(
  opened: use.Opened,
  prompts: Sequence[str] | None,
  source: pathlib.Path | None,
  target: pathlib.Path | None,
  sampling: Sampling,
  stop: Sequence[str] = (),
) -> None:
  """`--mode=generate`: prints what a model makes of each prompt, as it comes where there is but
  one, or writes it to a file.

  Args:
    opened: a run or a Hugging Face folder.
    prompts: the texts to go on from, or, for an encoder, to fill in; None: they stand in `source`.
    source: .txt, a prompt a line; or .jsonl, in the field `config.data.text` ('text').
    target: .jsonl, {"prompt": ..., "text": ...} a line, for an encoder also "masks"; None to print.
    sampling: how tokens are chosen.
    stop: strings before which a text ends.

  Raises:
    ValueError: prompts in both places or in none, files that cannot be, whatever `complete` or
      `fill` raises.
  """
  prompts = _prompts(opened, prompts, source, target)
  devices = jax.device_count()
  config = dataclasses.replace(
    opened.config,
    micro_batches=1,
    batch_size=min(opened.config.batch_size, -(-len(prompts) // devices) * devices),
  )
  program = build.outline(config, jax.devices(), opened.tokenizer)
  params = use.load_params(program, opened.origin)
  if not program.network.model.causal:
    answers = [
      {'text': filled.text, 'masks': filled.masks}
      for filled in fill(program, params, opened.tokenizer, prompts)
    ]
  else:
    live = target is None and len(prompts) == 1 and hosts.primary()
    stream = _terminal(prompts[0]) if live else None
    answers = [
      {'text': text}
      for text in complete(program, params, opened.tokenizer, prompts, sampling, stop, stream)
    ]
    if live:
      print('' if answers[0]['text'] else prompts[0])
      return
  if hosts.primary():
    _give(prompts, answers, target)


def complete(
  program: Program,
  params: Any,
  tokenizer: Tokenizer,
  texts: Sequence[str],
  sampling: Sampling,
  stop: Sequence[str] = (),
  stream: Stream | None = None,
) -> list[str]:
  """What a program's decoder writes after each text (`Completer`); `config.batch_size` texts are
  run at once.

  All processes call it with the same texts, and get the same answers.

  Args:
    program: of a decoder.
    params: its parameters, those of the heads among them or not.
    tokenizer: that of the model.
    texts: the prompts.
    sampling: how tokens are chosen.
    stop: strings before which a text ends.
    stream: called with the number of a text and the next piece of what comes after it.
  """
  generator = Generator(program.network.model, program.layout)
  completer = Completer(generator, tokenizer, program.config.batch_size)
  return completer(generator.weights(params['model']), texts, sampling, stop, stream)


class Samples:
  """What a decoder that is being trained writes: first after nothing, then after the beginnings of
  documents.

  Args:
    program: trains the decoder.
    tokenizer: its tokenizer.
    documents: where the beginnings come from.
    count: how many samples.
  """

  def __init__(
    self, program: Program, tokenizer: Tokenizer, documents: Sequence[Documents], count: int
  ):
    model, self._tokenizer, self._seed = program.network.model, tokenizer, program.config.seed
    self._completer = Completer(Generator(model, program.layout), tokenizer, rows=count)
    begin = min(SAMPLE_PROMPT, model.max_len // 4)
    known = (
      part.text(i, 0, begin) for part in documents for i in range(len(part)) if part.lengths[i]
    )
    self._beginnings = [np.zeros(0, np.int32), *itertools.islice(known, count - 1)]
    self._tokens = min(SAMPLE_TOKENS, model.max_len - begin - 1)

  def __call__(self, params: Any) -> list[tuple[str, str]]:
    """Beginnings, and what comes after them, the same each time; all processes call it, and get the
    same.
    """
    sampling = Sampling(
      max_new_tokens=self._tokens, temperature=SAMPLE_TEMPERATURE, seed=self._seed
    )
    prompts = [[self._tokenizer.bos_id, *ids] for ids in self._beginnings]
    texts = self._completer.continued(
      self._completer.generator.weights(params['model']), prompts, sampling
    )
    return [
      (self._tokenizer.decode(ids), text) for ids, text in zip(self._beginnings, texts, strict=True)
    ]


def fill(
  program: Program, params: Any, tokenizer: Tokenizer, texts: Sequence[str], top: int = 5
) -> list[Filled]:
  """Fills in what is masked in each text, with a program's encoder and its masked-LM head.

  A mask is written as the tokenizer writes it, or as [MASK].

  Args:
    program: of an encoder whose objective has the head `mlm`.
    params: its parameters.
    tokenizer: that of the model.
    texts: with a mask each, or several.
    top: how many candidates a mask gets.

  Raises:
    ValueError: no such head, a text without a mask, one longer than the model takes.
  """
  if 'mlm' not in program.network.heads:
    raise ValueError(
      'this model has no masked-LM head (heads_mlm), so it cannot fill in what is masked; open one '
      'that has.'
    )
  if tokenizer.mask_id is None:
    raise ValueError(
      'this tokenizer has no mask token; an encoder that was trained by masking has one.'
    )
  rows = [_masked(text, tokenizer, program.network.model.max_len) for text in texts]
  run = jax.jit(functools.partial(_candidates, program, top=min(top, tokenizer.vocab_size)))
  filled = []
  for first in range(0, len(rows), program.config.batch_size):
    part = rows[first : first + program.config.batch_size]
    p_BMC, ids_BMC = run(params, _batch(program, part, tokenizer.mask_id))
    filled += [
      _told(row, tokenizer, *found)
      for row, *found in zip(part, np.asarray(p_BMC), np.asarray(ids_BMC), strict=False)
    ]
  return filled


def _masked(text: str, tokenizer: Tokenizer, max_len: int) -> np.ndarray:
  """The ids of a text with what stands around it, at least one of them the mask's."""
  before, after = use.template(tokenizer, causal=False)
  ids = tokenizer.encode(text, special=True)
  if (
    tokenizer.mask_id not in ids
  ):  # its own name for a mask is another one: <mask>, which takes the space before it along
    parts = [tokenizer.encode(part.removesuffix(' '), special=True) for part in text.split(MASK)]
    ids = functools.reduce(
      lambda left, right: np.concatenate([left, [tokenizer.mask_id], right]), parts
    )
  if tokenizer.mask_id not in ids:
    raise ValueError(f'{text!r} has no {MASK}; write one where a word is to be filled in.')
  ids = np.concatenate([before, ids, after]).astype(np.int32)
  if len(ids) > max_len:
    raise ValueError(
      f'{text[:40]!r}... has {len(ids)} tokens, and the model takes max_len={max_len}; shorten the '
      'text.'
    )
  return ids


def _batch(program: Program, rows: Sequence[np.ndarray], mask_id: int) -> dict[str, jax.Array]:
  """Rows and the places of their masks, filled up to a whole batch."""
  rounded = lambda n: -(-n // TILE) * TILE
  T = min(rounded(max(map(len, rows))), program.network.model.max_len)
  places = [np.flatnonzero(row == mask_id) for row in rows]
  M, B = 1 << (max(map(len, places)) - 1).bit_length(), program.config.batch_size
  batch = {name: np.zeros((B, T), np.int32) for name in ('tokens', 'segments')} | {
    'places': np.zeros((B, M), np.int32)
  }
  for i, (row, masks) in enumerate(zip(rows, places, strict=True)):
    batch['tokens'][i, : len(row)], batch['segments'][i, : len(row)] = row, 1
    batch['places'][i, : len(masks)] = masks
  by_row = sharding.batch_sharding(program.mesh)
  return {
    name: jax.make_array_from_callback(x.shape, by_row, x.__getitem__) for name, x in batch.items()
  }


def _candidates(
  program: Program, params: Any, batch: dict[str, jax.Array], *, top: int
) -> tuple[jax.Array, jax.Array]:
  """Probabilities and ids of the most likely tokens at each mask, [B, M, top] each, whole on each
  device.
  """

  def logits(net):
    x_BMD, bias_V = net.heads['mlm'](
      net.hidden({name: batch[name] for name in ('tokens', 'segments')}, batch['places'])
    )
    return net.model.logits(x_BMD) + bias_V[None, None]

  with sharding.use(program.layout):
    logits_BMV = program.network.apply({'params': params}, method=logits)
    found = jax.lax.top_k(jax.nn.softmax(sharding.constrain(logits_BMV, 'batch', None, None)), top)
    return tuple(sharding.constrain(x, None, None, None) for x in found)


def _told(row: np.ndarray, tokenizer: Tokenizer, p_MC: np.ndarray, ids_MC: np.ndarray) -> Filled:
  places = np.flatnonzero(row == tokenizer.mask_id)
  whole = row.copy()
  whole[places] = ids_MC[: len(places), 0]
  masks = tuple(
    tuple((tokenizer.decode([token]).strip(), float(p)) for token, p in zip(ids, ps, strict=True))
    for ids, ps in zip(ids_MC[: len(places)], p_MC[: len(places)], strict=True)
  )
  return Filled(tokenizer.decode(whole), masks)


def _terminal(prompt: str) -> Stream:
  """Prints what comes, after the prompt."""
  begun = []

  def show(_: int, piece: str) -> None:
    print(piece if begun else prompt + piece, end='', flush=True)
    begun.append(True)

  return show


def _prompts(
  opened: use.Opened,
  prompts: Sequence[str] | None,
  source: pathlib.Path | None,
  target: pathlib.Path | None,
) -> list[str]:
  if (prompts is None) == (source is None):
    raise ValueError("--mode=generate needs either --prompt='...' or --input=prompts.txt.")
  if target is not None and (
    target.suffix != '.jsonl' or target.is_dir() or not target.absolute().parent.is_dir()
  ):
    raise ValueError(f'--output={target} must be a .jsonl file in a folder that exists.')
  if prompts is not None:
    return list(prompts)
  documents = use.texts(source, opened.config.data.get('text') or 'text')
  return [documents[i]['text'] for i in range(len(documents))]


def _give(
  prompts: Sequence[str], answers: Sequence[dict[str, Any]], target: pathlib.Path | None
) -> None:
  """Prints prompts and answers, or writes them, whole or not at all."""
  if target is not None:
    partial = target.with_name(f'{target.name}.partial')
    lines = (
      json.dumps({'prompt': prompt} | answer, ensure_ascii=False)
      for prompt, answer in zip(prompts, answers, strict=True)
    )
    partial.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
    partial.rename(target)
    return
  for prompt, answer in zip(prompts, answers, strict=True):
    print(answer['text'] if 'masks' in answer else prompt + answer['text'])
    for candidates in answer.get('masks', ()):
      print('  ' + '  '.join(f'{token} {p:.3f}' for token, p in candidates))
