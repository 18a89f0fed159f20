"""Multiple choice, cross-encoders and vectors of texts, from text: the answers of transformers,
from their folders and in what is written; and the contrastive loss and gradient of torch.
"""

import json

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax.core import config as config_lib
from llm_jax.core import tree
from llm_jax.data.documents import Memory
from llm_jax.hf import sentences
from llm_jax.inference.export import export
from llm_jax.inference.session import Session
from llm_jax.objectives import contrast
from llm_jax.programs import pretrained
from llm_jax.training import step

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('as_in_use')]

TEXT = 'the cat sat on the mat'
LAST = ('classifier.out_proj.weight', 'classifier.weight', 'score.weight')
OTHERS = ['the dog ran fast', 'bad', 'it is a very bad film']


def encoded(path, *texts):
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  return tokenizer(*texts, return_tensors='pt', padding=True)


def choices_of_transformers(path):
  model = transformers.AutoModelForMultipleChoice.from_pretrained(path).eval()
  inputs = {key: x[None] for key, x in encoded(path, [TEXT] * 3, OTHERS).items()}
  with torch.no_grad():
    return torch.softmax(model(**inputs).logits[0], -1).numpy()


@pytest.mark.parametrize('family', ['Bert', 'Roberta'])
def test_multiple_choice(tiny, tmp_path, family):
  folder = tiny.written(family, 'MultipleChoice', tmp_path / 'in')
  session = llm_jax.open(folder)
  assert session.config.objective['name'] == 'choice'
  for where in (folder, tmp_path / 'out'):
    (answer,) = llm_jax.open(where).predict([{'text': TEXT, 'choices': OTHERS}])
    theirs = choices_of_transformers(where)
    np.testing.assert_allclose(answer['probabilities'], theirs, atol=1e-4)
    assert answer['choice'] == theirs.argmax() and theirs.max() - theirs.min() > 1e-2
    if where == folder:
      export(session, tmp_path / 'out')


def opened(folder, **objective):
  sections = dict(tokenizer={}, model={}, optimizer={}, data={}, objective=objective)
  config = config_lib.Config(steps=1, batch_size=8, seq_len=64, init_from=str(folder), **sections)
  config = pretrained.fill_in(config)
  return Session(folder, config, pretrained.load_tokenizer(config))


@pytest.mark.parametrize('family', ['Bert', 'Roberta', 'ModernBert', 'Llama'])
def test_a_cross_encoder_ranks_passages(tiny, tmp_path, family):
  folder = tiny.written(family, 'SequenceClassification', tmp_path / 'in')
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, num_labels=1, ignore_mismatched_sizes=True
  )
  named = dict(model.named_parameters())
  (last,) = (named[name] for name in LAST if name in named)
  torch.nn.init.normal_(last)
  model.save_pretrained(folder)
  session = opened(folder, name='rerank')
  for where in (folder, tmp_path / 'out'):
    (answer,) = opened(where, name='rerank').predict([{'text': TEXT, 'passages': OTHERS}])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(where).eval()
    with torch.no_grad():
      theirs = [float(model(**encoded(where, [TEXT], [other])).logits[0, 0]) for other in OTHERS]
    np.testing.assert_allclose(answer['scores'], theirs, atol=1e-3)
    assert answer['ranking'] == np.argsort(theirs)[::-1].tolist()
    assert np.ptp(theirs) > 1e-2
    if where == folder:
      export(session, tmp_path / 'out')


PAIRS = [
  {'text': TEXT, 'pair': 'the dog ran fast', 'negatives': ['bad', 'film']},
  {'text': 'a good film', 'pair': 'it was slow'},
  {'text': 'very bad', 'pair': 'not good', 'negatives': 'the mat'},
]


def loss_of_torch(model, path, temperature):
  """InfoNCE over the mean vectors of texts that run alone."""

  def vector(text):
    inputs = encoded(path, [text])
    hidden = model(**inputs).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=0)

  texts = [vector(row['text']) for row in PAIRS]
  listed = lambda x: [x] if isinstance(x, str) else x
  negatives = [text for row in PAIRS for text in listed(row.get('negatives', []))]
  others = [*(row['pair'] for row in PAIRS), *negatives]
  logits = torch.stack(texts) @ torch.stack([vector(text) for text in others]).T / temperature
  return torch.nn.functional.cross_entropy(logits, torch.arange(len(PAIRS)))


@pytest.mark.parametrize('micro_batches', [1, 2])
def test_contrastive_loss_and_gradient_are_those_of_torch(tiny, tmp_path, micro_batches):
  folder = tiny.written('Bert', 'MaskedLM', tmp_path / 'in')
  session = opened(folder, name='contrast', temperature=0.2)
  assert session.config.objective['pool'] == 'mean'
  documents = Memory(PAIRS, contrast.Objective.encode, session.tokenizer)
  rows = session.program.objective.rows(documents, 64)
  examples = [rows.example(i, np.random.default_rng(0)) for i in range(len(rows))]
  empty = {key: np.zeros_like(value) for key, value in examples[0].items()}
  examples += [empty] * (-len(examples) % 2)
  batch = {key: np.stack([e[key] for e in examples]) for key in examples[0]}
  network = session.program.network

  @jax.jit
  def learn(params):
    return step.gradient(params, batch, None, network=network, micro_batches=micro_batches)

  grads, metrics = learn(session.params)
  model = transformers.AutoModel.from_pretrained(folder).train(False)
  loss = loss_of_torch(model, folder, 0.2)
  loss.backward()
  assert float(metrics['loss'][0]) == pytest.approx(loss.item(), abs=1e-4)
  ours = tree.flatten(grads)
  theirs = model.embeddings.word_embeddings.weight.grad.numpy()
  found = np.asarray(ours['model/embedder/token/embedding'])[: len(theirs)]
  np.testing.assert_allclose(found, theirs, atol=1e-4 * np.abs(theirs).max())


def test_vectors_are_those_of_transformers_and_the_export_says_how(tiny, tmp_path):
  folder = tiny.written('Bert', 'MaskedLM', tmp_path / 'in')
  session = opened(folder, name='contrast', pool='cls')
  export(session, tmp_path / 'out')
  assert sentences.read(tmp_path / 'out') == ('cls', True, False)
  assert sentences.max_len(tmp_path / 'out') == 64
  kinds = [module['type'] for module in json.loads((tmp_path / 'out/modules.json').read_text())]
  assert [kind.rpartition('.')[2] for kind in kinds] == ['Transformer', 'Pooling', 'Normalize']
  model = transformers.AutoModel.from_pretrained(tmp_path / 'out').eval()
  with torch.no_grad():
    hidden = [model(**encoded(tmp_path / 'out', [text])).last_hidden_state[0, 0] for text in OTHERS]
  theirs = torch.nn.functional.normalize(torch.stack(hidden), dim=1).numpy()
  for opened_from in (session, llm_jax.open(tmp_path / 'out')):
    np.testing.assert_allclose(opened_from.embed(OTHERS), theirs, atol=1e-5)
  (answer,) = session.predict([(OTHERS[0], OTHERS[1])])
  assert answer == {'similarity': pytest.approx(theirs[0] @ theirs[1], abs=1e-5)}
