"""Groups of validation and test texts, by fields of their records: `config.evaluation.slices`.

The fields are read from the source itself, not from the token cache: other slices make no other
run, and nothing is encoded again.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.core import config as config_lib
from llm_jax.core.config import Config
from llm_jax.core.contracts import Documents, Rows, Source
from llm_jax.data import pipeline
from llm_jax.programs import assemble

MOST_GROUPS = 100  # of a field
MISSING = '(none)'  # the group of texts whose field is null or empty


def check(config: Config) -> None:
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


def read(
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
  return dict(section) | {'fields': tuple(dict.fromkeys((*known, *fields)))}


def _group(value: Any) -> str:
  return MISSING if value is None or value == '' else str(value)


def _check_groups(field: str, groups: set[str]) -> None:
  if len(groups) > MOST_GROUPS:
    raise ValueError(
      f'config.evaluation.slices: the field {field!r} has {len(groups)} values in the validation '
      f'set, such as {min(groups)!r}; a slice may have {MOST_GROUPS}: name a field of few values.'
    )
