"""Summaries, scored by ROUGE on new text that is written for the validation set: the first sentence
of a docstring from what follows it.

`--config.init_from=FOLDER` starts from a T5 or BART; without it a small model learns from scratch.
For your own pairs: `--config.data.source=jsonl --config.data.path=FILE --config.data.text=article
--config.data.target=summary`.
"""

from configs import base, transformer


def get_config():
  """`configs/transformer.py:tiny` with scores; from pretrained weights three passes."""
  config = transformer.get_config('tiny')
  config.evaluation.rows = 16
  config.evaluators = dict(
    loss={}, summarization=dict(stemmer=True) | base.writing(max_new_tokens=96)
  )
  config.pretrained = base.fine_tuning() | dict(epochs=3.0, eval_every=0)
  return config
