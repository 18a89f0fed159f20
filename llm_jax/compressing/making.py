"""A method applied to an opened model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.compressing import looking
from llm_jax.core import config as config_lib
from llm_jax.core import params as params_lib
from llm_jax.core import tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Compression, Example, Seen, Smaller, Tokenizer
from llm_jax.core.tree import PyTree
from llm_jax.inference.session import Session
from llm_jax.programs import assemble, forms, inference
from llm_jax.programs.inference import Inference
from llm_jax.training import evaluation
from llm_jax.training.corpora import Splits


class Made(NamedTuple):
  """A smaller model.

  Attributes:
    config: opens it.
    tokenizer: its own.
    program: runs it.
    params: nested, in the forms of the program.
  """

  config: Config
  tokenizer: Tokenizer
  program: Inference
  params: PyTree


def parent(session: Session) -> tuple[Session, PyTree]:
  """A model as a method gets it, whole arrays alone: what an adapter has learned is merged into it.

  Raises:
    ValueError: an adapter that cannot be merged.
  """
  program = session.program
  params = program.dense(session.params)
  if program.network.adapter is not None:
    params = program.network.adapter.merged(params, program.infos)
  plain = dict(adapter={}, base_weights='', compress={})
  whole = Session(session.origin, dataclasses.replace(session.config, **plain), session.tokenizer)
  return whole, params


def check(method: Compression, session: Session, schemes: Mapping[str, Any]) -> None:
  """Raises ValueError for a method that this model cannot take; nothing is compiled."""
  program = session.program
  method.check(program.infos, tree.flatten(program.params))
  model = type(program.network.model).__name__
  if not schemes and type(method).shrink is Compression.shrink:
    raise ValueError(f'config.compress changes nothing of the model {model}.')


def look(
  method: Compression, session: Session, params: PyTree, splits: Splits | None, rows: int
) -> Seen:
  """What the method wants to know of the model.

  Args:
    method: the method.
    session: the model, of `parent`.
    params: its parameters.
    splits: texts; None where the method wants none.
    rows: how many rows of training texts it sees.

  Raises:
    ValueError: there are no texts.
  """
  if not method.looks_at:
    return Seen()
  program = session.program
  schemes = method.schemes(program.infos, tree.flatten(program.params))
  examples = _examples(program, splits, rows)
  return looking.look(
    program,
    params,
    method.looks_at,
    evaluation.batches(program, examples),
    splits.train,
    schemes,
  )


def make(session: Session, params: PyTree, section: Mapping[str, Any], seen: Seen) -> Made:
  """The smaller model.

  Args:
    session: its parent, of `parent`.
    params: the parent's parameters.
    section: `config.compress`.
    seen: what was seen of the parent.

  Raises:
    ValueError: the method cannot be applied to this model.
  """
  program = session.program
  asked = dataclasses.replace(session.config, compress=dict(section))
  method = assemble.create_compression(asked)
  section = config_lib.given(section) | method.decide(seen)
  model = Smaller(session.config.model, params, program.infos, session.tokenizer)
  method.shrink(model, seen)
  config = dataclasses.replace(
    session.config, model=model.options, compress=section, init_from=None
  )
  small = inference.outline(config, model.tokenizer)
  small_params = _placed(small, model.params)
  kept = forms.kept(small_params, small.infos, small.formed, small.layout, seen.activations)
  check_changed(kept, small_params, small.formed)
  return Made(small.config, model.tokenizer, small, kept)


def check_changed(kept: PyTree, before: PyTree, formed: Mapping[str, Any]) -> None:
  """Raises ValueError where no form stands for other numbers than its kernel: it gains nothing."""
  if not formed:
    return
  arrays, forms_of = params_lib.leaves(before), params_lib.leaves(kept)
  for path in formed:
    if not jnp.array_equal(forms_of[path].dense(arrays[path].dtype), arrays[path]):
      return
  raise ValueError(
    'config.compress changes nothing: the model is in this form already, or all its kernels are 0.'
  )


def _placed(program: Inference, params: PyTree) -> dict[str, Any]:
  """Parameters on a program's mesh; heads that are missing stay so."""
  wanted, found = tree.flatten(program.params), tree.flatten(params)
  left = sorted(found.keys() - wanted.keys())
  heads = {path.split('/')[0] for path in found}
  missing = sorted(p for p in wanted.keys() - found.keys() if p.split('/')[0] in heads)
  if left or missing:
    raise ValueError(f'the smaller model has other parameters: {[*left, *missing][0]}.')
  shared = {path: leaf for path, leaf in wanted.items() if path in found}
  difference = tree.difference(shared, found)
  if difference:
    raise ValueError(f'the smaller model has parameters of other shapes:\n{difference}')
  return tree.nest(
    {path: jax.device_put(found[path], leaf.sharding) for path, leaf in shared.items()}
  )


def _examples(program: Inference, splits: Splits | None, rows: int) -> Sequence[Example]:
  from llm_jax.data import pipeline

  if splits is None:
    raise ValueError('config.compress looks at texts: give config.data, or compress a run.')
  laid_out = pipeline.validation_rows(splits.train, program.objective, program.config.seq_len)
  return pipeline.validation_examples(laid_out, program.objective, program.config.seed, rows)
