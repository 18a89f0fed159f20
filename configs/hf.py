"""A model from its folder: `--config.init_from=FOLDER`, of Hugging Face or of a run, says what it
is; nothing else need be set.

For every mode: `--mode=eval`, `embed`, `generate`, `export`, and to train on from its weights.
"""

from configs import base


def get_config():
  """Model, objective and tokenizer are those of the folder; the recipe is BERT's for fine-tuning."""
  config = base.get_config()
  config.steps = 1000
  config.batch_size = 32
  config.seq_len = base.unset(int)  # None: as long as the model takes, at most 512
  config.data.validation = 0.0  # all documents; training on wants a share to measure itself by
  config.model = base.model(base.unset(str), base.unset(str))
  config.objective = dict(name=base.unset(str))
  config.optimizer.learning_rate = 5e-5
  config.optimizer.warmup_fraction = 0.1
  config.evaluation.rows = 0
  return config
