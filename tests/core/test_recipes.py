"""The recipe of a config for pretrained weights, and the one from scratch."""

import json

import pytest

from configs import classify
from llm_jax.core import config, recipes


@pytest.fixture
def settings():
  return classify.get_config().to_dict()


def test_from_scratch_nothing_changes(settings):
  assert recipes.chosen(settings, ()) == {k: v for k, v in settings.items() if k != 'pretrained'}
  assert config.parse(settings).optimizer['name'] == 'muon'


def test_a_run_goes_on_by_the_optimizer_that_trained_it(settings, tmp_path):
  settings['init_from'] = str(tmp_path)
  for name, taken in (('muon', 'muon'), ('adamw', 'adamw'), ('lamb', 'adamw')):
    (tmp_path / 'config.json').write_text(json.dumps({'optimizer': {'name': name}}))
    assert config.parse(settings).optimizer['name'] == taken
  (tmp_path / 'config.json').write_text('{"model_type": "bert"}')
  assert config.parse(settings).optimizer['name'] == 'adamw'


def test_pretrained_weights_have_another_recipe_and_flags_go_before_it(settings):
  settings['init_from'] = 'FOLDER'
  before = str(settings)
  taken = config.parse(settings)
  assert taken.optimizer['name'] == 'adamw' and taken.optimizer['learning_rate'] == 'auto'
  assert taken.objective['pool'] is None and taken.objective['dropout'] == 0.1
  assert taken.epochs == 4 and taken.eval_every == 0
  settings['optimizer']['learning_rate'] = 3e-4
  settings['objective']['pool'] = 'mean'
  flagged = recipes.chosen(settings, {'optimizer.learning_rate', 'objective.pool'})
  assert flagged['optimizer'] | {'learning_rate': 3e-4} == flagged['optimizer']
  assert flagged['optimizer']['name'] == 'adamw' and flagged['objective']['pool'] == 'mean'
  settings['optimizer']['learning_rate'], settings['objective']['pool'] = 1e-2, 'mean'
  assert str(settings) == before  # what was given is not changed
