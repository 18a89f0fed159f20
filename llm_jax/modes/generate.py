"""`--mode=generate`: a decoder continues prompts, an encoder fills in what is masked, and what has
both answers them.
"""

import collections
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.modes import _command, _decoding
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.generation.sampling import Sampling
  from llm_jax.inference.records import Records
  from llm_jax.inference.session import Session

PROMPT = flags.DEFINE_multi_string(
  'prompt',
  None,
  'generate: a text to continue, or to fill in at [MASK]; may be repeated.',
)
STOP = flags.DEFINE_multi_string(
  'stop', [], 'generate: a string before which a text ends; may be repeated.'
)


PREFIX = flags.DEFINE_string(
  'prefix',
  None,
  'generate: with --suffix, a text to fill in behind, by a decoder that has learned it.',
)
SUFFIX = flags.DEFINE_string('suffix', None, 'generate: what stands behind --prefix.')


def run(command: Command) -> None:
  """Prints texts, or writes them to --output."""
  if PREFIX.value is not None or SUFFIX.value is not None:
    _infill(command)
    return
  prompts, sampling = PROMPT.value, _decoding.sampling(temperature=1.0)
  target = _command.output_path()
  with _command.input_file() as source:
    _check(prompts, source, target)  # before a model is opened
    generate(command.session(), prompts, source, target, sampling, STOP.value, _command.TEXT.value)


def _infill(command: Command) -> None:
  """Prints a text with its middle filled in."""
  prefix, suffix = PREFIX.value, SUFFIX.value
  if prefix is None or suffix is None or PROMPT.value or _command.INPUT.value:
    raise ValueError(
      "--prefix='...' and --suffix='...' go together, without --prompt and --input; the text "
      'between them is written.'
    )
  if _command.OUTPUT.value:
    raise ValueError('--prefix and --suffix print one text; leave --output out.')
  sampling = _decoding.sampling(temperature=1.0)
  for middle in command.session().infill([(prefix, suffix)], sampling=sampling):
    print(prefix + middle + suffix)


def generate(
  session: 'Session',
  prompts: Sequence[str] | None,
  source: pathlib.Path | None,
  target: pathlib.Path | None,
  sampling: 'Sampling',
  stop: Sequence[str] = (),
  text: str | None = None,
) -> None:
  """Prints what a model makes of each prompt, as it comes where there is but one, or writes it.

  Args:
    session: a model.
    prompts: the texts to continue, or, for an encoder, to fill in; None: they stand in `source`.
    source: one of `records.SUFFIXES`. A prompt of it that is not possible has `error`.
    target: one of `answers.OUTPUTS`: each record again, its text as `prompt`, with the new `text`
      (and all that were asked for as `texts`), for an encoder also `masks`; None to print.
    sampling: how tokens are chosen.
    stop: strings before which a text ends.
    text: the field of `source` with the prompt, as `records.Records` has it.

  Raises:
    ValueError: prompts in both places or in none, files that are not possible, or what
      `Session.complete` or `Session.fill` raises.
  """
  from llm_jax.inference.records import Records
  from llm_jax.parallel import hosts

  _check(prompts, source, target)
  if source is not None:
    own = {key: value for key, value in session.config.data.items() if key != 'pair'}
    _answer_file(session, Records(source, own, text), target, sampling, stop)
    return
  one = len(prompts) == sampling.num_return_sequences == 1
  live = session.causal and target is None and one and hosts.primary()
  if live:
    stream = _terminal(prompts[0])
    (completion,) = session.complete(prompts, sampling=sampling, stop=stop, stream=stream)
    print('' if completion else prompts[0])
    return
  lines = list(_answers(session, enumerate(prompts), sampling, stop))
  if hosts.primary():
    _give(lines, target)


def _answer_file(
  session: 'Session',
  records: 'Records',
  target: pathlib.Path | None,
  sampling: 'Sampling',
  stop: Sequence[str],
) -> None:
  from llm_jax.inference import answers
  from llm_jax.parallel import hosts

  def ask(numbered: Iterator[tuple[int, Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    prompts = ((number, record['text']) for number, record in numbered)
    return _answers(session, prompts, sampling, stop)

  check = lambda record: session.check_prompt(record['text'], sampling)
  change = functools.partial(_without_prompt, field=records.fields.text)
  if target is not None:
    made_by = answers.model_key(
      session.origin, session.config, *session.beside, sampling, tuple(stop)
    )
    answers.write_answers(records, ask, target, made_by, check, change)
    return
  for line in records.answered(ask, check=check):
    if hosts.primary():
      _print(change(line))
  records.log_faults()


def _answers(
  session: 'Session',
  prompts: Iterable[tuple[int, str]],
  sampling: 'Sampling',
  stop: Sequence[str],
) -> Iterator[dict[str, Any]]:
  """What becomes of each prompt; it comes with the number that its draws depend on."""
  asked: collections.deque[str] = collections.deque()

  def noted() -> Iterator[tuple[int, str]]:
    for number, prompt in prompts:
      asked.append(prompt)
      yield number, prompt

  if session.causal:
    written = session.completions(noted(), sampling, stop)
    each = sampling.num_return_sequences
    while texts := list(itertools.islice(written, each)):
      answer = {'prompt': asked.popleft(), 'text': texts[0]}
      yield answer | ({'texts': texts} if each > 1 else {})
    return
  for filled in session.fillings(prompt for _, prompt in noted()):
    yield {'prompt': asked.popleft(), 'text': filled.text, 'masks': filled.masks}


def _without_prompt(line: dict[str, Any], field: str) -> dict[str, Any]:
  """A record without the field that its answer has as `prompt`."""
  dropped = f'input_{field}' if field in line else field
  return {key: value for key, value in line.items() if key != dropped or 'error' in line}


def _terminal(prompt: str) -> Callable[[int, str], None]:
  """Prints what comes, after the prompt."""
  begun = []

  def show(_: int, piece: str) -> None:
    print(piece if begun else prompt + piece, end='', flush=True)
    begun.append(True)

  return show


def _check(
  prompts: Sequence[str] | None, source: pathlib.Path | None, target: pathlib.Path | None
) -> None:
  from llm_jax.inference import answers

  if (prompts is None) == (source is None):
    raise ValueError("--mode=generate needs either --prompt='...' or --input=prompts.txt.")
  if source is not None:
    _command.check_input(source)
  if target is not None:
    _command.check_output(target, answers.OUTPUTS, source)


def _give(lines: Sequence[Mapping[str, Any]], target: pathlib.Path | None) -> None:
  """Prints prompts and answers, or writes them, whole or not at all."""
  from llm_jax.inference import answers

  if target is not None:
    answers.write(target, lines)
    return
  for line in lines:
    _print(line)


def _print(line: Mapping[str, Any]) -> None:
  if 'error' in line:
    print(f'error: {line["error"]}')
    return
  for text in line.get('texts', [line['text']]):
    print(text if 'masks' in line else line['prompt'] + text)
  for candidates in line.get('masks', ()):
    print('  ' + '  '.join(f'{token} {p:.3f}' for token, p in candidates))
