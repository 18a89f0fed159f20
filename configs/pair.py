"""Similarity of two texts by a cross-encoder, as a number: here, how much of the summary of a
docstring is left?

`--config.init_from=FOLDER` starts from pretrained weights. For another corpus:
`--config.data.source=jsonl --config.data.path=FILE --config.data.text=FIELD
--config.data.pair=FIELD --config.data.label=FIELD`, and `"--config.objective.range=(0,5)"`, the
lowest and the highest label.
"""

from configs import base


def get_config():
  """A few hundred steps on pairs, from the weights of `init_from` or from scratch."""
  config = base.get_config()
  config.steps = 300
  config.batch_size = 16
  config.seq_len = 256
  config.micro_batches = 1
  config.log_every = 10
  config.eval_every = 100
  config.data.source = 'summaries'
  config.data.graded = True
  config.data.validation = 0.1
  config.tokenizer.vocab_size = 4096
  config.model = base.model('encoder', 'bert_tiny')
  config.objective = dict(
    name='pair',
    loss='bce',
    range=(0.0, 1.0),
    scale=1.0,
    dropout=0.1,
    pool='mean',
    unlabelled='error',
    packing='best_fit',
  )
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 1e-2
  config.checkpoint.every = 100
  config.evaluation.rows = 0
  config.pretrained = base.fine_tuning() | dict(
    epochs=4.0,
    eval_every=0,
    objective=dict(pool=base.unset(str)),  # as the folder has it
  )
  return config
