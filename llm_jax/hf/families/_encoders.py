"""What several families of encoders share. BERT's names of tensors are RoBERTa's and ESM's too."""

from llm_jax.hf.tensors import (
  CHOOSES,
  HEADS_IN,
  HEADS_OUT,
  TAGS,
  bias,
  linear,
  norm,
  table,
  vocabulary,
)

SHAPE_FIELDS = {
  'vocab_size': ('vocab_size', int),
  'hidden_size': ('dim', int),
  'num_hidden_layers': ('layers', int),
  'num_attention_heads': ('heads', int),
  'intermediate_size': ('mlp_dim', int),
  'initializer_range': ('init_std', float, 0.02),
  'tie_word_embeddings': ('tied', bool, True),
}
BERT_FIELDS = SHAPE_FIELDS | {
  'layer_norm_eps': ('norm_eps', float, 1e-12),
  'hidden_dropout_prob': ('dropout', float, 0.1),
  'attention_probs_dropout_prob': ('attention_dropout', float, 0.1),
}
TYPE_FIELD = {'type_vocab_size': ('token_types', int, 2)}
POST_NORM = dict(
  positions='learned',
  embedding_norm=True,
  norm='layernorm',
  norm_order='post',
  norm_bias=True,
  bias=True,
  gated=False,
  window=None,
  global_every=1,
)
ABSOLUTE = {'position_embedding_type': ('absolute', 'absolute')}
POSITION_IDS = (r'(embeddings\.)?position_ids',)  # a buffer in old checkpoints

TOKEN_TABLE = table('embeddings.word_embeddings', 'model/embedder/token')
EMBEDDINGS = (
  *TOKEN_TABLE,
  *table('embeddings.position_embeddings', 'model/embedder/position'),
  *table('embeddings.token_type_embeddings', 'model/embedder/token_type'),
  *norm('embeddings.LayerNorm', 'model/embedder/embedding_norm'),
)
_ATTENTION = 'encoder.layer.{}.attention'
LAYER = (
  *linear(f'{_ATTENTION}.self.query', 'attention/query', axes=HEADS_OUT),
  *linear(f'{_ATTENTION}.self.key', 'attention/key', axes=HEADS_OUT),
  *linear(f'{_ATTENTION}.self.value', 'attention/value', axes=HEADS_OUT),
  *linear(f'{_ATTENTION}.output.dense', 'attention/out', axes=HEADS_IN),
  *linear('encoder.layer.{}.intermediate.dense', 'mlp/up'),
  *linear('encoder.layer.{}.output.dense', 'mlp/down'),
)
POST_NORMS = (
  *norm(f'{_ATTENTION}.output.LayerNorm', 'attention_norm'),
  *norm('encoder.layer.{}.output.LayerNorm', 'mlp_norm'),
)
POOLER = linear('pooler.dense', 'heads_pooler/dense')

# RoBERTa's names of heads, which ESM has too. Its pooler is a part of the classifier.
LM_HEAD = (
  *linear('lm_head.dense', 'heads_mlm/dense'),
  *norm('lm_head.layer_norm', 'heads_mlm/norm'),
  *bias('lm_head.bias', 'heads_mlm/bias'),
  *vocabulary('lm_head.decoder.weight'),
)
QUESTIONS = linear('qa_outputs', 'heads_spans/dense')
TAGGER = linear('classifier', 'heads_tagger/dense', of=TAGS)
CHOICE = linear('classifier', 'heads_choice/dense', of=CHOOSES)
CLASSIFIER = (
  *linear('classifier.dense', 'heads_pooler/dense', needs='heads_classifier'),
  *linear('classifier.out_proj', 'heads_classifier/dense'),
)
