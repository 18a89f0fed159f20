"""BERT-base: 110M parameters, masked LM and next-sentence prediction.

Devlin et al. 2019, arXiv:1810.04805, appendix A.2.
"""

from configs import base


def get_config():
  """256 sequences of 512 tokens per step, a million steps, as in the paper."""
  config = base.get_config()
  config.steps = 1_000_000
  config.batch_size = 256
  config.seq_len = 512
  config.log_every = 100
  config.eval_every = 10_000
  config.tokenizer.vocab_size = 30_522
  config.tokenizer.sample_bytes = 50_000_000
  config.model = base.model('encoder', 'bert_base')
  config.objective = base.bert()
  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_fraction = 0.01
  config.optimizer.eps = 1e-6
  config.checkpoint.every = 5000
  return config
