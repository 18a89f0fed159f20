"""New text that a model writes for the texts of a validation set, beside what it should have
written.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llm_jax.core import plugins
from llm_jax.core.contracts import Model, Objective, Validation

WORST = 10  # texts in the report
SHOWN = 300  # characters of each


class Written(NamedTuple):
  """One text.

  Attributes:
    asked: what the model was given.
    wanted: what stands in the record; it is not what the tokenizer makes of it.
    found: what the model wrote.
  """

  asked: str
  wanted: str
  found: str


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """What evaluators of new text have in common. Texts are written by beams, or else the most likely
  tokens are taken; a text for which the model has no more room ends there.

  Attributes:
    max_new_tokens, min_new_tokens, no_repeat_ngram_size, repetition_penalty, beams, length_penalty:
      as flags of `--mode=predict` have them.
  """

  max_new_tokens: int = 128
  min_new_tokens: int = 0
  no_repeat_ngram_size: int = 0
  repetition_penalty: float = 1.0
  beams: int = 1
  length_penalty: float = 1.0

  @property
  def options(self) -> dict[str, Any]:
    """Fields of `Sampling`."""
    own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Evaluator)}
    return own | {'temperature': 0.0}

  def check(self, objective: Objective, model: Model) -> None:
    """Raises ValueError where nothing can be written, or not so much."""
    if not objective.writes:
      raise ValueError(
        f'the evaluator {plugins.said(self)} scores new text, and the objective '
        f'{plugins.said(objective)} asks for none; name other evaluators in config.evaluators.'
      )
    if self.max_new_tokens >= model.max_len:
      raise ValueError(
        f'max_new_tokens={self.max_new_tokens} of the evaluator {plugins.said(self)} must be '
        f'less than config.model.max_len={model.max_len}.'
      )

  def evaluate(self, validation: Validation) -> tuple[dict[str, Any], str]:
    """Scores by name, the signatures of the libraries that gave them, and a report.

    Raises:
      ValueError: an ensemble, which does not write.
    """
    texts = written(validation, self.options)
    numbers = self.scores(texts)
    title = f'{len(texts)} texts, written with {_said(self.options)}:'
    lines = [
      f'{name:>16} {value if isinstance(value, str) else format(value, ".4f")}'
      for name, value in numbers.items()
    ]
    return numbers, '\n'.join([title, *lines, '', *worst(texts, self.score)])

  def scores(self, texts: Sequence[Written]) -> dict[str, Any]:
    """Numbers of all texts by name, and signatures."""
    raise NotImplementedError

  def score(self, text: Written) -> float:
    """How good one text is; the worst are shown."""
    raise NotImplementedError


def written(validation: Validation, options: dict[str, Any]) -> list[Written]:
  """What is written for each text of a validation set, in their order.

  Raises:
    ValueError: an ensemble, or no text.
  """
  if validation.write is None:
    raise ValueError(
      'several models answer together only where answers have means; new text has '
      'none. --soup is one model.'
    )
  prompts: dict[tuple[int, int], tuple[Any, int, Any]] = {}
  for rows, index in validation.rows:
    prompts |= {(id(rows), text): (rows, text, rows.prompt(text)) for text in rows.texts(index)}
  texts = [each for each in prompts.values() if each[2] is not None]
  if not texts:
    raise ValueError('the validation set has no text for which something could be written.')
  found = validation.write([prompt for _, _, prompt in texts], options)
  asked = (validation.objective.asked(validation.record(rows, text)) for rows, text, _ in texts)
  return [Written(*pair, new) for pair, new in zip(asked, found, strict=True)]


def worst(texts: Sequence[Written], score: Callable[[Written], float]) -> list[str]:
  """Lines about the texts of the lowest scores."""
  order = sorted(((score(text), number) for number, text in enumerate(texts)))[:WORST]
  lines = [f'the {len(order)} worst:']
  for value, number in order:
    lines.append(f'{value:8.4f}')
    for name, text in zip(('asked', 'wanted', 'written'), texts[number], strict=True):
      lines.append(f'{name:>10}: {_shortened(text)}')
  return lines


def _shortened(text: str) -> str:
  line = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
  return line if len(line) <= SHOWN else f'{line[: SHOWN - 3]}...'


def _said(options: dict[str, Any]) -> str:
  return ', '.join(f'{name}={value:g}' for name, value in options.items() if name != 'temperature')
