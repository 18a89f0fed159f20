"""Training of SentencePiece models: a sample of the corpus, the trainer's options, its errors."""

import io
import re
import time
from collections.abc import Iterable, Iterator, Mapping

import sentencepiece
from absl import logging

from llm_jax.data.tokenizers import _convert, _export

PIECES = _export.NAMES
KINDS = ('unigram', 'bpe')
NORMALIZATIONS = ('identity', 'nfkc')
_LINE_CHARACTERS = 1000  # at most 4000 bytes: the trainer drops a sentence of more than 4192


def sample(texts: Iterable[str], limit: int) -> list[str]:
  """Lines of at most about `limit` UTF-8 bytes in all, spread evenly over the texts, in one pass
  that holds twice that much.

  Which lines are taken depends on their number alone: line i has the key i * 2654435769 mod 2**32
  (multiples of the golden ratio, whose low values lie evenly and hit no period of the text), and
  those with the lowest keys stay.
  """
  kept: list[tuple[int, int, str]] = []  # (key, bytes, line)
  total = held = seen = 0  # bytes of all lines, bytes of those that are kept, lines
  threshold = 2**32
  for text in texts:
    for line in _lines(text):
      key, size = seen * 2654435769 % 2**32, len(line.encode('utf-8', 'replace'))
      seen += 1
      total += size
      if key < threshold:
        kept.append((key, size, line))
        held += size
        if held > 2 * limit:
          threshold //= 2
          kept, held = _below(kept, threshold)
  if held > limit:
    kept, held = _below(kept, threshold * limit // held)
  logging.info(
    'Tokenizer: training on %d of %d lines, %.1f of %.1f MB.',
    len(kept),
    seen,
    held / 1e6,
    total / 1e6,
  )
  return [line for _, _, line in kept]


def _below(
  kept: list[tuple[int, int, str]], threshold: int
) -> tuple[list[tuple[int, int, str]], int]:
  kept = [entry for entry in kept if entry[0] < threshold]
  return kept, sum(size for _, size, _ in kept)


def _lines(text: str) -> Iterator[str]:
  for line in text.split('\n'):
    for start in range(0, len(line), _LINE_CHARACTERS):
      yield line[start : start + _LINE_CHARACTERS]


def check_options(
  vocab_size: int, kind: str, normalization: str, character_coverage: float, sample_bytes: int
) -> None:
  """Raises ValueError for an option that is out of range."""
  if kind not in KINDS:
    raise ValueError(f'kind={kind!r} is not known; allowed: {", ".join(KINDS)}.')
  if normalization not in NORMALIZATIONS:
    raise ValueError(
      f'normalization={normalization!r} is not known; allowed: {", ".join(NORMALIZATIONS)}.'
    )
  if not 0.9 <= character_coverage <= 1:
    raise ValueError(
      f'character_coverage={character_coverage} must be from 0.9 to 1; 0.9995 suits most languages.'
    )
  if sample_bytes < 1000:
    raise ValueError(f'sample_bytes={sample_bytes} is too small; give at least 1000.')
  if vocab_size <= len(PIECES) + 2 + 256:
    raise ValueError(
      f'vocab_size={vocab_size} leaves no id for a piece; give more than {len(PIECES) + 2 + 256}, '
      'or take the tokenizer named byte.'
    )


def train(lines: list[str], options: Mapping[str, object]) -> bytes:
  """Trains on the lines and returns the serialised model; one thread, so that equal lines give
  equal bytes.
  """
  if not lines:
    raise ValueError(
      'the tokenizer has an empty corpus to train on; give texts that are not empty.'
    )
  names = {name: pieces[0] for name, pieces in PIECES.items()}
  writer, began = io.BytesIO(), time.monotonic()
  try:
    sentencepiece.SentencePieceTrainer.Train(
      sentence_iterator=iter(lines),
      model_writer=writer,
      num_threads=1,
      minloglevel=2,
      byte_fallback=True,
      # Text comes back exactly: no space is added, dropped or merged; newline, tab and runs of
      # spaces have pieces.
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      # Without a piece a space would be spelled in the bytes of the sign that stands for it.
      required_chars='\u2581',
      user_defined_symbols=['\n', '\t'],
      pad_id=0,
      unk_id=1,
      bos_id=5,
      eos_id=6,
      control_symbols=[names['cls'], names['sep'], names['mask']],  # these fill 2, 3, 4
      pad_piece=names['pad'],
      unk_piece=names['unk'],
      bos_piece=names['bos'],
      eos_piece=names['eos'],
      **options,
    )
  except RuntimeError as error:
    raise ValueError(_training_error(str(error), options)) from error
  logging.info('Tokenizer: trained in %.0f s.', time.monotonic() - began)
  return _convert.rounded(writer.getvalue())


def _training_error(message: str, options: Mapping[str, object]) -> str:
  given = f'vocab_size={options["vocab_size"]}'
  if match := re.search(r'set it to a value <= (\d+)', message):
    return (
      f'{given} is more than the corpus can fill; the largest that works is {match[1]} '
      '(or give more text, or a larger sample_bytes).'
    )
  if match := re.search(r'smaller than required_chars\. \d+ vs (\d+)', message):
    return (
      f'{given} is too small for the characters of the corpus at '
      f'character_coverage={options["character_coverage"]}; '
      f'give at least {match[1]}, or a lower character_coverage.'
    )
  return f'SentencePiece could not train with {dict(options)}: {message}'
