"""The numbers of a program on a validation set, and the baselines that belong beside them."""

import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from llm_jax.build import Program
from llm_jax.contracts import Batch, Objective, Tokenizer
from llm_jax.data import pipeline
from llm_jax.evaluators import classification, loss


def scores(program: Program, params: Any, examples: Any, report: pathlib.Path) -> dict[str, float]:
  """Loss and metrics over a validation set; a classifier's report for people is written to `report`.

  Args:
    program: what to evaluate.
    params: its parameters, on its mesh.
    examples: the validation set, as `pipeline.validation_examples` gives it.
    report: a file.
  """
  objective = program.objective
  values = loss.evaluate(lambda batch: program.eval_step(params, program.put(batch)), batches(program, examples), objective)
  if objective.predictor is not None:
    predict = lambda batch: program.predict_step(params, program.put(batch))
    more, text = classification.evaluate(predict, batches(program, examples), objective.predictor)
    values |= more
    if jax.process_index() == 0:
      report.write_text(text + '\n')
  return values


def batches(program: Program, examples: Any) -> Iterator[dict[str, np.ndarray]]:
  """This host's part of the validation set, once."""
  return pipeline.padded_batches(examples, program.config.batch_size, jax.process_index(), jax.process_count())


def baselines(objective: Objective, tokenizer: Tokenizer, validation: Callable[[], Iterable[Batch]]) -> dict[str, float]:
  """What the best guess without reading, and `xz -9`, reach on the targets of a validation set, where tokens are predicted.

  Args:
    objective: names the targets.
    tokenizer: spells the text of causal targets, for xz.
    validation: gives the batches, anew at each call.

  Returns:
    unigram_loss in nats a target; xz_bits_per_byte for causal objectives; nothing for those that predict no tokens.
  """
  unigram = loss.unigram_loss(validation(), objective)
  found = {} if unigram is None else {'unigram_loss': unigram}
  texts = [tokenizer.decode(batch['targets'][row][batch['weights'][row] > 0])
           for batch in validation() if 'targets' in batch for row in range(len(batch['targets']))]
  return found | ({'xz_bits_per_byte': loss.xz_bits_per_byte(''.join(texts).encode())} if texts else {})
