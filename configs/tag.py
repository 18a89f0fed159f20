"""Token labelling: in the lines of Python's library that define or import something, what is the
name of a function, a parameter, a class, a module?

`--config.init_from=WORKDIR` starts from a pretrained run. For another corpus:
`--config.data.source=conll --config.data.path=FILE`, or conllu, word_tag, jsonl or parquet instead
of conll.
"""

from configs import base


def get_config():
  """A few hundred steps on labelled lines, from the weights of `init_from` or from scratch."""
  config = base.get_config()
  config.steps = 200
  config.batch_size = 16
  config.seq_len = 128
  config.micro_batches = 1
  config.log_every = 10
  config.eval_every = 50
  config.data.source = 'headings'
  config.data.validation = 0.05
  config.tokenizer.vocab_size = 4096
  config.model = base.model('encoder', 'bert_tiny')
  config.objective = dict(
    name='tag',
    scheme=base.unset(str),
    loss='softmax',
    words='space',
    label_all=False,
    unread=base.unset(str),
    dropout=0.1,
    transform=base.unset(str),
    unlabelled='error',
    packing='best_fit',
  )
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 1e-2
  config.checkpoint.every = 50
  config.evaluation.rows = 0
  config.pretrained = base.fine_tuning() | dict(epochs=4.0, eval_every=0)
  return config
