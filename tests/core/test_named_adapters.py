"""Adapters are found by name, and a wrong name is answered with those that there are."""

import json

import pytest

from llm_jax.core import named_adapters as named


def test_runs_and_folders_of_peft_are_found_by_name(tmp_path):
  with pytest.raises(ValueError, match='no adapter of this name; there are none: train one'):
    named.existing(tmp_path, 'spam')
  run = named.workdir(tmp_path, 'spam')
  assert run == tmp_path / 'adapters' / 'spam' and named.home(run) == tmp_path
  run.mkdir(parents=True)
  assert named.names(tmp_path) == []
  for adapter, found in (({}, []), (None, []), ({'name': 'lora'}, ['spam'])):
    (run / 'config.json').write_text(json.dumps({'adapter': adapter}))
    assert named.names(tmp_path) == found
  (run / 'config.json').unlink()
  (run / 'checkpoints').mkdir()
  assert named.names(tmp_path) == []
  (run / 'checkpoints' / '12').mkdir()  # which holds the config too
  peft = tmp_path / 'topics'
  peft.mkdir()
  (peft / 'adapter_config.json').write_text('{}')
  (tmp_path / 'tokenizer').mkdir()
  assert named.names(tmp_path) == ['spam', 'topics'] and named.home(peft) == tmp_path
  assert named.existing(tmp_path, 'spam') == run and named.existing(tmp_path, 'topics') == peft
  assert named.home(tmp_path) == tmp_path
  with pytest.raises(ValueError, match='--adapter=spma: .* there are spam, topics.'):
    named.existing(tmp_path, 'spma')
  for name in ('../spam', 'a/b', '', '.hidden', '-x'):
    with pytest.raises(ValueError, match='a name is of letters'):
      named.workdir(tmp_path, name)
