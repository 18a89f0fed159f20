"""Rows of prompts: each text in its template, behind what is shown before it; what is too long for
a row loses text, never template or demonstrations.
"""

from collections.abc import Sequence

import numpy as np

from llm_jax.core.contracts import Documents, Example, Tokenizer
from llm_jax.data import pack, pairs
from llm_jax.objectives.shared import text_rows
from llm_jax.objectives.shared.demonstrations import Demonstrations, texts
from llm_jax.objectives.shared.templates import Template, parse
from llm_jax.objectives.shared.text_rows import TextRows
from llm_jax.objectives.shared.verbalizers import Words, stems


class Prompts:
  """What a text becomes: segments of a row, one for each of the S fillings of the gap behind which
  words are read.

  A masked model has one filling, as many masks as the longest word has ids. A causal one has the
  fewest continuations with which each word's last id has the others before it; with words of one id
  that is a single one, the empty one.

  Args:
    template, words: what a text is put in, and what fills the gap.
    tokenizer: has the special ids.
    causal: for which kind of model.
    shown: what stands before a text; None for nothing.

  Attributes:
    fillings: [S] tuples of ids.
    segment_W: per word the number of the segment in which it is read.
    least: the tokens of a row that a prompt takes whose text is empty.
  """

  def __init__(
    self,
    template: Template,
    words: Words,
    tokenizer: Tokenizer,
    causal: bool,
    shown: Demonstrations | None,
  ):
    self.template, self.words, self.causal, self.shown = template, words, causal, shown
    frame = pairs.frame(tokenizer, causal, closed=False)
    self.frame = frame._replace(after=()) if causal else frame
    self.filler = tokenizer.bos_id
    if causal:
      self.fillings, read = stems(words.ids)
    else:
      self.fillings, read = [(tokenizer.mask_id,) * words.longest], [0] * len(words.ids)
    self.segment_W = np.array(read, np.int32)
    self.least = int(self.size(self._around(0 if shown is None else len(shown.usual))))

  def around(self, documents: Documents) -> np.ndarray:
    """[documents]: the ids of each segment beside those of its text and of the gap."""
    lengths = documents.lengths('tokens')
    found = np.full(len(lengths), self._around(0 if self.shown is None else len(self.shown.usual)))
    if self.shown is not None:
      for index in np.flatnonzero(np.isin(lengths, sorted(self.shown.lengths))):
        found[index] = self._around(len(self.shown(*texts(documents, index))))
    return found

  def _around(self, shown: int) -> int:
    return self.frame.single + self.template.size + shown

  def size(self, context: np.ndarray | int) -> np.ndarray | int:
    """The tokens of a row that a text takes with all its segments.

    Args:
      context: the ids of a segment without the gap.
    """
    # Behind no id at all nothing can be read: a filler then stands before the gap.
    context = np.maximum(context, 1) if self.causal else context
    return len(self.fillings) * context + sum(map(len, self.fillings))

  def room(self, around: np.ndarray, seq_len: int) -> np.ndarray:
    """[documents]: how many ids of each text there is room for in a row.

    Raises:
      ValueError: there is none.
    """
    gaps = sum(map(len, self.fillings))
    room = (seq_len - gaps) // len(self.fillings) - around
    if np.min(room, initial=1) < 1:
      shown = '' if self.shown is None else ', the demonstrations'
      times = f', {len(self.fillings)} times' if len(self.fillings) > 1 else ''
      least = self.size(int(np.max(around)))
      raise ValueError(
        f'seq_len={seq_len} leaves no room for a text: objective.template{shown} and the words for '
        f'the classes{times} take {least} tokens of a row; raise config.seq_len, or make them '
        'shorter.'
      )
    return room

  def segments(
    self, text: np.ndarray, pair: np.ndarray | None, shown: np.ndarray
  ) -> list[tuple[np.ndarray, int]]:
    """The ids of each segment, and the index in it at which the first id of a word is read.

    Args:
      text, pair: ids, which fit; None where the template has no {pair}.
      shown: ids that stand before the template.
    """
    found = []
    for filling in self.fillings:
      ids, gap = self.template.filled(text, pair, filling)
      before = np.append(np.array(self.frame.before, np.int32), shown)
      if self.causal and not len(before) + gap:
        before = np.array([self.filler], np.int32)
      whole = [before, ids, np.array(self.frame.after, np.int32)]
      found.append((np.concatenate(whole), len(before) + gap - self.causal))
    return found

  def slots(self, seq_len: int) -> int:
    """G: the most texts of a row."""
    each = max(text_rows.TOKENS_PER_TEXT, self.least)
    return max(1, min(text_rows.MOST_TEXTS, seq_len // each))


class PromptRows(TextRows):
  """A plan of which texts share a row, each with all its segments in one.

  Args:
    prompts: what texts become.
    documents: the texts.
    seq_len: T.
    slots: G.

  Raises:
    ValueError: no room for a text, or pairs that the template has not, or the reverse.
  """

  def __init__(self, prompts: Prompts, documents: Documents, seq_len: int, slots: int):
    check_pairs(prompts.template.template, documents)
    self.prompts, self.documents, self.seq_len, self.slots = prompts, documents, seq_len, slots
    self.frame, self.name = prompts.frame, 'prompt'
    first = documents.lengths('tokens')
    second = documents.lengths('pair_tokens') if prompts.template.paired else None
    around = prompts.around(documents)
    self.first, self.second = text_rows.fit(first, second, prompts.room(around, seq_len), 0)
    self.given = first if second is None else first + second
    kept = self.first if second is None else self.first + self.second
    self.lost = self.given - kept
    self.cut = int(np.count_nonzero(self.lost))
    self.sizes = prompts.size(around + kept)
    self.plan = text_rows.plan(self.sizes, seq_len, slots)

  def example(self, index: int, rng: np.random.Generator | None = None) -> Example:
    """A row, with where the words are read in it, `reads` [G, S] int32."""
    del rng
    S = len(self.prompts.fillings)
    pieces, reads = [], np.zeros((self.slots, S), np.int32)
    for slot, document in enumerate(self.texts(index)):
      start = sum(len(ids) for ids in pieces)
      for segment, (ids, read) in enumerate(self._segments(document)):
        reads[slot, segment] = start + read
        pieces.append(ids)
        start += len(ids)
    row = pack.assemble(pieces, self.seq_len)
    return row | {'token_types': np.zeros(self.seq_len, np.int32), 'reads': reads}

  def _segments(self, document: int) -> Sequence[tuple[np.ndarray, int]]:
    shown = np.zeros(0, np.int32)
    if self.prompts.shown is not None:
      shown = self.prompts.shown(*texts(self.documents, document))
    return self.prompts.segments(*self.ids(document), shown)


def check_pairs(template: str, documents: Documents) -> None:
  """Raises ValueError where only one of template and documents has pairs."""
  paired = any(piece.field == 'pair' for piece in parse(template))
  if paired == ('pair_tokens' in documents.names) or not len(documents):
    return
  if paired:
    raise ValueError(
      f'objective.template={template!r} has a {{pair}}, and the records have none; name its field '
      'by config.data.pair.'
    )
  raise ValueError(
    f'objective.template={template!r} has no {{pair}}, and the records have one; put it in, or '
    'leave config.data.pair unset.'
  )
