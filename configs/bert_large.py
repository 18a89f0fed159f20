"""BERT-large (Devlin et al. 2019, arXiv:1810.04805): 335M parameters, else as bert_base."""

from configs import bert_base


def get_config():
  """BERT-base's recipe with the larger model."""
  config = bert_base.get_config()
  config.model.variant = 'bert_large'
  return config
