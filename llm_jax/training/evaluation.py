"""The numbers of a program on a validation set, and the baselines that belong beside them."""

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from llm_jax.core import progress
from llm_jax.core.contracts import (
  Batch,
  Evaluator,
  Example,
  Metrics,
  Objective,
  Tokenizer,
  Validation,
)
from llm_jax.core.tree import PyTree
from llm_jax.data import pipeline
from llm_jax.evaluators import loss
from llm_jax.generation import completion
from llm_jax.generation.completion import Completer
from llm_jax.generation.sampling import Sampling
from llm_jax.parallel import hosts, sharding
from llm_jax.programs import assemble
from llm_jax.programs.inference import Inference
from llm_jax.training.held_out import HeldOut

Predict = Callable[[Batch, tuple[str, ...]], dict[str, jax.Array]]
AVERAGED = {'probabilities', 'values'}  # of what a model predicts, what has a mean over several


def scores(
  program: Inference,
  params: PyTree,
  tokenizer: Tokenizer,
  held: HeldOut,
  report: pathlib.Path | None,
  completer: Callable[[], Completer] | None = None,
  others: Sequence[tuple[Inference, PyTree]] = (),
) -> dict[str, Any]:
  """The numbers of all evaluators over a validation set, the same on all processes.

  Args:
    program: what to evaluate.
    params: its parameters, on its mesh.
    tokenizer: for evaluators that look at texts.
    held: the validation set.
    report: a file for what evaluators say to people; None for none.
    completer: gives what the model writes with, where an evaluator has it write.
    others: programs and parameters of the other members of an ensemble.

  Raises:
    ValueError: an ensemble of what cannot be averaged.
  """
  completer = completer or (lambda: completion.of(program, tokenizer, program.config.batch_size))
  eval_step = hosts.compiled(program.eval_step)
  evaluators = assemble.create_evaluators(program.config, program.objective)
  if others:
    _check_averaged(program)
    evaluators = _without_loss(evaluators)
  validation = Validation(
    objective=program.objective,
    terms=program.network.terms,
    tokenizer=tokenizer,
    batches=functools.partial(_shown_batches, program, held.examples),
    losses=_no_losses if others else lambda batch: eval_step(params, program.put(batch)),
    predict=_mean([predictions(*each) for each in ((program, params), *others)]),
    slices=held.slices,
    rows=held.rows,
    record=held.record,
    write=None if others else functools.partial(_written, completer, params),
  )
  values: dict[str, Any] = {}
  reports = []
  for evaluator in evaluators.values():
    numbers, text = evaluator.evaluate(validation)
    values |= numbers
    reports += [text] if text else []
  if report and reports and hosts.primary():
    report.write_text('\n\n'.join(reports) + '\n')
  return hosts.agree(lambda: values)  # decisions by them are then the same, to the last bit


def _written(
  completer: Callable[[], Completer],
  params: PyTree,
  prompts: Sequence[Sequence[int]],
  options: Mapping[str, Any],
) -> list[str]:
  """What the model writes for each prompt."""
  writer = completer()
  weights = writer.generator.weights(params['model'])
  most = [min(options['max_new_tokens'], writer.generator.room(prompt)) for prompt in prompts]
  blocks = list(_blocks(most, writer.rows))
  found: dict[int, str] = {}
  for block in progress.shown(blocks, 'Writing', len(blocks), 'batches', hosts.primary()):
    limit = most[block[0]]
    least = min(options['min_new_tokens'], limit)
    sampling = Sampling(**dict(options) | {'max_new_tokens': limit, 'min_new_tokens': least})
    given = [prompts[number] for number in block]
    texts = writer.from_ids(weights, given, sampling, numbers=block)
    found |= dict(zip(block, texts, strict=True))
  return [found[number] for number in range(len(prompts))]


def _blocks(most: Sequence[int], size: int) -> Iterator[list[int]]:
  """The numbers of prompts, so many at once, that may have equally many new tokens."""
  order = sorted(range(len(most)), key=lambda number: most[number])
  for _, group in itertools.groupby(order, key=lambda number: most[number]):
    alike = list(group)
    yield from (alike[first : first + size] for first in range(0, len(alike), size))


