"""What the log says of a failure: where it happened, and nothing that a request may have said."""

import traceback

import jax


def described(error: BaseException) -> str:
  """The kind of an error and the lines of code that it came through, also of those behind it.

  Messages are left out, for they may quote a text; those of the runtime beneath JAX (no memory,
  say) never do.
  """
  said = type(error).__name__
  if isinstance(error, jax.errors.JaxRuntimeError):
    said += f': {error}'
  lines = ''.join(traceback.format_tb(error.__traceback__))
  behind = error.__cause__ or error.__context__
  return f'{said}\n{lines}' + (f'because of {described(behind)}' if behind is not None else '')
