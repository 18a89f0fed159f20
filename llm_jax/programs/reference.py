"""What a model that stays as it is thinks of the texts of a run: found once, before training, and
kept between runs.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from llm_jax.core import files, progress, tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Batch, Example, Objective, Rows, Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.data import pipeline
from llm_jax.objectives.shared import distilled
from llm_jax.parallel import hosts
from llm_jax.programs import assemble, bases, inference, pretrained, teachers
from llm_jax.programs.inference import Inference
from llm_jax.programs.network import Network

MODEL = ('name', 'attention', 'dtype')  # what the numbers depend on beside parameters and rows


class Reference(NamedTuple):
  """A model that is asked.

  Attributes:
    program: runs it.
    params: nested.
    said: what checkpoints say of it; None where they have its parameters from elsewhere anyway.
  """

  program: Inference
  params: PyTree
  said: bases.Base | None


def attach(
  config: Config,
  objective: Objective,
  tokenizer: Tokenizer,
  rows: Sequence[Rows],
  cache: pathlib.Path,
) -> bases.Base | None:
  """Gives rows their `reference`: of a run with a teacher what that one answers.

  Args:
    config: of the run.
    objective: of the run, with `of_reference`.
    tokenizer: of the run.
    rows: of all its documents.
    cache: a folder where the numbers are kept.

  Returns:
    What checkpoints say of a teacher.

  Raises:
    ValueError: no model that could be the reference, one with another tokenizer.
  """
  rows = [laid_out for laid_out in rows if len(laid_out)]
  if not rows:
    return None
  kept = isinstance(objective, distilled.Distilled) and objective.distill.cached
  asked = (_teacher if kept else _model)(config, objective, tokenizer, rows[0])
  key = _key(asked, rows)
  path = cache / 'references' / f'{key[:32]}.npz'
  found = hosts.agree(lambda: _read(path))
  if found is None:
    values = [_scores(asked, laid_out) for laid_out in rows]
    if hosts.primary():
      _write(path, values)
  else:
    logging.info('What the reference thinks of the texts: %s.', path)
    values = [np.array(each, np.float32) for each in found]
  for laid_out, each in zip(rows, values, strict=True):
    laid_out.reference = each
  return asked.said


def _key(asked: Reference, rows: Sequence[Rows]) -> str:
  """Of all that the numbers depend on: the model, and every row that it reads."""
  flat, program = tree.flatten(asked.params), asked.program
  said = [bases.fingerprints(flat, program.mesh), type(program.objective).__module__]
  said += [{name: program.config.model.get(name) for name in MODEL}]
  digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
  for laid_out in rows:
    digest.update(f'{len(laid_out)} {len(laid_out.documents)}'.encode())
    for index in range(len(laid_out)):
      for name, array in sorted(_example(laid_out, index).items()):
        digest.update(f'{name} {array.dtype} {array.shape}'.encode())
        digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()


def _example(rows: Rows, index: int) -> Example:
  return rows.example(index, np.random.default_rng(0))


def _teacher(config: Config, objective: Objective, tokenizer: Tokenizer, rows: Rows) -> Reference:
  """The teacher of a run whose answers are kept."""
  del objective
  return Reference(*teachers.alone(config, tokenizer, _example(rows, 0)))


def _model(config: Config, objective: Objective, tokenizer: Tokenizer, rows: Rows) -> Reference:
  """The model that a loss with a reference compares with."""
  folder = getattr(objective, 'reference', None) or config.init_from
  if folder is None:
    raise ValueError(
      'a loss with a reference compares with a model as it was before: give config.init_from, or '
      'config.objective.reference, or choose a loss without one (simpo, orpo).'
    )
  plain = dataclasses.replace(config, adapter={}, base_weights='', init_from=str(folder))
  if getattr(objective, 'reference', None):
    plain = dataclasses.replace(plain, model={}, tokenizer={})
    plain = pretrained.fill_in(plain)
    theirs = pretrained.load_tokenizer(plain)
    if theirs.fingerprint != tokenizer.fingerprint:
      raise ValueError(
        f'config.objective.reference={folder} has another tokenizer than the model that is trained.'
      )
    plain = assemble.resolve(plain, tokenizer.vocab_size)
  adapter = assemble.create_adapter(config)
  if adapter is not None and adapter.tokens:
    raise ValueError(
      f'the adapter {config.adapter["name"]} puts virtual tokens before each text, which the '
      'reference cannot read; choose another adapter, or a loss without a reference (simpo, orpo).'
    )
  program = inference.build(plain, objective, _example(rows, 0))
  loaded = pretrained.load_params(program, pathlib.Path(folder))
  lacking = [path for path in loaded.new if path.startswith('model/')]
  if lacking:
    raise ValueError(f'the reference {folder} lacks parameters:\n  ' + '\n  '.join(lacking))
  return Reference(program, tree.nest(loaded.params), None)


def _scores(asked: Reference, rows: Rows) -> np.ndarray:
  """[documents, ...] float32; 0 for what is in no row."""
  program = asked.program
  score = hosts.compiled(program.function(_scored))
  examples = [_example(rows, index) for index in range(len(rows))]
  size = program.config.batch_size
  batches = pipeline.padded_batches(examples, size, hosts.rows(program.mesh, size))
  total, found = -(-len(examples) // size), None
  shown = progress.shown(batches, 'Asking the reference', total, 'batches', hosts.primary())
  for number, batch in enumerate(shown):
    said = np.asarray(jax.device_get(score(asked.params, program.put(batch))))
    if found is None:
      found = np.zeros((len(rows.documents), *said.shape[2:]), np.float32)
    for row in range(min(size, len(examples) - number * size)):
      texts = rows.texts(number * size + row)
      found[texts] = said[row, : len(texts)]
  return found


def _scored(network: Network, batch: Batch) -> jax.Array:
  outputs = network.model(batch, network.objective.positions(batch))
  ask = network.objective
  ask = ask.of_reference if ask.needs_reference else ask.answer
  return ask(network.net(), outputs.hidden, batch)


def _read(path: pathlib.Path) -> list[Any] | None:
  if not path.exists():
    return None
  with np.load(path) as held:
    return [held[name].tolist() for name in sorted(held.files, key=int)]


def _write(path: pathlib.Path, values: Sequence[np.ndarray]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole_file(path, 'wb') as file:
    np.savez(file, **{str(number): each for number, each in enumerate(values)})
