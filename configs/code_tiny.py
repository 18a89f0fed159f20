"""A small model of Python code that also fills in what is missing: functions of the standard
library with their docstrings, half of them turned round (fill in the middle, arXiv:2207.14255).

    llm_jax --workdir=W --mode=generate --temperature=0 --prefix='def add(a, b):' --suffix='return'

For your own code: `--config.data.source=text --config.data.path='/code/**/*.py'`.
"""

from configs import base, gpt_tiny

MARKS = ('<|fim_prefix|>', '<|fim_suffix|>', '<|fim_middle|>')


def get_config():
  """`gpt_tiny` on whole functions, longer rows, with marks for the three parts of a text."""
  config = gpt_tiny.get_config()
  config.seq_len = 256
  config.batch_size = 8
  config.data.source = 'functions'
  config.tokenizer.added = MARKS
  config.objective = base.clm() | dict(packing='best_fit', fim_rate=0.5)
  return config
