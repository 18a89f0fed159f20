"""A GPT-2 of a size for laptops: minutes on two cores, over the embedded corpus, to the last byte
of it.
"""

from configs import base


def get_config():
  """Causal LM over text that is not normalised, so that bits per byte compare with `xz -9` of the
  same text.
  """
  config = base.get_config()
  config.steps = 500
  config.batch_size = 16
  config.seq_len = 128
  config.micro_batches = 1
  config.log_every = 20
  config.eval_every = 100
  config.tokenizer.vocab_size = 4096
  config.tokenizer.normalization = 'identity'
  config.model = base.model('decoder', 'gpt_tiny')
  config.objective = base.clm()
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 5e-3
  config.optimizer.weight_decay = 0.1
  config.checkpoint.every = 100
  config.evaluation.rows = 0  # all of the validation text, so that xz reads it whole and in order
  return config
