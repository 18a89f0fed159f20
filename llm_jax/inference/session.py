"""A model opened for use: `llm_jax.open(folder)`.

    >>> import llm_jax
    >>> session = llm_jax.open(folder)  # of a run, or of a Hugging Face model
    >>> answers = session.predict(['a text', 'another one'])

Nothing is trained here, and no optimizer is made. What a call compiles is kept for the next one.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from llm_jax.core import config as config_lib
from llm_jax.core import named_adapters, tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Encoded, Objective, Tokenizer
from llm_jax.data import chat_template, encoding
from llm_jax.data.conversations import Message
from llm_jax.generation import completion
from llm_jax.generation.completion import Completer, Stream
from llm_jax.generation.decoding import Generator
from llm_jax.generation.sampling import Sampling
from llm_jax.hf import folders as hf
from llm_jax.hf import sentences
from llm_jax.inference import answers as answers_lib
from llm_jax.inference import explanation, prediction
from llm_jax.inference.attention_maps import AttentionMaps
from llm_jax.inference.chatting import Chat
from llm_jax.inference.embedding import Embedder, rounded_rows
from llm_jax.inference.filling import Filled, Filler
from llm_jax.objectives.shared import infilling
from llm_jax.parallel import sharding
from llm_jax.programs import assemble, inference, pretrained, soups, workdir
from llm_jax.programs.inference import Inference

Text = str | Sequence[str] | Mapping[str, Any]  # a text, a pair, or a record


class Session:
  """A model, its tokenizer and what they can be asked.

  In the examples `session` is an encoder with a masked-LM head and a classifier, `decoder` a
  decoder; `llm_jax.open` makes both.

  Attributes:
    origin: the folder that holds the weights.
    config: the resolved config.
    tokenizer: that of the model.
    soup: folders of runs whose parameters are averaged with those of `origin`.
    beneath: an opened session whose parameters are taken where they are those of the base.
  """

  def __init__(
    self,
    origin: pathlib.Path,
    config: Config,
    tokenizer: Tokenizer,
    soup: Sequence[pathlib.Path] = (),
    beneath: 'Session | None' = None,
  ):
    self.origin, self.tokenizer, self.soup = origin, tokenizer, tuple(soup)
    self.beneath = beneath
    self.config = assemble.resolve(config, tokenizer.vocab_size)

  @functools.cached_property
  def program(self) -> Inference:
    """Network, shardings and compiled functions, for any text."""
    return inference.outline(self.config, self.tokenizer)

  @functools.cached_property
  def params(self) -> dict[str, Any]:
    """The parameters on the mesh; heads that the folder does not hold are left out.

    Raises:
      ValueError: a parameter of the model is missing, or a part of a head.
    """
    return self.load(self.program)

  def load(self, program: Inference, heads: bool = False) -> dict[str, Any]:
    """The parameters as a program wants them, of a soup their average; numbers of the validation
    set are those of `origin`.

    Args:
      program: wants them.
      heads: as for `load_params`.

    Raises:
      ValueError: as `load_params` and `soups.average`.
    """

    held = {} if self.beneath is None else tree.flatten(self.beneath.params)

    def load(folder: pathlib.Path) -> dict[str, Any]:
      return load_params(program, folder, heads, calibrate=folder == self.origin, held=held)

    if self.soup:
      return program.kept(soups.average(program, [self.origin, *self.soup], load))
    return program.kept(load(self.origin))

  @functools.cached_property
  def beside(self) -> tuple[object, ...]:
    """What answers depend on besides `origin` and `config`: the other runs of a soup."""
    return tuple(answers_lib.model_key(folder, 'soup') for folder in self.soup)

  @property
  def adapters(self) -> list[str]:
    """The names of the adapters on the base that this is, or that this is one on."""
    return named_adapters.names(named_adapters.home(self.origin))

  def switched(self, adapter: str) -> 'Session':
    """Another adapter on the same base, which is held in memory once: of the parameters of a run,
    those that are in memory here, to the bit, are not read again; kernels in another form
    (`config.base_weights`) are.

    Args:
      adapter: one of `adapters`.

    Raises:
      ValueError: there is none of this name.
    """
    other = open_folder(named_adapters.home(self.origin), adapter)
    return Session(other.origin, other.config, other.tokenizer, beneath=self)

  @property
  def named(self) -> dict[str, list[str]]:
    """The folders of the other runs of a soup, as eval.json has them."""
    return {'soup': [str(folder) for folder in self.soup]} if self.soup else {}

  def predict(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """What the model says of each text: label, probabilities and how sure they are, or a value.

    Args:
      texts: texts, pairs of texts, or records with `text` and `pair`.

    Raises:
      ValueError: the model gives no labels, or its head is missing.

    Example:
      >>> first, second = session.predict(['a text', {'text': 'another one'}])
      >>> sorted(first)
      ['entropy', 'label', 'margin', 'probabilities', 'probability']
    """
    return list(self.answers(map(prediction.record, texts)))

  def answers(self, records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same for a stream of records, block by block."""
    labeller = self._labeller
    self._require(tuple(labeller.heads))
    return labeller(self.params, records)

  def check_record(self, record: Mapping[str, Any]) -> Encoded:
    """The arrays and values of a record; raises ValueError for one that the objective cannot
    read.
    """
    return self._encoder(record, self.tokenizer)

  def explain(
    self, texts: Sequence[Text], method: str = 'integrated_gradients', **options: Any
  ) -> list[dict[str, Any]]:
    """Which tokens the answer to each text rests on.

    Args:
      texts: as in `predict`.
      method: 'integrated_gradients' or 'occlusion'.
      **options: further fields of `explanation.Options`: unit='word', ig_steps=64.

    Returns:
      For each text `label`, the most likely class (None in regression); `score`, its probability
      (the value); `parts`, the tokens of the text with `text`, `field` ('text' or 'pair'), the
      `span` of its characters where it is known, and `score`; `sum` of these scores, by integrated
      gradients nearly `score` - `baseline`, more so with more steps; `baseline`, the answer where
      all tokens are masked; and `deletion`: the answer `by_score`, while the `masked` share of the
      tokens grows, the highest scores first, and in `random` orders.

    Raises:
      ValueError: the model gives no labels, its head is missing, or an option is not possible.

    Example:
      >>> (explained,) = session.explain(['a text'], method='occlusion')
      >>> sorted(explained['parts'][0])
      ['field', 'score', 'span', 'text']
    """
    return list(
      self.explanations(map(prediction.record, texts), explanation.Options(method, **options))
    )

  def explanations(
    self, records: Iterable[Mapping[str, Any]], options: explanation.Options
  ) -> Iterator[dict[str, Any]]:
    """The same for a stream of records, block by block."""
    explainer = self._explainer
    self._require(tuple(self._labeller.heads))
    return explainer(self.params, records, options)

  def embed(
    self, texts: Sequence[str], pool: str | None = None, normalize: bool | None = None
  ) -> np.ndarray:
    """[texts, D] float32: a vector for each text.

    Args:
      texts: any texts.
      pool: 'mean' of all positions, 'cls' the first, 'last' the last; None for what the folder of
        a sentence-transformers model says, or what the objective learned vectors by, else the mean.
      normalize: whether the vectors have length 1; None likewise, else they have.

    Example:
      >>> vectors = session.embed(['a text', 'another one', 'a third'])
      >>> vectors.shape == (3, session.config.model['dim'])
      True
    """
    if not len(texts):
      return np.zeros((0, self.program.network.model.options.dim), np.float32)
    said = self._sentences
    if said is not None and said.lower:
      texts = [text.lower() for text in texts]
    return self._embedder(self.params, texts, *self._pooling(pool, normalize))

  def ready_to_embed(self) -> None:
    """Makes vectors in batches of few sizes from here on, and compiles for all of them."""
    self._embedder = Embedder(self.program, self.tokenizer, few=True)
    self._embedder.warm(self.params, *self._pooling(None, None))

  def ready_to_fill(self, top: int) -> None:
    """Fills in batches of few sizes from here on, and compiles for all of them.

    Args:
      top: how many candidates a mask will get.

    Raises:
      ValueError: the model has no masked-LM head.
    """
    self._filler = Filler(self.program, self.tokenizer, few=True)
    self._require(('mlm',))
    self._filler.warm(self.params, top)

  def ready_to_answer(self, sample: Mapping[str, Any]) -> None:
    """Answers records in batches of few sizes from here on, and compiles for all of them.

    Args:
      sample: a record of the kind that it answers.
    """
    self._labeller = prediction.Labeller(self.program, self.tokenizer, self._encoder, few=True)
    self._require(tuple(self._labeller.heads))
    self._labeller.warm(self.params, sample)

  def _pooling(self, pool: str | None, normalize: bool | None) -> tuple[str, bool]:
    said = self._sentences
    if pool is None:
      objective = self.program.objective
      learned = (objective.embedding_pool if objective is not None else None) or 'mean'
      pool = said.pool if said is not None else learned
    if normalize is None:
      normalize = said.normalize if said is not None else True
    return pool, normalize

  def attention(self, text: str) -> tuple[list[str], np.ndarray]:
    """Where each token of a text looks.

    Args:
      text: its end is cut off where the model takes no row so long.

    Returns:
      The T tokens, special ones by name, and [L, N, T, T] float32: layer, head, from, to; each row
      adds up to 1.

    Raises:
      ValueError: the layers of the model are not those of this package.

    Example:
      >>> tokens, maps = session.attention('a text')
      >>> maps.shape[2:] == (len(tokens), len(tokens))
      True
    """
    return self._maps(self.params, text)

  @functools.cached_property
  def _sentences(self) -> sentences.Sentences | None:
    return sentences.read(self.origin)

  def complete(
    self,
    prompts: Sequence[str],
    *,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    stream: Stream | None = None,
    **numbers: float,
  ) -> list[str]:
    """The completion of each prompt, without the prompt; what an encoder-decoder writes for it.
    With `num_return_sequences` above 1 there are as many of each prompt, one after the other.

    Args:
      prompts: texts; an empty one asks for any text.
      sampling: how tokens are chosen.
      stop: strings before which a completion ends.
      stream: called with the number of a completion and its next piece.
      **numbers: fields of `Sampling`, in place of `sampling`: max_new_tokens=50, temperature=0.

    Raises:
      ValueError: the model is no decoder, a prompt too long, a sampling that is not possible.

    Example:
      >>> pieces = []
      >>> stream = lambda number, piece: pieces.append(piece)
      >>> (text,) = decoder.complete(['def main('], max_new_tokens=8, stream=stream)
      >>> ''.join(pieces) == text
      True
    """
    if not self.causal:
      raise ValueError('this model is an encoder: it fills in [MASK]s (`fill`) and does not write.')
    if sampling is not None and numbers:
      raise ValueError(f'give either sampling or {", ".join(numbers)}.')
    if not prompts:
      return []
    completer = self.completer(self._rows(len(prompts)))
    return completer(self.weights, prompts, sampling or Sampling(**numbers), stop, stream)

  def fill(self, texts: Sequence[str], top: int = 5) -> list[Filled]:
    """The most likely tokens at each [MASK] of each text.

    Args:
      texts: with one mask or several.
      top: how many candidates a mask gets.

    Raises:
      ValueError: the model has no masked-LM head, a text without a mask or too long.

    Example:
      >>> (filled,) = session.fill(['return the [MASK] of the [MASK]'], top=3)
      >>> [len(candidates) for candidates in filled.masks]
      [3, 3]
    """
    filler = self._filler
    self._require(('mlm',))
    return filler(self.params, texts, self._rows(len(texts)), top) if texts else []

  def chat(
    self,
    messages: Sequence[Message],
    *,
    sampling: Sampling | None = None,
    stream: Callable[[str], None] | None = None,
    **numbers: float,
  ) -> str:
    """What a decoder says next in a conversation, by the chat template of its folder or its run.

    Args:
      messages: {'role', 'content'} each; the last one is of the user, or of a tool.
      sampling: how tokens are chosen.
      stream: called with each piece of the answer.
      **numbers: fields of `Sampling`, in place of `sampling`.

    Raises:
      ValueError: the model is no decoder or has no chat template, messages that are no
        conversation, or too long.
    """
    if sampling is not None and numbers:
      raise ValueError(f'give either sampling or {", ".join(numbers)}.')
    return self.conversation(self.weights, messages, sampling or Sampling(**numbers), stream)

  def fitting(self, messages: Sequence[Message], sampling: Sampling) -> list[Message]:
    """The messages without as many of the oldest turns as there is no room for with the answer."""
    return self.conversation.fitting(messages, sampling)

  def infill(
    self,
    parts: Sequence[tuple[str, str]],
    *,
    sampling: Sampling | None = None,
    stream: Stream | None = None,
    **numbers: float,
  ) -> list[str]:
    """What a decoder that has learned it (`objective.fim_rate`) writes between two texts.

    Args:
      parts: what stands before, and what behind.
      sampling, stream, **numbers: as for `complete`.

    Raises:
      ValueError: the model is no decoder, or its tokenizer has no tokens for it; parts too long.
    """
    if not self.causal or self.reads_source:
      raise ValueError('only a decoder writes between two texts; this model is none.')
    if sampling is not None and numbers:
      raise ValueError(f'give either sampling or {", ".join(numbers)}.')
    before = completion.template(self.tokenizer, causal=True)[0]
    ids = [[*before, *infilling.prompt(self.tokenizer, *pair)] for pair in parts]
    completer = self.completer(self._rows(len(ids)))
    return completer.from_ids(self.weights, ids, sampling or Sampling(**numbers), stream=stream)

  def completions(
    self, prompts: Iterable[tuple[int, str]], sampling: Sampling, stop: Sequence[str] = ()
  ) -> Iterator[str]:
    """The same for a stream of prompts, batch by batch; the number that comes with a prompt is what
    its draws depend on.
    """
    for block, rows in self._batches(prompts):
      completer = self.completer(rows)
      numbers, texts = zip(*block, strict=True)
      yield from completer(self.weights, texts, sampling, stop, numbers=numbers)

  def fillings(self, texts: Iterable[str], top: int = 5) -> Iterator[Filled]:
    """As `fill`, for a stream of texts, batch by batch."""
    filler = self._filler
    self._require(('mlm',))
    for block, rows in self._batches(texts):
      yield from filler(self.params, block, rows, top)

  def check_prompt(self, prompt: str, sampling: Sampling) -> None:
    """Raises ValueError for a prompt that `complete`, or of an encoder `fill`, would refuse."""
    if self.causal:
      self.completer(rows=1).check(prompt, sampling)
    else:
      self._filler.ids(prompt)

  @property
  def causal(self) -> bool:
    """Whether the model writes: it is a decoder, or has one."""
    return bool(self.program.network.model.causal)

  @property
  def reads_source(self) -> bool:
    """Whether the model is an encoder-decoder, which answers in new text."""
    return bool(self.program.network.model.reads_source())

  @property
  def writing_ids(self) -> dict[str, int | None]:
    """See `completion.writing_ids`."""
    return completion.writing_ids(self.program, self.tokenizer)

  def _batches(self, items: Iterable[Any]) -> Iterator[tuple[list[Any], int]]:
    """A batch of items at a time, and how many rows they are run in."""
    items, rows = iter(items), 0
    while block := list(itertools.islice(items, self.config.batch_size)):
      rows = rows or self._rows(len(block))  # the last batch is filled up
      yield block, rows

  def _rows(self, count: int) -> int:
    """Texts that are run at once."""
    shards = sharding.row_shards(self.program.mesh)
    return min(self.config.batch_size, rounded_rows(count, shards))

  @functools.cached_property
  def _encoder(self) -> encoding.Encoder:
    return assemble.encoder(self.config)

  @functools.cached_property
  def _labeller(self) -> prediction.Labeller:
    return prediction.Labeller(self.program, self.tokenizer, self._encoder)

  @functools.cached_property
  def _explainer(self) -> explanation.Explainer:
    return explanation.Explainer(self.program, self.tokenizer, self._encoder)

  @functools.cached_property
  def _embedder(self) -> Embedder:
    return Embedder(self.program, self.tokenizer)

  @functools.cached_property
  def _maps(self) -> AttentionMaps:
    return AttentionMaps(self.program, self.tokenizer)

  @functools.cached_property
  def _filler(self) -> Filler:
    return Filler(self.program, self.tokenizer)

  def completer(self, rows: int = 1) -> Completer:
    """What continues prompts with the model, so many at once."""
    asked = self.program.objective or Objective()
    given = self.writing_ids, asked.ends, asked.prompt_end
    return Completer(self._generator, self.tokenizer, rows, *given)

  @functools.cached_property
  def conversation(self) -> Chat:
    """What answers conversations.

    Raises:
      ValueError: the model is no decoder, or has no chat template.
    """
    if not self.causal or self.reads_source:
      raise ValueError('only a decoder answers in a conversation; this model is none.')
    template = getattr(self.program.objective, 'template', None)
    if not isinstance(template, chat_template.Template):
      found = hf.chat_template(self.origin)
      if found is None:
        raise ValueError(
          f'{self.origin} has no chat template; fine-tune it by configs/chat.py, or put one into '
          'chat_template.jinja of its folder.'
        )
      template = chat_template.of(found, self.tokenizer)
    ends = (template.end,)
    return Chat(Completer(self._generator, self.tokenizer, 1, self.writing_ids, ends), template)

  @functools.cached_property
  def _generator(self) -> Generator:
    return completion.of(self.program, self.tokenizer, rows=1).generator

  @functools.cached_property
  def weights(self) -> Any:
    """The parameters as generation runs them."""
    return self._generator.weights(self.params['model'])

  def _require(self, heads: Sequence[str]) -> None:
    """Raises ValueError where the folder lacks one of these heads."""
    missing = [f'heads_{name}' for name in heads if f'heads_{name}' not in self.params]
    wanted = tree.paths({name: self.program.params[name] for name in missing})
    if wanted:
      raise ValueError(f'{self.origin} lacks parameters that this needs:\n  ' + '\n  '.join(wanted))


