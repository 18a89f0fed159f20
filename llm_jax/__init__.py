"""llm_jax: raw text to a trained, adapted, checked and usable Transformer, in JAX and Flax."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import os
  from collections.abc import Sequence

  from llm_jax.inference.ensembles import Ensemble
  from llm_jax.inference.session import Session

__version__ = '0.1.0'


def open(  # noqa: A001
  folder: 'str | os.PathLike[str]',
  *,
  adapter: str | None = None,
  soup: 'Sequence[str | os.PathLike[str]]' = (),
  ensemble: 'Sequence[str | os.PathLike[str]]' = (),
) -> 'Session | Ensemble':
  """Opens the workdir of a run, or a Hugging Face folder, for use.

  Args:
    folder: its path.
    adapter: the name of one of the adapters on the base in there (`--adapter`).
    soup: paths of runs of the same shape, whose parameters are averaged with its own.
    ensemble: paths of runs whose answers are averaged with its own.

  Returns:
    A `Session`: predict, embed, complete and fill, arrays and dictionaries in and out. With
    `ensemble` an `Ensemble`, which predicts.

  Raises:
    ValueError: no such run, folder or adapter, or runs that do not go together.

  Example:
    >>> import llm_jax
    >>> session = llm_jax.open(folder)
    >>> session.causal  # an encoder
    False
  """
  from llm_jax.inference import ensembles  # takes seconds: JAX comes with it

  return ensembles.open_runs(folder, soup, ensemble, adapter)
