"""`--mode=eval`: the numbers of a model on a validation set."""

import json
import pathlib
from typing import TYPE_CHECKING

from llm_jax.modes._command import Command

if TYPE_CHECKING:
  from llm_jax.inference.ensembles import Ensemble
  from llm_jax.inference.session import Session


def run(command: Command) -> None:
  """Prints them, and writes them to `eval.json` in the workdir."""
  evaluate(command.session(), command.workdir)


def evaluate(session: 'Session | Ensemble', folder: pathlib.Path | None = None) -> dict[str, float]:
  """Prints a model's numbers, and writes them to `eval.json`; data.validation=0: on all documents.

  Args:
    session: the model, and in its config the data; of an ensemble, which has no loss, what is said
      of its answers.
    folder: where to write; None to print only.

  Raises:
    ValueError: an unusable source, an empty corpus, parameters that are missing.
  """
  from llm_jax.core import files, metrics
  from llm_jax.inference import ensembles
  from llm_jax.parallel import hosts
  from llm_jax.programs import assemble, inference, reference
  from llm_jax.training import corpora, evaluation, held_out

  tokenizer = session.tokenizer
  held_out.check_slices(session.config)
  documents = corpora.documents(assemble.without_copies(session.config), tokenizer)
  config = assemble.derive(session.config, documents.train)
  chosen = documents.validation or documents.train
  objective = assemble.create_objective(config, tokenizer)
  held = held_out.lay_out(config, 'validation', chosen, objective, config.evaluation.rows)
  if objective.needs_reference:
    cache = corpora.cache_directory(config)
    reference.attach(config, objective, tokenizer, held.laid_out, cache)
  program = inference.build(config, objective, held.examples[0])
  several = isinstance(session, ensembles.Ensemble)
  params = (session.members[0] if several else session).load(program, heads=True)
  others = session.voters(config, chosen, held.examples[0]) if several else ()
  report = folder and folder / 'eval_report.txt'
  values = evaluation.scores(program, params, tokenizer, held, report, others=others)
  values |= evaluation.baselines(program, tokenizer, held.examples)
  if hosts.primary():
    for name, value in metrics.shown(values, '.6g').items():
      print(f'{name:>24} {value}')
    if folder:
      record = {'model': str(session.origin), 'data': config.data} | session.named | values
      with files.whole_file(folder / 'eval.json') as file:
        json.dump(record, file, indent=2)
  return values