def open_folder(folder: str | os.PathLike[str], adapter: str | None = None) -> Session:
  """Opens the workdir of a run, or a Hugging Face folder; or the adapter of this name in there.

  Raises:
    ValueError: no such run, folder or adapter, or a tokenizer that does not belong to it.
  """
  path = pathlib.Path(folder).expanduser().absolute()
  if adapter is not None:
    path = named_adapters.existing(path, adapter)
  if not pretrained.is_foreign(path):
    return open_model(path)
  sections = dict(tokenizer={}, model={}, objective={}, optimizer={}, data={})
  config = Config(steps=1, batch_size=32, init_from=str(path), **sections)
  return open_model(None, pretrained.fill_in(config))


def open_model(folder: pathlib.Path | None, given: Config | None = None) -> Session:
  """Opens what `config.init_from` names, or else the run in a workdir.

  Args:
    folder: of a run; None where the config names a folder.
    given: a config. Where it names no folder, its data, evaluation and batch size go before the
      run's own.

  Raises:
    ValueError: no such run or folder, or a tokenizer that does not belong to it.
  """
  if given is not None and given.init_from:
    origin = pathlib.Path(given.init_from)
    given = dataclasses.replace(given, compress=pretrained.compression(origin))
    return Session(origin, given, pretrained.load_tokenizer(given))
  config = _on_devices_here(workdir.read_config(folder))
  if given is not None:
    config = _with_data_of(given, config)
  return Session(folder, config, workdir.load_tokenizer(config, folder))


