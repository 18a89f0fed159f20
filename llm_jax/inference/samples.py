"""A hook that shows what a decoder in training writes."""

import itertools
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from llm_jax.core.contracts import Documents, Tokenizer
from llm_jax.core.state import TrainState
from llm_jax.core.tree import PyTree
from llm_jax.data import prompted
from llm_jax.generation import completion
from llm_jax.generation.sampling import Sampling
from llm_jax.parallel import hosts
from llm_jax.programs.inference import Inference
from llm_jax.training.logs import Log
from llm_jax.training.loop import Run

FILE = 'samples.txt'
NEW_TOKENS, PROMPT_TOKENS = 48, 8
TEMPERATURE = 0.8
CONTROLS = ('Cc', 'Cs', 'Zl', 'Zp')  # by Unicode's categories


class Samples:
  """Texts that a decoder writes at each evaluation: first after nothing, then after the beginnings
  of validation documents; in the log, in TensorBoard, and after those of earlier evaluations in
  samples.txt.

  Attributes:
    every: steps between two evaluations.

  Args:
    program: trains the decoder.
    tokenizer: that of the model.
    documents: where the beginnings come from.
    count: how many samples.
    path: of samples.txt.
    every: steps between two evaluations.
    log: of the run.
  """

  def __init__(
    self,
    program: Inference,
    tokenizer: Tokenizer,
    documents: Sequence[Documents],
    count: int,
    path: pathlib.Path,
    every: int,
    log: Log,
  ):
    self.every = every
    self._tokenizer, self._path, self._log = tokenizer, path, log
    self._completer, self._kept = completion.of(program, tokenizer, rows=count), program.kept
    longest = program.network.longest
    begin = min(PROMPT_TOKENS, longest // 4)
    self._beginnings = _beginnings(documents, begin, count)
    self._sampling = Sampling(
      max_new_tokens=min(NEW_TOKENS, longest - begin - 1),
      temperature=TEMPERATURE,
      seed=program.config.seed,
    )

  @classmethod
  def of(cls, run: Run, log: Log) -> 'Samples | None':
    """The hook of a run; None where it is no language model that continues prompts."""
    program, data = run.program, run.data
    count = program.config.evaluation.samples
    if not count or not program.network.model.causal or 'clm' not in program.objective.terms:
      return None
    path = run.workdir / FILE
    documents = data.splits.validation or data.splits.train
    return cls(program, data.tokenizer, documents, count, path, run.eval_every, log)

  def __call__(self, step: int, state: TrainState, values: Mapping[str, float]) -> None:
    """Shows the samples of a step; all processes call it."""
    del values
    lines = [shown(*sample) for sample in self.texts(state.answering_params)]
    for line in lines:
      self._log.say('step %d  sample: %s', step, line)
    self._log.text(step, 'samples', '\n'.join(lines))
    if hosts.primary():
      with open(self._path, 'a', encoding='utf-8') as file:
        file.write(f'step {step}\n' + ''.join(f'  {line}\n' for line in lines))

  def texts(self, params: PyTree) -> list[tuple[str, str]]:
    """Beginnings and their completions, the same each time for the same parameters."""
    before = (*prompted.prompt(self._tokenizer), self._tokenizer.bos_id)
    prompts = [[*before, *ids] for ids in self._beginnings]
    weights = self._completer.generator.weights(self._kept(params)['model'])
    texts = self._completer.from_ids(weights, prompts, self._sampling)
    beginnings = [self._tokenizer.decode(ids) for ids in self._beginnings]
    return list(zip(beginnings, texts, strict=True))


def shown(prompt: str, text: str) -> str:
  """A beginning and what follows, as they are; further lines are indented, and control characters,
  which a terminal would obey, escaped.
  """
  whole = f'{prompt} -> {text}'.replace('\n', '\n    ')
  return ''.join(_escaped(c) if unicodedata.category(c) in CONTROLS else c for c in whole)


def _escaped(character: str) -> str:
  return character if character in '\n\t' else character.encode('unicode_escape').decode()


def _beginnings(documents: Sequence[Documents], length: int, count: int) -> list[np.ndarray]:
  """An empty one, and the first tokens of documents."""
  known = (
    part.array('tokens', index, 0, length)
    for part in documents
    for index in range(len(part))
    if part.lengths('tokens')[index]
  )
  return [np.zeros(0, np.int32), *itertools.islice(known, count - 1)]
