"""A model from its folder: `--config.init_from=FOLDER`, of Hugging Face or of a run.

The folder decides model, objective and tokenizer; nothing else needs to be set. It works in every
mode: `--mode=eval`, `embed`, `generate`, `export`, and training on from the weights.
"""

from configs import base


def get_config():
  """Model, objective and tokenizer of the folder, with BERT's recipe for fine-tuning."""
  config = base.get_config()
  config.steps = 1000
  config.batch_size = 32
  config.seq_len = base.unset(int)  # None: the longest that the model takes, at most 512
  config.data.validation = 0.0  # eval reads all documents; set a share to train
  config.model = base.model(base.unset(str), base.unset(str))
  config.objective = dict(name=base.unset(str))
  config.pretrained = base.fine_tuning()
  config.evaluation.rows = 0
  return config
