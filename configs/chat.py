"""Fine-tuning a decoder for conversations or instructions: it learns what the assistant says.

For your own: `--config.data.source=chat --config.data.path=FILE` (JSON Lines with `messages`, or
the fields of Alpaca or ShareGPT), or any source with `--config.data.text=question
--config.data.target=answer`. `--config.init_from=FOLDER` starts from a model, with its own chat
template. Without data of yours the first sentence of a docstring is the answer to what follows it.
"""

from configs import base


def get_config():
  """A few hundred steps from scratch; from pretrained weights three passes."""
  config = base.get_config()
  config.steps = 300
  config.batch_size = 8
  config.seq_len = 256
  config.micro_batches = 1
  config.log_every = 20
  config.eval_every = 100
  config.data.source = 'first_sentences'
  config.tokenizer.vocab_size = 4096
  config.model = base.model('decoder', 'gpt_tiny')
  config.model.max_len = 512
  config.objective = dict(
    name='chat',
    template=base.unset(str),  # plain | chatml | bare | a file; None: the folder's own, or plain
    packing='best_fit',
    long='cut',  # error | cut | drop
    label_smoothing=0.0,
    z_loss=0.0,
  )
  config.optimizer.name = 'muon'
  config.optimizer.learning_rate = 5e-3
  config.checkpoint.every = 100
  config.evaluation.rows = 0
  config.pretrained = base.fine_tuning() | dict(
    epochs=3.0, eval_every=0, model=dict(max_len=base.unset(int))
  )
  return config
