"""Conversations as text: the Jinja template of a folder, or one of ours, in a sandbox; and which
characters of the text an assistant says.

A template is given what `transformers` gives it: `messages`, `add_generation_prompt`, `bos_token`
and the other special tokens, `raise_exception`, the filter `tojson`, and `{% generation %}` around
what an assistant says; not `strftime_now`, by which a conversation would be another one every day.
"""

import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from llm_jax.core.contracts import Tokenizer
from llm_jax.data.conversations import Message

# Works with the special tokens that every tokenizer has.
PLAIN = (
  '{{ bos_token }}{% for message in messages %}<{{ message.role }}>\n{{ message.content }}'
  "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
  '{% if add_generation_prompt %}<assistant>\n{% endif %}'
)
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
  "'<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A question and its answer and nothing else: translation, summaries.
BARE = (
  '{{ bos_token }}{% for message in messages %}{{ message.content }}'
  "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)
KNOWN = {'plain': PLAIN, 'chatml': CHATML, 'bare': BARE}
STEPS = 1_000_000  # lines that a template may run through when it is tried
_BEGIN, _END = '\ue0f1\ue0f3', '\ue0f2\ue0f3'  # around what an assistant says, by marks
_PROBE = (
  {'role': 'user', 'content': 'abc'},
  {'role': 'assistant', 'content': 'xyz'},
)


class Rendered(NamedTuple):
  """A conversation as text.

  Attributes:
    text: all of it.
    spans: begin and end of what the assistant says in each of its turns, in characters.
  """

  text: str
  spans: tuple[tuple[int, int], ...]


class Encoded(NamedTuple):
  """A conversation in ids.

  Attributes:
    tokens_T: int32.
    learned_T: 1 for what the assistant says, the token that ends it included; int32.
    ends_N: after how many tokens each of its turns is over, int32.
  """

  tokens_T: np.ndarray
  learned_T: np.ndarray
  ends_N: np.ndarray


def text(given: str | None) -> str:
  """The template that an option means: a name of `KNOWN`, a file, or a template itself; None: ours.

  Raises:
    ValueError: nothing of that.
  """
  if given is None:
    return PLAIN
  if given in KNOWN:
    return KNOWN[given]
  if '{' in given:
    return given
  path = pathlib.Path(given).expanduser()
  if not path.is_file():
    raise ValueError(
      f'objective.template={given!r} is no file, and none of {", ".join(KNOWN)}; or give a Jinja '
      'template itself.'
    )
  return path.read_text(encoding='utf-8')


@functools.lru_cache(maxsize=8)
def of(source: str, tokenizer: Tokenizer) -> 'Template':
  """A template for a tokenizer, made once in a process."""
  return Template(source, tokenizer)


class Template:
  """A template for a tokenizer.

  Args:
    source: in Jinja.
    tokenizer: names the special tokens.

  Raises:
    ValueError: a template that cannot be read, that fails on one turn, or does not come to an end.
    ImportError: Jinja2 is not installed.
  """

  def __init__(self, source: str, tokenizer: Tokenizer):
    self.source, self.tokenizer = source, tokenizer
    self._compiled = _compiled(source)
    with _limited():
      whole = self._call(_PROBE)
    self._marked = _BEGIN in whole
    if 'xyz' not in whole or 'abc' not in whole:
      raise ValueError('the chat template leaves out what is said in a conversation.')
    tried = self.render(_PROBE)
    if not tried.spans or 'xyz' not in tried.text[slice(*tried.spans[0])]:
      raise ValueError('the chat template marks something else than what the assistant says.')
    self._puts_end = True
    self._puts_end = self._ends(tried)
    self._warn_of_words(tried)

  def render(self, messages: Sequence[Message]) -> Rendered:
    """A conversation, and where the assistant speaks: between `{% generation %}` marks where the
    template has them, else what a turn adds to the text before it.

    Raises:
      ValueError: the template fails, or renders earlier turns otherwise where others follow.
    """
    if self._marked:
      return _between_marks(self._call(messages))
    whole, spans = self._call(messages), []
    for number, message in enumerate(messages):
      if message['role'] != 'assistant':
        continue
      before = self.prompt(messages[:number])
      after = whole if number + 1 == len(messages) else self._call(messages[: number + 1])
      if not (whole.startswith(before) and whole.startswith(after)) or len(after) <= len(before):
        raise ValueError(
          f'the chat template renders the messages before number {number + 1} otherwise where it '
          'follows, so what the assistant says cannot be told; put {% generation %} and '
          '{% endgeneration %} around it in the template.'
        )
      spans.append((len(before), len(after)))
    return Rendered(whole, tuple(spans))

  def prompt(self, messages: Sequence[Message]) -> str:
    """The text after which the assistant speaks.

    Raises:
      ValueError: the template fails.
    """
    text = self._call(messages, add_generation_prompt=True)
    return text.replace(_BEGIN, '').replace(_END, '') if self._marked else text

  def encode(self, messages: Sequence[Message]) -> Encoded:
    """A conversation in ids, BOS once before it where the tokenizer puts it before a text.

    A turn ends with its last special token; where it has none, with one that the template puts
    behind it, or else with an EOS that is put there. White space after it is not learned.

    Raises:
      ValueError: as `render`.
    """
    rendered = self.render(messages)
    ids, offsets = self.tokenizer.offsets(rendered.text, special=True)
    tokens: list[int] = self._first(ids)
    learned, ends, at = [0] * len(tokens), [], 0
    for begin, end in rendered.spans:
      inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin))
      first, stop, closed = self._turn(rendered.text, ids, offsets, inside, begin)
      tokens += [*ids[at:stop].tolist(), *[self.tokenizer.eos_id] * (not closed)]
      learned += [0] * (first - at) + [1] * (len(tokens) - len(learned) - (first - at))
      ends.append(len(tokens))
      at = stop
    tokens += ids[at:].tolist()
    learned += [0] * (len(tokens) - len(learned))
    return Encoded(*(np.array(x, np.int32) for x in (tokens, learned, ends)))

  def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
    """The ids after which the assistant speaks; turns of it before are ended as `encode` does it.

    Raises:
      ValueError: as `render`.
    """
    spoken = [*messages, {'role': 'assistant', 'content': 'xyz'}]
    encoded = self.encode(spoken)
    begun = np.flatnonzero(np.diff(encoded.learned_T, prepend=0) == 1)
    return encoded.tokens_T[: begun[-1]].tolist()

  @functools.cached_property
  def end(self) -> int:
    """The id with which the assistant ends a turn."""
    encoded = self.encode(_PROBE)
    return int(encoded.tokens_T[encoded.ends_N[0] - 1])

  def _first(self, ids: np.ndarray) -> list[int]:
    """BOS, where it is wanted and the template has none."""
    before = self.tokenizer.template[0] if self.tokenizer.template is not None else ()
    bos = self.tokenizer.bos_id
    return [bos] if bos in before and (not len(ids) or ids[0] != bos) else []

  def _turn(
    self, text: str, ids: np.ndarray, offsets: np.ndarray, inside: np.ndarray, begin: int
  ) -> tuple[int, int, bool]:
    """The first token of a turn, one past its last, and whether that is a special one."""
    if not len(inside):
      raise ValueError('the assistant says nothing in a turn; leave the turn out.')
    special = inside[self.tokenizer.special[ids[inside]]]
    last, follows = int(inside[-1]), int(inside[-1]) + 1
    if len(special) and not text[offsets[special[-1], 1] : offsets[last, 1]].strip():
      return int(inside[0]), int(special[-1]) + 1, True
    if self._puts_end and self._closes(ids, follows):
      return int(inside[0]), follows + 1, True
    said = begin + len(text[begin : offsets[last, 1]].rstrip())
    kept = inside[offsets[inside, 0] < said]
    return int(inside[0]), int(kept[-1]) + 1 if len(kept) else int(inside[0]), False

  def _closes(self, ids: np.ndarray, index: int) -> bool:
    """Whether a special token that may end a turn stands there."""
    if index >= len(ids) or not self.tokenizer.special[ids[index]]:
      return False
    return bool(ids[index] != self.tokenizer.bos_id)

  def _ends(self, tried: Rendered) -> bool:
    """Whether the template puts a special token behind a turn, also behind the last."""
    ids, offsets = self.tokenizer.offsets(tried.text, special=True)
    ((begin, end),) = tried.spans
    inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin))
    return self._turn(tried.text, ids, offsets, inside, begin)[2]

  def _warn_of_words(self, tried: Rendered) -> None:
    """Says so where what ends a turn is text to the tokenizer: it would be learned as words."""
    said = tried.text[slice(*tried.spans[0])]
    tail = said[said.index('xyz') + 3 :].strip()
    if tail and not self._names_special(tail):
      logging.warning(
        'The chat template ends a turn with %r, which is no token of this tokenizer: it is learned '
        'as words of the answer, before the end. A new tokenizer has it by config.tokenizer.added.',
        tail,
      )

  def _names_special(self, text: str) -> bool:
    ids, _ = self.tokenizer.offsets(text, special=True)
    return bool(len(ids)) and bool(self.tokenizer.special[ids[-1]])

  def _call(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    try:
      return self._compiled.render(
        messages=list(messages),
        add_generation_prompt=add_generation_prompt,
        **self.tokenizer.special_texts,
      )
    except Exception as error:  # whatever a template does
      raise ValueError(f'the chat template fails: {type(error).__name__}: {error}') from error


def _between_marks(text: str) -> Rendered:
  parts, spans, length = [], [], 0
  for number, part in enumerate(text.split(_BEGIN)):
    said, _, rest = part.partition(_END) if number else ('', '', part)
    if number:
      spans.append((length, length + len(said)))
    parts += [said, rest]
    length += len(said) + len(rest)
  return Rendered(''.join(parts), tuple(spans))


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
  try:
    import jinja2
    from jinja2 import ext, nodes, sandbox
  except ImportError as error:
    raise ImportError(
      'chat templates need the package jinja2: pip install llm_jax[chat].'
    ) from error

  class Generation(ext.Extension):
    """`{% generation %}`: what is inside stands between signs."""

    tags = {'generation'}

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      return nodes.CallBlock(self.call_method('_said'), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
      return f'{_BEGIN}{caller()}{_END}'

  def fail(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)

  def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )
  environment.filters['tojson'] = as_json
  environment.globals['raise_exception'] = fail
  try:
    return environment.from_string(source)
  except jinja2.exceptions.TemplateError as error:
    line = getattr(error, 'lineno', None)
    where = '' if line is None else f' in line {line}'
    raise ValueError(f'the chat template cannot be read{where}: {error}') from error


class _limited:
  """Ends what runs through more than `STEPS` lines of Python: a template that loops."""

  def __enter__(self) -> None:
    self._left, self._before = STEPS, sys.gettrace()
    sys.settrace(self._count)

  def __exit__(self, *error: object) -> None:
    sys.settrace(self._before)

  def _count(self, frame: Any, event: str, argument: Any) -> Any:
    self._left -= 1
    if self._left < 0:
      raise TimeoutError(f'it does not end within {STEPS:,} steps on a conversation of one turn.')
    return self._count
