"""P-tuning (arXiv:2103.10385): prompt tuning, the vectors of whose virtual tokens are what a small
mlp gives of a table, so that they move together:

    relu(relu(E W_1 + w_1) W_2 + w_2) W_3 + w_3

as `peft` has it (`PromptEncoder`, MLP). The paper puts an LSTM before it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from llm_jax.adapters import _embedder, _targets, prompt
from llm_jax.core import tree
from llm_jax.core.contracts import Ported
from llm_jax.core.params import Info
from llm_jax.core.tree import PyTree
from llm_jax.nn.embedder import Embedder

KERNELS = 'prompt_inner', 'prompt_middle', 'prompt_outer'


class Adapter(prompt.Adapter):
  """Trains the table and the mlp, and the heads.

  Args:
    length: P, virtual tokens.
    hidden: the width of the mlp.
    heads: as in prompt tuning.

  Raises:
    ValueError: a value that is not possible.
  """

  def __init__(self, length: int = 20, hidden: int = 128, heads: str | None = None):
    super().__init__(length, heads)
    if hidden < 1:
      raise ValueError(f'config.adapter.hidden={hidden} must be at least 1.')
    self.hidden = hidden

  def create(self, module: Embedder) -> None:
    D, R = module.options.dim, self.hidden
    sizes, names = (D, R, R, D), ('embed', 'rank', 'rank', 'embed')
    super().create(module)
    for i, name in enumerate(KERNELS):
      shape, axes = sizes[i : i + 2], (names[i], names[i + 1])
      axes = (axes[0], None) if axes[0] == axes[1] else axes
      scaled = nn.initializers.he_normal()
      _embedder.parameter(module, name, shape, axes, scaled, inputs=(0,))
      zeros = nn.initializers.zeros
      _embedder.parameter(module, f'{name}_bias', shape[1:], ('norm' if i == 2 else 'rank',), zeros)

  def vectors(self, module: Embedder) -> jax.Array:
    return _made(lambda name: _embedder.value(module, name))

  def ported(self, times: int = 1) -> Ported:
    found = super().ported(times)
    more = dict(
      peft_type='P_TUNING',
      encoder_hidden_size=self.hidden,
      encoder_reparameterization_type='MLP',
    )
    return found._replace(settings={**found.settings, **more})

  def to_ported(self, params: PyTree, infos: Mapping[str, Info]) -> dict[str, Any]:
    """See the contract: the vectors that the mlp gives, in place of the table."""
    leaves = tree.flatten(params)
    for module in _targets.modules(leaves, prompt.TABLE):
      found = {name: leaves[f'{module}/{name}'] for name in _names()}
      leaves[f'{module}/{prompt.TABLE}'] = _made(found.__getitem__)
    return tree.nest(leaves)


def _names() -> tuple[str, ...]:
  return prompt.TABLE, *KERNELS, *(f'{name}_bias' for name in KERNELS)


def _made(value: Callable[[str], jax.Array]) -> jax.Array:
  """The vectors of the virtual tokens, [P, D], from the parameters by name."""
  x_PD = value(prompt.TABLE)
  for i, name in enumerate(KERNELS):
    x_PD = x_PD @ value(name) + value(f'{name}_bias')
    x_PD = x_PD if i == 2 else jax.nn.relu(x_PD)
  return x_PD
