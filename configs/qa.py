"""Answers to questions as spans of a text: what is a parameter of a function by default?

`--config.init_from=WORKDIR` starts from a pretrained run. For SQuAD's JSON:
`--config.data.source=squad --config.data.path=train.json --config.validation.path=dev.json`.
"""

from configs import base


def get_config():
  """A few hundred steps on short contexts, from the weights of `init_from` or from scratch; from
  pretrained weights BERT's recipe (arXiv:1810.04805, section 4.2).
  """
  config = base.get_config()
  config.steps = 400
  config.batch_size = 16
  config.seq_len = 128
  config.micro_batches = 1
  config.log_every = 10
  config.eval_every = 100
  config.data.source = 'defaults'
  config.data.validation = 0.05
  config.tokenizer.vocab_size = 2048  # the default corpus fills no more than 4,000
  config.model = base.model('encoder', 'bert_tiny')
  config.objective = dict(
    name='qa',
    stride=128,
    max_question=64,
    max_answer=30,
    n_best=20,
    no_answer=base.unset(bool),
    threshold=base.unset(float),
    dropout=0.0,
    unlabelled='error',
    packing='best_fit',
  )
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 1e-2
  config.checkpoint.every = 100
  config.evaluation.rows = 0
  config.pretrained = base.fine_tuning() | dict(epochs=2.0, eval_every=0)
  return config
