"""Classification by words of the vocabulary: with little training, or none.

A template makes a text a phrase with a gap, and each class has words for it:

  --config.init_from=FOLDER --config.objective.template='{text} It was {mask}.'
  --config.objective.verbalizers="{'positive': ['great', 'good'], 'negative': 'terrible'}"

`--mode=predict` and `--mode=eval` answer without training; without a mode the model learns. Without
verbalizers each class's name is its word, as here: which package of the standard library is a
docstring from? For a decoder, {mask} is the end of the template. For another corpus:
`--config.data.source=csv --config.data.path=FILE --config.data.label=COLUMN`.
"""

from configs import base


def get_config():
  """A few epochs on labelled docstrings, from the weights of `init_from` or from scratch; from
  pretrained weights BERT's recipe.
  """
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
    name='prompt',
    template='{text} It is about {mask}.',
    verbalizers=dict(),
    score='sum',
    calibrate=False,
    demonstrations=0,
    shown=base.unset(tuple),
    seed=0,
    separator='\n',
    unlabelled='error',
    packing='best_fit',
  )
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 1e-2
  config.checkpoint.every = 50
  config.evaluation.rows = 0
  config.pretrained = base.fine_tuning() | dict(epochs=4.0, eval_every=0)
  return config
