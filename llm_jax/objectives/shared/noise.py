"""Text with parts taken out, and what an encoder-decoder is to write of it: spans of T5 (Raffel et
al. 2020, arXiv:1910.10683, section 3.1.4), text infilling and sentence permutation of BART (Lewis
et al. 2020, arXiv:1910.13461, section 2.2), the mixture of UL2 (Tay et al. 2022, arXiv:2205.05131,
section 3.1).

How many tokens a text of n tokens becomes depends on n alone, so that rows can be planned before
anything is drawn.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]  # source and target, without what stands around them


class Noise(Protocol):
  """A way of taking parts out of texts of two tokens or more."""

  def lengths(self, n: np.ndarray) -> Pair:
    """The most tokens of source and target, for texts of n tokens; [n] integers each."""
    ...

  def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Pair:
    """Source and target of one text, drawn anew each time."""
    ...


class Spans(NamedTuple):
  """Spans are taken out, one sentinel after the other stands for each; the target has the sentinels
  with what they stand for. A text begins with a token that stays and ends with a span.

  Attributes:
    sentinels: their ids, in order.
    rate: share of the tokens that are taken out.
    mean: tokens of a span, on average; None: one span.
    mode: ids before the source, which say what is asked.
    at_end: the one span is the end of the text: what a language model continues.
  """

  sentinels: Sequence[int]
  rate: float
  mean: float | None
  mode: Sequence[int] = ()
  at_end: bool = False

  def counts(self, n: np.ndarray) -> Pair:
    """How many tokens are taken out of texts of n, and in how many spans."""
    n = np.asarray(n)
    out = np.clip(np.round(n * self.rate).astype(np.int64), 1, np.maximum(n - 1, 1))
    if self.mean is None or self.at_end:
      return out, np.ones_like(out)
    spans = np.maximum(np.round(out / self.mean).astype(np.int64), 1)
    return out, np.minimum(spans, np.minimum(out, np.maximum(n - out, 1)))

  def lengths(self, n: np.ndarray) -> Pair:
    """See `Noise`."""
    out, spans = self.counts(n)
    return n - out + spans + len(self.mode), out + spans

  def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Pair:
    """See `Noise`."""
    out, spans = map(int, self.counts(np.array(len(tokens))))
    kept_sizes = _parts(len(tokens) - out, spans, rng)
    out_sizes = _parts(out, spans, rng)
    bounds = np.cumsum(np.stack([kept_sizes, out_sizes], axis=1).reshape(-1))
    pieces = np.split(tokens, bounds[:-1])
    source: list[np.ndarray] = [np.asarray(self.mode, np.int32)]
    target: list[np.ndarray] = []
    for number, (kept, taken) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
      sentinel = np.array([self.sentinels[number]], np.int32)
      source += [kept, sentinel]
      target += [sentinel, taken]
    return np.concatenate(source), np.concatenate(target)


class Infilling(NamedTuple):
  """Spans of a length from Poisson's distribution are taken out, and one mask stands for each, also
  for those of no length; sentences are put in another order; the target is the text as it was.

  Attributes:
    mask: its id.
    rate: share of the tokens that are taken out.
    mean: of Poisson's distribution.
    ends_V: which tokens end a sentence; None: sentences stay in their order.
  """

  mask: int
  rate: float
  mean: float
  ends_V: np.ndarray | None

  def lengths(self, n: np.ndarray) -> Pair:
    """See `Noise`."""
    return n, n

  def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Pair:
    """See `Noise`."""
    shuffled = tokens if self.ends_V is None else _permuted(tokens, self.ends_V, rng)
    out = int(np.clip(round(len(tokens) * self.rate), 1, len(tokens) - 1))
    sizes = _poisson(out, self.mean, rng)
    gaps = _gaps(len(tokens) - out, len(sizes), rng)
    source, at = [], 0
    for gap, size in zip(gaps[:-1], sizes, strict=True):
      source += [shuffled[at : at + gap], np.array([self.mask], np.int32)]
      at += gap + size
    return np.concatenate([*source, shuffled[at:]]), tokens


def mixture(sentinels: Sequence[int], modes: Sequence[Sequence[int]]) -> tuple[Spans, ...]:
  """The seven of UL2, table 1: regular, sequential, and extreme ones, each equally often.

  Args:
    sentinels: their ids, in order.
    modes: ids before the sources of regular, of sequential and of extreme ones.
  """
  regular, sequential, extreme = modes
  return (
    Spans(sentinels, 0.15, 3.0, regular),
    Spans(sentinels, 0.15, 8.0, regular),
    Spans(sentinels, 0.25, None, sequential, at_end=True),
    Spans(sentinels, 0.5, 3.0, extreme),
    Spans(sentinels, 0.5, 8.0, extreme),
    Spans(sentinels, 0.15, 64.0, extreme),
    Spans(sentinels, 0.5, 64.0, extreme),
  )


def longest(noises: Sequence[Noise], room: tuple[int, int], sentinels: int) -> int:
  """The most tokens of a text, so that all of these fit in such rows; below 2 for none.

  Args:
    noises: all that a text may get.
    room: tokens of a source and of a target.
    sentinels: how many there are; a text gets no more spans.
  """
  n = np.arange(2, 4 * sum(room) + 2)
  fits = np.ones(len(n), bool)
  for noise in noises:
    source, target = noise.lengths(n)
    fits &= (source <= room[0]) & (target <= room[1])
    if isinstance(noise, Spans):
      fits &= noise.counts(n)[1] <= sentinels
  return int(n[-1] if fits.all() else n[0] + np.argmin(fits) - 1)


def sentence_ends(decode: Callable[[Sequence[int]], str], special_V: np.ndarray) -> np.ndarray:
  """[V] bool: tokens whose text ends a sentence."""
  marks = ('.', '!', '?', '\n', '\u3002', '\uff01', '\uff1f', '\u0964', '\u061f')
  return np.array(
    [not special and decode([i]).endswith(marks) for i, special in enumerate(special_V.tolist())]
  )


def _parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
  """`count` numbers of at least 1 that add up to `total`, each division equally likely."""
  cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1 if count > 1 else []
  return np.diff(np.concatenate([[0], cuts, [total]]).astype(np.int64))


def _gaps(total: int, spans: int, rng: np.random.Generator) -> list[int]:
  """How many tokens stay before each span and after the last, any division equally likely."""
  return (_parts(total + spans + 1, spans + 1, rng) - 1).tolist()


def _poisson(total: int, mean: float, rng: np.random.Generator) -> list[int]:
  """Lengths that add up to `total`, the last one cut; no more of them than `total`."""
  sizes: list[int] = []
  left = total
  while left > 0:
    size = min(int(rng.poisson(mean)), left)
    if size or len(sizes) + left < total:  # a mask more, and all that is left still has room
      sizes.append(size)
      left -= size
  return [sizes[i] for i in rng.permutation(len(sizes))]


def _permuted(tokens: np.ndarray, ends_V: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  sentences = np.split(tokens, np.flatnonzero(ends_V[tokens[:-1]]) + 1)
  return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])
