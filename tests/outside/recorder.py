"""A hook: writes the numbers of a step to a file in the workdir, a line of JSON for each time."""

import json
from collections.abc import Mapping

from llm_jax.core.state import TrainState
from llm_jax.training.loop import Run


class Hook:
  """Appends to a file.

  Args:
    run: whose workdir it is.
    file: its name.
    every: after how many steps.
  """

  def __init__(self, run: Run, file: str = 'recorded.jsonl', every: int = 5):
    self.path, self.every = run.workdir / file, every

  def __call__(self, step: int, state: TrainState, values: Mapping[str, float]) -> None:
    line = {'step': step, 'state': int(state.step)} | dict(values)
    with open(self.path, 'a') as file:
      file.write(json.dumps(line) + '\n')
