"""Runs that are made of these plug-ins: --config=tests/outside/config.py:tags"""

from configs import base

TINY = dict(dim=16, layers=2, heads=2, mlp_dim=32, max_len=32)


def get_config(kind='tags'):
  """A run.

  Args:
    kind: 'tags' or 'pairs', whose every part is from outside; 'encoder' or 'decoder', whose model
      and objective are the package's.
  """
  config = base.get_config()
  config.steps, config.batch_size, config.seq_len = 12, 8, 32
  config.log_every, config.eval_every, config.checkpoint.every = 1, 6, 6
  config.data = dict(
    source='outside.counting',
    kind={'tags': 'tags', 'pairs': 'pairs'}.get(kind, 'text'),
    validation=0.25,
    cache=base.unset(str),
    workers=1,
  )
  config.tokenizer = dict(name='outside.characters')
  config.optimizer.schedule = 'constant'
  config.optimizer.learning_rate = 0.02
  config.evaluation.rows = 0
  config.evaluation.samples = 0
  config.logging.tensorboard = False
  config.hooks = dict(recorder=dict(name='outside.recorder', every=5))
  if kind == 'tags':
    config.model = dict(name='outside.gated_convolution')
    config.objective = dict(name='outside.token_labels')
    config.evaluators = dict(loss=dict(), words=dict(name='outside.token_accuracy'))
  elif kind == 'pairs':
    config.model = dict(name='outside.gated_convolution', balance=0.1)
    config.objective = dict(name='outside.source_target')
  elif kind == 'encoder':
    config.model = base.model('encoder', 'bert_tiny') | TINY
    config.objective = base.mlm()
  else:
    config.model = base.model('decoder', 'gpt_tiny') | TINY
    config.objective = base.clm()
  return config
