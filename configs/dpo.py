"""Preferences: of two answers the chosen one becomes likelier than the rejected one.

`--config.init_from=FOLDER` starts from a model by DPO, with that model as the reference; with
`--config.adapter.name=lora` beside it. For your own pairs: `--config.data.source=chat
--config.data.path=FILE`, JSON Lines with `prompt`, `chosen` and `rejected`. Without a model it
learns from scratch by ORPO, which needs no reference; without data of yours, which first sentence
belongs to a docstring.
"""

from configs import base


def get_config():
  """A few hundred steps from scratch; from pretrained weights one pass at a low rate."""
  config = base.get_config()
  config.steps = 200
  config.batch_size = 8
  config.seq_len = 512
  config.micro_batches = 1
  config.log_every = 20
  config.eval_every = 100
  config.data.source = 'preferences'
  config.tokenizer.vocab_size = 4096
  config.model = base.model('decoder', 'gpt_tiny')
  config.model.max_len = 512
  config.objective = dict(
    name='dpo',
    loss='orpo',  # dpo | ipo | simpo | orpo
    beta=base.unset(float),
    gamma=base.unset(float),
    label_smoothing=0.0,
    reference=base.unset(str),
    template=base.unset(str),
    packing='best_fit',
    long='drop',
  )
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 5e-3
  config.checkpoint.every = 100
  config.evaluation.rows = 64
  config.pretrained = dict(
    epochs=1.0,
    eval_every=0,
    model=dict(max_len=base.unset(int)),
    objective=dict(loss='dpo'),
    optimizer=dict(
      name='adamw', learning_rate=1e-6, weight_decay=0.0, warmup_fraction=0.1, schedule='linear'
    ),
  )
  return config
