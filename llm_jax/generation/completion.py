"""Prompts to completions: a decoder continues texts, an encoder-decoder answers them.

Text comes in whole characters: where a character's bytes are spread over several tokens, it waits
for the last of them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from llm_jax.core.contracts import Objective, Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.data import prompted
from llm_jax.generation.decoding import Generator
from llm_jax.generation.sampling import Sampling
from llm_jax.programs.inference import Inference

CONTEXT = 8  # prompt tokens that new ones are decoded with: a space may depend on what precedes it
BROKEN = '\ufffd'  # what bytes that are no character are decoded to

Stream = Callable[[int, str], None]


def template(tokenizer: Tokenizer, causal: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids that stand before and after one text, as the model was trained."""
  if tokenizer.template is not None:
    before, after = tokenizer.template
  else:
    before = (tokenizer.bos_id if causal else tokenizer.cls_id,)
    after = () if causal else (tokenizer.sep_id,)
  return (*prompted.prompt(tokenizer), *before), after


def of(program: Inference, tokenizer: Tokenizer, rows: int) -> 'Completer':
  """What completes prompts with a program's model, so many at once."""
  network, ids = program.network, writing_ids(program, tokenizer)
  begin = () if ids['start'] is None else (ids['start'],)
  asked = program.objective or Objective()
  generator = Generator(
    network.model,
    program.model_infos,
    program.layout,
    network.adapter,
    begin,
    asked.opens_prompts,
  )
  return Completer(generator, tokenizer, rows, ids, asked.ends, asked.prompt_end)


def writing_ids(program: Inference, tokenizer: Tokenizer) -> dict[str, int | None]:
  """The ids that an encoder-decoder begins with (`start`), and those that its first and its last
  possible new token are (`forced_bos`, `forced_eos`; None for any); of a decoder None each.
  """
  names = 'start', 'forced_bos', 'forced_eos'
  if not program.network.model.reads_source():
    return dict.fromkeys(names)
  said = {name: getattr(program.objective, name, None) for name in names}
  return {'start': tokenizer.bos_id} | {k: v for k, v in said.items() if v is not None}


class Completer:
  """Continues prompts with a decoder.

  Args:
    generator: of the decoder.
    tokenizer: that of the model.
    rows: prompts that are run at once.
    ids: what `writing_ids` says of an encoder-decoder.
    ends: further ids that end a completion, beside EOS.
    after: ids that stand after a prompt of a decoder.

  Attributes:
    ends: the ids that end a completion.
  """

  def __init__(
    self,
    generator: Generator,
    tokenizer: Tokenizer,
    rows: int = 8,
    ids: Mapping[str, int | None] | None = None,
    ends: Sequence[int] = (),
    after: Sequence[int] = (),
  ):
    self.generator, self.rows = generator, rows
    self.ends = tuple(dict.fromkeys([*tokenizer.eos_ids, *ends]))
    self._tokenizer, self._ids_said, self._after = tokenizer, ids or {}, after

  def __call__(
    self,
    weights: PyTree,
    prompts: Sequence[str],
    sampling: Sampling,
    stop: Sequence[str] = (),
    stream: Stream | None = None,
    numbers: Sequence[int] | None = None,
  ) -> list[str]:
    """The completion of each prompt, or `num_return_sequences` of them one after the other; the
    prompts themselves are left out.

    A prompt stands after the ids that the tokenizer's template has before a text, else after BOS;
    a source between those around a text, else before EOS. A completion ends with EOS, or one of
    `ends`.

    Args:
      weights: as `Generator.weights` makes them.
      prompts: texts; an empty one asks for any text.
      sampling: how tokens are chosen.
      stop: strings before which a completion ends, wherever tokens begin and end.
      stream: called with the number of a completion and its next piece, as soon as that is certain.
      numbers: of the prompts, on which what is drawn depends; counted from 0 by default.

    Raises:
      ValueError: an empty stop string; whatever `Generator.tokens` raises.
    """
    ids = [self.ids(text) for text in prompts]
    return self.from_ids(weights, ids, sampling, stop, stream, numbers)

  def check(self, prompt: str, sampling: Sampling) -> None:
    """Raises ValueError for a prompt that is too long."""
    self.generator.check([self.ids(prompt)], [self.decided(sampling)])

  def decided(self, sampling: Sampling) -> Sampling:
    """With what the model says of its first and last token, where the sampling does not."""
    said = {name: self._ids_said.get(name) for name in ('forced_bos', 'forced_eos')}
    left_open = {name: one for name, one in said.items() if getattr(sampling, name) is None}
    return dataclasses.replace(sampling, **left_open)

  def ids(self, prompt: str) -> list[int]:
    """What the model reads of a prompt, with all that stands around it."""
    if self.generator.reads_source:
      before, after = self._tokenizer.template or ((), (self._tokenizer.eos_id,))
      return [*before, *self._tokenizer.encode(prompt), *after]
    before = template(self._tokenizer, causal=True)[0]
    ids = [*before, *self._tokenizer.encode(prompt), *self._after]
    return ids or [self._tokenizer.bos_id]

  def from_ids(
    self,
    weights: PyTree,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Sequence[str] = (),
    stream: Stream | None = None,
    numbers: Sequence[int] | None = None,
  ) -> list[str]:
    """The same for prompts that are ids already."""
    if '' in stop:
      raise ValueError('an empty stop string would end every text before it begins; leave it out.')
    sampling = self.decided(sampling)
    self.generator.check(prompts, [sampling] * len(prompts))  # all, before the first is continued
    stream = stream or (lambda *_: None)
    numbers, filled = range(len(prompts)) if numbers is None else numbers, numbers is not None
    each = sampling.num_return_sequences
    if sampling.beams == 1 and each > 1:  # as many draws, each in a row of its own
      prompts = [prompt for prompt in prompts for _ in range(each)]
      numbers = [number * each + i for number in numbers for i in range(each)]
      each = 1
    texts: list[str] = []
    for first in range(0, len(prompts), self.rows):
      batch = list(range(first, min(first + self.rows, len(prompts))))
      begun = [() if self.generator.reads_source else prompts[i] for i in batch]
      known = [prompt for prompt in begun for _ in range(each)]
      completions = [Completion(self._tokenizer, prompt, stop) for prompt in known]
      if first or filled:
        # The last batch is filled up with its own last row: another number of rows would have to
        # be compiled.
        batch += batch[-1:] * (self.rows - len(batch))
      columns = self.generator.tokens(
        weights,
        [prompts[i] for i in batch],
        sampling,
        self.ends,
        rows=[numbers[i] for i in batch],
      )
      _write(columns, dict(enumerate(completions, len(texts))), stream)
      texts += [completion.text for completion in completions]
    return texts


