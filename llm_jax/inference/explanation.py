"""Which tokens an answer rests on: a score for each token of a text, and what the scores are worth.

Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365, eq. 1): the gradient with respect
to the embeddings, averaged on the straight line from a baseline to the text. The scores add up to
what the text changes against the baseline (completeness, proposition 1). The baseline is the text
with all its tokens masked, special ones left as they are; not a row of zeros, where the first norm
of a model whose norms come first has a jump that no rule of few points sees.

Occlusion (Zeiler and Fergus 2014, arXiv:1311.2901): what the answer loses when a token is masked.

The deletion curve (Petsiuk et al. 2018, arXiv:1806.07421, section 4.3): the answer while tokens are
masked, those of the highest scores first. Scores that mean something make it fall faster than
random orders do.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.contracts import Batch, Example, Predictor, Record, Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.data import documents, encoding
from llm_jax.inference.embedding import rounded_rows
from llm_jax.nn.embedder import Embedder
from llm_jax.parallel import sharding
from llm_jax.programs import inference, network
from llm_jax.programs.inference import Inference
from llm_jax.programs.network import Network

METHODS = ('integrated_gradients', 'occlusion')
UNITS = ('token', 'word')
TASKS = ('multiclass', 'binary', 'multilabel', 'regression')
DELETIONS = np.linspace(0, 1, 11)  # shares of a text that are masked
RANDOM_ORDERS = 5
TILE = 16  # rows are as long as the longest text, rounded up to this


@dataclasses.dataclass(frozen=True)
class Options:
  """How texts are explained.

  Attributes:
    method: one of `METHODS`.
    unit: what gets a score, a 'token' or a 'word'; the gradients of a word's tokens are added,
      and its tokens are masked together.
    ig_steps: points on the line of the integral, those of Gauss and Legendre.

  Raises:
    ValueError: a value that is not allowed.
  """

  method: str = 'integrated_gradients'
  unit: str = 'token'
  ig_steps: int = 32

  def __post_init__(self) -> None:
    for name, allowed in (('method', METHODS), ('unit', UNITS)):
      if getattr(self, name) not in allowed:
        raise ValueError(f'{name}={getattr(self, name)!r} must be one of {", ".join(allowed)}.')
    if self.ig_steps < 1:
      raise ValueError(f'ig_steps={self.ig_steps} must be at least 1.')


class Explainer:
  """Explains the answers of a classifier or a regressor.

  Args:
    program: of a network whose objective answers by probabilities or values.
    tokenizer: that of the model.
    encoder: makes arrays of a record.

  Raises:
    ValueError: the objective gives no such answers.
  """

  def __init__(self, program: Inference, tokenizer: Tokenizer, encoder: encoding.Encoder):
    predictor = getattr(program.objective, 'predictor', None)
    if getattr(predictor, 'task', None) not in TASKS:
      raise ValueError(
        f'the objective {program.config.objective.get("name")} gives no label or value that could '
        'be explained; fine-tune the run first: --config=configs/classify.py '
        '--config.init_from=WORKDIR.'
      )
    if not predictor.explainable:
      raise ValueError(
        f'the objective {program.config.objective.get("name")} reads texts among other '
        'words, whose part in an answer cannot be told from theirs here; --mode=predict gives the '
        'answers.'
      )
    self._program, self._tokenizer, self._encoder = program, tokenizer, encoder
    self._predictor: Predictor = predictor
    mask = tokenizer.mask_id
    self._mask_id = tokenizer.unk_id if mask is None else mask
    self._answers = self._compiled(functools.partial(_answers, program.network))
    self._gradients: dict[int, Callable[..., Any]] = {}

  def __call__(
    self, params: PyTree, records: Iterable[Record], options: Options
  ) -> Iterator[dict[str, Any]]:
    """An explanation for each record, as `Session.explain` says, `batch_size` records at a time."""
    records = iter(records)
    while block := list(itertools.islice(records, self._program.config.batch_size)):
      yield from self._explained(params, block, options)

  def _explained(
    self, params: PyTree, records: Sequence[Record], options: Options
  ) -> list[dict[str, Any]]:
    seq_len = self._row_length(records)
    texts = [self._text(record, seq_len, options.unit) for record in records]
    said_NC = self._said(params, (text.row for text in texts))
    labels = np.argmax(said_NC, -1).astype(np.int32)  # in regression the only column
    whole = said_NC[np.arange(len(texts)), labels]
    run = functools.partial(self._scores, params, texts, labels)
    if options.method == 'occlusion':
      pairs = [_occlusion(i, text, whole[i], run) for i, text in enumerate(texts)]
      scores, baseline = zip(*pairs, strict=True)
    else:
      scores, baseline = self._integrated(params, texts, labels, options.ig_steps)
    deletions = [_deletion(i, text, scores[i], run) for i, text in enumerate(texts)]
    return [
      {
        'label': self._name(labels[i]),
        'score': float(whole[i]),
        'baseline': float(baseline[i]),
        'sum': float(np.sum(scores[i])),
        'parts': text.described(scores[i]),
        'deletion': deletions[i],
      }
      for i, text in enumerate(texts)
    ]

  def _row_length(self, records: Sequence[Record]) -> int:
    """Tokens of a row with a single text, few lengths for many texts, which the mesh can cut."""
    rows = (self._row(record, self._program.config.seq_len) for record in records)
    longest = max(int(np.count_nonzero(row['segments'])) for row in rows)
    tile = math.lcm(TILE, self._program.mesh.shape['sequence'])
    return min(self._program.config.seq_len, -(-longest // tile) * tile)

  def _row(self, record: Record, seq_len: int) -> Example:
    alone = documents.Memory([record], self._encoder, self._tokenizer)
    return self._predictor.layout(alone, seq_len).example(0, np.random.default_rng(0))

  def _text(self, record: Record, seq_len: int, unit: str) -> '_Text':
    row, tokenizer = self._row(record, seq_len), self._tokenizer
    frame_ids = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id}
    frame_ids |= {tokenizer.bos_id, tokenizer.eos_id}
    special = tokenizer.special[row['tokens']]
    if tokenizer.unk_id not in frame_ids:  # it is a token of the text
      special = special & (row['tokens'] != tokenizer.unk_id)
    positions = np.flatnonzero((row['segments'] > 0) & ~special)
    return _Text(row, positions, self._mask_id, record, tokenizer, unit)

  def _said(self, params: PyTree, rows: Iterable[Example]) -> np.ndarray:
    """[rows, C] float32: what is said of each row."""
    # In batches of one size, that of a deletion curve: each size is compiled for.
    batches = self._batches(rows, len(DELETIONS) * (1 + RANDOM_ORDERS))
    return np.concatenate([np.asarray(self._answers(params, batch))[:n] for batch, n in batches])

  def _name(self, label: int) -> str | None:
    return None if self._predictor.task == 'regression' else self._predictor.classes[label]

  def _scores(
    self,
    params: PyTree,
    texts: Sequence['_Text'],
    labels: np.ndarray,
    variants: Sequence[tuple[int, np.ndarray]],
  ) -> np.ndarray:
    """[variants] float32: what is said of each variant, a text by its number and its tokens."""
    rows = (texts[number].row | {'tokens': tokens} for number, tokens in variants)
    chosen = labels[[number for number, _ in variants]]
    return self._said(params, rows)[np.arange(len(variants)), chosen]

  def _integrated(
    self,
    params: PyTree,
    texts: Sequence['_Text'],
    labels: np.ndarray,
    steps: int,
  ) -> tuple[list[np.ndarray], np.ndarray]:
    """The scores of each text's parts, and what is said of the baseline of each text."""
    rows = (
      text.row | {'masked': text.masked(range(text.count)), 'explained': label}
      for text, label in zip(texts, labels, strict=True)
    )
    run, scores_NT, baseline_N = self._gradient(steps), [], []
    for batch, count in self._batches(rows, len(texts)):
      by_position_BT, baseline_B = map(np.asarray, run(params, batch))
      scores_NT += list(by_position_BT[:count])
      baseline_N += list(baseline_B[:count])
    pairs = zip(texts, scores_NT, strict=True)
    return [text.summed(scores_T) for text, scores_T in pairs], np.array(baseline_N)

  def _gradient(self, steps: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    if steps not in self._gradients:
      run = functools.partial(_explained_by_gradients, self._program.network, steps)
      self._gradients[steps] = self._compiled(run)
    return self._gradients[steps]

  def _batches(self, rows: Iterable[Example], most: int) -> Iterator[tuple[Batch, int]]:
    """Rows in batches on the mesh of at most about `most`, and how many of each count: the last is
    filled up.
    """
    program, rows = self._program, iter(rows)
    shards = sharding.row_shards(program.mesh)
    size = min(program.config.batch_size, rounded_rows(most, shards))
    by_row = sharding.batch_sharding(program.mesh)
    while part := list(itertools.islice(rows, size)):
      full = part + [part[0]] * (size - len(part))
      arrays = {key: np.stack([row[key] for row in full]) for key in part[0]}
      place = lambda x: jax.make_array_from_callback(x.shape, by_row, x.__getitem__)
      yield {key: place(x) for key, x in arrays.items()}, len(part)

  def _compiled(self, function: Callable[[PyTree, Batch], Any]) -> Callable[..., Any]:
    program = self._program
    whole = sharding.replicated(program.mesh)
    return jax.jit(inference.on_layout(program.layout, function), out_shardings=whole)


def integrated_gradients(
  score: Callable[[jax.Array], jax.Array], x_BTD: jax.Array, baseline_BTD: jax.Array, steps: int
) -> jax.Array:
  """The scores of positions, [B, T], by arXiv:1703.01365, eq. 1, summed over D.

  Args:
    score: embeddings [B, T, D] to [B]; no row changes another's.
    x_BTD: the embeddings that are explained.
    baseline_BTD: those at which the integral begins.
    steps: points of the Gauss-Legendre rule, which is exact where the score is a polynomial of a
      degree up to 2 * steps along the line.
  """
  nodes, weights = np.polynomial.legendre.leggauss(steps)  # of an integral from -1 to 1
  points = jnp.asarray((nodes + 1) / 2, x_BTD.dtype), jnp.asarray(weights / 2, x_BTD.dtype)
  gradient = jax.grad(lambda x_BTD: jnp.sum(score(x_BTD)))
  change_BTD = x_BTD - baseline_BTD

  def add(total_BTD: jax.Array, point: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    along, weight = point
    return total_BTD + weight * gradient(baseline_BTD + along * change_BTD), None

  mean_BTD, _ = jax.lax.scan(add, jnp.zeros_like(x_BTD), points)
  return jnp.sum(mean_BTD * change_BTD, axis=-1)


def _answers(net: Network, params: PyTree, batch: Batch) -> jax.Array:
  """[B, C]: the probabilities of each row's only text; its value where there are no classes."""
  return _of_first_text(network.apply(net, params, batch, method='predict'))


def _of_first_text(said: Mapping[str, jax.Array]) -> jax.Array:
  return said['probabilities'][:, 0] if 'probabilities' in said else said['values'][:, :1]


def _explained_by_gradients(
  net: Network, steps: int, params: PyTree, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """The scores of positions [B, T], and what is said of the baseline [B].

  Args:
    net: the network.
    steps: points of the integral.
    params: of the network.
    batch: a text per row, its `masked` tokens [B, T], and the class `explained` [B].
  """
  batch = dict(batch)
  masked_BT, label_B = batch.pop('masked'), batch.pop('explained')
  dtype = net.model.options.compute_dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  embed = functools.partial(network.apply, net, params, method=_embedded)
  x_BTD = embed(batch).astype(wide)
  baseline_BTD = embed(batch | {'tokens': masked_BT}).astype(wide)

  def score(x_BTD: jax.Array) -> jax.Array:
    method = functools.partial(_predicted_from, x_BTD=x_BTD.astype(dtype))
    said_BC = _of_first_text(network.apply(net, params, batch, method=method))
    return jnp.take_along_axis(said_BC, label_B[:, None], -1)[:, 0].astype(wide)

  scores_BT = integrated_gradients(score, x_BTD, baseline_BTD, steps)
  return scores_BT, score(baseline_BTD)


def _embedded(net: Network, batch: Batch) -> jax.Array:
  """[B, T, D]: what the embedder of a bound network gives.

  Raises:
    ValueError: the model has no `nn.embedder.Embedder`, or calls it several times.
  """
  found = []

  def note(next_fun, args, kwargs, context):
    result = next_fun(*args, **kwargs)
    if _is_embedding(context):
      found.append(result)
    return result

  with nn.intercept_methods(note):
    net.predict(batch)
  if len(found) != 1:
    raise ValueError(
      f'the answer of {type(net.model).__name__} calls an nn.embedder.Embedder {len(found)} times, '
      "and integrated gradients vary what a single call gives; use the method 'occlusion'."
    )
  return found[0]


def _predicted_from(net: Network, batch: Batch, x_BTD: jax.Array) -> dict[str, jax.Array]:
  """What a bound network answers where its embedder gives `x_BTD`."""

  def replace(next_fun, args, kwargs, context):
    return x_BTD if _is_embedding(context) else next_fun(*args, **kwargs)

  with nn.intercept_methods(replace):
    return net.predict(batch)


def _is_embedding(context: 'nn.module.InterceptorContext') -> bool:
  return isinstance(context.module, Embedder) and context.method_name == '__call__'


class _Text:
  """One text in a row of its own, and the parts of it that get a score.

  Args:
    row: as the predictor lays it out.
    positions: indices of the row where tokens of the text, or of a pair, stand.
    mask_id: what a token is replaced by.
    record: where it comes from.
    tokenizer: made the ids.
    unit: one of `UNITS`.
  """

  def __init__(
    self,
    row: Example,
    positions: np.ndarray,
    mask_id: int,
    record: Record,
    tokenizer: Tokenizer,
    unit: str,
  ):
    self.row, self._positions, self._mask_id = row, positions, mask_id
    ids = row['tokens'][positions]
    gaps = np.flatnonzero(np.diff(positions) > 1)
    second = int(gaps[0]) + 1 if len(gaps) and record.get('pair') is not None else len(positions)
    firsts = np.ones(len(ids), bool)
    if unit == 'word':
      firsts = tokenizer.word_start[ids] | np.isin(np.arange(len(ids)), (0, second))
    self._part = np.cumsum(firsts) - 1
    self.count = int(np.count_nonzero(firsts))
    texts = [('text', ids[:second], 0), ('pair', ids[second:], second)]
    self._tokens = [
      token
      for field, given, first in texts
      for token in _tokens(record, field, given, self._part[first:], tokenizer)
    ]

  def masked(self, parts: Iterable[int]) -> np.ndarray:
    """[T] int32: the row's tokens, those of some parts masked."""
    tokens = self.row['tokens'].copy()
    tokens[self._positions[np.isin(self._part, list(parts))]] = self._mask_id
    return tokens

  def summed(self, scores_T: np.ndarray) -> np.ndarray:
    """[parts] float64, from scores of the row's positions."""
    return np.bincount(self._part, scores_T[self._positions], minlength=self.count)

  def described(self, scores: np.ndarray) -> list[dict[str, Any]]:
    """Each part with its score."""
    return [
      token | {'score': float(score)} for token, score in zip(self._tokens, scores, strict=True)
    ]


def _tokens(
  record: Record, field: str, ids: np.ndarray, part: np.ndarray, tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
  """The parts of one text: how each is spelled, its field and, where the ids are those of the
  field, the span of its characters.
  """
  spans = None
  if isinstance(record.get(field), str):
    known, found = tokenizer.offsets(record[field])
    if np.array_equal(known[: len(ids)], ids):
      spans = found
  for number in dict.fromkeys(part[: len(ids)]):
    own = np.flatnonzero(part[: len(ids)] == number)
    described: dict[str, Any] = {'text': tokenizer.decode(ids[own]), 'field': field}
    if spans is not None:
      start, stop = int(spans[own, 0].min()), int(spans[own, 1].max())
      described |= {'text': record[field][start:stop], 'span': [start, stop]}
    yield described


Run = Callable[[Sequence[tuple[int, np.ndarray]]], np.ndarray]


def _occlusion(number: int, text: _Text, whole: float, run: Run) -> tuple[np.ndarray, float]:
  """What the answer loses by each part of a text, [parts], and the answer where all are masked."""
  parts = [[part] for part in range(text.count)] + [range(text.count)]
  *said, baseline = run([(number, text.masked(part)) for part in parts])
  return whole - np.array(said, np.float64), baseline


def _deletion(number: int, text: _Text, scores: np.ndarray, run: Run) -> dict[str, Any]:
  """The answer while parts are masked: by their scores, and the mean over random orders."""
  rng = np.random.default_rng(0)
  orders = [np.argsort(-scores, kind='stable')]
  orders += [rng.permutation(text.count) for _ in range(RANDOM_ORDERS)]
  counts = np.rint(DELETIONS * text.count).astype(int)
  said = run([(number, text.masked(order[:count])) for order in orders for count in counts])
  by_score, *random = said.reshape(len(orders), len(counts)).astype(np.float64)
  return {
    'masked': DELETIONS.tolist(),
    'by_score': by_score.tolist(),
    'random': np.mean(random, axis=0).tolist(),
  }
