"""What a text may be: JSON of a schema, what a regular expression matches, or a Lark grammar.

A guide says before each token which ones lead on to such a text; all others get no probability
(Willard and Louf 2023, arXiv:2307.09702). The work is done by llguidance, the extra `serve`.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_jax.core.contracts import Tokenizer
from llm_jax.generation.sampling import words

if TYPE_CHECKING:
  import llguidance

KINDS = ('json', 'regex', 'lark')
# As `json.dumps` puts it: with white space as they like, texts may never end.
LAYOUT = {'whitespace_flexible': False, 'item_separator': ', ', 'key_separator': ': '}


class Guide:
  """One text, as far as it is written.

  Attributes:
    allowed_W: uint32, which tokens may come next, as `generation.decoding` takes it.
    over: whether nothing may follow.
  """

  def __init__(self, matcher: 'llguidance.LLMatcher', size: int):
    self._matcher, self._size = matcher, size
    self._look()

  def copied(self) -> 'Guide':
    """Another text that is as far."""
    return Guide(self._matcher.deep_copy(), self._size)

  def add(self, token: int) -> None:
    """Takes the next token.

    Raises:
      ValueError: it was not allowed, or the text is too much for the guide.
    """
    self._matcher.consume_token(token)
    self._look()

  def _look(self) -> None:
    self.over = self._matcher.is_stopped()
    bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
    if self._matcher.is_error():
      raise ValueError(f'what is written cannot be guided: {_short(self._matcher.get_error())}')
    self.allowed_W = np.zeros(words(self._size), np.uint32)
    self.allowed_W[: len(bits)] = bits


class Guides:
  """Makes the guides of a model.

  Args:
    tokenizer: that of the model.
    vocab_size: V of the model, at least that of the tokenizer.
    ends: ids that end a text.
  """

  def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]):
    self._tokenizer, self._size, self._ends = tokenizer, vocab_size, tuple(ends)

  def __call__(self, kind: str, form: str | Mapping[str, Any]) -> Guide:
    """A guide at the beginning of its text.

    Args:
      kind: one of `KINDS`.
      form: a JSON schema, a regular expression, or a Lark grammar.

    Raises:
      ValueError: a form that is wrong, or one that no text can have.
    """
    matcher = _library().LLMatcher(self._vocabulary, _grammar(kind, form), log_level=0)
    if matcher.is_error():
      raise ValueError(f'this {kind} cannot guide a text: {_short(matcher.get_error())}')
    return Guide(matcher, self._size)

  @functools.cached_property
  def _vocabulary(self) -> 'llguidance.LLTokenizer':
    return _library().LLTokenizer(_Vocabulary(self._tokenizer, self._ends), eos_token=[*self._ends])


class _Vocabulary:
  """A tokenizer, as llguidance asks for it."""

  is_tokenizer_wrapper = True
  bos_token_id = None

  def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]):
    self._tokenizer, self.eos_token_id = tokenizer, ends[0]
    spelled = map(tokenizer.spelling, range(tokenizer.vocab_size))
    # No text has the byte FF.
    self.tokens = [text or b'\xff<%d>' % number for number, text in enumerate(spelled)]
    self.special_token_ids = [n for n, text in enumerate(self.tokens) if text[:1] == b'\xff']

  def __call__(self, text: str) -> list[int]:
    return self._tokenizer.encode(text).tolist()


def _grammar(kind: str, form: str | Mapping[str, Any]) -> str:
  matcher = _library().LLMatcher
  if kind == 'json':
    return matcher.grammar_from_json_schema(json.dumps(form), overrides=LAYOUT)
  return matcher.grammar_from_regex(form) if kind == 'regex' else matcher.grammar_from_lark(form)


def _short(message: str) -> str:
  """What is said of a form, in a line."""
  return ' '.join(message.split())[:200]


def _library() -> Any:
  try:
    import llguidance
  except ModuleNotFoundError as error:
    raise ImportError("guided texts need llguidance: pip install 'llm_jax[serve]'") from error
  return llguidance
