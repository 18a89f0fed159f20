"""The teacher of a run, `config.teacher`: the folder of a run or of a Hugging Face model, whose
network stands as a head beside the one that learns, and stays as it is.

Its parameters are those under `heads_teacher`. Checkpoints do not hold them: they name the folder,
and fingerprints of the values, as they do for a base (`programs.bases`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax

from llm_jax.core import files, plugins, tree
from llm_jax.core.config import Config
from llm_jax.core.contracts import Batch, Example, Objective, Tokenizer
from llm_jax.core.state import Loaded
from llm_jax.core.tree import PyTree
from llm_jax.nn.forms import int8
from llm_jax.objectives.shared import distilled
from llm_jax.programs import assemble, bases, inference, pretrained
from llm_jax.programs.inference import Inference

PREFIX = f'heads_{distilled.HEAD}/'
FOLDER = 'teacher'  # of a workdir: where the teacher may also lie
FORMS = {'int8': int8.Scheme()}
LEAST = 1e-8  # of a loss that is one, by what rounding leaves of equal answers


def options(config: Config) -> distilled.Options:
  """The section `config.distill`.

  Raises:
    ValueError: an option that is not possible, or a form of weights that is not known.
  """
  found = plugins.construct('distill', distilled.Options, config.distill)
  if found.weights and found.weights not in FORMS:
    raise ValueError(
      f'config.distill.weights={found.weights!r} is not known; known: {", ".join(FORMS)}.'
    )
  return found


def beside(config: Config, objective: Objective, tokenizer: Tokenizer) -> Objective:
  """The objective with its teacher; as it is where the config names none.

  Args:
    config: of the run, resolved.
    objective: of the run.
    tokenizer: of the run.

  Raises:
    ValueError: a folder that is none, a teacher with another tokenizer, other labels, another
      objective, or shorter rows.
  """
  if not config.teacher:
    return objective
  given = options(config)
  theirs, answers = opened(config, tokenizer)
  network = inference.network_of(theirs, answers)
  if config.seq_len > network.longest:
    raise ValueError(
      f'config.teacher={config.teacher} reads rows of at most {network.longest} tokens, and '
      f'config.seq_len={config.seq_len}; lower it.'
    )
  if theirs.objective['name'] != config.objective['name'] and given.soft:
    raise ValueError(
      f'config.teacher={config.teacher} learned the objective {theirs.objective["name"]}, and the '
      f'student learns {config.objective["name"]}: their answers cannot be compared. Set '
      'config.distill.soft to 0, and hidden or relations above it.'
    )
  order = _order(config, objective, answers) if given.soft else None
  return distilled.beside(objective, network, given, order, getattr(answers, 'outputs', 0))


def opened(config: Config, tokenizer: Tokenizer) -> tuple[Config, Objective]:
  """The teacher's config, for rows and devices of the student, and its objective.

  Raises:
    ValueError: as `beside`.
  """
  folder = files.local('config.teacher', config.teacher)
  sections = dict(tokenizer={}, model={}, objective={}, optimizer={}, data={})
  found = Config(steps=1, batch_size=config.batch_size, init_from=str(folder), **sections)
  found = pretrained.fill_in(found)
  theirs = pretrained.load_tokenizer(found)
  if theirs.fingerprint != tokenizer.fingerprint:
    raise ValueError(
      f'config.teacher={folder} has another tokenizer than the student, so the two do not read the '
      'same ids. Start the student from the teacher (config.init_from), or from a model with its '
      'tokenizer.'
    )
  found = assemble.resolve(found, tokenizer.vocab_size)
  dtypes = {'dtype': config.model.get('dtype'), 'param_dtype': options(config).param_dtype}
  dtypes = {name: value for name, value in dtypes.items() if value is not None}
  model = found.model | dtypes | {'remat': 'none', 'dropout': 0.0, 'attention_dropout': 0.0}
  found = dataclasses.replace(found, model=model, mesh=config.mesh, seq_len=config.seq_len)
  return found, assemble.create_objective(found, tokenizer)


def schemes(program: Inference) -> dict[str, Any]:
  """How the teacher's kernels are kept, where that is in another form."""
  form = options(program.config).weights if in_state(program.config) else ''
  if not form:
    return {}
  kernels = (
    path for path, info in program.infos.items() if info.formable and info.layer is not None
  )
  return {path: FORMS[form] for path in kernels if path.startswith(PREFIX)}


def in_state(config: Config) -> bool:
  """Whether a run holds the parameters of a teacher; one whose answers are kept is not held."""
  return bool(config.teacher) and not options(config).cached


