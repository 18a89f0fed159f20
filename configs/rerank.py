"""Reranking: which of four passages answers a query? Here, which continuation belongs to this
summary of a docstring.

`--config.init_from=FOLDER` starts from pretrained weights. For another corpus:
`--config.data.source=jsonl --config.data.path=FILE
"--config.data.fields=('passages','relevance')"`.
"""

from configs import choice


def get_config():
  """A few hundred steps on four passages, from the weights of `init_from` or from scratch."""
  config = choice.get_config()
  config.objective = dict(
    name='rerank', loss='softmax', dropout=0.1, pool='mean', packing='best_fit'
  )
  return config
