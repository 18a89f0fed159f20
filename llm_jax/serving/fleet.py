"""The models of a service, and new versions of them, which take their place while it answers."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from absl import logging

from llm_jax.serving.served import Served

Open = Callable[[], dict[str, Served]]
Loaded = Callable[[str, bool], None]
GRACE = 1.0  # seconds that a request has from finding a model to using it
PAUSE = 0.01  # seconds between two looks at whether a model is still used


class _Group(NamedTuple):
  """A model, and the adapters on it, which come from the same folder.

  Attributes:
    name: of the model.
    open: gives the newest version of all.
  """

  name: str
  open: Open


class Fleet:
  """All models that requests may name.

  Args:
    openers: by the name of each model, what opens its newest version and the adapters on it.

  Attributes:
    models: by name, the first model first; it is the same mapping all the time.

  Raises:
    ValueError: a name twice.
  """

  def __init__(self, openers: Mapping[str, Open]):
    self._groups = [_Group(name, opener) for name, opener in openers.items()]
    self._lock = threading.Lock()
    self.models: dict[str, Served] = {}
    self._names: dict[str, list[str]] = {}
    for group in self._groups:
      self._put(group, group.open())

  def warm(self) -> None:
    """Compiles all that requests may need."""
    with self._lock:
      for model in self.models.values():
        model.warm()

  def renew(self, loaded: Loaded = lambda name, ok: None) -> None:
    """Opens the newest version of each model beside the one that answers, and puts it in its place.

    Requests that the old one has are answered by it. Where a version cannot be opened, the old one
    answers on.

    Args:
      loaded: called with the name of each model, and whether its new version answers now.
    """
    with self._lock:
      for group in self._groups:
        try:
          new = group.open()
          for model in new.values():
            model.warm()
          old = self._put(group, new)
        except Exception as error:
          logging.error(
            '%s: the new version cannot be used, and the old one stays: %s', group.name, error
          )
          loaded(group.name, False)
        else:
          loaded(group.name, True)
          for model in old:
            _retire(model)
          logging.info('%s: a new version answers.', group.name)

  def close(self) -> None:
    """Answers what waits, and takes no more."""
    for model in self.models.values():
      model.close()

  def _put(self, group: _Group, new: Mapping[str, Served]) -> list[Served]:
    """Puts the models of a group in the place of its old ones, which are returned."""
    names = self._names.get(group.name, [])
    twice = [name for name in new if name in self.models and name not in names]
    if twice:
      raise ValueError(f'{twice[0]} is the name of two models; give --serve_models=OTHER=FOLDER.')
    old = [self.models[name] for name in names]
    self.models.update(new)
    for name in names:
      if name not in new:
        del self.models[name]
    self._names[group.name] = list(new)
    return old


def _retire(model: Served) -> None:
  """Closes a model when the last request that found it has given it its texts."""
  time.sleep(GRACE)
  while model.users:
    time.sleep(PAUSE)
  model.close()
