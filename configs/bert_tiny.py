"""A BERT small enough for a laptop: it trains in minutes on two cores."""

from configs import base


def get_config():
  """Masked LM on packed documents of Python's standard library, with Muon."""
  config = base.get_config()
  config.steps = 600
  config.batch_size = 16
  config.seq_len = 128
  config.micro_batches = 1
  config.log_every = 20
  config.eval_every = 100
  config.tokenizer.vocab_size = 4096
  config.model = base.model('encoder', 'bert_tiny')
  config.objective = base.mlm()
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 5e-3
  config.optimizer.weight_decay = 0.01
  config.checkpoint.every = 100
  return config
