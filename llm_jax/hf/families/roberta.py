"""RoBERTa (arXiv:1907.11692), and XLM-RoBERTa (1911.02116): the same with another vocabulary."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm_jax.hf.families import _encoders as shared
from llm_jax.hf.family import Family, Rule
from llm_jax.hf.fields import field

MODEL = 'encoder'


def _read_positions(config: Mapping[str, Any]) -> dict[str, Any]:
  """Positions are counted from pad_token_id + 1; the rows of the table before that are free."""
  offset = 1
  if config.get('pad_token_id') != 0:
    offset = field(config, 'pad_token_id', int, 1) + 1
  rows = field(config, 'max_position_embeddings', int)
  if rows <= offset:
    raise ValueError(
      f'max_position_embeddings={rows} must be more than pad_token_id + 1 = {offset}.'
    )
  return {'position_offset': offset, 'max_len': rows - offset}


def _write_positions(options: Mapping[str, Any]) -> dict[str, Any]:
  offset = options['position_offset']
  return {'pad_token_id': offset - 1, 'max_position_embeddings': options['max_len'] + offset}


_ROBERTA = Family(
  rank=20,
  prefix='roberta.',
  fields={
    **shared.BERT_FIELDS,
    **shared.TYPE_FIELD,
    # The activation of the head is GELU whatever the config says, and ours has one for both.
    'hidden_act': ('activation', {'gelu': 'gelu'}, 'gelu'),
  },
  fixed=shared.ABSOLUTE,
  rules=(Rule(_read_positions, _write_positions),),
  options=shared.POST_NORM,
  body=(*shared.EMBEDDINGS, *shared.LAYER, *shared.POST_NORMS, *shared.POOLER),
  heads=(*shared.LM_HEAD, *shared.CLASSIFIER, *shared.TAGGER, *shared.CHOICE, *shared.QUESTIONS),
  copies={'lm_head.decoder.bias': 'lm_head.bias'},
  ignored=shared.POSITION_IDS,
  classes={
    'RobertaForSequenceClassification': ('pooler', 'classifier'),
    'RobertaForQuestionAnswering': ('spans',),
    'RobertaForTokenClassification': ('tagger',),
    'RobertaForMultipleChoice': ('pooler', 'choice'),
    'RobertaForMaskedLM': ('mlm',),
    'RobertaModel': (),
  },
)

FAMILIES = {
  'roberta': _ROBERTA,
  'xlm-roberta': dataclasses.replace(
    _ROBERTA,
    rank=21,  # an export says RoBERTa
    classes={f'XLM{name}': heads for name, heads in _ROBERTA.classes.items()},
  ),
}
