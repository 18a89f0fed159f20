"""What looks at a model: evaluators and hooks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax

from llm_jax.core.contracts.data import Rows, Tokenizer
from llm_jax.core.contracts.objective import Objective
from llm_jax.core.contracts.values import Batch, Metrics, Record

if TYPE_CHECKING:
  from llm_jax.core.state import TrainState


class Validation(NamedTuple):
  """What an evaluator works with.

  Attributes:
    objective: what is learned.
    terms: coefficients of the metrics that make up the loss: the objective's and the model's.
    tokenizer: made the ids.
    batches: gives a fresh iterator over this host's rows of each batch.
    losses: this host's rows of a batch -> the metrics of objective and model over all hosts'
      rows.
    predict: (this host's rows of a batch, keys) -> what the objective's predictor says of all
      hosts' rows, and the batch's arrays `keys` of them.
    slices: field of the records -> for each row of all hosts', its value for each text of the row;
      the fields of `config.evaluation.slices`.
    rows: for each row of all hosts', the `Rows` of the objective that it is of, and its number in
      them; with these a predictor's `answers` are those of `--mode=predict`.
    record: (such rows, a document of theirs) -> its record, as the source has it.
    write: (prompts in ids, fields of `generation.sampling.Sampling`) -> the text that the model
      writes for each; all hosts call it with the same.
  """

  objective: Objective
  terms: Mapping[str, float]
  tokenizer: Tokenizer
  batches: Callable[[], Iterable[Batch]]
  losses: Callable[[Batch], Metrics]
  predict: Callable[[Batch, tuple[str, ...]], dict[str, jax.Array]]
  slices: Mapping[str, Sequence[Sequence[str]]] = {}
  rows: Sequence[tuple[Rows, int]] = ()
  record: Callable[[Rows, int], Record] | None = None
  write: Callable[[Sequence[Sequence[int]], Mapping[str, Any]], list[str]] | None = None


class Evaluator(Protocol):
  """Numbers of a validation set; a run may have several.

  One that scores the groups of `Validation.slices` has an attribute `slices` that is true. One that
  cannot work with every objective and model has a method `check(objective, model)`, which raises
  ValueError before anything is compiled.
  """

  def evaluate(self, validation: Validation) -> tuple[dict[str, Any], str]:
    """Numbers by name, and a report for people, which may be empty. Beside the numbers there may be
    strings, such as the signature of a metric.

    All hosts call it; they get the same numbers.
    """
    ...


class Hook(Protocol):
  """Something that a training run does every so many steps.

  Attributes:
    every: after how many steps; the last step counts too.
  """

  every: int

  def __call__(self, step: int, state: 'TrainState', values: Mapping[str, float]) -> None:
    """Called on all hosts, when step `step` is over; `values` are its numbers."""
    ...