def _write(
  columns: Iterator[np.ndarray], completions: dict[int, 'Completion'], stream: Stream
) -> None:
  """Gives each completion its tokens, until all are over."""
  for ids in columns:
    for (number, completion), token in zip(completions.items(), ids, strict=False):
      if completion.over:
        continue
      piece = completion.add(int(token)) if token >= 0 else completion.finish()
      if piece:
        stream(number, piece)
    if all(completion.over for completion in completions.values()):
      break
  for number, completion in completions.items():
    piece = completion.finish()
    if piece:
      stream(number, piece)


class Completion:
  """A text that grows: whole characters only, and nothing that may yet become a stop string.

  Args:
    tokenizer: spells the tokens.
    prompt: ids that stand before it.
    stop: strings before which it ends.

  Attributes:
    text: as far as it is known.
    over: whether a stop string came, or `finish` was called.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
    self._tokenizer, self._stop = tokenizer, stop
    self._ids = [int(token) for token in prompt[-CONTEXT:]]
    # Tokens that decoding begins with, and those whose text is known.
    self._from, self._read = 0, len(self._ids)
    self.text, self._given, self.over = '', 0, False

  def add(self, token: int) -> str:
    """Takes a token; returns what is certain now and was not before."""
    self._ids.append(token)
    new = self._decoded()
    if not new.endswith(BROKEN):
      self._take(new)
    return self._certain()

  def finish(self) -> str:
    """Ends the text; returns what was held back. Bytes that are no whole character are dropped."""
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
    found = [self.text.find(stop, self._given) for stop in self._stop]
    found = [offset for offset in found if offset >= 0]
    if found:
      self.text, self.over = self.text[: min(found)], True

  def _certain(self) -> str:
    """The new part of the text but for an end with which a stop string begins."""
    held = 0 if self.over else self._held()
    end = max(len(self.text) - held, self._given)
    piece, self._given = self.text[self._given : end], end
    return piece

  def _held(self) -> int:
    """How many characters at the end may be the beginning of a stop string."""
    lengths = [
      length
      for stop in self._stop
      for length in range(1, len(stop))
      if self.text.endswith(stop[:length])
    ]
    return max(lengths, default=0)
