"""A GPT-2 small enough for a laptop: it trains in minutes on two cores."""

from configs import base


def get_config():
  """Causal LM on the source of Python's standard library, with Muon.

  The text is not normalised, so its bits per byte compare with what `xz -9` makes of the same text.
  """
  config = base.get_config()
  config.steps = 500
  config.batch_size = 16
  config.seq_len = 128
  config.micro_batches = 1
  config.log_every = 20
  config.eval_every = 100
  config.tokenizer.vocab_size = 4096
  config.model = base.model('decoder', 'gpt_tiny')
  config.objective = base.clm()
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 5e-3
  config.optimizer.weight_decay = 0.1
  config.checkpoint.every = 100
  config.evaluation.rows = 0  # all of the validation text, whole and in order, as xz reads it
  return config
