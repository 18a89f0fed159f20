"""A smaller model as a folder that every mode opens: that of a run, with one checkpoint."""

import dataclasses
import pathlib
from typing import Any

from llm_jax.compressing.making import Made
from llm_jax.core import files
from llm_jax.parallel import hosts
from llm_jax.programs import workdir
from llm_jax.programs.checkpoints import Checkpoints

REPORT = 'compression.json'
STEP = 0  # it was not trained


def check_target(target: pathlib.Path) -> None:
  """Raises ValueError unless a folder can be made there."""
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise ValueError(f'--output={target} holds something already; name a folder that is not there.')
  if not target.absolute().parent.is_dir():
    raise ValueError(f'--output={target} must be in a folder that exists.')


def write(made: Made, target: pathlib.Path, said: dict[str, Any] | None = None) -> None:
  """Writes the folder; whole, or not at all.

  Args:
    made: the model.
    target: a folder that is empty, or not there.
    said: numbers of its validation set, for what answers by thresholds.
  """
  part = hosts.agree(lambda: str(_emptied(target)))
  folder = pathlib.Path(part)
  if hosts.primary():
    workdir.write_config(folder, made.config)
    workdir.save_tokenizer(made.tokenizer, folder)
  hosts.barrier()
  saved = Checkpoints(folder / 'checkpoints', keep=1)
  meta = {
    'config': dataclasses.asdict(made.config),
    'tokenizer': workdir.pack_tokenizer(folder),
  }
  saved.save(STEP, {'params': made.params}, 0, meta, said)
  saved.close()
  if hosts.primary():
    if target.exists():
      target.rmdir()
    folder.rename(target)
  hosts.barrier()


def _emptied(target: pathlib.Path) -> pathlib.Path:
  """The folder that becomes `target`, empty."""
  part = target.absolute().with_name(f'{target.name}.partial')
  files.remove(part)
  part.mkdir()
  return part
