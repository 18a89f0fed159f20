"""How well what is said of two texts agrees with how alike they are: Spearman's and Pearson's
correlation, as in semantic textual similarity (Cer et al. 2017, arXiv:1708.00055).
"""

from scipy import stats

from llm_jax.core.contracts import Validation
from llm_jax.evaluators import _answers

NAMES = ('similarity', 'score', 'value')  # of the number in an answer; the first that is there


class Evaluator:
  """Correlations of the numbers in answers (`NAMES`) with the labels of texts."""

  def evaluate(self, validation: Validation) -> tuple[dict[str, float], str]:
    """`spearman` and `pearson`.

    Raises:
      ValueError: an objective without such answers, or fewer than two pairs with labels.
    """
    said, wanted = [], []
    for rows, text, answer, _, _ in _answers.answered(validation):
      label = rows.label(text) if hasattr(rows, 'label') else None
      found = next((answer[name] for name in NAMES if answer.get(name) is not None), None)
      if label is not None and found is not None:
        said.append(found)
        wanted.append(label)
    if len(said) < 2 or len(set(wanted)) < 2:
      raise ValueError(
        f"the evaluator 'similarity' found {len(said)} pairs with a similarity and a label; it "
        'needs two different ones at least. config.data.label names the field of the labels.'
      )
    numbers = {
      'spearman': float(stats.spearmanr(said, wanted).statistic),
      'pearson': float(stats.pearsonr(said, wanted).statistic),
    }
    title = f'{len(said)} pairs, similarities from {min(said):.3f} to {max(said):.3f}:'
    lines = [f'{name:>9} {value:.4f}' for name, value in numbers.items()]
    return numbers, '\n'.join([title, *lines])
