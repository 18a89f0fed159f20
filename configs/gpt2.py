"""GPT-2 (Radford et al. 2019) in four sizes: `configs/gpt2.py:small`, `:medium`, `:large`, `:xl`.

`:tiny` is a model small enough to try the recipe on a laptop.
"""

from configs import base, gpt_tiny

SIZES = ('small', 'medium', 'large', 'xl')


def get_config(size: str = 'small'):
  """512 sequences of 1024 tokens per step, the batch of the paper.

  The learning rates are those of GPT-3 (arXiv:2005.14165, table 2.1).
  """
  if size == 'tiny':
    return gpt_tiny.get_config()
  if size not in SIZES:
    raise ValueError(f'configs/gpt2.py:{size} is not a size; there are tiny, {", ".join(SIZES)}.')
  config = base.get_config()
  config.steps = 600_000
  config.batch_size = 512
  config.seq_len = 1024
  config.log_every = 100
  config.eval_every = 5000
  config.tokenizer.vocab_size = 50_257
  config.tokenizer.sample_bytes = 50_000_000
  config.tokenizer.kind = 'bpe'
  config.model = base.model('decoder', f'gpt2_{size}')
  config.objective = base.clm()
  config.optimizer.learning_rate = dict(small=6e-4, medium=3e-4, large=2.5e-4, xl=2e-4)[size]
  config.optimizer.schedule = 'cosine'
  config.optimizer.final_fraction = 0.1
  config.optimizer.warmup_fraction = 0.005
  config.optimizer.weight_decay = 0.1
  config.optimizer.b2 = 0.95
  config.checkpoint.every = 5000
  return config
