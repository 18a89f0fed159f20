"""Relations between two spans of a text: in the lines of Python's library that define or import
something, what are two of their names to each other?

`--config.init_from=FOLDER` starts from pretrained weights. For another corpus:
`--config.data.source=jsonl --config.data.path=FILE --config.data.text=FIELD
--config.data.label=FIELD "--config.data.fields=('head','tail')"`; a decoder is read by
`--config.objective.pool=closing`.
"""

from configs import base


def get_config():
  """A few hundred steps on pairs of names, from the weights of `init_from` or from scratch."""
  config = base.get_config()
  config.steps = 200
  config.batch_size = 16
  config.seq_len = 128
  config.micro_batches = 1
  config.log_every = 10
  config.eval_every = 50
  config.data.source = 'headings'
  config.data.view = 'relations'
  config.data.validation = 0.05
  config.tokenizer.vocab_size = 4096
  config.model = base.model('encoder', 'bert_tiny')
  config.objective = dict(
    name='relation',
    markers='plain',
    pool='markers',
    dropout=0.1,
    unlabelled='error',
    packing='best_fit',
    balance=False,
    label_smoothing=0.0,
  )
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 1e-2
  config.checkpoint.every = 50
  config.evaluation.rows = 0
  config.pretrained = base.fine_tuning() | dict(epochs=4.0, eval_every=0)
  return config
