"""T5 1.1 (Raffel et al. 2020, arXiv:1910.10683) from scratch: spans are taken out of a text, and
the decoder writes them. `:tiny` for a laptop, `:small`, `:base` and `:large` as published.

For your own corpus: `--config.data.source=text --config.data.path='/data/*.txt'`. BART's noise:
`--config.objective.noise=infilling`; UL2's: `mixture`.
"""

from configs import base

SIZES = ('tiny', 'small', 'base', 'large')


def get_config(size: str = 'tiny'):
  """Rows of 512 tokens to read and 114 to write, as in the paper: no padding at its rates."""
  if size not in SIZES:
    raise ValueError(f'configs/t5.py:{size} is not a size; there are {", ".join(SIZES)}.')
  config = base.get_config()
  tiny = size == 'tiny'
  config.model = base.model('encoder_decoder', 't5_tiny' if tiny else f't5_1_1_{size}')
  config.model.encoder_layers = base.unset(int)
  config.tokenizer.sentinels = 100
  config.objective = dict(
    name='denoise',
    noise='spans',  # spans | infilling | mixture
    rate=base.unset(float),
    mean_span=base.unset(float),
    permute=True,
    modes=base.unset(tuple),
    source_len=512,
    start=base.unset(int),
    packing='best_fit',
    label_smoothing=0.0,
    z_loss=0.0,
  )
  return _tiny(config) if tiny else _published(config)


def _tiny(config):
  """Minutes on two cores, with Muon."""
  config.steps = 300
  config.batch_size = 8
  config.seq_len = 64
  config.micro_batches = 1
  config.objective.source_len = 256
  config.log_every = 20
  config.eval_every = 100
  config.tokenizer.vocab_size = 4096
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 5e-3
  config.checkpoint.every = 100
  config.evaluation.rows = 128
  return config


def _published(config):
  """The recipe of the T5 1.1 models: no dropout, Adafactor, a rate of 0.01 for 10,000 steps that
  falls with the square root of the step, 2,048 rows a step.
  """
  config.steps = 1_000_000
  config.batch_size = 2048
  config.seq_len = 114
  config.log_every = 100
  config.eval_every = 10_000
  config.tokenizer.vocab_size = 32_000
  config.model.dropout = 0.0
  config.model.attention_dropout = 0.0
  config.optimizer.name = 'adafactor'
  config.optimizer.learning_rate = 1e-2
  config.optimizer.schedule = 'inverse_sqrt'
  config.optimizer.warmup_fraction = base.unset(float)
  config.optimizer.warmup_steps = 10_000
  config.optimizer.weight_decay = 0.0
  config.checkpoint.every = 10_000
  return config