def _shown_batches(program: Inference, examples: Sequence[Example]) -> Iterator[Example]:
  total = -(-len(examples) // program.config.batch_size)
  found = batches(program, examples)
  return progress.shown(found, 'Evaluating', total, 'batches', hosts.primary())


def _mean(voters: Sequence[Predict]) -> Predict:
  """What several models predict, on average; the batch's arrays are those of the first."""
  if len(voters) == 1:
    return voters[0]

  def predict(batch: Batch, keys: tuple[str, ...] = ()) -> dict[str, jax.Array]:
    found, *others = (voter(batch, keys) for voter in voters)
    means = {
      name: (value + sum(other[name] for other in others)) / len(voters)
      for name, value in found.items()
      if name in AVERAGED
    }
    return found | means

  return predict


def _check_averaged(program: Inference) -> None:
  said = jax.eval_shape(program.predict_step, program.params, program.batch)
  if not said.keys() <= AVERAGED:
    raise ValueError(
      f'the objective {program.config.objective["name"]} predicts {", ".join(sorted(said))}, of '
      'which an ensemble has no mean; it is evaluated by probabilities of classes, or values. '
      '--soup is one model.'
    )


def _without_loss(evaluators: Mapping[str, Evaluator]) -> dict[str, Evaluator]:
  """The evaluators that an ensemble has."""
  found = {
    name: evaluator
    for name, evaluator in evaluators.items()
    if not isinstance(evaluator, loss.Evaluator)
  }
  if not found:
    raise ValueError(
      'an ensemble has answers and no loss, and config.evaluators names none that scores answers; '
      "name one, such as 'classification'."
    )
  logging.info('An ensemble has no loss: scores are of the mean answers alone.')
  return found


def _no_losses(batch: Batch) -> Metrics:
  raise ValueError(
    'an evaluator asks for the loss of an ensemble, which has none; leave it out of '
    'config.evaluators.'
  )


def predictions(program: Inference, params: PyTree) -> Predict:
  """A function from this host's rows of a batch, and keys, to what is predicted for all hosts' rows
  beside the batch's arrays of these keys.
  """
  predict_step = hosts.compiled(program.predict_step)
  whole = sharding.replicated(program.mesh)
  gather = jax.jit(lambda arrays: arrays, out_shardings=whole)

  def predict(batch: Batch, keys: tuple[str, ...] = ()) -> dict[str, jax.Array]:
    placed = program.put(batch)
    return dict(predict_step(params, placed)) | gather({key: placed[key] for key in keys})

  return predict


def batches(program: Inference, examples: Sequence[Example]) -> Iterator[Example]:
  """This host's rows of the validation set, once."""
  size = program.config.batch_size
  return pipeline.padded_batches(examples, size, hosts.rows(program.mesh, size))


def baselines(
  program: Inference, tokenizer: Tokenizer, examples: Sequence[Example]
) -> dict[str, float]:
  """What the best guess without reading, and `xz -9`, reach on the targets of a validation set.

  Process 0 reads the whole set; the others take its word.

  Args:
    program: names the targets.
    tokenizer: spells the text of causal targets, for xz.
    examples: the validation set.

  Returns:
    unigram_loss in nats per target; xz_bits_per_byte for causal objectives; nothing for those that
    predict no tokens.
  """

  def whole() -> Iterator[Example]:
    return pipeline.padded_batches(examples, program.config.batch_size)

  return hosts.agree(lambda: _baselines(program.objective, tokenizer, whole))


def _baselines(
  objective: Objective, tokenizer: Tokenizer, validation: Callable[[], Iterable[Batch]]
) -> dict[str, float]:
  unigram = loss.unigram_loss(validation(), objective)
  found = {} if unigram is None else {'unigram_loss': unigram}
  text = ''.join(_target_texts(tokenizer, validation()))
  if text:
    found['xz_bits_per_byte'] = loss.xz_bits_per_byte(text.encode())
  return found


def _target_texts(tokenizer: Tokenizer, validation: Iterable[Batch]) -> Iterator[str]:
  """The text that the causal targets of each row spell."""
  for batch in validation:
    if 'bytes' not in batch:  # with which a loss in bits per byte is to be compared
      return
    for targets, weights in zip(batch['targets'], batch['weights'], strict=True):
      yield tokenizer.decode(targets[weights > 0])
