"""What a model that stays as it is thinks of the texts of a run: found once, before training, and
kept between runs.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from llm_jax.core import files, progress, tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Batch, Objective, Rows, Tokenizer
from llm_jax.data import pipeline
from llm_jax.parallel import hosts
from llm_jax.programs import assemble, bases, inference, pretrained
from llm_jax.programs.inference import Inference
from llm_jax.programs.network import Network

MODEL = ('name', 'attention', 'dtype')  # what else the numbers depend on


def attach(
  config: Config,
  objective: Objective,
  tokenizer: Tokenizer,
  rows: Sequence[Rows],
  contents: str,
  cache: pathlib.Path,
) -> None:
  """Gives rows their `reference`.

  Args:
    config: of the run.
    objective: of the run, with `log_probabilities`.
    tokenizer: of the run.
    rows: of all its documents.
    contents: a hash of what these say.
    cache: a folder where the numbers are kept.

  Raises:
    ValueError: no model that could be the reference, one with another tokenizer.
  """
  rows = [laid_out for laid_out in rows if len(laid_out)]
  if not rows:
    return
  program, params = _model(config, objective, tokenizer, rows[0])
  flat = tree.flatten(params)
  said = [bases.fingerprints(flat, program.mesh), contents, config.objective, config.seq_len]
  said += [{name: program.config.model.get(name) for name in MODEL}]
  said += [[(len(laid_out), len(laid_out.documents)) for laid_out in rows]]
  key = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
  path = cache / 'references' / f'{key[:32]}.npz'
  found = hosts.agree(lambda: _read(path))
  if found is None:
    values = [_scores(program, params, objective, laid_out) for laid_out in rows]
    if hosts.primary():
      _write(path, values)
  else:
    logging.info('What the reference thinks of the texts: %s.', path)
    values = [np.array(each, np.float32) for each in found]
  for laid_out, each in zip(rows, values, strict=True):
    laid_out.reference = each


def _model(
  config: Config, objective: Objective, tokenizer: Tokenizer, rows: Rows
) -> tuple[Inference, Any]:
  """The program of the reference and its parameters."""
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
  example = rows.example(0, np.random.default_rng(0))
  program = inference.build(plain, objective, example)
  loaded = pretrained.load_params(program, pathlib.Path(folder))
  lacking = [path for path in loaded.new if path.startswith('model/')]
  if lacking:
    raise ValueError(f'the reference {folder} lacks parameters:\n  ' + '\n  '.join(lacking))
  return program, tree.nest(loaded.params)


def _scores(program: Inference, params: Any, objective: Objective, rows: Rows) -> np.ndarray:
  """[documents, 2] float32; 0 for what is in no row."""
  score = hosts.compiled(program.function(_scored))
  examples = [rows.example(index, np.random.default_rng(0)) for index in range(len(rows))]
  size = program.config.batch_size
  batches = pipeline.padded_batches(examples, size, hosts.rows(program.mesh, size))
  total, found = -(-len(examples) // size), np.zeros((len(rows.documents), 2), np.float32)
  shown = progress.shown(batches, 'Asking the reference', total, 'batches', hosts.primary())
  for number, batch in enumerate(shown):
    said = np.asarray(jax.device_get(score(params, program.put(batch))))
    for row in range(min(size, len(examples) - number * size)):
      texts = rows.texts(number * size + row)
      found[texts] = said[row, : len(texts)]
  return found


def _scored(network: Network, batch: Batch) -> jax.Array:
  outputs = network.model(batch, network.objective.positions(batch))
  return network.objective.log_probabilities(network.net(), outputs.hidden, batch)


def _read(path: pathlib.Path) -> list[Any] | None:
  if not path.exists():
    return None
  with np.load(path) as held:
    return [held[name].tolist() for name in sorted(held.files, key=int)]


def _write(path: pathlib.Path, values: Sequence[np.ndarray]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.whole_file(path, 'wb') as file:
    np.savez(file, **{str(number): each for number, each in enumerate(values)})
