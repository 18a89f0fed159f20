"""`--mode=augment`: the records of a file again, some of their words replaced by what a masked LM
finds likely there; labels and all other fields stay.
"""

import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.modes import _command
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.inference.session import Session

RATE = flags.DEFINE_float(
  'rate', 0.15, 'augment: the share of the words of a text that are replaced, at least one.'
)
TOP = 10  # candidates of a word, of which one is drawn by its probability
BLOCK = 1024  # texts that are masked together


def run(command: Command) -> None:
  """Reads --input, writes --output."""
  command.require('input=train.jsonl', 'output=more.jsonl')
  target = _command.output_path()
  with _command.input_file() as source:
    _check(source, target, RATE.value)  # before a model is opened
    seed = flags.FLAGS['seed'].value
    augment(command.session(), source, target, RATE.value, seed, _command.TEXT.value)


def augment(
  session: 'Session',
  source: pathlib.Path,
  target: pathlib.Path,
  rate: float = 0.15,
  seed: int = 0,
  text: str | None = None,
) -> None:
  """Writes each record of a file with other words in its text; a call that is interrupted is gone
  on with by the same call (`answers.write_answers`).

  Args:
    session: an encoder with a masked-LM head.
    source: one of `records.SUFFIXES`.
    target: one of `answers.OUTPUTS`. A record without a word, or too long, has `error`.
    rate: the share of the words that are replaced.
    seed: of what is drawn, for each record by its number.
    text: the field with the text, as `records.Records` has it.

  Raises:
    ValueError: files that are not possible, a model that fills in no words.
  """
  import numpy as np

  from llm_jax.data import augmentation
  from llm_jax.inference import answers
  from llm_jax.inference.filling import MASK
  from llm_jax.inference.records import Records

  _check(source, target, rate)
  if session.causal:
    raise ValueError('this model is a decoder; a masked LM, such as bert_tiny, replaces words.')
  session.fill([])  # where it cannot, that is said before records are read
  own = {key: value for key, value in session.config.data.items() if key != 'pair'}
  records = Records(source, own, text)
  field = records.fields.text

  def ask(numbered: Iterator[tuple[int, Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    while block := list(itertools.islice(numbered, BLOCK)):
      draws = [np.random.default_rng([seed, number]) for number, _ in block]
      texts = [record['text'] for _, record in block]
      found = [augmentation.blanks(*each) for each in zip(texts, itertools.repeat(rate), draws)]
      filled = session.fillings((each.masked(MASK) for each in found), TOP)
      for each, rng, one in zip(found, draws, filled, strict=True):
        yield {field: each.filled(one.masks, rng)}

  def check(record: Mapping[str, Any]) -> None:
    if MASK in record['text']:
      raise ValueError(f'the text holds a {MASK} already')
    augmentation.blanks(record['text'], rate, np.random.default_rng(0))
    session.check_prompt(f'{record["text"]} {MASK}', None)

  def change(line: dict[str, Any]) -> dict[str, Any]:
    """A record without the text that it had."""
    dropped = () if 'error' in line else (f'input_{field}',)
    return {key: value for key, value in line.items() if key not in dropped}

  made_by = answers.model_key(session.origin, session.config, *session.beside, rate, seed)
  answers.write_answers(records, ask, target, made_by, check, change)


def _check(source: pathlib.Path, target: pathlib.Path, rate: float) -> None:
  from llm_jax.inference import answers

  if not 0 < rate < 1:
    raise ValueError(f'--rate={rate} must be a share of the words, above 0 and below 1.')
  _command.check_input(source)
  _command.check_output(target, answers.OUTPUTS, source)
