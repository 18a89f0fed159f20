"""What the parts of the program agree on. A plug-in is one module that implements one of these.

Data flows one way: config -> records -> arrays -> rows -> batch -> step -> metrics -> checkpoint.

| plug-in | config section | module defines | shipped in |
|---|---|---|---|
| source | `data` (`data.source`) | `Source(**options)` | `llm_jax.data.sources` |
| tokenizer | `tokenizer` | `create(**options)`, `load(directory)` | `llm_jax.data.tokenizers` |
| model | `model` | `Model(**options)`, `VARIANTS` | `llm_jax.models` |
| objective | `objective` | `Objective(tokenizer, **options)` | `llm_jax.objectives` |
| adapter | `adapter` | `Adapter(**options)` | `llm_jax.adapters` |
| evaluator | `evaluators` (a section by name) | `Evaluator(**options)` | `llm_jax.evaluators` |
| hook | `hooks` (a section by name) | `Hook(**options)` | `llm_jax.training.hooks` |
| mode | `--mode` | `run(command)`, its flags | `llm_jax.modes` |

A name with a dot is the path of a module of the user's own. Objectives, models, adapters and
predictors inherit the classes below for their defaults; sources, tokenizers and evaluators have
nothing to inherit. An objective may also ask for `causal`, whether the model is.

A batch is a dictionary of arrays whose leading axis is the row. Letters: B rows, T tokens of a
row, P positions whose hidden states are read, M masked positions, C classes, G the most texts of a
row. Every array has one static shape for the whole run; rows that only fill up a batch are zeros.

| key | shape, type | meaning |
|---|---|---|
| tokens | B T int32 | input ids; anything where segments is 0 |
| segments | B T int32 | 0 padding, then 1, 2, ...: a number per document; it sees itself alone |
| positions | B T int32 | position within the segment, from 0 |
| source_tokens, source_segments, ... | B S int32 | of the row that an encoder reads beside it |
| prefix | B T int32 | prefix LM: 1 for tokens that all of their document see |
| token_types | B T int32 | 0 first text, 1 second text of a pair (objectives with pairs only) |
| mask_positions, mask_targets | B M int32 | masked LM: indices into the row, true ids there |
| mask_weights | B M float32 | 1 or 0 |
| targets, weights | B T int32, float32 | causal LM: the next ids, 1 where one counts |
| bytes | B float32 | causal LM: UTF-8 bytes that the counted targets spell |
| nsp_label, nsp_weight, sop_... | B int32, float32 | 1 when the pair is not what it should be |
| text_firsts, text_lasts | B G int32 | first and last index of text g, which is segment g + 1 |
| label | B G int32, B G C float32, or B G float32 | classes, several classes, a number |
| label_weight | B G float32 | classification; 0: no text or no label |
| mix_rank, mix_share | B G int32, float32 | mixup: an order of all texts; how much each is itself |
| unlabelled | B G float32 | classification that learns from them: 1 for a text without a label |
| chain, tag | B T int32 | token labelling: bits of `nn.crf` where a word is read; its tag |
| tag_weight | B T float32 | token labelling; 0: no word or no tag |
| span | B T int32 | QA: bits; 1 an answer may begin or end here, 2 it begins, 4 it ends |
| span_weight | B G float32 | QA; 0: no window or no answers given |
| reads | B G S int32 | prompts: where a word is read in each of the S segments of text g |
| group, member | B G int32 | the group of its row that text g is of, from 1; its number in it |
| text_key | B G 2 int32 | contrastive learning: equal for equal texts |
| markers | B G 2 int32 | relations: where in the row head and tail are read |
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

import flax.struct
import jax
import numpy as np
from jax.typing import DTypeLike

from llm_jax.core.tree import PyTree

if TYPE_CHECKING:
  import flax.linen as nn

  from llm_jax.core.params import Info
  from llm_jax.core.state import TrainState

SOURCE = 'source_'  # before the names of the arrays of a second row, that an encoder reads
Record = Mapping[str, Any]  # what a source yields: field -> anything that JSON holds
Encoded = dict[str, Any]  # of one record: name -> integers [n], or anything else that JSON holds
Example = dict[str, np.ndarray]  # one row: batch keys without B
Batch = Mapping[str, Any]  # NumPy arrays on the host, jax's on devices
Number: TypeAlias = jax.Array | np.ndarray | float
Metrics = dict[str, tuple[Number, Number]]  # name -> (sum, weight); divided once, at the end


class Tokenizer(Protocol):
  """Text to ids and back.

  Ids of special tokens are attributes: pad_id (0 where the tokenizer was trained here), unk_id,
  cls_id, sep_id, mask_id, bos_id, eos_id. Our own tokenizers have all seven. A Hugging Face folder
  may lack some: then cls is bos, else eos; sep is eos; bos is cls, else eos; eos is sep; pad is
  eos, else 0 (padding is known by segment 0, not by its id); unk is pad; mask_id alone is None,
  and masked language modelling refuses such a tokenizer.

  Attributes:
    vocab_size: 1 + the highest id.
    eos_ids: where a text that is generated ends: eos_id, and others that a folder names.
    template: ids that a Hugging Face folder puts before and after one text; None for our own,
      which an encoder reads as [CLS] ... [SEP] and a decoder as BOS ....
    pair_template: likewise the ids before the first text of a pair, between the two and after the
      second, and the token type of the second; None for our own.
    fingerprint: changes whenever any id of any text could change.
    token_bytes: [vocab_size] int32, UTF-8 bytes that each id spells, 0 for special tokens.
    word_start: [vocab_size] bool, whether the id begins a word (whole-word masking).
    special: [vocab_size] bool, whether the id is a special token.
    special_texts: their texts, as chat templates name them: `bos_token`, `eos_token` and so on.
    sentinels: ids of special tokens that stand for what was taken out of a text, in their order;
      none where the vocabulary has none.

  One that reads and writes by other rules has a tokenizer `target` for what is written (Marian).

  One that an adapter gave virtual tokens (`data.prompted`) has them as `prompt`, ids that stand
  before each text, and its arrays go on to the last of them.
  """

  vocab_size: int
  pad_id: int
  unk_id: int
  cls_id: int
  sep_id: int
  mask_id: int | None
  bos_id: int
  eos_id: int
  eos_ids: tuple[int, ...]
  template: tuple[tuple[int, ...], tuple[int, ...]] | None
  pair_template: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] | None
  fingerprint: str
  token_bytes: np.ndarray
  word_start: np.ndarray
  special: np.ndarray
  special_texts: Mapping[str, str]
  sentinels: tuple[int, ...]

  def encode(self, text: str, special: bool = False) -> np.ndarray:
    """The ids of a text, [n] int32, none around it.

    '[MASK]' in the text is text like any other, with `special` it is its special token.
    """
    ...

  def offsets(self, text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What `encode` gives, and [n, 2] int64: where the characters of each id begin and end."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; special tokens are left out."""
    ...

  def special_text(self, number: int) -> str:
    """The text of a special token, '' where its id has none."""
    ...

  def save(self, directory: str) -> None:
    """Writes what the module's `load(directory)` reads."""
    ...

  def export(
    self, directory: str, *, causal: bool, max_len: int, token_types: bool, closed: bool = False
  ) -> None:
    """Writes what transformers' `AutoTokenizer` opens.

    Args:
      directory: is made where it is not there.
      causal: texts stand after BOS, else between [CLS] and [SEP].
      max_len: the longest row that the model takes.
      token_types: whether the model reads token types.
      closed: a causal model's texts end with EOS, as its classifier reads them; where the model is
        not causal, they have EOS after them and nothing before, as an encoder-decoder's.
    """
    ...


