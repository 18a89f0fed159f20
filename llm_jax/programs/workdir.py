"""The folder of a run: its resolved config and its tokenizer, written whole or not at all, and
restored from the newest checkpoint where one is lost.
"""

import base64
import pathlib
import uuid
from collections.abc import Mapping

import jax

from llm_jax.core import config as config_lib
from llm_jax.core import files, ownership
from llm_jax.core.config import Config
from llm_jax.core.contracts import Tokenizer
from llm_jax.parallel import hosts
from llm_jax.programs import assemble, checkpoints


def open_workdir(workdir: pathlib.Path) -> None:
  """Makes the folder where it does not exist, for these processes alone to train in, and checks
  that it can be written to and that all of them see the same one.

  Raises:
    ValueError: it cannot, they do not, or others train there.
  """
  probe = workdir / hosts.agree(lambda: _probe(workdir))
  if not probe.exists():
    raise ValueError(
      f'--workdir={workdir}: process {jax.process_index()} does not see what process 0 wrote '
      'there; give a folder on a file system that all hosts share.'
    )
  hosts.barrier()
  if hosts.primary():
    probe.unlink()


def leave(workdir: pathlib.Path) -> None:
  """Lets other processes train in the folder."""
  if hosts.primary():
    ownership.release(workdir)


def _probe(workdir: pathlib.Path) -> str:
  name = f'.probe-{uuid.uuid4().hex}'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    ownership.take(workdir)
    (workdir / name).touch()
  except OSError as error:
    raise ValueError(
      f'--workdir={workdir} cannot be written to ({error.strerror}); give a folder of your own.'
    ) from error
  return name


def has_checkpoints(workdir: pathlib.Path) -> bool:
  """Whether a run in this folder has saved anything that it can go on from."""
  folder = workdir / 'checkpoints'
  return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


def read_config(workdir: pathlib.Path) -> Config:
  """The resolved config of the run in a folder; of its newest checkpoint where config.json is lost.

  Raises:
    ValueError: there is none.
  """
  path = workdir / 'config.json'
  lost = hosts.agree(lambda: not path.exists())
  if lost and hosts.agree(lambda: has_checkpoints(workdir)):
    return config_lib.parse(checkpoints.read_meta(workdir / 'checkpoints')[0]['config'])
  if lost:
    raise ValueError(
      f'{workdir} holds no run: there is no config.json. Train one there first, or give the '
      'workdir of one.'
    )
  try:
    return config_lib.from_json(path.read_text())
  except (ValueError, TypeError) as error:
    raise ValueError(
      f'{path} is not the config of a run ({error}); remove it, and that of the newest checkpoint '
      'is used.'
    ) from error


def write_config(workdir: pathlib.Path, config: Config) -> None:
  """Writes the resolved config, whole or not at all."""
  with files.whole_file(workdir / 'config.json') as file:
    file.write(config_lib.to_json(config))


def load_tokenizer(config: Config, workdir: pathlib.Path) -> Tokenizer:
  """The tokenizer of a run; from its newest checkpoint where the folder is lost."""
  if hosts.agree(lambda: not (workdir / 'tokenizer').is_dir()):
    packed = checkpoints.read_meta(workdir / 'checkpoints')[0]['tokenizer']
    hosts.agree(lambda: unpack_tokenizer(packed, workdir))
  return assemble.load_tokenizer(config, str(workdir / 'tokenizer'))


def save_tokenizer(tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
  """Writes the run's tokenizer, whole or not at all."""
  with files.whole_folder(workdir / 'tokenizer') as folder:
    tokenizer.save(str(folder))


def pack_tokenizer(workdir: pathlib.Path) -> dict[str, str]:
  """The files of the run's tokenizer by name, in base64: what a checkpoint keeps of it."""
  packed = {}
  for file in sorted((workdir / 'tokenizer').iterdir()):
    packed[file.name] = base64.b64encode(file.read_bytes()).decode()
  return packed


def unpack_tokenizer(packed: Mapping[str, str], workdir: pathlib.Path) -> None:
  """Writes the files that `pack_tokenizer` read, whole or not at all."""
  with files.whole_folder(workdir / 'tokenizer') as folder:
    for name, content in packed.items():
      (folder / name).write_bytes(base64.b64decode(content))
