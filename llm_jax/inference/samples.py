"""A hook that shows what a decoder in training writes."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax.core.state import TrainState
from llm_jax.inference.completion import Completer
from llm_jax.inference.decoding import Generator
from llm_jax.inference.sampling import Sampling
from llm_jax.parallel import hosts
from llm_jax.training.logs import Log
from llm_jax.training.loop import Run

FILE = 'samples.txt'
NEW_TOKENS, PROMPT_TOKENS = 48, 8
TEMPERATURE = 0.8


class Samples:
  """Texts that a decoder writes at each evaluation: first after nothing, then after the beginnings
  of validation documents; in the log, and after those of earlier evaluations in samples.txt.

  Attributes:
    every: steps between two evaluations.

  Args:
    run: trains the decoder.
    log: of the run.
    count: how many samples.
  """

  def __init__(self, run: Run, log: Log, count: int):
    program, tokenizer = run.program, run.data.tokenizer
    model = program.network.model
    self.every = program.config.eval_every
    self._tokenizer, self._log, self._path = tokenizer, log, run.workdir / FILE
    generator = Generator(model, program.model_infos, program.layout)
    self._completer = Completer(generator, tokenizer, rows=count)
    begin = min(PROMPT_TOKENS, model.max_len // 4)
    self._beginnings = _beginnings(run, begin, count)
    self._sampling = Sampling(
      max_new_tokens=min(NEW_TOKENS, model.max_len - begin - 1),
      temperature=TEMPERATURE,
      seed=program.config.seed,
    )

  @classmethod
  def of(cls, run: Run, log: Log) -> 'Samples | None':
    """The hook of a run; None where it is no language model that continues prompts."""
    program = run.program
    count = program.config.evaluation.samples
    continues = program.network.model.causal and 'clm' in program.objective.terms
    return cls(run, log, count) if count and continues else None

  def __call__(self, step: int, state: TrainState, values: Mapping[str, float]) -> None:
    """Shows the samples of a step; all processes call it."""
    del values
    lines = [f'{prompt!r} -> {text!r}' for prompt, text in self.texts(state.network_params)]
    for line in lines:
      self._log.say('step %d  sample: %s', step, line)
    if hosts.primary():
      with open(self._path, 'a', encoding='utf-8') as file:
        file.write(f'step {step}\n' + ''.join(f'  {line}\n' for line in lines))

  def texts(self, params: Any) -> list[tuple[str, str]]:
    """Beginnings and their completions, the same each time for the same parameters."""
    prompts = [[self._tokenizer.bos_id, *ids] for ids in self._beginnings]
    weights = self._completer.generator.weights(params['model'])
    texts = self._completer.from_ids(weights, prompts, self._sampling)
    beginnings = [self._tokenizer.decode(ids) for ids in self._beginnings]
    return list(zip(beginnings, texts, strict=True))


def _beginnings(run: Run, length: int, count: int) -> list[np.ndarray]:
  """An empty one, and the first tokens of validation documents."""
  known = (
    part.array('tokens', index, 0, length)
    for part in run.data.splits.validation
    for index in range(len(part))
    if part.lengths('tokens')[index]
  )
  return [np.zeros(0, np.int32), *itertools.islice(known, count - 1)]
