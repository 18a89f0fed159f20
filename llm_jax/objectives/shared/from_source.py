"""What objectives of encoder-decoders have in common: a decoder that begins with `start` and gives
each token of a target from those before it and a whole source.
"""

from collections.abc import Sequence

import numpy as np

from llm_jax.core import contracts
from llm_jax.core.contracts import SOURCE, Example, Tokenizer
from llm_jax.data import pack
from llm_jax.objectives.shared import next_tokens

PACKINGS = ('best_fit', 'none')


class Objective(next_tokens.Objective):
  """Options, checks and rows.

  Args:
    name: of the loss.
    tokenizer: makes the ids.
    source_len: tokens of a row of sources; None: as many as `config.seq_len`, which are those of a
      row of targets.
    start: the id that the decoder begins with; None: BOS of the tokenizer.
    packing: 'best_fit' puts several pairs in a row; 'none': one.
    label_smoothing, z_loss: as in `vocabulary.cross_entropy`.

  Raises:
    ValueError: an option that is not possible.
  """

  def __init__(
    self,
    name: str,
    tokenizer: Tokenizer,
    source_len: int | None,
    start: int | None,
    packing: str,
    label_smoothing: float,
    z_loss: float,
  ):
    if packing not in PACKINGS:
      raise ValueError(f'objective.packing={packing!r} must be one of {", ".join(PACKINGS)}.')
    if source_len is not None and source_len < 2:
      raise ValueError(f'objective.source_len={source_len} must be at least 2.')
    super().__init__(name, label_smoothing, z_loss)
    self.tokenizer, self.source_len = tokenizer, source_len
    self.start = tokenizer.bos_id if start is None else self.id('start', start)
    self.packing = packing

  @property
  def most(self) -> int | None:
    """The most pairs of a row."""
    return 1 if self.packing == 'none' else None

  @property
  def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after a text; of our own tokenizers EOS after it."""
    return self.tokenizer.template or ((), (self.tokenizer.eos_id,))

  def id(self, name: str, given: int) -> int:
    """An option that is an id.

    Raises:
      ValueError: it is none.
    """
    if not 0 <= given < self.tokenizer.vocab_size:
      raise ValueError(
        f'objective.{name}={given} is no id of the vocabulary, 0 to '
        f'{self.tokenizer.vocab_size - 1}.'
      )
    return given

  def check(self, model: contracts.Model) -> None:
    """The model must read sources."""
    if not model.reads_source():
      raise ValueError(
        f'objective {self.name} needs a model that reads two rows (encoder_decoder); this one '
        f'reads {", ".join(model.inputs)}.'
      )
    if self.source_len is not None and self.source_len > model.max_len:
      raise ValueError(
        f'objective.source_len={self.source_len} is more than config.model.max_len={model.max_len}.'
      )

  def example(
    self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], lengths: tuple[int, int]
  ) -> Example:
    """A row of sources and a row of targets of these lengths."""
    inputs = [np.append(self.start, ids[:-1]) for ids in targets]
    example = pack.assemble(inputs, lengths[1])
    source = pack.assemble(list(sources), lengths[0])
    example |= {f'{SOURCE}{name}': x for name, x in source.items()}
    wanted = pack.assemble(list(targets), lengths[1])
    return example | {
      'targets': wanted['tokens'],
      'weights': (wanted['segments'] > 0).astype(np.float32),
    }
