"""New versions of models in the place of old ones."""

import threading
import types

import pytest

from llm_jax.serving import fleet as fleets
from llm_jax.serving.fleet import Fleet


@pytest.fixture(autouse=True)
def no_grace(monkeypatch):
  monkeypatch.setattr(fleets, 'GRACE', 0)


class Model:
  """What a fleet needs of one."""

  def __init__(self, version, fails=False):
    self.version, self.users, self.closed, self.ready = version, 0, threading.Event(), False
    self._fails = fails

  def warm(self):
    if self._fails:
      raise ValueError('no memory')
    self.ready = True

  def close(self):
    self.closed.set()


def made(*versions):
  """A fleet of two models whose first one gets these versions, one after the other."""
  left = list(versions)

  def opener():
    found = left.pop(0)
    if isinstance(found, Exception):
      raise found
    return found

  other = iter(range(9))
  fleet = Fleet({'a': opener, 'b': lambda: {'b': Model(next(other))}})
  fleet.warm()
  return fleet


def test_a_new_version_takes_the_place_of_the_old_one_when_nobody_asks_it_any_more():
  old, new, adapter = Model(1), Model(2), Model(2)
  fleet, loads, models = made({'a': old}, {'a': new, 'an adapter': adapter}), [], None
  models, old.users = fleet.models, 1
  renewing = threading.Thread(target=lambda: fleet.renew(lambda *said: loads.append(said)))
  renewing.start()
  while ('a', True) not in loads:
    pass
  assert models['a'] is new and new.ready and adapter.ready and not old.closed.wait(0.05)
  old.users = 0
  renewing.join()
  assert old.closed.is_set() and not new.closed.is_set() and models['b'].version == 1
  assert list(models) == ['a', 'b', 'an adapter'] and loads == [('a', True), ('b', True)]


@pytest.mark.parametrize('bad', [{'a': Model(2, fails=True)}, OSError('no folder')])
def test_a_version_that_cannot_be_used_leaves_the_old_one(bad):
  fleet, loads = made({'a': Model(1), 'old adapter': Model(1)}, bad, {'a': Model(3)}), []
  fleet.renew(lambda *said: loads.append(said))
  assert fleet.models['a'].version == 1 and not fleet.models['a'].closed.is_set()
  assert loads == [('a', False), ('b', True)]
  fleet.renew()
  assert fleet.models['a'].version == 3 and 'old adapter' not in fleet.models


def test_a_name_is_of_one_model():
  with pytest.raises(ValueError, match='b is the name of two models'):
    made({'a': Model(1), 'b': Model(1)})
  fleet = made({'a': Model(1)}, {'a': Model(2), 'b': Model(2)})
  fleet.renew()
  assert fleet.models['a'].version == 1  # whose new version would hide the other model


def test_all_are_closed_at_the_end():
  models = types.SimpleNamespace(a=Model(1))
  fleet = made({'a': models.a})
  fleet.close()
  assert all(model.closed.is_set() for model in fleet.models.values())
