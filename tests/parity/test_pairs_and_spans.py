"""A cross-encoder's scores of pairs are those of transformers, from its folder and in what is
written; and spans are marked in the tokens of its tokenizers.
"""

import numpy as np
import pytest
from scipy import special

from llm_jax.core import config as config_lib
from llm_jax.inference.export import export
from llm_jax.inference.session import Session
from llm_jax.objectives import relation
from llm_jax.programs import pretrained

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('as_in_use')]

TEXT = 'the cat sat on the mat'
OTHERS = ['the dog ran fast', 'bad', 'it is a very bad film']


def opened(folder, **objective):
  sections = dict(tokenizer={}, model={}, optimizer={}, data={}, objective=objective)
  config = config_lib.Config(steps=1, batch_size=8, seq_len=64, init_from=str(folder), **sections)
  config = pretrained.fill_in(config)
  return Session(folder, config, pretrained.load_tokenizer(config))


def logits_of_transformers(path):
  model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  inputs = tokenizer([TEXT] * len(OTHERS), OTHERS, return_tensors='pt', padding=True)
  with torch.no_grad():
    return model(**inputs).logits[:, 0].numpy()


def test_a_cross_encoder_scores_pairs(tiny, tmp_path):
  folder = tiny.written('Bert', 'SequenceClassification', tmp_path / 'in')
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, num_labels=1, ignore_mismatched_sizes=True
  )
  torch.nn.init.normal_(model.classifier.weight)
  model.save_pretrained(folder)
  options = dict(name='pair', range=(1.0, 5.0))
  export(opened(folder, **options), tmp_path / 'out')
  theirs = logits_of_transformers(folder)
  np.testing.assert_allclose(logits_of_transformers(tmp_path / 'out'), theirs, atol=1e-4)
  for where, kind, wanted in (
    (folder, 'bce', 1 + 4 * special.expit(theirs)),
    (tmp_path / 'out', 'mse', theirs),
  ):
    answers = opened(where, loss=kind, **options).predict([(TEXT, other) for other in OTHERS])
    np.testing.assert_allclose([answer['score'] for answer in answers], wanted, atol=1e-4)
  assert np.ptp(theirs) > 1e-2


@pytest.mark.parametrize('family', ['Bert', 'Roberta', 'Llama'])
def test_spans_are_marked_in_tokens(tiny, tmp_path, family):
  folder = tiny.written(family, 'SequenceClassification', tmp_path / 'in')
  tokenizer = opened(folder, name='pair').tokenizer
  record = {'text': 'the (cat) sat on the mat', 'head': [5, 8], 'tail': [21, 24]}
  encoded = relation.Objective.encode(record, tokenizer)
  ids, markers = encoded['tokens'], encoded['markers']
  spelled = [tokenizer.decode([number]) for number in ids[markers]]
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  known = theirs('@ #', add_special_tokens=False)['input_ids']
  if theirs.unk_token_id not in known:
    assert [sign in text for sign, text in zip('@#@#', spelled, strict=True)] == [True] * 4
  plain = theirs('the (@ cat @) sat on the # mat #', add_special_tokens=False)['input_ids']
  assert ids.tolist() == plain
  assert markers[0] < markers[2] < markers[1] < markers[3] == len(ids) - 1
