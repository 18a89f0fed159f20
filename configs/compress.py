"""A smaller model of a run, or of a Hugging Face folder.

    python -m llm_jax.main --mode=compress --config=configs/compress.py --workdir=DIR \
      --output=SMALL

Kernels and tables in 8 bits; other methods by `--config.compress.name`. In place of a workdir a
folder may be given: `--config.init_from=FOLDER`. Texts are those of the run; with a folder, or
where others are wanted, `--config.data.source=...` names them.
"""

import ml_collections

from configs import base, hf


def get_config() -> ml_collections.ConfigDict:
  """What the mode is given."""
  config = hf.get_config()
  config.data.source = base.unset(str)  # None: the texts of the run
  config.compress.name = 'int8'
  del config.pretrained
  return config
