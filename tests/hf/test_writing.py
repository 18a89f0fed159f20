"""Which family an export is; the rest of writing is tested with whole folders."""

import pytest

from llm_jax.hf import families, writing
from llm_jax.models import decoder, encoder

FAMILIES = families.known()
ROBERTA = encoder.Model(vocab_size=50, dim=16, layers=2, heads=2, position_offset=2, token_types=1)
LLAMA = decoder.Model(
  vocab_size=50, **decoder.VARIANTS['llama_tiny'] | dict(dim=16, heads=2, kv_heads=1)
)


@pytest.mark.parametrize(
  ('name', 'model', 'first', 'second'),
  [('encoder', ROBERTA, 'roberta', 'xlm-roberta'), ('decoder', LLAMA, 'llama', 'mistral')],
)
def test_of_several_families_the_first_is_taken(name, model, first, second):
  """An XLM-RoBERTa is a RoBERTa, and a Mistral without a window is a LLaMA."""
  assert writing.family_of(FAMILIES, name, model)[0] == first
  others = {kind: found for kind, found in FAMILIES.items() if kind != first}
  assert writing.family_of(others, name, model)[0] == second


def test_models_of_ones_own_have_their_own_families():
  with pytest.raises(ValueError, match="no family .* is known for model 'my.model'"):
    writing.family_of(FAMILIES, 'my.model', LLAMA)
  own = {'mine': ('my.model', FAMILIES['llama'][1])}
  assert writing.family_of(own, 'my.model', LLAMA)[0] == 'mine'


def test_a_tagger_is_written_unless_it_scores_moves():
  model = encoder.Model(vocab_size=50, dim=8, layers=1, heads=2, mlp_dim=16, max_len=8)
  kind, family = writing.family_of(families.known(), 'encoder', model)
  tagger = {f'heads_tagger/dense/{name}': None for name in ('kernel', 'bias')}
  assert writing.class_of(kind, family, model, tagger, []) == 'BertForTokenClassification'
  modern = {'modernbert': families.known()['modernbert']}
  with pytest.raises(
    ValueError, match="no modernbert that tags as this .*objective.transform='norm'"
  ):
    writing.class_of('modernbert', modern['modernbert'][1], model, tagger, [])
  moves = {'heads_moves/first': None}
  with pytest.raises(ValueError, match='transformers has no tagger that scores moves'):
    writing.class_of(kind, family, model, tagger | moves, list(moves))
