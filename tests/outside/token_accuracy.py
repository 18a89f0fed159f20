"""An evaluator: the share of words that get their tag, over all and for each tag."""

import numpy as np

from llm_jax.core.contracts import Validation


class Evaluator:
  """Reads what `outside.token_labels` predicts.

  Args:
    report: whether to say it for each tag.
  """

  def __init__(self, report: bool = True):
    self.report = report

  def evaluate(self, validation: Validation) -> tuple[dict[str, float], str]:
    tags = validation.objective.tags
    right_C, total_C = np.zeros(len(tags)), np.zeros(len(tags))
    for batch in validation.batches():
      found = validation.predict(batch, ('tag', 'tag_weight'))
      counted = np.asarray(found['tag_weight']) > 0
      tag = np.asarray(found['tag'])[counted]
      best = np.argmax(found['probabilities'], -1)[counted]
      total_C += np.bincount(tag, minlength=len(tags))
      right_C += np.bincount(tag[best == tag], minlength=len(tags))
    accuracy = float(right_C.sum() / total_C.sum())
    lines = [
      f'{tag}: {right:.0f} of {total:.0f}'
      for tag, right, total in zip(tags, right_C, total_C, strict=True)
    ]
    return {'token_accuracy': accuracy}, '\n'.join(lines) if self.report else ''
