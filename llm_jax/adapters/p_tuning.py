"""P-tuning (arXiv:2103.10385): prompt tuning, the vectors of whose virtual tokens are what a small
mlp gives of a table, so that they move together:

    relu(relu(E W_1 + w_1) W_2 + w_2) W_3 + w_3

as `peft` has it (`PromptEncoder`, MLP). The paper puts an LSTM before it.
"""

import flax.linen as nn
import jax

from llm_jax.adapters import prompt
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
      prompt.parameter(module, name, shape, axes, scaled, inputs=(0,))
      zeros = nn.initializers.zeros
      prompt.parameter(module, f'{name}_bias', shape[1:], ('norm' if i == 2 else 'rank',), zeros)

  def vectors(self, module: Embedder) -> jax.Array:
    x_PD = prompt.value(module, prompt.TABLE)
    for i, name in enumerate(KERNELS):
      x_PD = x_PD @ prompt.value(module, name) + prompt.value(module, f'{name}_bias')
      x_PD = x_PD if i == 2 else jax.nn.relu(x_PD)
    return x_PD
