"""Pairs of texts on every machine: the first sentence of a docstring of the Python standard
library, and what follows it.
"""

import functools
import hashlib
import random
import re
from typing import Any

from llm_jax.data.sources import stdlib
from llm_jax.data.sources.docstrings import docstrings

_LEAST, _MOST = 40, 400  # characters of either text; a longer one loses its end
_SUMMARY = re.compile(r'(.+?[.!?])\s+(\S.*)', re.DOTALL)


class Source:
  """Summaries as `text`, each once, and the rest of the docstring as `pair`, both of 40 characters
  or more.

  Parsing takes a few seconds, when the records are first asked for.

  Args:
    candidates: above 0, records have in place of `pair` so many rests, of which one is the right
      one: as `choices`, with its number as `label`, and as `passages` with their `relevance`.
    graded: `pair` is the summary itself without some of its words, by chance, and `label` the share
      of them that is left.
  """

  def __init__(self, candidates: int = 0, graded: bool = False):
    if candidates < 0 or candidates == 1:
      raise ValueError(f'config.data.candidates={candidates} must be 0, or at least 2.')
    if candidates and graded:
      raise ValueError(f'config.data.candidates={candidates} leaves no pair to be graded.')
    self.library, self.candidates, self.graded = stdlib.Source(), candidates, graded
    known = (self.library.fingerprint, _LEAST, _MOST, _SUMMARY.pattern, candidates)
    known = repr((*known, 'graded') if graded else known)
    self.fingerprint = hashlib.sha256(known.encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, index: int) -> dict[str, Any]:
    text, pair = self._pairs[index]
    draw = random.Random(index)
    if self.graded:
      words = text.split()
      left = sorted(draw.sample(range(len(words)), draw.randint(1, len(words))))
      pair = ' '.join(words[number] for number in left)
      return {'text': text, 'pair': pair, 'label': len(left) / len(words)}
    if not self.candidates:
      return {'text': text, 'pair': pair}
    others = [i for i in draw.sample(range(len(self)), self.candidates) if i != index]
    texts = [self._pairs[i][1] for i in others[: self.candidates - 1]]
    right = draw.randrange(self.candidates)
    texts.insert(right, pair)
    relevance = [int(i == right) for i in range(self.candidates)]
    return dict(text=text, choices=texts, label=str(right), passages=texts, relevance=relevance)

  @functools.cached_property
  def _pairs(self) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for file in self.library.files:
      for text in docstrings(self.library.read(file)):
        parts = _SUMMARY.fullmatch(text)
        if parts is not None and min(map(len, parts.groups())) >= _LEAST:
          found.setdefault(' '.join(parts[1].split())[:_MOST], parts[2][:_MOST])
    return list(found.items())
