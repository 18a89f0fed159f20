"""The numbers of a program on a validation set, and the baselines that belong beside them."""

import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from llm_jax.core.contracts import Batch, Objective, Tokenizer
from llm_jax.data import pipeline
from llm_jax.evaluators import classification, loss
from llm_jax.parallel import hosts, sharding
from llm_jax.programs.build import Program


def scores(
  program: Program, params: Any, examples: Any, report: pathlib.Path | None
) -> dict[str, float]:
  """Loss and metrics over a validation set, the same on all processes; a classifier's report for
  people goes to `report`.

  Args:
    program: what to evaluate.
    params: its parameters, on its mesh.
    examples: the validation set, as `pipeline.validation_examples` gives it.
    report: a file; None for no report.
  """
  objective, eval_step = program.objective, hosts.compiled(program.eval_step)
  values = loss.evaluate(
    lambda batch: eval_step(params, program.put(batch)), batches(program, examples), objective
  )
  if objective.predictor is not None:
    predict = predictions(program, params, ('label', 'label_weight'))
    more, text = classification.evaluate(predict, batches(program, examples), objective.predictor)
    values |= more
    if report and hosts.primary():
      report.write_text(text + '\n')
  return hosts.agree(lambda: values)  # what depends on them is then decided alike, to the last bit


def predictions(
  program: Program, params: Any, keys: tuple[str, ...]
) -> Callable[[Batch], dict[str, jax.Array]]:
  """A function from this host's rows of a batch to what is predicted for all hosts' rows, beside
  the batch's arrays `keys`.
  """
  predict_step = hosts.compiled(program.predict_step)
  gather = jax.jit(lambda arrays: arrays, out_shardings=sharding.replicated(program.mesh))

  def predict(batch: Batch) -> dict[str, jax.Array]:
    placed = program.put(batch)
    return dict(predict_step(params, placed)) | gather({key: placed[key] for key in keys})

  return predict


def batches(program: Program, examples: Any) -> Iterator[dict[str, np.ndarray]]:
  """This host's rows of the validation set, once."""
  return pipeline.padded_batches(
    examples, program.config.batch_size, hosts.rows(program.mesh, program.config.batch_size)
  )


def baselines(program: Program, tokenizer: Tokenizer, examples: Any) -> dict[str, float]:
  """What the best guess without reading, and `xz -9`, reach on the targets of a validation set,
  where tokens are predicted.

  Process 0 reads the whole set; the others take its word.

  Args:
    program: names the targets.
    tokenizer: spells the text of causal targets, for xz.
    examples: the validation set.

  Returns:
    unigram_loss in nats a target; xz_bits_per_byte for causal objectives; nothing for those that
    predict no tokens.
  """
  whole = lambda: pipeline.padded_batches(examples, program.config.batch_size)
  return hosts.agree(lambda: _baselines(program.objective, tokenizer, whole))


def _baselines(
  objective: Objective, tokenizer: Tokenizer, validation: Callable[[], Iterable[Batch]]
) -> dict[str, float]:
  unigram = loss.unigram_loss(validation(), objective)
  found = {} if unigram is None else {'unigram_loss': unigram}
  texts = [
    tokenizer.decode(batch['targets'][row][batch['weights'][row] > 0])
    for batch in validation()
    if 'targets' in batch
    for row in range(len(batch['targets']))
  ]
  return found | (
    {'xz_bits_per_byte': loss.xz_bits_per_byte(''.join(texts).encode())} if texts else {}
  )
