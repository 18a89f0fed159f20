"""`--mode=generate`: a decoder continues prompts, an encoder fills in what is masked."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from llm_jax.modes import _command
from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.inference.sampling import Sampling
  from llm_jax.inference.session import Session

PROMPT = flags.DEFINE_multi_string(
  'prompt',
  None,
  'generate: a text to continue, or to fill in at [MASK]; may be repeated.',
)
STOP = flags.DEFINE_multi_string(
  'stop', [], 'generate: a string before which a text ends; may be repeated.'
)
flags.DEFINE_integer('max_new_tokens', 128, 'generate: the most tokens that come after a prompt.')
flags.DEFINE_float(
  'temperature', 1.0, 'generate: how freely is drawn; 0 takes the most likely token.'
)
flags.DEFINE_integer('top_k', 0, 'generate: only the most likely K tokens are drawn; 0 for all.')
flags.DEFINE_float(
  'top_p', 1.0, 'generate: only the most likely tokens of this probability together are drawn.'
)
flags.DEFINE_float(
  'min_p',
  0.0,
  'generate: only tokens at least this many times as likely as the most likely are drawn.',
)
flags.DEFINE_float(
  'repetition_penalty',
  1.0,
  'generate: above 1, tokens that stand in the text already become less likely.',
)
flags.DEFINE_integer('beams', 1, 'generate: beam search with so many beams; needs --temperature=0.')
flags.DEFINE_float('length_penalty', 1.0, 'generate: of beam search; above 1 favours long texts.')
flags.DEFINE_integer('seed', 0, 'generate: the same seed draws the same text.')


def run(command: Command) -> None:
  """Prints texts, or writes them to --output."""
  from llm_jax.inference.sampling import Sampling

  numbers = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Sampling)}
  generate(
    command.session(),
    PROMPT.value,
    _command.input_file(),
    _command.output_path(),
    Sampling(**numbers),
    STOP.value,
  )


def generate(
  session: 'Session',
  prompts: Sequence[str] | None,
  source: pathlib.Path | None,
  target: pathlib.Path | None,
  sampling: 'Sampling',
  stop: Sequence[str] = (),
) -> None:
  """Prints what a model makes of each prompt, as it comes where there is but one, or writes it.

  Args:
    session: a model.
    prompts: the texts to continue, or, for an encoder, to fill in; None: they stand in `source`.
    source: .txt, a prompt per line; or .jsonl, in the field `config.data.text` ('text').
    target: .jsonl, {"prompt": ..., "text": ...} per line, for an encoder also "masks"; None to
      print.
    sampling: how tokens are chosen.
    stop: strings before which a text ends.

  Raises:
    ValueError: prompts in both places or in none, files that are not possible, or what
      `Session.complete` or `Session.fill` raises.
  """
  from llm_jax.parallel import hosts

  prompts = _prompts(session, prompts, source, target)
  if not session.causal:
    filled = session.fill(prompts)
    answers = [{'text': text.text, 'masks': text.masks} for text in filled]
  else:
    live = target is None and len(prompts) == 1 and hosts.primary()
    stream = _terminal(prompts[0]) if live else None
    texts = session.complete(prompts, sampling=sampling, stop=stop, stream=stream)
    if live:
      print('' if texts[0] else prompts[0])
      return
    answers = [{'text': text} for text in texts]
  if hosts.primary():
    _give(prompts, answers, target)


def _terminal(prompt: str) -> Callable[[int, str], None]:
  """Prints what comes, after the prompt."""
  begun = []

  def show(_: int, piece: str) -> None:
    print(piece if begun else prompt + piece, end='', flush=True)
    begun.append(True)

  return show


def _prompts(
  session: 'Session',
  prompts: Sequence[str] | None,
  source: pathlib.Path | None,
  target: pathlib.Path | None,
) -> list[str]:
  from llm_jax.modes.embed import read_texts

  if (prompts is None) == (source is None):
    raise ValueError("--mode=generate needs either --prompt='...' or --input=prompts.txt.")
  if target is not None:
    _command.check_output(target, ('.jsonl',))
  if prompts is not None:
    return list(prompts)
  return read_texts(source, session.config.data.get('text') or 'text')


def _give(
  prompts: Sequence[str], answers: Sequence[dict[str, Any]], target: pathlib.Path | None
) -> None:
  """Prints prompts and answers, or writes them, whole or not at all."""
  from llm_jax.core import files

  if target is not None:
    with files.whole_file(target) as file:
      for prompt, answer in zip(prompts, answers, strict=True):
        file.write(json.dumps({'prompt': prompt} | answer, ensure_ascii=False) + '\n')
    return
  for prompt, answer in zip(prompts, answers, strict=True):
    print(answer['text'] if 'masks' in answer else prompt + answer['text'])
    for candidates in answer.get('masks', ()):
      print('  ' + '  '.join(f'{token} {p:.3f}' for token, p in candidates))
