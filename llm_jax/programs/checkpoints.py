"""Checkpoints: state, data position, and all else that a run needs to go on, written by Orbax while
the training runs.

The folder of a step holds two Orbax items, `state` (arrays, by path) and `meta` (JSON), and
`seal.json`: the size and SHA-256 of every file, and the validation metrics. The seal is written
last. So a folder without one is a save that did not end, as if it had never begun, and a folder
that does not agree with its seal is damaged; neither is ever read. A checkpoint that agrees with
its seal and does not fit the model is another model's: that is an error, and never a reason to fall
back to an older one.

The folder lies on a file system that all hosts share. Process 0 seals, deletes and moves; the
arrays are written by all.
"""

import concurrent.futures
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from llm_jax.core import files, tree
from llm_jax.core.state import AVERAGES, Loaded
from llm_jax.core.tree import PyTree
from llm_jax.parallel import hosts
from llm_jax.programs import forms

SEAL = 'seal.json'
DAMAGED = 'damaged'  # the folder of checkpoints that do not agree with their seals
UNFINISHED = 'unfinished'  # the folder of those without a seal
_NONE, _NONE_LEFT = -1, -2  # instead of a step, agreed on by all processes
# Where a state keeps the parameters of the network; what comes later goes before.
_PARAMETERS = ('params/', 'frozen/', f'extras/{AVERAGES}/')


Elsewhere = Callable[[Mapping[str, Any]], Mapping[str, jax.Array]]


class Restored(NamedTuple):
  """What a checkpoint held.

  Attributes:
    state: as it was saved.
    position: examples consumed by then.
    meta: what was saved beside it.
    step: optimizer steps taken.
  """

  state: PyTree
  position: int
  meta: dict[str, Any]
  step: int


