"""Classes by their words, from text and without training: the log-probabilities of transformers'
language models, for words of one id and of several, with demonstrations and calibrated.
"""

import numpy as np
import pytest

from llm_jax.core import config as config_lib
from llm_jax.inference.session import Session
from llm_jax.programs import pretrained

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('as_in_use')]

TEXTS = ['the cat sat on the mat', 'bad', 'a dog ran fast and the film was slow', '']
SINGLE = {'positive': ['good', 'fast'], 'negative': 'bad'}
SEVERAL = {'positive': 'very good', 'negative': ['not very good', 'bad'], 'dull': 'very slow'}
SHOWN = (('positive', 'it ran fast'), ('negative', 'the mat was bad'), ('dull', 'a cat sat'))


def opened(folder, **objective):
  sections = dict(tokenizer={}, model={}, optimizer={}, data={}, objective=objective)
  config = config_lib.Config(steps=1, batch_size=4, seq_len=64, init_from=str(folder), **sections)
  config = pretrained.fill_in(config)
  return Session(folder, config, pretrained.load_tokenizer(config))


class Theirs:
  """What transformers' model of a folder says of words in a phrase."""

  def __init__(self, folder, causal):
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self.model, self.causal = kind.from_pretrained(folder).eval(), causal

  def log_softmax(self, text):
    inputs = self.tokenizer(text, return_tensors='pt')
    with torch.no_grad():
      logits = self.model(**inputs).logits[0].double()
    return inputs['input_ids'][0].numpy(), torch.log_softmax(logits, -1).numpy()

  def word(self, before, word, after, longest):
    """Log-probabilities of the ids of a word between two texts."""
    own = self.tokenizer.encode(f' {word}', add_special_tokens=False)
    if self.causal:
      ids, log_p = self.log_softmax(f'{before} {word}')
      assert ids[-len(own) :].tolist() == own
      return [log_p[i - 1, ids[i]] for i in range(len(ids) - len(own), len(ids))]
    ids, log_p = self.log_softmax(f'{before} {"[MASK]" * longest}{after}')
    masks = np.flatnonzero(ids == self.tokenizer.mask_token_id)
    assert len(masks) >= longest
    return [log_p[masks[i - longest], token] for i, token in enumerate(own)]

  def probabilities(self, before, after, words, score):
    """Of the classes, by their words between two texts."""
    listed = [each if isinstance(each, list) else [each] for each in words.values()]
    sizes = [len(self.tokenizer.encode(f' {w}', add_special_tokens=False)) for w in sum(listed, [])]
    scores = []
    for each in listed:
      found = [self.word(before, word, after, max(sizes)) for word in each]
      values = [np.mean(x) if score == 'mean' else np.sum(x) for x in found]
      scores.append(np.mean(np.exp(values)))
    return np.array(scores) / np.sum(scores)


@pytest.mark.parametrize(
  ('family', 'task', 'words', 'options'),
  [
    ('Bert', 'MaskedLM', SINGLE, dict(calibrate=True)),
    ('Bert', 'MaskedLM', SEVERAL, dict(demonstrations=1, shown=SHOWN, score='mean')),
    ('Llama', 'CausalLM', SEVERAL, dict(calibrate=True, score='mean')),
    ('Qwen2', 'CausalLM', SINGLE, dict(demonstrations=1, shown=SHOWN[:2])),
  ],
)
def test_classes_have_the_probabilities_of_transformers(
  tiny, tmp_path, family, task, words, options
):
  folder, causal = tiny.written(family, task, tmp_path / 'in'), task == 'CausalLM'
  template = 'on {text} it was {mask}' if causal else 'on {text} it was {mask}.'
  session = opened(folder, name='prompt', template=template, verbalizers=words, **options)
  after = '' if causal else '.'
  first = {name: each if isinstance(each, str) else each[0] for name, each in words.items()}
  shown = ''.join(
    f'on {text} it was {first[name]}{after}\n' for name, text in options.get('shown', ())
  )
  theirs, score = Theirs(folder, causal), options.get('score', 'sum')

  def probabilities(text):
    return theirs.probabilities(f'{shown}on {text} it was', after, words, score)

  wanted = np.array([probabilities(text) for text in TEXTS])
  if options.get('calibrate'):
    nothing = np.mean([probabilities(text) for text in ('N/A', '[MASK]', '')], axis=0)
    wanted = wanted / nothing
    wanted /= wanted.sum(-1, keepdims=True)
  answers = session.predict(TEXTS)
  found = np.array([[answer['probabilities'][name] for name in words] for answer in answers])
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  assert np.ptp(wanted, axis=0).max() > 1e-2  # other texts have other answers
  assert [answer['label'] for answer in answers] == [list(words)[i] for i in wanted.argmax(-1)]
