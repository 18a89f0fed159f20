"""`--mode=export`: a model as a folder that Hugging Face's transformers opens."""

from absl import flags

from llm_jax.modes import _command
from llm_jax.modes._command import Command

DTYPE = flags.DEFINE_enum(
  'export_dtype',
  'float32',
  ['float32', 'bfloat16', 'float16', 'float64'],
  'export: the type that weights are written in.',
)
FORM = flags.DEFINE_enum(
  'export',
  'merged',
  ['merged', 'base', 'adapter', 'stablehlo'],
  'export: of a run with an adapter, merged into its base, the base without it, or the adapter '
  'alone (and the heads), as the library peft reads it; stablehlo: one function that JAX runs '
  'without this package.',
)


def run(command: Command) -> None:
  """Writes --output."""
  from llm_jax.inference.export import export

  command.require('output=FOLDER')
  export(command.session(), _command.output_path(), DTYPE.value, FORM.value)