class Checkpoints:
  """The checkpoints of one run: the `keep` newest, and the one with the lowest validation loss."""

  def __init__(self, directory: str | pathlib.Path, keep: int):
    """Opens the folder, which is made where it does not exist, and clears it of saves that were
    interrupted.

    Args:
      directory: where the checkpoints are, shared by all hosts.
      keep: how many of the newest to keep, at least 1.
    """
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._orbax = _orbax()
    self._worker = concurrent.futures.ThreadPoolExecutor(1)
    self._pending: concurrent.futures.Future[None] | None = None
    hosts.agree(self._clear)

  def save(
    self,
    step: int,
    state: PyTree,
    position: int,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Saves a step, once; returns whether it does.

    The arrays are copied before this returns, so the state may be donated; they are written, sealed
    and the older ones deleted in the background. An error there is raised by the next `save`,
    `wait` or `close`.

    Args:
      step: optimizer steps taken, as in the state.
      state: any pytree of arrays.
      position: examples consumed.
      meta: anything that JSON can hold.
      metrics: validation metrics at this step; `loss` decides which checkpoint is the best.

    Raises:
      OSError: this save or the one before it failed (a full disk, say); earlier checkpoints are as
        they were.
    """
    self.wait()
    path = self._directory / str(step)
    if hosts.agree(path.exists):
      return False
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(tree.nest(tree.flatten(state))),
      meta=ocp.args.JsonSave({'position': int(position), 'meta': dict(meta)}),
    )
    try:
      self._orbax.save(path, args=items)
    except Exception as error:
      raise self._failure(step, error) from error
    measured = None if metrics is None else dict(metrics)
    self._pending = self._worker.submit(self._finish, step, measured)
    return True

  def wait(self) -> None:
    """Returns when the save under way has ended; raises OSError if it failed."""
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def close(self) -> None:
    """Waits, and frees the threads."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()
      self._orbax.close()

  def steps(self) -> list[int]:
    """Steps that were saved to the end, in order."""
    return sorted(_seals(self._directory))

  def best_step(self) -> int | None:
    """The step with the lowest validation loss; None where none was saved with one."""
    return _best(_seals(self._directory))

  def restore(
    self, abstract_state: PyTree, elsewhere: Elsewhere = lambda meta: {}
  ) -> Restored | None:
    """Reads the newest checkpoint that is whole; None in a folder that never had one.

    Damaged checkpoints are moved to `damaged/<step>`, saves that did not end to
    `unfinished/<step>`, with an error in the log.

    Args:
      abstract_state: the state wanted, each leaf with shape, dtype and sharding; the sharding need
        not be that of the save.
      elsewhere: gives the leaves that the checkpoint does not hold, by path, from what was saved
        beside it.

    Raises:
      ValueError: no checkpoint is left whole; or the newest does not fit, listing '-' parameters
        that it lacks, '+' those that it has beyond, '!' those of another shape or type.
    """
    step = hosts.agree(self._newest_whole)
    if step == _NONE:
      return None
    if step == _NONE_LEFT:
      raise ValueError(
        f'No whole checkpoint is left in {self._directory}: all were damaged and are now in '
        f'{DAMAGED}/. Put one back that you trust, or start over in another workdir.'
      )
    path = self._directory / str(step)
    record = _record(self._orbax, path)
    others = elsewhere(record['meta'])
    wanted = {
      name: leaf for name, leaf in tree.flatten(abstract_state).items() if name not in others
    }
    difference = tree.difference(wanted, _stored(self._orbax, path))
    if difference:
      raise ValueError(
        f'Checkpoint {path} does not fit the state wanted (- it lacks, + it has beyond, ! '
        f'differs):\n{difference}'
      )
    leaves = _read(self._orbax, path, wanted) | others
    return Restored(tree.replace(abstract_state, leaves), record['position'], record['meta'], step)

  def _clear(self) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    for leftover in self._directory.iterdir():
      if '.orbax-checkpoint-tmp' in leftover.name or leftover.name.endswith('.deleting'):
        shutil.rmtree(leftover)

  def _newest_whole(self) -> int:
    for step in reversed(_folders(self._directory)):
      path = self._directory / str(step)
      fault = _fault(path)
      if fault is None:
        return step
      aside = self._set_aside(step, DAMAGED if (path / SEAL).exists() else UNFINISHED)
      logging.error('CHECKPOINT OF STEP %d IS NOT USED: %s. Moved to %s.', step, fault, aside)
    return _NONE_LEFT if (self._directory / DAMAGED).exists() else _NONE

  def _set_aside(self, step: int, kind: str) -> pathlib.Path:
    aside = self._directory / kind
    if kind == UNFINISHED:  # of these only the last is kept, in case its seal alone was lost
      shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(exist_ok=True)
    copies = sum(child.name.split('.')[0] == str(step) for child in aside.iterdir())
    target = aside / (f'{step}.{copies}' if copies else str(step))
    (self._directory / str(step)).rename(target)
    return target

  def _finish(self, step: int, metrics: dict[str, float] | None) -> None:
    try:
      self._orbax.wait_until_finished()
      if hosts.primary():
        _seal(self._directory / str(step), metrics)
        self._delete_old()
    except Exception as error:
      raise self._failure(step, error) from error

  def _delete_old(self) -> None:
    seals = _seals(self._directory)
    kept = {*sorted(seals)[-self._keep :], _best(seals)}
    for step in seals.keys() - kept:
      # Renamed first: a kill in between must not leave half a checkpoint.
      doomed = self._directory / f'{step}.deleting'
      (self._directory / str(step)).rename(doomed)
      shutil.rmtree(doomed)

  def _failure(self, step: int, error: Exception) -> OSError:
    steps = self.steps()
    newest = 'there is no good checkpoint yet'
    if steps:
      newest = f'the newest good checkpoint is that of step {steps[-1]}'
    return OSError(
      f'Saving the checkpoint of step {step} in {self._directory} failed; {newest}. Cause: {error}'
    )


def read_meta(
  directory: str | pathlib.Path, which: str | int = 'latest'
) -> tuple[dict[str, Any], int]:
  """What a run saved beside its state, and the step.

  Args:
    directory: the run's checkpoints.
    which: as in `restore_params`.

  Raises:
    ValueError: no whole checkpoint there.
  """
  orbax = _orbax()
  path = _choose(pathlib.Path(directory).absolute(), which)
  record = _record(orbax, path)
  orbax.close()
  return record['meta'], int(path.name)


def restore_params(
  directory: str | pathlib.Path,
  abstract_params: PyTree,
  which: str | int = 'best',
  formed: Mapping[str, PyTree] | None = None,
) -> Loaded:
  """Reads parameters of another run, by path; that run's folder is not changed.

  Args:
    directory: the checkpoints of that run.
    abstract_params: parameters wanted, each leaf with shape, dtype and sharding; numbers are
      rounded to a type of fewer bits.
    which: 'best' (lowest validation loss; the latest where none was measured), 'latest', or a
      step. A damaged checkpoint is skipped, with an error in the log.
    formed: of parameters that the checkpoint may hold in another form, that form, by path, abstract
      in the same way.

  Raises:
    ValueError: no whole checkpoint there; or a parameter that both have, in another shape or type.
  """
  orbax = _orbax()
  path = _choose(pathlib.Path(directory).absolute(), which)
  stored = _stored(orbax, path)
  paths = _parameter_paths(stored)
  wanted = tree.flatten(abstract_params)
  elsewhere = wanted.keys() - paths.keys()
  in_form = {kernel: form for kernel, form in (formed or {}).items() if kernel in elsewhere}
  for kernel, form in in_form.items():
    del wanted[kernel]
    wanted |= {f'{kernel}/{name}': leaf for name, leaf in tree.flatten(form).items()}
  shared = {name: leaf for name, leaf in wanted.items() if name in paths}
  there = {name: _retyped(stored[paths[name]], leaf) for name, leaf in shared.items()}
  difference = tree.difference(shared, there)
  if difference:
    raise ValueError(
      f'Parameters of {path} do not fit the model; give both runs the same shapes, or start from '
      f'another run:\n{difference}'
    )
  rounded = [name for name, leaf in shared.items() if leaf.dtype != stored[paths[name]].dtype]
  if rounded:
    kind = shared[rounded[0]].dtype
    logging.info('%d parameters of %s are rounded to %s.', len(rounded), path, kind)
  leaves = {}
  if shared:
    leaves = _read(orbax, path, {paths[name]: leaf for name, leaf in shared.items()})
  base = _record(orbax, path)['meta'].get('base')
  orbax.close()
  return Loaded(
    params=forms.joined({name: leaves[paths[name]] for name in shared}, in_form),
    new=[name for name in wanted if name not in paths],
    unused=[name for name in paths if name not in wanted],
    step=int(path.name),
    values=(_read_seal(path) or {}).get('metrics'),
    base=base,
  )


def _orbax() -> ocp.AsyncCheckpointer:
  items = {'state': ocp.PyTreeCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()}
  return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**items))