class Source(Protocol):
  """Records by index.

  A record that a language model learns from has a `text` (str). Where the source has them, `pair`
  is a second text, and `label` a str, a float, or a list of str. Further fields are the business
  of the objective, whose `encode` reads them.

  A source may have a `where(index)`, which says where a record stands ('data.jsonl:17'), for
  messages.

  Attributes:
    fingerprint: changes whenever the records could.
  """

  fingerprint: str

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


class Documents(Protocol):
  """Encoded records by index: one split (training or validation) of one corpus, or a few texts.

  Attributes:
    ids: [documents] int64, the index of each document in its source.
    names: what an objective's `encode` gave as arrays of integers.
  """

  ids: np.ndarray
  names: frozenset[str]

  def __len__(self) -> int: ...

  def lengths(self, name: str) -> np.ndarray:
    """[documents] int64: how long the array `name` of each document is."""
    ...

  def array(self, name: str, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """[stop - start] int32: a part of the array `name` of one document, cut as a slice is."""
    ...

  def values(self, name: str) -> Sequence[Any] | None:
    """What `encode` gave under `name` that is no array, one per document; None where none has."""
    ...

  def where(self, index: int) -> str:
    """Where a document comes from, for messages: 'data.jsonl:17'."""
    ...


class Rows(Protocol):
  """The rows that an objective lays documents out in: how many there are, and what each holds."""

  def __len__(self) -> int: ...

  def example(self, index: int, rng: np.random.Generator) -> Example: ...


class Texts(Rows, Protocol):
  """Rows that hold several texts each, all of them whole or cut to a row. A text that is read in
  several parts (windows) is named once for each.

  Attributes:
    cut: how many texts are longer than a row and lose their ends.
  """

  cut: int

  def texts(self, index: int) -> list[int]:
    """The documents of one row, in the order in which they stand in it."""
    ...


@flax.struct.dataclass
class Outputs:
  """What a model returns.

  Attributes:
    hidden: [B, P, D] in the compute type, at the positions asked for; [B, T, D] for all.
    aux_losses: (sum, weight) by name, each with a coefficient in the model's `terms`.
    intermediates: arrays by name (attention maps, say), where they were asked for.
    cache: what the next call continues from; None without a cache.
  """

  hidden: jax.Array
  aux_losses: Metrics = flax.struct.field(default_factory=dict)
  intermediates: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
  cache: PyTree = None


class Model:
  """A Linen module from a batch to hidden states: `class Model(contracts.Model, nn.Module)`.

  Its fields are the options of the config. Parameters say what they are (`core.params.boxed`);
  one that does not is replicated, and decayed if it is a matrix. Nothing outside a model names
  its parameters' paths.

  Attributes:
    inputs: the batch arrays that it reads.
    causal: whether a position sees no later one.
    vocab_size: V.
    max_len: the longest row.
    options: `nn.Options`, which heads are made from: sizes, types, initialisation.
    terms: coefficients of its `aux_losses` in the total loss.
  """

  inputs: ClassVar[tuple[str, ...]] = ('tokens', 'segments', 'positions')
  causal: ClassVar[bool] = False
  terms: ClassVar[Mapping[str, float]] = {}

  def __call__(
    self,
    batch: Batch,
    positions: jax.Array | None = None,
    *,
    train: bool = False,
    cache: PyTree = None,
  ) -> Outputs:
    """Hidden states, last norm included.

    Args:
      batch: has `inputs`, each [B, T]; one that is left out means one document per row.
      positions: [B, P] int32, the indices of each row whose states are wanted, in any order, any
        of them more than once; None for all.
      train: dropout is on, from the stream `dropout`.
      cache: of `empty_cache`, or as it was returned; models that generate only.
    """
    raise NotImplementedError

  @classmethod
  def reads_source(cls) -> bool:
    """Whether it reads a second row beside the tokens."""
    return f'{SOURCE}tokens' in cls.inputs

  def table(self) -> jax.Array:
    """The projection on the vocabulary, [V, D]: logits are inner products with its rows."""
    raise ValueError(f'{type(self).__name__} has no projection on the vocabulary.')

  def table_bias(self) -> jax.Array | None:
    """What is added to the logits, [V]; None for nothing."""
    return None

  def empty_cache(self, rows: int, slots: int) -> PyTree:
    """What `cache` begins with, for `rows` rows of at most `slots` tokens. A model that reads a
    second row takes as a third argument the most tokens of that one.

    Axis 0 of every array is the row, so that rows of one cache can be put into another's; only
    the arrays of a `nn.stack.Stack` have their layers before it.
    """
    raise ValueError(f'{type(self).__name__} keeps no cache, so it cannot generate.')

  def flops(self, length: int, positions: int, source: int = 0) -> float:
    """FLOPs of the forward pass of one row of `length` tokens, its states read at `positions`, and
    of a second row of `source` tokens, where the model reads one.

    0 where a model does not say; utilization is then not reported.
    """
    del length, positions, source
    return 0.0


class Net(NamedTuple):
  """A network with its parameters, as objectives and predictors see it.

  Attributes:
    model: the bound model; `model.table()` is the projection on the vocabulary.
    heads: the bound heads by name.
    forward: (batch, positions) -> `Outputs`: a further pass through the model.
    train: whether it is training: dropout is on, and drawn anew in each pass.
  """

  model: Model
  heads: Mapping[str, 'nn.Module']
  forward: Callable[..., Outputs]
  train: bool = False


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
    embedding_pool: one of `nn.heads.POOLS`, by which it learns vectors of texts; None where it does
      not.
    writes: whether it asks for new text: `asked` says which, and its rows have `texts` and
      `prompt(text)`, the ids after which that text is to be written; None where it was cut.
    needs_reference: whether its rows need what another model thinks of their texts, which is found
      once before training: `log_probabilities` of that model. Such rows have `documents` and
      `texts`, and take what is found as `reference`, per document.
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

  def log_probabilities(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """What `Rows.reference` has of each text of a row, [B, G, ...]; called where `needs_reference`
    is set. Arguments as for `loss`.
    """
    del net, hidden_BPD, batch
    raise NotImplementedError

  def answer(self, net: Net, hidden_BPD: jax.Array, batch: Batch) -> jax.Array:
    """What `divergence` compares, of one pass: logits, say. Called where `diverges` is set, by
    methods that want the answers to a text and to the same text changed a little to be alike.
    Arguments as for `loss`.
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
    raise ValueError(f'the answers of {type(self).__module__} have no mean.')

  def calibrate(self, values: Mapping[str, float]) -> None:
    """Takes numbers that answering needs, a threshold say, from those of the validation set with
    which the parameters were saved; host half only, no compiled function may depend on them.
    """
    del values


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


class WeightForm(Protocol):
  """A pytree that stands where a kernel does, and multiplies in its own way.

  Transposed, quantized or low-rank forms are of this kind. `nn.linear.multiply` is where every
  projection meets one, in training, generation and plans.
  """

  def product(self, spec: str, x: jax.Array, dtype: DTypeLike, result: DTypeLike) -> jax.Array:
    """The einsum `spec` ('...D,DF->...F') of x and the weight.

    Args:
      spec: the einsum of the dense kernel.
      x: activations.
      dtype: the type to multiply in.
      result: the type to sum in and to return.
    """
    ...


class Piece(NamedTuple):
  """A parameter of an adapter, and the tensor of the library peft that it is.

  Attributes:
    name: ours, the last component of its path.
    suffix: theirs, after the name of the linear map, or of the table, that it stands beside.
    theirs: the axes of their tensor: R rank, I inputs of the map or rows of the table, O outputs, 1
      an axis of length one.
    ours: those of our parameter, where I and O may be several each.
    fill: what may stand for a map that is not adapted, where several maps are one tensor; None:
      nothing.
    targets: the option of the adapter that names the maps.
    listed: a list of adapter_config.json that names them, beside target_modules.
    beside: the last component of the path of the base's parameter: kernel, or embedding.
  """

  name: str
  suffix: str
  theirs: str
  ours: str
  fill: float | None = 0.0
  targets: str = 'targets'
  listed: str | None = None
  beside: str = 'kernel'


class Ported(NamedTuple):
  """What an adapter is to the library peft.

  Attributes:
    settings: its adapter_config.json, but for what the base decides.
    pieces: what it has beside linear maps. Of those with the same `targets`, the first is there in
      every adapted map.
    prompt: instead, one tensor of the whole model, whose name is the `suffix`; of its axes L counts
      layers where our parameter is in layers.
    tasks: peft's names of the tasks in which the network is the same there and here; () for all.
  """

  settings: Mapping[str, Any]
  pieces: tuple[Piece, ...] = ()
  prompt: Piece | None = None
  tasks: tuple[str, ...] = ()


class Adapter:
  """What is trained beside a frozen base, whose parameters keep their paths and their bits.

  By default nothing is added and every parameter that the adapter created is trained.

  Attributes:
    terms: name of each metric that `loss` gives -> its coefficient in the loss that is trained.
    positions: how many positions it takes before each document; a row is shorter by as many.
    tokens: how many virtual tokens it puts before each text, ids from the model's `vocab_size` on.
  """

  terms: Mapping[str, float] = {}
  positions: int = 0
  tokens: int = 0

  def check(self, infos: Mapping[str, 'Info'], base: Collection[str]) -> None:
    """Raises ValueError where an option does not fit the network; called before a run trains.

    Args:
      infos: what each parameter is, by path, the adapter's own among them.
      base: the paths of those that are not the adapter's own.
    """
    del infos, base

  def intercept(
    self,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: 'nn.module.InterceptorContext',
  ) -> Any:
    """Stands around every method of every module (`flax.linen.intercept_methods`).

    May create parameters in `context.module`; they are initialised after the whole base.
    """
    del context
    return next_fun(*args, **kwargs)

  def weights(self, params: PyTree) -> PyTree:
    """The parameters in the form in which the network reads them; kernels may be weight forms.

    Args:
      params: those of the network; in generation, where only the model runs, `model` alone.
    """
    return params

  def trains(self, path: str, info: 'Info', base: bool) -> bool:
    """Whether a parameter is trained; `base`: it is not the adapter's own."""
    del path, info
    return not base

  def trained_layers(self, params: PyTree, infos: Mapping[str, 'Info']) -> Mapping[str, np.ndarray]:
    """Of parameters that are trained in some layers only: in which, bool by path, as
    `Info.depths` numbers them ([layers] for a stack). One that is trained in none is frozen, one
    that is not mentioned is trained whole.

    Args:
      params: those that `trains` says are trained, arrays or shapes.
      infos: what each of them is, by path.
    """
    del params, infos
    return {}

  def begins(self, params: PyTree, infos: Mapping[str, 'Info']) -> Mapping[str, np.ndarray]:
    """Of parameters that are not trained from the first step on: after how many steps each of their
    layers is, int32 by path, as `trained_layers` has them.

    Until then they stay as they are; what the optimizer keeps of their gradients it keeps from the
    first step on, so that their first update is like any other.

    Args:
      params, infos: as for `trained_layers`.
    """
    del params, infos
    return {}

  def no_gradient(self, path: str) -> str | None:
    """Why the gradient of a trained parameter is zero before the first step, if the method has it
    so; None where it must not be, or the parameter would never learn.
    """
    del path
    return None

  def rate(self, path: str) -> float:
    """A factor on the learning rate of a trained parameter."""
    del path
    return 1.0

  def merged(self, params: PyTree, infos: Mapping[str, 'Info']) -> PyTree:
    """The parameters of the base alone, nested, with which it computes what the adapted network
    does; where the adapter adds nothing to the network, `params` as they are.

    Args:
      params: those of the network, nested arrays; a head may be missing.
      infos: what each of them is, by path.

    Raises:
      ValueError: the method cannot be merged, or a kernel is no array.
    """
    del infos
    if type(self).intercept is Adapter.intercept and type(self).weights is Adapter.weights:
      return params
    raise ValueError(
      f'the adapter {type(self).__module__} cannot be merged into its base: it has no `merged`.'
    )

  def ported(self, times: int = 1) -> Ported:
    """What the adapter is to the library peft.

    Args:
      times: by how much the rank is larger, where one tensor of the base is several maps of ours.

    Raises:
      ValueError: peft has no such method, or it is not known here how it has it.
    """
    del times
    raise ValueError(
      f'the adapter {type(self).__module__} has no form in the library peft; --export=merged '
      'writes a whole model.'
    )

  def to_ported(self, params: PyTree, infos: Mapping[str, 'Info']) -> PyTree:
    """The parameters with the values that `ported` has in peft; both nested."""
    del infos
    return params

  def from_ported(self, params: PyTree, infos: Mapping[str, 'Info']) -> PyTree:
    """The inverse of `to_ported`."""
    del infos
    return params

  @classmethod
  def ported_options(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the adapter, from an adapter_config.json whose type is one of `PEFT_TYPES` of its
    module; targets are not among them.

    Raises:
      ValueError: a setting that the adapter cannot have.
    """
    raise NotImplementedError

  def extras(self, params: PyTree) -> dict[str, Any]:
    """Arrays that are carried from step to step in `TrainState.extras`."""
    del params
    return {}

  def loss(self, params: PyTree) -> Metrics:
    """What the adapter itself wants of its parameters: (sum, weight) for each of `terms`, which are
    added to the loss that is trained, once per step.

    Args:
      params: those that are trained.
    """
    del params
    return {}

  def after_update(self, state: 'TrainState', grads: PyTree) -> 'TrainState':
    """Runs inside the jitted step, after the optimizer.

    Args:
      state: after the update.
      grads: of `state.params` before it, as they were, not clipped.
    """
    del grads
    return state


class Hook(Protocol):
  """Something that a training run does every so many steps.

  Attributes:
    every: after how many steps; the last step counts too.
  """

  every: int

  def __call__(self, step: int, state: 'TrainState', values: Mapping[str, float]) -> None:
    """Called on all hosts, when step `step` is over; `values` are its numbers."""
    ...
