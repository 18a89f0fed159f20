"""BitFit (arXiv:2106.10199): the biases of a frozen base are trained, those of its norms too, and
the heads.
"""

from collections.abc import Collection, Mapping

from llm_jax.adapters import _targets
from llm_jax.core import contracts
from llm_jax.core.params import Info


class Adapter(contracts.Adapter):
  """Trains biases and heads.

  Args:
    heads: the heads that are trained whole, a regular expression for their names; '' for none,
      None for all but the masked-LM head.

  Raises:
    ValueError: no regular expression.

  Example:
    >>> adapter = Adapter()
    >>> adapter.trains('heads_classifier/dense/kernel', None, True)
    True
    >>> adapter.trains('model/stack/layers/block/mlp/up/kernel', None, True)
    False
  """

  def __init__(self, heads: str | None = None):
    self.heads = _targets.Heads(heads)

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    self.heads.check(base)
    if not any(_is_bias(path) for path in base):
      raise ValueError(
        "config.adapter.name='bitfit' trains biases, and this model has none; take 'lora' or 'ia3'."
      )

  def trains(self, path: str, info: Info, base: bool) -> bool:
    return _is_bias(path) or path in self.heads

  def no_gradient(self, path: str) -> str | None:
    return _targets.softmax_hides(path)


def _is_bias(path: str) -> bool:
  return path.startswith('model/') and path.endswith('/bias')
