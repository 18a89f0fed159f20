"""Fill in the middle: a part of a text is learned after what stands before and behind it, so that a
decoder can write it (Bavarian et al. 2022, arXiv:2207.14255).

A text is cut between characters, before it is cut into tokens (section 3); its three parts, each
behind a special token, stand in the order prefix, suffix, middle (PSM), or with the suffix first
(SPM, as the section's second form has it: the middle follows on the prefix without a sign).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.core.contracts import Tokenizer

KNOWN = (  # what models call the three
  ('<|fim_prefix|>', '<|fim_suffix|>', '<|fim_middle|>'),
  ('<fim_prefix>', '<fim_suffix>', '<fim_middle>'),
  ('<fim-prefix>', '<fim-suffix>', '<fim-middle>'),
  ('<\uff5cfim\u2581begin\uff5c>', '<\uff5cfim\u2581hole\uff5c>', '<\uff5cfim\u2581end\uff5c>'),
  ('\u2581<PRE>', '\u2581<SUF>', '\u2581<MID>'),
)
SLACK = 8  # tokens that the parts of a text may have more than the whole


class Marks(NamedTuple):
  """The ids before the three parts."""

  prefix: int
  suffix: int
  middle: int


def marks(tokenizer: Tokenizer) -> Marks:
  """Those of a tokenizer.

  Raises:
    ValueError: it has none, or parts of a text do not spell the text.
  """
  for texts in KNOWN:
    ids = [tokenizer.encode(text, special=True).tolist() for text in texts]
    if all(len(each) == 1 and tokenizer.special[each[0]] for each in ids):
      break
  else:
    raise ValueError(
      'the tokenizer has no special tokens for prefix, suffix and middle; add them: '
      f'config.tokenizer.added={KNOWN[0]}.'
    )
  parts = np.concatenate([tokenizer.encode('a'), tokenizer.encode('b')])
  if tokenizer.decode(parts.tolist()) != 'ab':
    raise ValueError(
      f'this tokenizer makes {tokenizer.decode(parts.tolist())!r} of the parts a and b of a text, '
      'so texts cannot be cut between characters; set config.objective.fim_rate=0.'
    )
  return Marks(*(each[0] for each in ids))


def prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
  """The ids after which the middle is written, without BOS.

  Raises:
    ValueError: as `marks`.
  """
  found = marks(tokenizer)
  before, behind = (tokenizer.encode(part).tolist() for part in (prefix, suffix))
  return [found.prefix, *before, found.suffix, *behind, found.middle]


class FillIn:
  """Turns texts round.

  Args:
    tokenizer: has the special tokens.
    rate: the share of the texts.
    spm: of these the share that begins with the suffix.

  Raises:
    ValueError: as `marks`, or shares that are none.
  """

  def __init__(self, tokenizer: Tokenizer, rate: float, spm: float):
    for name, share in (('fim_rate', rate), ('fim_spm', spm)):
      if not 0 <= share <= 1:
        raise ValueError(f'objective.{name}={share} must be at least 0 and at most 1.')
    self.tokenizer, self.rate, self.spm = tokenizer, rate, spm
    self.marks = marks(tokenizer) if rate else None

  @property
  def room(self) -> int:
    """By how many tokens a text becomes longer at most."""
    return 0 if self.marks is None else len(self.marks) + SLACK

  def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The ids of a text, or in so many cases of its parts.

    As it is stays a text that begins or ends inside a character, and one whose parts have many more
    tokens than it has.
    """
    if self.marks is None or rng.random() >= self.rate:
      return ids
    first = rng.random() < self.spm
    text = self.tokenizer.decode(ids.tolist())
    if len(text.encode()) != self.tokenizer.token_bytes[ids].sum():
      return ids
    cuts = np.sort(rng.integers(0, len(text) + 1, 2)).tolist()
    prefix, middle, suffix = (
      self.tokenizer.encode(part)
      for part in (text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :])
    )
    parts: Sequence[np.ndarray | list[int]]
    if first:
      parts = [self.marks.prefix], [self.marks.suffix], suffix, [self.marks.middle], prefix, middle
    else:
      parts = [self.marks.prefix], prefix, [self.marks.suffix], suffix, [self.marks.middle], middle
    found = np.concatenate(parts).astype(np.int32)
    return found if len(found) <= len(ids) + self.room else ids
