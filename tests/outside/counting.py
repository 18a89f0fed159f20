"""A source that makes its records: the numbers below a hundred in words."""

from typing import Any

BELOW_TWENTY = (
  'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen '
  'sixteen seventeen eighteen nineteen'
).split()
TENS = 'twenty thirty forty fifty sixty seventy eighty ninety'.split()
KINDS = ('tags', 'pairs', 'text')


class Source:
  """Records of one kind.

  Args:
    kind: 'tags': two numbers as `words`, and the `tags` of these; 'pairs': a number in words as
      `source`, one in digits as `target`, and a `score` of 1 where they are equal, else 0; 'text':
      three numbers in a row as `text`.
    count: how many records.
  """

  def __init__(self, kind: str, count: int = 64):
    if kind not in KINDS:
      raise ValueError(f'data.kind={kind!r} must be one of {", ".join(KINDS)}.')
    self.kind, self.count = kind, count
    self.fingerprint = f'counting {kind} {count}'

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict[str, Any]:
    number = index % 98
    if self.kind == 'text':
      words = [word for n in range(number, number + 3) for word, _ in spelled(n)]
      return {'text': ' '.join(words)}
    if self.kind == 'tags':
      tagged = [*spelled(number), *spelled(37 * index % 100)]
      return {'words': [word for word, _ in tagged], 'tags': [tag for _, tag in tagged]}
    other = number if index % 2 else 99 - number
    words = [word for word, _ in spelled(number)]
    return {'source': ' '.join(words), 'target': str(other), 'score': float(number == other)}


def spelled(number: int) -> list[tuple[str, str]]:
  """The words of a number below a hundred, each with its tag."""
  if number < 20:
    return [(BELOW_TWENTY[number], 'unit' if number < 10 else 'teen')]
  tens = (TENS[number // 10 - 2], 'tens')
  return [tens, (BELOW_TWENTY[number % 10], 'unit')] if number % 10 else [tens]
