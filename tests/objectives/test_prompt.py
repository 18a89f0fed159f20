"""Classes by their words: what is read where, and what is made of it; in float64 against NumPy."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from scipy import special

from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.models import decoder, encoder
from llm_jax.objectives import prompt
from llm_jax.programs import network as networks
from llm_jax.training import step

RNG = np.random.default_rng(0)
TOKENIZER = byte.create()
V, D = TOKENIZER.vocab_size, 8
WORDS = {'good': ['ab', 'ac'], 'bad': 'x', 'so': 'bdef'}
LABELS = {'up': 'good', '': 'bad', 'downward': 'so', 'u': 'good', 'left': 'bad'}
RECORDS = [{'text': text, 'label': label} for text, label in LABELS.items()]
SHAPE = dict(
  vocab_size=V,
  dim=D,
  layers=1,
  heads=2,
  mlp_dim=16,
  max_len=160,
  dropout=0.0,
  attention_dropout=0.0,
  dtype='float64',
  param_dtype='float64',
  unroll=0,
)


def made(causal=False, **options):
  template = '{text}: {mask}' if causal else '{text} is {mask}.'
  given = dict(template=template, verbalizers=WORDS) | options
  return prompt.Objective(TOKENIZER, causal, **given)


def memory(records=RECORDS, **options):
  return Memory(records, prompt.Objective.encoding(options), TOKENIZER)


def batch_of(objective, documents, seq_len=96):
  rows = objective.rows(documents, seq_len)
  examples = [rows.example(i, RNG) for i in range(len(rows))]
  return rows, {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def segment(batch, row, number):
  return batch['tokens'][row][batch['segments'][row] == number].tolist()


def ids(text):
  return [ord(letter) + 7 for letter in text]


def test_a_masked_model_reads_as_many_masks_as_the_longest_word_has_ids():
  objective = made()
  rows, batch = batch_of(objective, memory())
  assert len(rows) == 1 and batch['reads'].shape[1:] == (96 // 11, 1)
  for slot, document in enumerate(rows.texts(0)):
    text = ids(RECORDS[document]['text'])
    wanted = [2, *text, *ids(' is'), 4, 4, 4, 4, 4, *ids('.'), 3]
    assert segment(batch, 0, slot + 1) == wanted
    assert objective.classes[batch['label'][0, slot]] == RECORDS[document]['label']
  read = batch['tokens'][0][np.asarray(objective.positions(batch))[0]]
  assert read.reshape(-1, 5)[:5].tolist() == [[4] * 5] * 5
  assert not batch['label_weight'][0, 5:].any() and not batch['token_types'].any()


def test_a_causal_model_reads_words_behind_few_continuations():
  objective = made(causal=True)
  rows, batch = batch_of(objective, memory())
  assert [TOKENIZER.decode(f) for f in objective.prompts.fillings] == [' a', ' bde']
  assert objective.prompts.segment_W.tolist() == [0, 0, 0, 1]
  for row in range(len(rows)):
    for slot, document in enumerate(rows.texts(row)):
      context = [5, *ids(RECORDS[document]['text'] + ':')]
      for number, filling in enumerate((' a', ' bde')):
        assert segment(batch, row, 2 * slot + number + 1) == [*context, *ids(filling)]
        read = batch['reads'][row, slot, number]
        assert batch['positions'][row, read] == len(context) - 1
        assert batch['tokens'][row, read] == ids(':')[0]
  single = made(causal=True, template='{text}{mask}', verbalizers={'a': 'a', 'b': 'b'})
  assert single.prompts.fillings == [()] and single.words.longest == 1


@pytest.mark.parametrize(('causal', 'score'), [(False, 'sum'), (True, 'mean')])
def test_scores_are_the_mean_probability_of_words(small, causal, score):
  objective = made(causal, score=score)
  rows, batch = batch_of(objective, memory())
  net = small.network(D, V)
  hidden = RNG.normal(size=(*batch['tokens'].shape, D)).astype(np.float32)
  found = objective.loss(net, small.read(objective, hidden, batch), batch)
  factor = 1 if causal else 2  # what the head of this network does
  log_p = special.log_softmax(factor * hidden.astype(np.float64) @ net.w_DV, axis=-1)
  losses, right = [], []
  for row in range(len(rows)):
    for slot, document in enumerate(rows.texts(row)):
      scores = []
      for words in WORDS.values():
        each = []
        for word in [words] if isinstance(words, str) else words:
          tokens = ids(f' {word}')
          at = batch['reads'][row, slot, int(causal and word == 'bdef')]
          values = [log_p[row, at + i, token] for i, token in enumerate(tokens)]
          each.append(np.sum(values) / (len(values) if score == 'mean' else 1))
        scores.append(np.log(np.mean(np.exp(each))))
      target = list(WORDS).index(RECORDS[document]['label'])
      losses.append(-special.log_softmax(scores)[target])
      right.append(np.argmax(scores) == target)
  loss, weight = map(float, found['prompt'])
  assert (loss, weight) == (pytest.approx(np.sum(losses), rel=1e-5), len(RECORDS))
  assert float(found['prompt_accuracy'][0]) == np.sum(right)


def test_of_words_with_one_id_only_their_logits_are_read(small):
  """LM-BFF, equation 1: no sum over the vocabulary."""
  objective = made(template='{text}{mask}', verbalizers={'a': 'a', 'b': ['b', 'c']})
  _, batch = batch_of(objective, memory([{'text': 'u', 'label': 'b'}]))
  net = small.network(D, V)
  hidden = RNG.normal(size=(1, 96, D)).astype(np.float32)
  (answer,) = objective.predict(net, small.read(objective, hidden, batch), batch).values()
  logits = 2 * hidden[0, batch['reads'][0, 0, 0]] @ net.w_DV
  a, b, c = np.exp(logits[ids('abc')].astype(np.float64))
  wanted = np.array([a, (b + c) / 2])
  np.testing.assert_allclose(answer[0, 0], wanted / wanted.sum(), rtol=1e-5)
  described = objective.describe({'probabilities': np.array([0.25, 0.75])})
  said = {'label': 'b', 'probability': 0.75, 'probabilities': {'a': 0.25, 'b': 0.75}}
  assert described == said | {'entropy': pytest.approx(0.5623351446), 'margin': 0.5}


def test_what_is_too_long_loses_text_and_is_counted():
  warnings, said = [], logging.warning
  logging.warning = lambda message, *values: warnings.append(message % values)
  try:
    objective = made(template='{text} and {pair} is {mask}.', packing='none')
    records = [{'text': 'u' * 60, 'pair': 'v' * 8, 'label': 'bad'}]
    options = dict(template='{text} and {pair} is {mask}.')
    _, batch = batch_of(objective, memory(records, **options), 40)
  finally:
    logging.warning = said
  kept = 40 - 2 - len(' and is.') - 5 - len(' vvvvvvvv')
  assert segment(batch, 0, 1)[1 : 1 + kept + 13] == ids('u' * kept + ' and vvvvvvvv')
  assert segment(batch, 0, 1)[-3:] == [4, *ids('.'), 3]
  assert warnings == [
    f'prompt: 1 of 1 documents are longer than seq_len=40 allows and lose {60 - kept} of 69 tokens.'
  ]


def test_shown_texts_stand_before_a_text_and_leave_it_its_room():
  records = [{'text': text, 'label': 'good' if text in 'ab' else 'bad'} for text in 'abcd']
  words = {'good': 'x', 'bad': 'y'}
  options = dict(template='{text}={mask}', verbalizers=words, demonstrations=1, separator=';')
  documents = memory(records, **options)
  derived = prompt.Objective.derive(options, [documents])
  assert derived['classes'] == ('good', 'bad') and len(derived['shown']) == 4
  objective = prompt.Objective(TOKENIZER, **options, **derived)
  rows, batch = batch_of(objective, documents, 64)
  seen = {}
  for row in range(len(rows)):
    for slot, document in enumerate(rows.texts(row)):
      seen[document] = TOKENIZER.decode(segment(batch, row, slot + 1))
  for document, record in enumerate(records):
    first, second, own = seen[document].split(';')
    assert own == f'{record["text"]}=' and own not in (first[:2], second[:2])
    assert first in ('a=x', 'b=x') and second in ('c=y', 'd=y')
  with pytest.raises(ValueError, match='=12 leaves no room.*, the demonstrations and .* 12'):
    objective.rows(documents, 12)
  assert objective.rows(documents, 13).example(0, RNG)['tokens'][9] > 6
  with pytest.raises(ValueError, match="document 4: no word for 'soso'; .* has 'good', 'bad'"):
    more = memory([*records, {'text': 'e', 'label': 'soso'}], **options)
    prompt.Objective.derive(options, [more])


@pytest.mark.parametrize(
  ('causal', 'options', 'message'),
  [
    (True, dict(template='{text} is {mask}.'), 'must stand at the end'),
    (False, dict(verbalizers=None), 'must give words for at least two .*there are none, and no'),
    (False, dict(verbalizers={'a': 'x'}), "at least two different classes, .* there are 'a'"),
    (False, dict(classes=('good', 'bad')), "words for 'so', which objective.classes does not"),
    (False, dict(classes=('good', 'bad', 'so', 'new')), "objective.classes: no word for 'new'"),
    (False, dict(score='max'), "objective.score='max' must be one of sum, mean"),
    (False, dict(packing='all'), "objective.packing='all' must be one of"),
    (False, dict(unlabelled='x'), "objective.unlabelled='x' must be one of"),
    (False, dict(demonstrations=-1), 'objective.demonstrations=-1 must be how many'),
    (False, dict(demonstrations=1), 'taken from training documents, and none are read here'),
    (False, dict(shown=(('good', 'a'),)), 'demonstrations=0 must be .* objective.shown has some'),
  ],
)
def test_options_that_cannot_be(causal, options, message):
  with pytest.raises(ValueError, match=message):
    made(causal, **options)


def test_tokenizers_and_documents_that_cannot_be():
  class NoMask(byte.Tokenizer):
    mask_id = None

  with pytest.raises(ValueError, match='needs a mask token, which this tokenizer lacks'):
    prompt.Objective(NoMask(), verbalizers=WORDS)
  prompt.Objective(NoMask(), True, '{text} {mask}', WORDS)
  for template, record, message in (
    ('{text} is {mask}', {'text': 'a', 'pair': 'b'}, r'has no \{pair\}, and the records have one'),
    ('{text}{pair}{mask}', {'text': 'a'}, r'has a \{pair\}, and the records have none'),
    ('{text} is {mask}', {'text': 'a', 'label': 'nice'}, "document 0: no word for 'nice'"),
    ('{text} is {mask}', {'text': 'a'}, 'objective prompt needs labels and this corpus has none'),
  ):
    options = dict(template=template)
    with pytest.raises(ValueError, match=message):
      made(**options).rows(memory([record], **options), 64)
  with pytest.raises(ValueError, match='seq_len=11 leaves no room for a text: .* take 11 tokens'):
    made().rows(memory(), 11)
  with pytest.raises(ValueError, match="in a mix, set rows='prompt'"):
    made().transform({}, RNG)
  assert made(unlabelled='ignore').rows(memory([{'text': 'a'}]), 64)


CASES = {
  'masked': (
    encoder,
    dict(template='{text} is{mask}.', verbalizers={'good': ['a', 'b'], 'bad': 'x', 'so': 'd'}),
    dict(calibrate=True),
    96,
  ),
  'causal': (decoder, dict(causal=True), dict(demonstrations=1, score='mean'), 160),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_packed_texts_learn_as_if_alone(case):
  """Each text in a row of its own, or all in few rows; in both cases in two micro-batches, among
  which the texts are shared out otherwise.
  """
  module, kind, options, seq_len = CASES[case]
  records = [*RECORDS, {'text': 'none'}, {'text': 'downward', 'label': 'good'}]
  shown = tuple((name, text) for name in WORDS for text in (name[0], 'u'))
  options |= dict(shown=shown) if 'demonstrations' in options else {}
  with jax.enable_x64(True):
    objective = made(**kind, **options, unlabelled='ignore')
    rows, packed = batch_of(objective, memory(records), seq_len)
    each = [batch_of(objective, memory([record]), seq_len)[1] for record in records]
    alone = {key: np.concatenate([batch[key] for batch in each]) for key in packed}
    assert len(rows) < len(records) == len(alone['tokens'])
    model = module.Model(**SHAPE)
    network = networks.Network(model, objective.heads(model), objective)
    shapes = nn.meta.unbox(jax.eval_shape(network.init, jax.random.PRNGKey(0), packed)['params'])
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0.3, 0.5, s.shape)), shapes)

    @jax.jit
    def learn(batch):
      grads, metrics = step.gradient(params, batch, None, network=network, micro_batches=2)
      return grads, metrics['prompt']

    def filled(batch):
      fill = len(records) + 1 - len(batch['tokens'])
      return {k: np.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1)) for k, x in batch.items()}

    packed = filled(packed)
    found, wanted = learn(packed), learn(filled(alone))
    wrong = learn(packed | {'segments': np.minimum(packed['segments'], 1)})
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)
  (grads, (loss, weight)), (_, (other, _)) = wanted, wrong
  assert float(weight) == len(records) - 1
  assert all(np.abs(x).max() > 1e-6 for x in jax.tree.leaves(grads['model']['embedder']))
  assert abs(float(other - loss)) > 1e-6


def test_it_takes_a_model_of_its_kind():
  small_model = types.SimpleNamespace(causal=True)
  with pytest.raises(ValueError, match='the model is of another kind'):
    made().check(small_model)
  assert made(causal=True).heads(small_model) == {}


def test_flops_are_those_of_the_vocabulary_and_of_what_says_nothing():
  model = types.SimpleNamespace(
    vocab_size=V, options=types.SimpleNamespace(dim=D), flops=lambda length, read: 1e6
  )
  batch = {'tokens': jnp.zeros((3, 96)), 'reads': jnp.zeros((3, 7, 1))}
  each = 2.0 * 7 * 5 * D * (V + D)
  assert made().flops(model, batch) == 3 * each
  assert made(calibrate=True).flops(model, batch) == 4 * each + 1e6
