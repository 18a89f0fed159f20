"""Prefix LM: a decoder whose tokens of a prefix all see each other, and which gives what follows
one token after the other (Liu et al. 2018, arXiv:1801.10198; Raffel et al. 2020, arXiv:1910.10683,
section 3.2.1).
"""

import numpy as np
from absl import logging

from llm_jax.core import contracts
from llm_jax.core.contracts import (
  Documents,
  Encoded,
  Example,
  Record,
  Rows,
  Tokenizer,
)
from llm_jax.data import pack
from llm_jax.objectives.shared import next_tokens

LONG = ('error', 'drop')
PACKINGS = ('best_fit', 'none')


class Objective(next_tokens.Objective):
  """Of a record with a `text` and a `target` the text is the prefix, between BOS and SEP, and the
  target is learned, with EOS. Of one without a target a part of the text is the prefix, cut off
  anew in each epoch, each length equally likely; longer texts are cut into pieces.

  Documents that share a row see nothing of each other.

  Args:
    tokenizer: makes the ids.
    packing: 'best_fit' puts several documents in a row; 'none': one.
    long: what a pair that is longer than a row is: an 'error', or left out ('drop') and counted.
    label_smoothing, z_loss: as in `vocabulary.cross_entropy`.

  Raises:
    ValueError: an option that is not possible.
  """

  terms = {'prefix_lm': 1.0}
  text_fields = ('text', 'target')
  writes = True
  shows_learned = True
  opens_prompts = True

  def __init__(
    self,
    tokenizer: Tokenizer,
    packing: str = 'best_fit',
    long: str = 'error',
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
  ):
    for name, value, known in (('packing', packing, PACKINGS), ('long', long, LONG)):
      if value not in known:
        raise ValueError(f'objective.{name}={value!r} must be one of {", ".join(known)}.')
    super().__init__('prefix_lm', label_smoothing, z_loss)
    self.tokenizer, self.packing, self.long = tokenizer, packing, long
    self.prompt_end = (tokenizer.sep_id,)

  @staticmethod
  def encode(record: Record, tokenizer: Tokenizer) -> Encoded:
    """`tokens` of `text`, and where there is a `target` its `target_tokens`."""
    if not isinstance(record.get('text'), str):
      raise ValueError(
        f'a record has no text, only {", ".join(record)}; config.data.text names its field.'
      )
    encoded: Encoded = {'tokens': tokenizer.encode(record['text'])}
    target = record.get('target')
    encoded['target_tokens'] = tokenizer.encode(target if isinstance(target, str) else '')
    return encoded

  @staticmethod
  def asked(record: Record) -> tuple[str, str]:
    """`text` and `target`."""
    return record['text'], record['target']

  def check(self, model: contracts.Model) -> None:
    """The model must be a decoder that sees everywhere."""
    if not model.causal or model.reads_source():
      raise ValueError('objective prefix_lm needs a decoder.')
    if getattr(model, 'window', None) is not None:
      raise ValueError(
        f'objective prefix_lm needs a decoder without a window; this one has window={model.window}.'
      )

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """Rows of pairs, and of pieces of texts.

    Raises:
      ValueError: a pair that is longer than a row, where that is an error, naming it.
    """
    return _Rows(self, documents, seq_len)


class _Rows:
  def __init__(self, objective: Objective, documents: Documents, seq_len: int):
    self.tokenizer, self.documents, self.seq_len = objective.tokenizer, documents, seq_len
    self.cut = 0
    first, second = (documents.lengths(name) for name in ('tokens', 'target_tokens'))
    self.paired = second > 0
    pieces = pack.one_per_row(np.where(self.paired, 0, first), seq_len, overhead=1)
    parts = np.stack([pieces.document, pieces.start, pieces.stop], axis=1)
    pairs = np.flatnonzero(self.paired)
    sizes = first[pairs] + second[pairs] + 2  # BOS and SEP; EOS is a target alone
    over = sizes > seq_len
    self._check(objective, pairs[over], sizes[over])
    pairs, sizes = pairs[~over], sizes[~over]
    whole = np.stack([pairs, np.zeros_like(pairs), first[pairs]], axis=1)
    self.parts = np.concatenate([parts, whole])
    lengths = np.concatenate([parts[:, 2] - parts[:, 1] + 1, sizes])
    most = 1 if objective.packing == 'none' else None
    self.plan = pack.best_fit(lengths, seq_len, most=most)

  def __len__(self) -> int:
    return len(self.plan)

  def texts(self, index: int) -> list[int]:
    """The documents of a row."""
    return [int(self.parts[part, 0]) for part, _, _ in self.plan[index]]

  def prompt(self, text: int) -> list[int] | None:
    """A prefix as generation reads it; None where there is no target."""
    return self._prefix(text).tolist() if self.paired[text] else None

  def example(self, index: int, rng: np.random.Generator) -> Example:
    documents, prefixes = [], []
    for part, _, _ in self.plan[index]:
      ids, count = self._document(*self.parts[part].tolist(), rng)
      documents.append(ids)
      prefixes.append(count)
    example = pack.assemble([ids[:-1] for ids in documents], self.seq_len)
    used = int(np.sum(example['segments'] > 0))
    targets_T = np.zeros(self.seq_len, np.int32)
    targets_T[:used] = np.concatenate([ids[1:] for ids in documents])
    lengths = np.array([0, *prefixes])[example['segments']]  # of each token's document
    open_T = (example['positions'] < lengths).astype(np.int32)
    learned_T = (example['segments'] > 0) & (example['positions'] >= lengths - 1)
    return example | {
      'prefix': open_T,
      'targets': targets_T,
      'weights': learned_T.astype(np.float32),
    }

  def _document(
    self, document: int, start: int, stop: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, int]:
    """The ids of a document, or of a piece, its last target included; and how many are prefix."""
    if self.paired[document]:
      prefix, target = self._prefix(document), self.documents.array('target_tokens', document)
      ids = np.concatenate([prefix, target, [self.tokenizer.eos_id]]).astype(np.int32)
      return ids, len(prefix)
    text = self.documents.array('tokens', document, start, stop)
    last = self.documents.lengths('tokens')[document] == stop
    end = [self.tokenizer.eos_id] if last else []
    if not last:  # the token behind a piece is its last target
      end = self.documents.array('tokens', document, stop, stop + 1)
    ids = np.concatenate([[self.tokenizer.bos_id], text, end]).astype(np.int32)
    return ids, int(rng.integers(1, len(ids)))

  def _prefix(self, document: int) -> np.ndarray:
    text = self.documents.array('tokens', document)
    around = self.tokenizer.bos_id, self.tokenizer.sep_id
    return np.concatenate([around[:1], text, around[1:]]).astype(np.int32)

  def _check(self, objective: Objective, over: np.ndarray, sizes: np.ndarray) -> None:
    if not len(over):
      return
    if objective.long == 'error':
      raise ValueError(
        f'{self.documents.where(int(over[0]))}: text and target have {int(sizes[0])} tokens, a row '
        f'{self.seq_len}; {len(over)} pairs are too long. Raise config.seq_len, or set '
        'config.objective.long=drop.'
      )
    logging.warning(
      'prefix_lm: %d of %d pairs are longer than a row and left out.',
      len(over),
      int(self.paired.sum()),
    )