def load(program: Inference, tokenizer: Tokenizer, example: Example) -> tuple[Loaded, bases.Base]:
  """The teacher's parameters by their paths in the student's program, and what checkpoints say of
  them.

  Raises:
    ValueError: some are missing.
  """
  folder = files.local('config.teacher', program.config.teacher).absolute()
  loaded = _load(program, tokenizer, example, folder, None)
  wanted = [path for path in tree.paths(program.params) if path.startswith(PREFIX)]
  _check_whole(folder, wanted, loaded)
  prints = bases.fingerprints(loaded.params, program.mesh)
  return loaded, bases.Base(str(folder), loaded.step, prints)


def alone(
  config: Config, tokenizer: Tokenizer, example: Example
) -> tuple[Inference, PyTree, bases.Base]:
  """The teacher's own program and its parameters, and what checkpoints say of them.

  Args:
    config: of the student's run.
    tokenizer: of both.
    example: a row of the student.

  Raises:
    ValueError: as `opened`, or parameters are missing.
  """
  theirs, objective = opened(config, tokenizer)
  program = inference.build(theirs, objective, example)
  folder = files.local('config.teacher', config.teacher).absolute()
  loaded = pretrained.load_params(program, folder)
  _check_whole(folder, tree.paths(program.params), loaded)
  named = {f'{PREFIX}{path}': leaf for path, leaf in loaded.params.items()}
  prints = bases.fingerprints(named, program.mesh)
  return program, tree.nest(dict(loaded.params)), bases.Base(str(folder), loaded.step, prints)


def check_same(config: Config, found: bases.Base, said: Mapping[str, Any] | None) -> None:
  """Raises ValueError where the teacher that answers is not the one that a run began with."""
  if said is None or dict(said['fingerprints']) != dict(found.fingerprints):
    raise ValueError(
      f'config.teacher={config.teacher} is not the teacher that this run began with: its '
      'parameters are others. Bring that one back, or begin a new run.'
    )


def check_teaches(program: Inference, params: PyTree, batch: Batch) -> None:
  """Raises ValueError where the teacher says of a batch what the student says: nothing would be
  learned from it, and nobody would see that.

  Args:
    program: of the student.
    params: all of its network, the teacher's among them.
    batch: the first one.
  """
  metrics = program.eval_step(params, batch)
  for name in (distilled.SOFT, distilled.HIDDEN, distilled.RELATIONS):
    if name not in metrics:
      continue
    total, weight = (float(x) for x in metrics[name])
    if not weight or total / weight < LEAST:
      reason = 'no text of the first batch counts' if not weight else f'it is {total / weight:.1e}'
      raise ValueError(
        f'config.teacher={program.config.teacher} has nothing to teach by {name}: {reason}. Is it '
        f'the student itself? Set config.distill.{name} to 0, or give another teacher.'
      )


def read(
  program: Inference,
  tokenizer: Tokenizer,
  example: Example,
  workdir: pathlib.Path,
  said: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """The teacher's parameters for a run that goes on, by path.

  Raises:
    ValueError: they are gone, or others.
  """
  load = functools.partial(_load, program, tokenizer, example)
  wanted = tree.paths(program.params)
  return bases.read(bases.Base(**said), workdir, load, wanted, program.mesh, {}, FOLDER)


def _check_whole(folder: pathlib.Path, wanted: Collection[str], loaded: Loaded) -> None:
  missing = [path for path in wanted if path not in loaded.params or path in loaded.new]
  if missing:
    raise ValueError(f'config.teacher={folder} lacks parameters:\n  ' + '\n  '.join(missing[:10]))


def _load(
  program: Inference,
  tokenizer: Tokenizer,
  example: Example,
  folder: pathlib.Path,
  step: int | None,
) -> Loaded:
  config = dataclasses.replace(program.config, teacher=str(folder))
  theirs, objective = opened(config, tokenizer)
  alone = inference.build(theirs, objective, example)
  loaded = pretrained.load_params(alone, folder, step)
  wanted = tree.flatten(program.params)
  named = {f'{PREFIX}{path}': leaf for path, leaf in loaded.params.items()}
  return loaded._replace(params={path: leaf for path, leaf in named.items() if path in wanted})


def _order(config: Config, ours: Objective, theirs: Objective) -> list[int] | None:
  """For each class of the student its number among the teacher's, by name."""
  names = [getattr(each, 'classes', None) or getattr(each, 'tags', None) for each in (ours, theirs)]
  student, teacher = (tuple(found or ()) for found in names)
  if student == teacher:
    return None
  if sorted(student) != sorted(teacher):
    odd = sorted(set(student) ^ set(teacher))
    raise ValueError(
      f'config.teacher={config.teacher} has other labels than the student: {", ".join(odd[:10])}. '
      'Train it on the same labels, or set config.distill.soft to 0.'
    )
  if getattr(ours, 'task', '') == 'binary':
    raise ValueError(
      f'config.teacher={config.teacher} has the two classes in the order {", ".join(teacher)}; set '
      'config.objective.classes to that.'
    )
  return [teacher.index(name) for name in student]
