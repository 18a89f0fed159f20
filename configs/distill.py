"""A smaller model that learns from a larger one.

    python -m llm_jax.main --mode=compress --config=configs/compress.py --workdir=TEACHER \
      --config.compress.name=structured --config.compress.layers=6 --output=STUDENT
    python -m llm_jax.main --config=configs/distill.py --config.teacher=TEACHER \
      --config.init_from=STUDENT --config.data.source=jsonl --config.data.path=data.jsonl \
      --workdir=DIR

The student starts from every second layer of the teacher, reads the same texts, and learns the
teacher's answers beside the labels. Any model with the teacher's tokenizer may be the student.
"""

import ml_collections

from configs import hf


def get_config() -> ml_collections.ConfigDict:
  """The student's recipe, and what it learns of the teacher."""
  config = hf.get_config()
  config.data.validation = 0.02
  config.distill.temperature = 2.0
  config.distill.soft = 1.0  # the teacher's answers
  config.distill.hard = 0.5  # the labels
  return config
