"""The first Transformer (Vaswani et al. 2017, arXiv:1706.03762), from text to text: `:tiny` for a
laptop, `:base` as in the paper.

Without data of yours it learns to give the first sentence of a docstring for what follows it. For
another corpus: `--config.data.source=jsonl --config.data.path=FILE --config.data.text=FIELD
--config.data.target=FIELD`.
"""

from configs import base

SIZES = ('tiny', 'base')


def get_config(size: str = 'tiny'):
  """Encoder, decoder and vocabulary from scratch, one table for all three."""
  if size not in SIZES:
    raise ValueError(f'configs/transformer.py:{size} is not a size; there are {", ".join(SIZES)}.')
  config = base.get_config()
  config.model = base.model('encoder_decoder', f'transformer_{size}')
  config.model.encoder_layers = base.unset(int)
  config.data.source = 'first_sentences'
  config.objective = base.seq2seq()
  return _tiny(config) if size == 'tiny' else _base(config)


def _tiny(config):
  """Two minutes on two cores, with Muon: five passes, after which it learns its texts by heart."""
  config.steps = 200
  config.batch_size = 16
  config.seq_len = 128
  config.micro_batches = 1
  config.log_every = 10
  config.eval_every = 50
  config.tokenizer.vocab_size = 4096
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 5e-3
  config.checkpoint.every = 50
  config.evaluation.rows = 0
  return config


def _base(config):
  """The paper's recipe (section 5): 25,000 source and as many target tokens a step, Adam, a rate
  that rises for 4,000 steps to (512 * 4000) ** -0.5 and falls with the square root of the step.
  """
  config.steps = 100_000
  config.batch_size = 104
  config.seq_len = 256
  config.log_every = 100
  config.eval_every = 5000
  config.tokenizer.vocab_size = 37_000
  config.tokenizer.kind = 'bpe'
  config.optimizer.learning_rate = 7e-4
  config.optimizer.schedule = 'inverse_sqrt'
  config.optimizer.warmup_fraction = base.unset(float)
  config.optimizer.warmup_steps = 4000
  config.optimizer.weight_decay = 0.0
  config.optimizer.b2 = 0.98
  config.optimizer.eps = 1e-9
  config.checkpoint.every = 5000
  return config
