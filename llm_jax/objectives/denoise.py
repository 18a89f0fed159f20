"""What an encoder-decoder is pretrained with: text whose parts were taken out, and what they were.
`objectives.shared.noise` says how, and where it comes from.
"""

import numpy as np
from absl import logging

from llm_jax.core.contracts import Documents, Example, Rows, Tokenizer
from llm_jax.data import pack
from llm_jax.objectives.shared import from_source
from llm_jax.objectives.shared import noise as noises

KINDS = {  # the rate and the mean that each has by itself
  'spans': (0.15, 3.0),
  'infilling': (0.3, 3.0),
  'mixture': (None, None),
}


class Objective(from_source.Objective):
  """The decoder writes what is missing in a source (`spans`, `mixture`), or the whole text
  (`infilling`).

  A document longer than a pair of rows takes is cut into pieces. What is taken out of a piece is
  drawn anew in each epoch; which of the seven kinds of `mixture` it gets is fixed.

  Args:
    tokenizer: needs sentinels for `spans` and `mixture`, a mask for `infilling`.
    noise: 'spans' of T5, 'infilling' of BART, or the 'mixture' of UL2.
    rate: share of the tokens that are taken out; None: 0.15 for spans, 0.3 for infilling.
    mean_span: tokens that are taken out at a time, on average; None: 3.
    permute: whether infilling puts sentences in another order.
    modes: texts before the sources of regular, sequential and extreme denoising in the mixture
      ('[NLU]', '[S2S]', '[NLG]' in the paper); () for none.
    source_len, start, packing, label_smoothing, z_loss: as in `seq2seq`.

  Raises:
    ValueError: an option that is not possible, a tokenizer without what is needed.
  """

  terms = {'denoise': 1.0}

  def __init__(
    self,
    tokenizer: Tokenizer,
    noise: str = 'spans',
    rate: float | None = None,
    mean_span: float | None = None,
    permute: bool = True,
    modes: tuple[str, ...] = (),
    source_len: int | None = None,
    start: int | None = None,
    packing: str = 'best_fit',
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
  ):
    super().__init__('denoise', tokenizer, source_len, start, packing, label_smoothing, z_loss)
    _check(noise, rate, mean_span, modes)
    usual_rate, usual_mean = KINDS[noise]
    rate, mean = rate or usual_rate, mean_span or usual_mean
    self.sentinels = tokenizer.sentinels
    if noise == 'infilling':
      if tokenizer.mask_id is None:
        raise ValueError('objective denoise: the tokenizer has no mask, which infilling needs.')
      ends_V = noises.sentence_ends(tokenizer.decode, tokenizer.special) if permute else None
      self.noises = (noises.Infilling(tokenizer.mask_id, rate, mean, ends_V),)
      return
    if not self.sentinels:
      raise ValueError(
        f'objective denoise: noise={noise!r} needs sentinels, and the tokenizer has none; set '
        'config.tokenizer.sentinels=100, or noise=infilling.'
      )
    if noise == 'spans':
      self.noises = (noises.Spans(self.sentinels, rate, mean),)
    else:
      shown = [tokenizer.encode(mode, special=True).tolist() for mode in modes or ('', '', '')]
      self.noises = noises.mixture(self.sentinels, shown)

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """Rows of pieces of documents.

    Logs how many documents are too short to take anything out.

    Raises:
      ValueError: rows that are too short.
    """
    return _Rows(self, documents, seq_len)


class _Rows:
  def __init__(self, objective: Objective, documents: Documents, seq_len: int):
    self.objective, self.documents = objective, documents
    self.capacities = objective.source_len or seq_len, seq_len
    around = sum(map(len, objective.around))
    room = self.capacities[0] - around, self.capacities[1] - around
    most = noises.longest(objective.noises, room, len(objective.sentinels))
    if most < 2:
      raise ValueError(
        f'rows of source_len={self.capacities[0]} and seq_len={seq_len} have no room for a text of '
        'two tokens; raise both.'
      )
    cut = pack.one_per_row(documents.lengths('tokens'), most)
    kept = np.flatnonzero(cut.stop - cut.start >= 2)
    if len(kept) < len(cut):
      logging.info(
        'denoise: %d of %d pieces of text are one token, from which nothing can be taken; they are '
        'left out.',
        len(cut) - len(kept),
        len(cut),
      )
    self.pieces = np.stack([cut.document, cut.start, cut.stop], axis=1)[kept]
    sizes = cut.stop[kept] - cut.start[kept]
    kinds = np.random.default_rng(0).integers(len(objective.noises), size=len(kept))
    self.kinds = kinds.tolist()
    lengths = np.stack([np.stack(noise.lengths(sizes)) for noise in objective.noises]) + around
    first, second = lengths[kinds, :, np.arange(len(kept))].T
    self.plan = pack.best_fit_pairs(first, second, self.capacities, objective.most)

  def __len__(self) -> int:
    return len(self.plan)

  def example(self, index: int, rng: np.random.Generator) -> Example:
    before, after = self.objective.around
    sources, targets = [], []
    for piece, _, _ in self.plan[index]:
      tokens = self.documents.array('tokens', *self.pieces[piece].tolist())
      noise = self.objective.noises[self.kinds[piece]]
      for rows, ids in zip((sources, targets), noise(tokens, rng), strict=True):
        rows.append(np.concatenate([before, ids, after]).astype(np.int32))
    return self.objective.example(sources, targets, self.capacities)


def _check(noise: str, rate: float | None, mean_span: float | None, modes: tuple[str, ...]) -> None:
  if noise not in KINDS:
    raise ValueError(f'objective.noise={noise!r} must be one of {", ".join(KINDS)}.')
  if rate is not None and not 0 < rate < 1:
    raise ValueError(f'objective.rate={rate} must be above 0 and below 1.')
  if mean_span is not None and mean_span < 1:
    raise ValueError(f'objective.mean_span={mean_span} must be at least 1.')
  if noise == 'mixture' and (rate, mean_span) != (None, None):
    raise ValueError('objective.rate and mean_span are those of the paper where noise=mixture.')
  if modes and (noise != 'mixture' or len(modes) != 3):
    raise ValueError(
      f'objective.modes={modes} must be three texts, for regular, sequential and extreme '
      'denoising, and needs noise=mixture.'
    )
