"""The base is frozen as it is, and only the heads are trained (linear probing)."""

from collections.abc import Collection, Mapping

from llm_jax.adapters import _targets
from llm_jax.core import contracts
from llm_jax.core.params import Info


class Adapter(contracts.Adapter):
  """Trains heads.

  Args:
    heads: the heads that are trained, a regular expression for their names; None for all but the
      masked-LM head.

  Raises:
    ValueError: no regular expression.

  Example:
    >>> adapter = Adapter()
    >>> adapter.trains('heads_classifier/dense/kernel', None, True)
    True
  """

  def __init__(self, heads: str | None = None):
    self.heads = _targets.Heads(heads)

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    self.heads.check(base)
    if not any(path in self.heads for path in base):
      raise ValueError(
        "config.adapter.name='freeze' trains heads, and this objective has none that is trained; "
        "take 'lora', or name one in config.adapter.heads ('mlm')."
      )

  def trains(self, path: str, info: Info, base: bool) -> bool:
    return path in self.heads