def load_params(
  program: Inference,
  origin: pathlib.Path,
  heads: bool = False,
  calibrate: bool = True,
  held: Mapping[str, jax.Array] | None = None,
) -> dict[str, Any]:
  """The parameters in a folder, of a run those of its best checkpoint, as a program wants them;
  what the run found on its validation set with them is given to the objective's predictor.

  Args:
    program: wants them.
    origin: the folder.
    heads: all heads must be there; otherwise those that are not are left out.
    calibrate: whether the predictor is given these numbers.
    held: parameters that are in memory, by path; those of the base are not read again.

  Raises:
    ValueError: there are none, or some are missing.
  """
  loaded = pretrained.load_params(program, origin, held=held, in_forms=True)
  missing = {path.split('/')[0] for path in loaded.new}
  partial = any(path.split('/')[0] in missing for path in loaded.params)
  if loaded.new and (heads or partial or 'model' in missing):
    raise ValueError(f'{origin} lacks parameters that this needs:\n  ' + '\n  '.join(loaded.new))
  if loaded.new:
    logging.info('%s has no %s.', origin, ', '.join(sorted(missing)))
  step = '' if loaded.step is None else f', step {loaded.step}'
  logging.info('Parameters of %s%s.', origin, step)
  if loaded.unused:
    logging.info('Not used: %s.', ', '.join(loaded.unused))
  predictor = getattr(program.objective, 'predictor', None)
  if predictor is not None and calibrate:
    predictor.calibrate(loaded.values or {})
  return tree.nest(loaded.params)


