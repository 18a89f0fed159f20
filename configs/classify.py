"""Fine-tuning for classification: which package of the standard library is a docstring from?

`--config.init_from=WORKDIR` starts from a pretrained run. For another corpus:
`--config.data.source=jsonl --config.data.path=FILE --config.data.label=FIELD`, or csv, parquet or
tfds instead of jsonl.
"""

from configs import base


def get_config():
  """A few epochs on labelled docstrings, from the weights of `init_from` or from scratch."""
  config = base.get_config()
  config.steps = 150
  config.batch_size = 16
  config.seq_len = 128
  config.micro_batches = 1
  config.log_every = 10
  config.eval_every = 50
  config.data.source = 'docstrings'
  config.data.validation = 0.15
  config.tokenizer.vocab_size = 4096
  config.model = base.model('encoder', 'bert_tiny')
  config.objective = dict(
    name='classify',
    task='multiclass',
    dropout=0.1,
    pool='mean',
    unlabelled='error',  # error | ignore | learn: self-training
    confidence=base.unset(float),  # with learn
    self_training=base.unset(float),
    packing='best_fit',
    mixup=base.unset(float),
  )
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 1e-2
  config.checkpoint.every = 50
  config.evaluation.rows = 0
  config.pretrained = base.fine_tuning() | dict(
    epochs=4.0,
    eval_every=0,
    objective=dict(pool=base.unset(str)),  # as the folder has it
  )
  return config
