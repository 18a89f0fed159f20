"""Prompt tuning (arXiv:2104.08691): `length` virtual tokens before each text, whose vectors are all
that is learned of the network. They are ids above the vocabulary (`data.prompted`), which stand in
rows as other tokens do, and see and are seen as these are. They start as small as the vectors of
the vocabulary do; what stands before a text cannot be merged into a kernel.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.adapters import _embedder, _ported, _targets
from llm_jax.core import contracts
from llm_jax.core.contracts import Piece, Ported
from llm_jax.core.params import Info
from llm_jax.nn.embedder import Embedder

TABLE = 'prompt_embedding'
PEFT_TYPES = ('PROMPT_TUNING', 'P_TUNING')  # of either, peft saves the vectors alone
_TASKS = ('CAUSAL_LM', 'SEQ_CLS', 'TOKEN_CLS')
_IN_PEFT = (
  'num_virtual_tokens token_dim num_attention_heads num_layers prompt_tuning_init '
  'prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs encoder_hidden_size '
  'encoder_reparameterization_type encoder_num_layers encoder_dropout'.split()
)


class Adapter(contracts.Adapter):
  """Trains the vectors of the virtual tokens, and the heads.

  Args:
    length: P, how many there are.
    heads: the heads that are trained whole, a regular expression for their names; '' for none,
      None for all but the masked-LM head.

  Raises:
    ValueError: a value that is not possible.
  """

  def __init__(self, length: int = 20, heads: str | None = None):
    if length < 1:
      raise ValueError(f'config.adapter.length={length} must be at least 1.')
    self.tokens, self.heads = length, _targets.Heads(heads)

  def check(self, infos: Mapping[str, Info], base: Collection[str]) -> None:
    self.heads.check(base)
    if not any(path.endswith(f'/{TABLE}') for path in infos):
      raise ValueError(
        'virtual tokens need `nn.embedder.Embedder`, which gives tokens their vectors, and this '
        'model has none.'
      )

  def trains(self, path: str, info: Info, base: bool) -> bool:
    return not base or path in self.heads

  def intercept(
    self,
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    module = context.module
    if not isinstance(module, Embedder) or context.method_name not in ('setup', 'vectors'):
      return next_fun(*args, **kwargs)
    if context.method_name == 'setup':
      next_fun(*args, **kwargs)
      return self.create(module)
    (ids_BT,) = args
    number_BT = ids_BT - module.vocab_size
    virtual_BT = number_BT >= 0
    x_BTD = next_fun(jnp.where(virtual_BT, 0, ids_BT))
    prompt_PD = self.vectors(module).astype(x_BTD.dtype)
    prompt_BTD = prompt_PD[jnp.clip(number_BT, 0, self.tokens - 1)]
    return jnp.where(virtual_BT[..., None], prompt_BTD, x_BTD)

  def ported(self, times: int = 1) -> Ported:
    settings = dict(
      peft_type='PROMPT_TUNING', num_virtual_tokens=self.tokens, num_transformer_submodules=1
    )
    return Ported(settings, prompt=Piece(TABLE, 'prompt_embeddings', 'PD', 'PD'), tasks=_TASKS)

  @classmethod
  def ported_options(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
    """See the contract; whatever made the vectors, they are what is learned here."""
    _ported.check('prompt', settings, _IN_PEFT, num_transformer_submodules=(None, 1))
    return dict(length=settings.get('num_virtual_tokens'))

  def create(self, module: Embedder) -> None:
    """Creates what is learned, in an embedder."""
    std = nn.initializers.normal(module.options.init_std)
    _embedder.parameter(module, TABLE, (self.tokens, module.options.dim), (None, 'embed'), std)

  def vectors(self, module: Embedder) -> jax.Array:
    """The vectors of the virtual tokens, [P, D]."""
    return _embedder.value(module, TABLE)
