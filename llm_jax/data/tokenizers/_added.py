"""Special tokens that a tokenizer is given beside its own: marks of a chat, sentinels."""

import re
from collections.abc import Mapping, Sequence

SENTINEL = '<extra_id_{}>'  # as T5 calls them (arXiv:1910.10683)
_NUMBERED = re.compile(r'<extra_id_(\d+)>')


def texts(added: Sequence[str], sentinels: int, known: Sequence[str]) -> tuple[str, ...]:
  """The texts of all of them: those of `added`, then the sentinels.

  Args:
    added: as the config has them.
    sentinels: how many.
    known: texts of the special tokens that are there.

  Raises:
    ValueError: an empty one, one that is there already, a negative number.
  """
  if sentinels < 0:
    raise ValueError(f'tokenizer.sentinels={sentinels} must be at least 0.')
  found = (*added, *map(SENTINEL.format, range(sentinels)))
  for number, text in enumerate(found):
    if not text.strip() or text in found[:number] or text in known:
      raise ValueError(f'tokenizer.added={text!r} must be a text that no other special token has.')
  return found


def named(ids: Mapping[str, int], texts: Mapping[int, str]) -> dict[str, str]:
  """Texts of special tokens by `bos_token` and the like.

  Args:
    ids: of special tokens, by 'bos' and the like.
    texts: by id.
  """
  return {f'{name}_token': texts[number] for name, number in ids.items() if number in texts}


def sentinels(ids: Mapping[str, int]) -> tuple[int, ...]:
  """The ids of the sentinels in their order, of a vocabulary by text.

  Example:
    >>> sentinels({'<extra_id_0>': 9, '<extra_id_1>': 8, '<extra_id_3>': 7})
    (9, 8)
  """
  numbered = {int(match[1]): ids[text] for text in ids if (match := _NUMBERED.fullmatch(text))}
  found: list[int] = []
  while len(found) in numbered:
    found.append(numbered[len(found)])
  return tuple(found)
