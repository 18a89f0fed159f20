"""Documents that measure a model: a validation or a test set, laid out, and what belongs to it; and
the groups of their texts, by fields of their records: `config.evaluation.slices`.

Records are read from the source itself, not from the token cache: other slices make no other run,
and nothing is encoded again.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.core import config as config_lib
from llm_jax.core.config import Config
from llm_jax.core.contracts import Documents, Example, Objective, Record, Rows, Source
from llm_jax.data import pipeline
from llm_jax.programs import assemble

MOST_GROUPS = 100  # of a field
MISSING = '(none)'  # the group of texts whose field is null or empty


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """A validation or test set.

  Attributes:
    config: names its source.
    name: 'validation' or 'test'.
    documents: of each corpus.
    laid_out: their rows.
    examples: those that are used; none where there are no documents.
    rows: where each example comes from, as `pipeline.numbered_rows` gives it.
    slices: the groups of their texts, as `read_slices` gives them.
  """

  config: Config
  name: str
  documents: Sequence[Documents]
  laid_out: Sequence[Rows]
  examples: Sequence[Example]
  rows: Sequence[tuple[Rows, int]]
  slices: Mapping[str, Sequence[Sequence[str]]]

  def __len__(self) -> int:
    return len(self.examples)

  def record(self, rows: Rows, text: int) -> Record:
    """The record of a document of `rows`, as its source has it, not as the tokenizer does."""
    corpus = next(i for i, laid_out in enumerate(self.laid_out) if laid_out is rows)
    return self._sources[corpus][int(self.documents[corpus].ids[text])]

  @functools.cached_property
  def _sources(self) -> list[Source]:
    return sources(self.config, self.name, ())


def lay_out(
  config: Config, name: str, documents: Sequence[Documents], objective: Objective, limit: int = 0
) -> HeldOut:
  """A set, laid out by an objective.

  Args:
    config: the resolved config.
    name: 'validation' or 'test'.
    documents: of each corpus; none where there is no such set.
    objective: lays them out.
    limit: how many rows are used; 0 for all.

  Raises:
    ValueError: as `read_slices`.
  """
  laid_out = pipeline.validation_rows(documents, objective, config.seq_len)
  examples: Sequence[Example] = []
  if laid_out:
    examples = pipeline.validation_examples(laid_out, objective, config.seed, limit)
  return HeldOut(
    config=config,
    name=name,
    documents=documents,
    laid_out=laid_out,
    examples=examples,
    rows=pipeline.numbered_rows(laid_out, config.seed, limit),
    slices=read_slices(config, name, documents, laid_out, limit),
  )


def check_slices(config: Config) -> None:
  """Raises ValueError where the first record of a source has no such field."""
  if not config.evaluation.slices:
    return
  for name in config_lib.SPLITS:
    if name == 'validation' or config_lib.given(config.test):
      _sources(config, name)


def sources(config: Config, name: str, fields: Sequence[str]) -> list[Source]:
  """The sources of a set, whose records also hold some fields: a given one, or those of the data.

  Raises:
    ValueError: a record without one of them.
  """
  data = config.data
  if data.get('parts'):
    parts = {name: _with_fields(part, fields) for name, part in data['parts'].items()}
    data = data | {'parts': parts}
  else:
    data = _with_fields(data, fields)
  if name != 'data' and config_lib.given(getattr(config, name)):
    section = _with_fields(assemble.split_section(config, name) or {}, fields)
    found = assemble.split_source(dataclasses.replace(config, **{name: section}), name)
    given = [found] if found else []
  else:
    given, _ = assemble.sources(dataclasses.replace(config, data=data))
  for source in given:
    source[0]  # some know their fields by their records alone
  return given


def read_slices(
  config: Config, name: str, splits: Sequence[Documents], rows: Sequence[Rows], limit: int = 0
) -> dict[str, list[list[str]]]:
  """Field -> for each row of a validation or test set, the value of each of its texts.

  Args:
    config: names the fields.
    name: of the set, 'validation' or 'test'.
    splits: its documents, of each corpus.
    rows: as `pipeline.validation_rows` lays them out; whole texts.
    limit: as for `pipeline.validation_examples`.

  Raises:
    ValueError: rows of pieces of texts, a record without a field, a field with too many values.
  """
  fields = config.evaluation.slices
  if not fields:
    return {}
  if not all(hasattr(laid_out, 'texts') for laid_out in rows):
    raise ValueError(
      f'config.evaluation.slices={fields} needs rows of whole texts, and the objective '
      f'{config.objective["name"]} lays out pieces of them; leave it empty.'
    )
  found_in = _sources(config, name) if rows else []
  found: dict[str, list[list[str]]] = {field: [] for field in fields}
  for corpus, row in pipeline.validation_indices(rows, config.seed, limit):
    ids = [int(splits[corpus].ids[text]) for text in rows[corpus].texts(row)]
    records = [found_in[corpus][index] for index in ids]
    for field, values in found.items():
      values.append([_group(record[field]) for record in records])
  for field, values in found.items():
    _check_groups(field, {value for row in values for value in row})
  return found


def _sources(config: Config, name: str) -> list[Source]:
  fields = config.evaluation.slices
  try:
    return sources(config, name, fields)
  except ValueError as error:
    raise ValueError(
      f'config.evaluation.slices={fields} names fields of records: {error}'
    ) from error


def _with_fields(section: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
  known = section.get('fields') or ()
  if not fields:
    return dict(section)
  return dict(section) | {'fields': tuple(dict.fromkeys((*known, *fields)))}


def _group(value: Any) -> str:
  return MISSING if value is None or value == '' else str(value)


def _check_groups(field: str, groups: set[str]) -> None:
  if len(groups) > MOST_GROUPS:
    raise ValueError(
      f'config.evaluation.slices: the field {field!r} has {len(groups)} values in the validation '
      f'set, such as {min(groups)!r}; a slice may have {MOST_GROUPS}: name a field of few values.'
    )
