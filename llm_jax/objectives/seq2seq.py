"""From text to text by an encoder-decoder: translation, summaries, and whatever else a target says
of a source (Sutskever et al. 2014, arXiv:1409.3215; Vaswani et al. 2017, arXiv:1706.03762).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from llm_jax.core.contracts import Documents, Encoded, Example, Record, Rows, Tokenizer
from llm_jax.data import pack
from llm_jax.objectives.shared import from_source

LONG = ('error', 'cut', 'drop')


class Objective(from_source.Objective):
  """Each token of a target, its end included, is predicted from those before it and the whole
  source.

  A record has a `text` and a `target`. Both stand between the special tokens of their tokenizer; of
  ours, before EOS. The decoder reads `start` and the target but for its last token. Several pairs
  share a row of sources and a row of targets, and see nothing of each other.

  Args:
    tokenizer: makes the ids.
    source_len: tokens of a row of sources; None: as many as `config.seq_len`, which are those of a
      row of targets.
    start: the id that the decoder begins with; None: BOS of the tokenizer.
    forced_bos: the id that each target begins with, in place of what the tokenizer puts there: that
      of a language, say (mBART); generation begins with it.
    forced_eos: the id that ends what is generated where it is as long as it may be.
    packing: 'best_fit' puts several pairs in a row; 'none': one.
    long: what a source or target that is longer than its row is: an 'error', 'cut' at its end, or
      left out with its pair ('drop'); the latter two are counted in the log.
    label_smoothing, z_loss: as in `vocabulary.cross_entropy`.
  """

  terms = {'seq2seq': 1.0}
  text_fields = ('text', 'target')
  writes = True

  def __init__(
    self,
    tokenizer: Tokenizer,
    source_len: int | None = None,
    start: int | None = None,
    forced_bos: int | None = None,
    forced_eos: int | None = None,
    packing: str = 'best_fit',
    long: str = 'error',
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
  ):
    super().__init__('seq2seq', tokenizer, source_len, start, packing, label_smoothing, z_loss)
    if long not in LONG:
      raise ValueError(f'objective.long={long!r} must be one of {", ".join(LONG)}.')
    self.forced_bos = None if forced_bos is None else self.id('forced_bos', forced_bos)
    self.forced_eos = None if forced_eos is None else self.id('forced_eos', forced_eos)
    self.long = long

  @staticmethod
  def encode(record: Record, tokenizer: Tokenizer) -> Encoded:
    """`tokens` of `text`, and `target_tokens` of `target`."""
    for name in ('text', 'target'):
      if not isinstance(record.get(name), str) or not record[name].strip():
        raise ValueError(
          f'a record has no {name}, only {", ".join(k for k, v in record.items() if v)}; '
          f'config.data.{name} names its field.'
        )
    return {
      'tokens': tokenizer.encode(record['text']),
      'target_tokens': getattr(tokenizer, 'target', tokenizer).encode(record['target']),
    }

  @staticmethod
  def asked(record: Record) -> tuple[str, str]:
    """`text` and `target`."""
    return record['text'], record['target']

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs."""
    del options
    return [{'text': 'some words', 'target': 'words'}] * 4

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """Rows of whole pairs.

    Logs how much of the rows is used, and what was cut or left out.

    Raises:
      ValueError: a pair that is longer than its rows, where that is an error, naming it.
    """
    return _Rows(self, documents, seq_len)


class _Rows:
  def __init__(self, objective: Objective, documents: Documents, seq_len: int):
    self.objective, self.documents = objective, documents
    self.lengths, self.cut = (objective.source_len or seq_len, seq_len), 0
    before, after = objective.around
    first = before if objective.forced_bos is None else (objective.forced_bos,)
    self.around = {'tokens': (before, after), 'target_tokens': (first, after)}
    counts = [
      documents.lengths(name) + sum(map(len, around)) for name, around in self.around.items()
    ]
    self.kept = self._checked(counts)
    first, second = (
      np.minimum(count[self.kept], most) for count, most in zip(counts, self.lengths, strict=True)
    )
    self.plan = pack.best_fit_pairs(first, second, self.lengths, objective.most)
    room = len(self.plan) * np.array(self.lengths)
    if len(self.plan):
      logging.info(
        "seq2seq: %.1f pairs in a row; %.0f %% of the sources' rows are used, %.0f %% of the "
        "targets'.",
        len(self.kept) / len(self.plan),
        100 * first.sum() / room[0],
        100 * second.sum() / room[1],
      )

  def __len__(self) -> int:
    return len(self.plan)

  def example(self, index: int, rng: np.random.Generator) -> Example:
    pairs = self.texts(index)
    sources = [self.ids('tokens', pair, self.lengths[0]) for pair in pairs]
    targets = [self.ids('target_tokens', pair, self.lengths[1]) for pair in pairs]
    return self.objective.example(sources, targets, self.lengths)

  def texts(self, index: int) -> list[int]:
    """The pairs of a row, as the contract `Texts` has them."""
    return [int(self.kept[pair]) for pair, _, _ in self.plan[index]]

  def prompt(self, text: int) -> list[int]:
    """A source as generation reads it."""
    return self.ids('tokens', text, self.lengths[0]).tolist()

  def ids(self, name: str, document: int, most: int) -> np.ndarray:
    """Those of a text between its special tokens, at most so many."""
    before, after = self.around[name]
    text = self.documents.array(name, document, 0, most - len(before) - len(after))
    return np.concatenate([before, text, after]).astype(np.int32)

  def _checked(self, counts: list[np.ndarray]) -> np.ndarray:
    """The pairs that are laid out."""
    long = self.objective.long
    over = np.stack([count > most for count, most in zip(counts, self.lengths, strict=True)])
    some = np.flatnonzero(over.any(axis=0))
    if len(some) and long == 'error':
      pair = int(some[0])
      side = int(over[1, pair])
      raise ValueError(
        f'{self.documents.where(pair)}: the {("source", "target")[side]} has '
        f'{int(counts[side][pair])} tokens, its row {self.lengths[side]}; {len(some)} of '
        f'{len(counts[0])} pairs are too long. Raise '
        f'{("config.objective.source_len", "config.seq_len")[side]}, or set '
        'config.objective.long=cut or drop.'
      )
    self.cut = len(some) if long == 'cut' else 0
    if len(some):
      done = {'cut': 'lose their ends', 'drop': 'are left out'}[long]
      logging.warning(
        'seq2seq: %d of %d pairs are longer than their rows and %s.',
        len(some),
        len(counts[0]),
        done,
      )
    kept = np.arange(len(counts[0]))
    return np.delete(kept, some) if long == 'drop' else kept
