"""What is learned, and what is said of single texts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from llm_jax.core import plugins
from llm_jax.core.contracts.data import Documents, Rows, Texts, Tokenizer
from llm_jax.core.contracts.model import Model, Net
from llm_jax.core.contracts.values import Batch, Encoded, Example, Metrics, Number, Record

if TYPE_CHECKING:
  import flax.linen as nn


class Objective:
  """What is learned. The host half, in NumPy, makes rows; the device half, in JAX, is pure.

  `rows` and `loss` are to be written; everything else has a default.

  Attributes:
    terms: name of each metric that is a loss -> its coefficient in the total.
    predictor: what answers for single texts: itself, a part of it, or nothing.
    evaluators: the evaluators of a validation set where the config names none.
    derived: the options that `derive` may give; their default is None.
    from_training: those of them that hold what documents say, and in a cross-validation are not to
      come from documents that are held out.
    text_fields: the fields of a record with a `text` that hold a text or a list of texts; a
      tokenizer that is trained for the run learns from them.
    compares: whether losses come from `compare`, of all rows of the global batch together.
    turns: the objectives that batches are learned from in turn, one after the other; none where
      each batch is learned from by all of it.
    diverges: whether it says how far the answers of two passes are apart (`answer`, `divergence`).
    distils: whether it learns from the answers of another model (`distilled`).
    watches: whether it looks at what layers pass on (`Net.seen`).
    embedding_pool: one of `nn.heads.POOLS`, by which it learns vectors of texts; None where it does
      not.
    writes: whether it asks for new text: `asked` says which, and its rows have `texts` and
      `prompt(text)`, the ids after which that text is to be written; None where it was cut.
    answers_texts: whether `answer` has something for each text of a row, [B, G, ...], whose rows
      have `documents` and `texts`: what a teacher says of a text can be kept then.
    needs_reference: whether its rows need what another model thinks of their texts, which is found
      once before training: `of_reference`. Such rows have `documents` and `texts`, and take what is
      found as `reference`, per document.
    shows_learned: whether people are shown which tokens of a row are learned.
    opens_prompts: whether all tokens of a prompt see all of it, in a decoder.
    prompt_end: ids that stand after a prompt of a decoder.
    ends: further ids than the tokenizer's `eos_ids` at which what it writes is over.
  """

  terms: Mapping[str, float]
  predictor: 'Predictor | None' = None
  evaluators: tuple[str, ...] = ('loss',)
  derived: ClassVar[tuple[str, ...]] = ()
  from_training: ClassVar[tuple[str, ...]] = ()
  text_fields: ClassVar[tuple[str, ...]] = ('text', 'pair')
  compares: bool = False
  turns: 'tuple[Objective, ...]' = ()
  diverges: bool = False
  distils: bool = False
  answers_texts: bool = False
  watches: bool = False
  embedding_pool: str | None = None
  writes: bool = False
  needs_reference: bool = False
  shows_learned: bool = False
  opens_prompts: bool = False
  prompt_end: tuple[int, ...] = ()
  ends: tuple[int, ...] = ()

  @staticmethod
  def encode(record: Record, tokenizer: Tokenizer) -> Encoded:
    """A record as named arrays of integers, each [n], and other values, which JSON must hold.

    The result is cached by source, tokenizer and the source code of this function, and read in
    any order by other processes: it must depend on its arguments alone. Arrays named `tokens` or
    `..._tokens` hold ids of the vocabulary. By default `tokens` of `text`, `pair_tokens` of
    `pair`, and `label` as it is.
    """
    if 'text' not in record:
      raise ValueError(
        f'a record has no text, only {", ".join(record)}; config.data.text names its field.'
      )
    encoded: Encoded = {'tokens': tokenizer.encode(record['text'])}
    if record.get('pair') is not None:
      encoded['pair_tokens'] = tokenizer.encode(record['pair'])
    if record.get('label') is not None:
      encoded['label'] = record['label']
    return encoded

  @classmethod
  def encoding(cls, options: Mapping[str, Any]) -> Callable[[Record, Tokenizer], Encoded]:
    """The `encode` that a section of the config asks for; a plain function, or one that
    `functools.partial` gives arguments by name.
    """
    del options
    return cls.encode

  @classmethod
  def derive(cls, options: Mapping[str, Any], documents: Sequence[Documents]) -> dict[str, Any]:
    """Options that only the training documents decide (names of classes), by name.

    Args:
      options: the section of the config; an option that it sets is not derived again.
      documents: of each corpus.
    """
    del options, documents
    return {}

  @classmethod
  def sample_records(cls, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Made-up records from which the shapes of a batch follow where the data is not there.

    Args:
      options: the section of the config; an option of `derived` that it lacks is then derived
        from these records.
    """
    del options
    return [{'text': 'some words'}] * 4

  @staticmethod
  def asked(record: Record) -> tuple[str, str]:
    """What a record asks, and the text that is to be written; called where `writes` is set."""
    raise NotImplementedError

  def check(self, model: Model) -> None:
    """Raises ValueError where a model cannot learn this; called before anything is compiled."""
    del model

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """How documents are laid out in rows of `seq_len` tokens."""
    raise NotImplementedError

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """Adds this objective's arrays to a row that any objective laid out (masking, say)."""
    del rng
    return example

  def heads(self, model: Model) -> dict[str, 'nn.Module']:
    """Linen modules by name, created beside the model as `heads_<name>`.

    Equal names of two objectives are one head.
    """
    del model
    return {}

  def positions(self, batch: Batch) -> jax.Array | None:
    """The indices of each row whose hidden states are read, [B, P] int32; None for all."""
    del batch
    return None

  def loss(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> Metrics:
    """(sum, weight) for each of `terms`, and for any further metric.

    Args:
      net: model, heads, and further passes.
      hidden_BPD: hidden states at `positions`, in their order.
      batch: a part of the global batch. Weights depend on it alone, never on parameters.
    """
    raise NotImplementedError

  def represent(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """What `compare` needs of the rows of a part of the global batch, axis 0 of each array the row;
    called where `compares` is set. Arguments as for `loss`.
    """
    del net, hidden_BPD, batch
    return {}

  def compare(self, found: Mapping[str, jax.Array], batch: Batch) -> Metrics:
    """Metrics that no part of a batch has alone, added to those of `loss`; called where `compares`
    is set.

    Args:
      found: what `represent` gave for all rows of the global batch, in their order.
      batch: the global batch.
    """
    del found, batch
    return {}

  def of_reference(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """What `Rows.reference` has of each text of a row, [B, G, ...], from the network that is the
    reference; called where `needs_reference` is set. Arguments as for `loss`.
    """
    del net, hidden_BPD, batch
    raise NotImplementedError

  def answer(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> Any:
    """What `divergence` compares, of one pass: logits, or what they are made of. Called where
    `diverges` is set, by methods that want the answers to a text and to the same text changed a
    little to be alike; and where `distils` is set, of a teacher. Arguments as for `loss`.
    """
    del net, hidden_BPD, batch
    raise NotImplementedError

  def divergence(self, a: jax.Array, b: jax.Array, batch: Batch) -> tuple[Number, Number]:
    """(sum, weight): how far two answers to a batch are apart, 0 where they are equal, and the
    weight, which depends on the batch alone. Called where `diverges` is set.

    Args:
      a: what `answer` gave in one pass.
      b: in another.
      batch: a part of the global batch.
    """
    del a, b, batch
    raise NotImplementedError

  def distilled(
    self,
    net: Net,
    hidden_BPD: jax.Array,
    taught: Any,
    batch: Batch,
    temperature: float,
  ) -> tuple[Number, Number]:
    """(sum, weight) of how far the answers are from a teacher's, T^2 KL(teacher || student), 0
    where they are equal (arXiv:1503.02531). Called where `distils` is set.

    Args:
      net, hidden_BPD, batch: as for `loss`.
      taught: what `answer` of the teacher's own objective gave; classes in the order of this one.
      temperature: T, by which the logits of both are divided.
    """
    raise NotImplementedError

  def trains(self, path: str) -> bool:
    """Whether a parameter is trained; heads that stay as they are are named here."""
    del path
    return True

  def no_gradient(self, path: str) -> str | None:
    """Why a parameter of a head has no gradient, if the loss does not depend on it; else None."""
    del path
    return None

  def summary(self, means: Mapping[str, float]) -> dict[str, float]:
    """Further numbers from the divided ones: perplexity from the mean loss, say."""
    del means
    return {}

  def terms_at(self, done: Number) -> Mapping[str, Number]:
    """The coefficients in a step of training; `terms` are those of its last one, by which a
    validation set is scored from first to last.

    Args:
      done: the share of the steps that is over, from 0 to 1.
    """
    del done
    return self.terms

  def targets(self, batch: Batch) -> tuple[Number, Number] | None:
    """Ids that a batch asks for, and their weights; None where no tokens are predicted."""
    del batch
    return None

  def flops(self, model: Model, batch: Batch) -> float:
    """FLOPs of the forward pass of heads and vocabulary over a batch (arrays or shapes)."""
    del model, batch
    return 0.0


class Predictor:
  """What says something of single texts.

  Attributes:
    classes: names of the classes, where there are any.
    task: one of 'multiclass', 'binary', 'multilabel', 'regression'; None for another.
    explainable: whether a row holds its texts alone, between special tokens, as `--mode=explain`
      takes it to.
    measures: the fields of its answers by which texts may be chosen that are worth a label, of
      `objectives.shared.uncertainty.MEASURES`.
  """

  classes: tuple[str, ...] | None = None
  task: str | None = None
  explainable: bool = True
  measures: tuple[str, ...] = ()

  def heads(self, model: Model) -> dict[str, 'nn.Module']:
    """The heads that answering needs, as an objective's."""
    del model
    return {}

  def layout(self, documents: Documents, seq_len: int) -> Texts:
    """Rows of texts without labels; the shapes of an example depend on `seq_len` alone."""
    raise NotImplementedError

  def positions(self, batch: Batch) -> jax.Array | None:
    """As an objective's."""
    del batch
    return None

  def predict(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Arrays of which axis 0 is the row; by default axis 1 is the text of the row, [B, G, ...]."""
    raise NotImplementedError

  def describe(self, text: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `predict` says of one text, as JSON can hold it."""
    raise NotImplementedError

  def answers(
    self, row: Mapping[str, np.ndarray], rows: Texts, index: int
  ) -> Iterator[dict[str, Any]]:
    """What is said of each text of row `index`, or of each part, in the order of
    `rows.texts(index)`.

    Args:
      row: what `predict` gave for this row, without B.
      rows: as `layout` made them.
      index: the row's number.
    """
    for slot, _ in enumerate(rows.texts(index)):
      yield self.describe({name: values[slot] for name, values in row.items()})

  def joined(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answer of a text from what is said of each of its parts, in their order; by default a
    text has one.
    """
    (answer,) = parts
    return answer

  def combined(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One answer from those of several models to one text: that of the means of their
    probabilities, or of their values.

    Raises:
      ValueError: its answers have no mean.
    """
    del answers
    raise ValueError(f'the answers of {plugins.said(self)} have no mean.')

  def calibrate(self, values: Mapping[str, float]) -> None:
    """Takes numbers that answering needs, a threshold say, from those of the validation set with
    which the parameters were saved; host half only, no compiled function may depend on them.
    """
    del values
