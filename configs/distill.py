"""A smaller model that learns from a larger one.

    python -m llm_jax.main --mode=compress --config=configs/compress.py --workdir=TEACHER \
      --config.compress.name=structured --config.compress.layers=6 --output=STUDENT
    python -m llm_jax.main --config=configs/distill.py --config.teacher=TEACHER \
      --config.init_from=STUDENT --workdir=DIR

The student starts from every second layer of the teacher, and learns the teacher's answers beside
the labels. Texts are those that the teacher learned from, where `config.data` names no others. Any
model with the teacher's tokenizer may be the student.
"""

import ml_collections

from configs import base, hf


def get_config() -> ml_collections.ConfigDict:
  """The student's recipe, and what it learns of the teacher."""
  config = hf.get_config()
  config.data.source = base.unset(str)  # None: the texts of the teacher
  config.data.validation = 0.02
  config.objective.unlabelled = base.unset(str)  # ignore: the teacher alone says what they are
  config.distill.temperature = 2.0
  config.distill.soft = 1.0  # the teacher's answers
  config.distill.hard = 0.5  # the labels
  return config
