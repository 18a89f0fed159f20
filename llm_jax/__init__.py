"""llm_jax: raw text to a trained, adapted, checked and usable Transformer, in JAX and Flax."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import os

  from llm_jax.inference.session import Session

__version__ = '0.1.0'


def open(folder: 'str | os.PathLike[str]') -> 'Session':  # noqa: A001
  """Opens the workdir of a run, or a Hugging Face folder, for use.

  Args:
    folder: its path.

  Returns:
    A `Session`: predict, embed, complete and fill, arrays and dictionaries in and out.

  Raises:
    ValueError: no such run or folder.

  Example:
    >>> import llm_jax
    >>> session = llm_jax.open(folder)
    >>> session.causal  # an encoder
    False
  """
  from llm_jax.inference import session  # takes seconds: JAX comes with it

  return session.open_folder(folder)
