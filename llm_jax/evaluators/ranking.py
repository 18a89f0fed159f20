"""How well candidates are ordered: recall, nDCG and reciprocal rank of what is relevant."""

from llm_jax.core.contracts import Validation
from llm_jax.evaluators import _answers, _ranks


class Evaluator:
  """Scores of an objective whose answers have `scores` of the candidates of a text.

  Args:
    cutoffs: ranks at which recall and nDCG are taken. nDCG weighs a relevance by itself, a whole
      number; fractions are rounded.

  Raises:
    ImportError: pytrec_eval is not installed.
  """

  def __init__(self, cutoffs: tuple[int, ...] = (1, 10)):
    self.cutoffs = _ranks.checked(cutoffs)

  def evaluate(self, validation: Validation) -> tuple[dict[str, float], str]:
    """Means over the texts with a relevant candidate; see `_ranks.scores`.

    Raises:
      ValueError: an objective without such answers, or nothing that is relevant.
    """
    wanted, found = {}, {}
    for rows, text, answer, position, _ in _answers.answered(validation):
      numbers = rows.numbers[text] if hasattr(rows, 'numbers') else None
      if numbers is None or 'scores' not in answer or max(numbers) < 0.5:
        continue
      query = str(position)
      wanted[query] = {str(i): round(number) for i, number in enumerate(numbers)}
      found[query] = {str(i): score for i, score in enumerate(answer['scores'])}
    if not wanted:
      raise ValueError(
        "the evaluator 'ranking' found no text with scores and a relevant candidate; name other "
        'evaluators in config.evaluators.'
      )
    numbers = _ranks.scores(wanted, found, self.cutoffs)
    return numbers, _ranks.report(f'{len(wanted)} texts order their candidates:', numbers)