def _stored(orbax: ocp.AsyncCheckpointer, path: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
  metadata = orbax.metadata(path).item_metadata['state']
  return {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for name, leaf in tree.flatten(metadata.tree).items()
  }


def _retyped(stored: jax.ShapeDtypeStruct, wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """What is stored, in the type that is wanted where that is a float of fewer bits."""
  floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (stored, wanted))
  fewer = floats and jnp.promote_types(stored.dtype, wanted.dtype) == stored.dtype
  return jax.ShapeDtypeStruct(stored.shape, wanted.dtype) if fewer else stored


def _parameter_paths(stored: Iterable[str]) -> dict[str, str]:
  """By the path of each parameter in the network, its path in the state: trained or frozen, or its
  average.
  """
  paths, stored = {}, list(stored)
  for prefix in _PARAMETERS:
    found = (path for path in stored if path.startswith(prefix))
    paths |= {path.removeprefix(prefix): path for path in found}
  return paths


def _record(orbax: ocp.AsyncCheckpointer, path: pathlib.Path) -> dict[str, Any]:
  return orbax.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def _read(
  orbax: ocp.AsyncCheckpointer, path: pathlib.Path, wanted: Mapping[str, Any]
) -> dict[str, jax.Array]:
  bare = [name for name, leaf in wanted.items() if leaf.sharding is None]
  if bare:
    raise ValueError(
      f'{bare[0]} has no sharding: a checkpoint is read straight to the devices that will hold it.'
    )
  nested = tree.nest(wanted)
  restore = ocp.args.PyTreeRestore(
    nested, restore_args=ocp.checkpoint_utils.construct_restore_args(nested), partial_restore=True
  )
  return tree.flatten(orbax.restore(path, args=ocp.args.Composite(state=restore)).state)


def _choose(directory: pathlib.Path, which: str | int) -> pathlib.Path:
  if which not in ('best', 'latest') and isinstance(which, str):
    raise ValueError(f"which={which!r} must be 'best', 'latest' or a step.")
  step = hosts.agree(lambda: _whole(directory, which))
  if step == _NONE and isinstance(which, int):
    raise ValueError(f'{directory} holds no whole checkpoint of step {which} any more.')
  if step == _NONE:
    raise ValueError(
      f'{directory} holds no whole checkpoint; train there first, or name the workdir of another '
      'run.'
    )
  return directory / str(step)


def _whole(directory: pathlib.Path, which: str | int) -> int:
  order = [step for step in _folders(directory)[::-1] if which in ('best', 'latest', step)]
  if which == 'best':
    seals = _seals(directory)
    order.sort(key=lambda step: _loss(seals[step]) if step in seals else math.inf)
  for step in order:
    fault = _fault(directory / str(step))
    if fault is None:
      return step
    logging.error('CHECKPOINT OF STEP %d IN %s IS NOT USED: %s.', step, directory, fault)
  return _NONE


def _seal(path: pathlib.Path, metrics: dict[str, float] | None) -> None:
  names = [str(p.relative_to(path)) for p in sorted(path.rglob('*')) if p.is_file()]
  fingerprints = dict(zip(names, _fingerprints(path, names), strict=True))
  with files.whole_file(path / SEAL) as file:
    file.write(json.dumps({'metrics': metrics, 'files': fingerprints}))


def _folders(directory: pathlib.Path) -> list[int]:
  """Steps that Orbax committed, sealed or not, in order; none where there is no folder."""
  return sorted(int(child.name) for child in directory.glob('*') if child.name.isdigit())


def _seals(directory: pathlib.Path) -> dict[int, dict[str, Any]]:
  """The seals that can be read, by step."""
  seals = {step: _read_seal(directory / str(step)) for step in _folders(directory)}
  return {step: seal for step, seal in seals.items() if seal is not None}


def _read_seal(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    return json.loads((path / SEAL).read_text())
  except (FileNotFoundError, ValueError):  # never written; cut short
    return None


def _fault(path: pathlib.Path) -> str | None:
  """What is wrong with a checkpoint; None where it agrees with its seal."""
  seal = _read_seal(path)
  if seal is None and (path / SEAL).exists():
    return f'its {SEAL} cannot be read'
  if seal is None:
    return f'it has no {SEAL}: its save did not end'
  listed = seal['files']
  missing = [name for name in listed if not (path / name).is_file()]
  if missing:
    return f'{missing[0]} is missing'
  for name, (size, _) in listed.items():
    found = (path / name).stat().st_size
    if found != size:
      return f'{name} has {found} bytes and should have {size}'
  names = list(listed)
  for name, fingerprint in zip(names, _fingerprints(path, names), strict=True):
    if fingerprint != listed[name]:
      return f'{name} is not what was written'
  return None


def _fingerprints(path: pathlib.Path, names: Sequence[str]) -> list[list[Any]]:
  """[size, SHA-256] of each file."""

  def fingerprint(name: str) -> list[Any]:
    with open(path / name, 'rb') as file:
      return [(path / name).stat().st_size, hashlib.file_digest(file, 'sha256').hexdigest()]

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    return list(pool.map(fingerprint, names))


def _loss(seal: Mapping[str, Any]) -> float:
  loss = (seal['metrics'] or {}).get('loss', math.inf)
  return math.inf if math.isnan(loss) else loss


def _best(seals: Mapping[int, Mapping[str, Any]]) -> int | None:
  measured = [step for step, seal in seals.items() if math.isfinite(_loss(seal))]
  return min(measured, key=lambda step: (_loss(seals[step]), step), default=None)