def _on_devices_here(config: Config) -> Config:
  """The config of a run; where its mesh is for other devices, all that are here share parameters
  and rows.
  """
  try:
    assemble.create_layout(config)
  except ValueError:
    whole = dict.fromkeys(('data', 'sequence', 'tensor', 'dcn_data', 'dcn_fsdp'), 1)
    logging.info('The mesh of the run, %s, is for other devices; here: fsdp=-1.', config.mesh)
    config = dataclasses.replace(config, mesh=dict(config.mesh) | whole | {'fsdp': -1})
    assemble.create_layout(config)
  return config


def _with_data_of(given: Config, config: Config) -> Config:
  theirs, ours = given.data.get('pair'), config.data.get('pair')
  if (theirs is None) != (ours is None):
    raise ValueError(
      f'the run read config.data.pair={ours!r}, and is to be evaluated on '
      f'config.data.pair={theirs!r}; both need pairs, or neither.'
    )
  chosen = dataclasses.replace(
    config,
    data=given.data,
    validation=given.validation,
    evaluation=given.evaluation,
    batch_size=given.batch_size,
  )
  forbidden, allowed = config_lib.differences(chosen, given)
  for line in [*forbidden, *allowed]:
    logging.info('as in the run, not as in --config: %s', line)
  return chosen
