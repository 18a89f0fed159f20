"""Six starts that are killed, at random moments; tests/benchmarks/kills.py does two hundred."""

import importlib
import pathlib
import signal

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture
def kills(monkeypatch):
  """The script, whose processes obey SIGINT even where this one was started in the background."""
  monkeypatch.syspath_prepend(BENCHMARKS)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield importlib.import_module('kills')
  signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_whatever_kills_a_start_the_run_ends_as_if_undisturbed(kills, tmp_path):
  found = kills.measure(tmp_path, tmp_path / 'compiled', count=6, seed=196)
  assert sum(len(one.kills) for one in found) == 6
  assert len({number for one in found for number, _ in one.kills}) == 3
  assert [one.fault for one in found if one.fault] == []
  changed = found[0].folder / 'run' / 'metrics.jsonl'  # the comparison sees what it must
  changed.write_text(changed.read_text().replace('"loss": ', '"loss": 1', 1))
  assert kills.difference(changed.parent, tmp_path / 'bert_tiny' / 'run') == 'metrics.jsonl differs'
