"""Several runs that are used together: their parameters as one model (`programs.soups`), or their
answers as one answer.

    both = llm_jax.open(folder, ensemble=[other])
    answers = both.predict(['a text'])

The probabilities of an ensemble are the means of those of its members, as scikit-learn's
`VotingClassifier` votes softly.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llm_jax.core import config as config_lib
from llm_jax.core.config import Config
from llm_jax.core.contracts import Documents, Encoded, Example, Predictor, Tokenizer
from llm_jax.data import pipeline
from llm_jax.inference import answers as answers_lib
from llm_jax.inference import prediction
from llm_jax.inference.session import Session, Text, open_folder
from llm_jax.programs import assemble, inference, pretrained, soups
from llm_jax.programs.inference import Inference

Folder = str | os.PathLike[str]
BLOCK = 1024  # records that all members answer before the next ones are read


class Ensemble:
  """Models that answer together; they may differ in all but their tokenizer and their classes.

  Args:
    members: the opened runs, all of which are held in memory.

  Attributes:
    members: as given.
    origin, config, tokenizer, program: those of the first.
    reads_source: False: what an encoder-decoder writes has no mean.

  Raises:
    ValueError: an objective whose answers have no mean, other classes, another tokenizer.
  """

  reads_source = False

  def __init__(self, members: Sequence[Session]):
    self.members = tuple(members)
    first = self.members[0]
    if _predictor(first) is None or type(_predictor(first)).combined is Predictor.combined:
      raise ValueError(
        f'the objective {first.config.objective.get("name")} of {first.origin} has no answers that '
        'could be averaged; a soup averages parameters.'
      )
    for member in self.members[1:]:
      _check_alike(first, member)

  @property
  def origin(self) -> pathlib.Path:
    """The folder of the first."""
    return self.members[0].origin

  @property
  def config(self) -> Config:
    """The config of the first."""
    return self.members[0].config

  @property
  def tokenizer(self) -> Tokenizer:
    """That of all."""
    return self.members[0].tokenizer

  @property
  def program(self) -> Inference:
    """The program of the first."""
    return self.members[0].program

  @functools.cached_property
  def beside(self) -> tuple[object, ...]:
    """What the answers depend on besides `origin` and `config`."""
    return tuple(
      answers_lib.model_key(member.origin, 'ensemble', member.config) for member in self.members[1:]
    )

  @property
  def named(self) -> dict[str, list[str]]:
    """The folders of the others, as eval.json has them."""
    return {'ensemble': [str(member.origin) for member in self.members[1:]]}

  def voters(
    self, config: Config, documents: Sequence[Documents], example: Example
  ) -> list[tuple[Inference, dict[str, Any]]]:
    """The programs of the other members for rows that the first one lays out, and their parameters.

    Args:
      config: with which the first is evaluated.
      documents: of each corpus.
      example: the first row of them, as the first member reads it.

    Raises:
      ValueError: a member reads them otherwise.
    """
    return [self._voter(member, config, documents, example) for member in self.members[1:]]

  def _voter(
    self, member: Session, config: Config, documents: Sequence[Documents], example: Example
  ) -> tuple[Inference, dict[str, Any]]:
    shared = {name: getattr(config, name) for name in ('seq_len', 'batch_size', 'mesh', 'seed')}
    # Documents are read as the first one reads them, hidden states as the member does.
    reads = {name: member.config.objective.get(name) for name in pretrained.READING}
    shared['objective'] = dict(config.objective) | config_lib.given(reads)
    own = dataclasses.replace(member.config, **shared)
    objective = assemble.create_objective(own, self.tokenizer)
    rows = pipeline.validation_rows(documents, objective, own.seq_len)
    found = pipeline.validation_examples(rows, objective, own.seed, config.evaluation.rows)[0]
    for name in sorted(found.keys() | example.keys()):
      if not np.array_equal(found.get(name), example.get(name)):
        raise ValueError(
          f'{member.origin} lays texts out in other rows than {self.origin} ({name} differs), so '
          'that they cannot be scored together; --mode=predict answers with both.'
        )
    program = inference.build(own, objective, found)
    if program.network.longest < own.seq_len:
      raise ValueError(
        f'{member.origin} reads rows of at most {program.network.longest} tokens, and those of '
        f'{self.origin} have {own.seq_len}; name the run with the shortest rows as --workdir.'
      )
    return program, member.load(program, heads=True)

  def predict(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """What the models say of each text; arguments and errors as for `Session.predict`."""
    return list(self.answers(map(prediction.record, texts)))

  def answers(self, records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same for a stream of records, block by block."""
    records, predictor = iter(records), _predictor(self.members[0])
    while block := list(itertools.islice(records, BLOCK)):
      found = [list(member.answers(block)) for member in self.members]
      for said in zip(*found, strict=True):
        yield predictor.combined(said)

  def check_record(self, record: Mapping[str, Any]) -> Encoded:
    """As `Session.check_record`."""
    return self.members[0].check_record(record)


def open_runs(
  folder: Folder,
  soup: Sequence[Folder] = (),
  ensemble: Sequence[Folder] = (),
  adapter: str | None = None,
) -> Session | Ensemble:
  """Opens a folder, and others beside it; see `llm_jax.open`."""
  return together(open_folder(folder, adapter), soup, ensemble)


def together(
  first: Session, soup: Sequence[Folder] = (), ensemble: Sequence[Folder] = ()
) -> Session | Ensemble:
  """An opened run with others.

  Args:
    first: the run.
    soup: folders whose parameters are averaged with its own.
    ensemble: folders whose answers are averaged with its own.

  Raises:
    ValueError: both are given, a folder twice, or runs that do not go together.
  """
  if soup and ensemble:
    raise ValueError(
      'a soup averages parameters, an ensemble answers; give one of both, or export the soup and '
      'name the export in the ensemble.'
    )
  others = [open_folder(folder) for folder in (*soup, *ensemble)]
  known = [first.origin.resolve()]
  for other in others:
    if other.origin.resolve() in known:
      raise ValueError(f'{other.origin} is named twice; each run counts once.')
    known.append(other.origin.resolve())
  if ensemble:
    return Ensemble([first, *others])
  for other in others:
    _check_alike(first, other)
    soups.check(first.config, other.config, other.origin)
  if not others:
    return first
  folders = [other.origin for other in others]
  return Session(first.origin, first.config, first.tokenizer, folders)


def _predictor(session: Session) -> Any:
  return getattr(session.program.objective, 'predictor', None)


def _check_alike(first: Session, other: Session) -> None:
  """Raises ValueError for another tokenizer, or classes."""
  if first.tokenizer.fingerprint != other.tokenizer.fingerprint:
    raise ValueError(
      f'{other.origin} has another tokenizer than {first.origin}: what is averaged must read the '
      'same tokens; train both with --config.init_from of one run.'
    )
  ours, theirs = _predictor(first), _predictor(other)
  for name in ('task', 'classes'):
    mine, other_one = getattr(ours, name, None), getattr(theirs, name, None)
    if mine != other_one:
      raise ValueError(
        f'{other.origin} has objective.{name}={other_one!r}, and {first.origin} has {mine!r}; what '
        'is averaged must have the same, in the same order.'
      )
  if type(ours) is not type(theirs):
    names = [session.config.objective.get('name') for session in (other, first)]
    raise ValueError(
      f'{other.origin} has the objective {names[0]}, and {first.origin} has {names[1]}; what is '
      'averaged must have the same.'
    )
