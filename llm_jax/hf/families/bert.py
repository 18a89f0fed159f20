"""BERT (arXiv:1810.04805)."""

from llm_jax.hf.families import _encoders as shared
from llm_jax.hf.family import Family
from llm_jax.hf.fields import ACTIVATIONS
from llm_jax.hf.tensors import CLASSIFIES, bias, linear, norm, vocabulary

MODEL = 'encoder'

_HEADS = (
  *linear('cls.predictions.transform.dense', 'heads_mlm/dense'),
  *norm('cls.predictions.transform.LayerNorm', 'heads_mlm/norm'),
  *bias('cls.predictions.bias', 'heads_mlm/bias'),
  *vocabulary('cls.predictions.decoder.weight'),
  *linear('cls.seq_relationship', 'heads_nsp/dense'),
  *linear('classifier', 'heads_classifier/dense', of=CLASSIFIES),
  *shared.TAGGER,
  *shared.CHOICE,
  *shared.QUESTIONS,
)

FAMILIES = {
  'bert': Family(
    rank=10,
    prefix='bert.',
    fields={
      **shared.BERT_FIELDS,
      **shared.TYPE_FIELD,
      'hidden_act': ('activation', ACTIVATIONS, 'gelu'),
      'max_position_embeddings': ('max_len', int, 512),
    },
    fixed=shared.ABSOLUTE,
    options={**shared.POST_NORM, 'position_offset': 0},
    body=(*shared.EMBEDDINGS, *shared.LAYER, *shared.POST_NORMS, *shared.POOLER),
    heads=_HEADS,
    copies={'cls.predictions.decoder.bias': 'cls.predictions.bias'},
    ignored=shared.POSITION_IDS,
    classes={
      'BertForPreTraining': ('mlm', 'pooler', 'nsp'),
      'BertForSequenceClassification': ('pooler', 'classifier'),
      'BertForQuestionAnswering': ('spans',),
      'BertForTokenClassification': ('tagger',),
      'BertForMultipleChoice': ('pooler', 'choice'),
      'BertForMaskedLM': ('mlm',),
      'BertForNextSentencePrediction': ('pooler', 'nsp'),
      'BertModel': (),
    },
  )
}
