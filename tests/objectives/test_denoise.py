"""Denoising: texts come back from what is left and what was taken, byte for byte; counts and order
of T5; rows; exact gradients; and what is refused.
"""

import collections
import re

import jax
import numpy as np
import pytest
from exact import assert_same, filled, network_of, shape
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.models import encoder_decoder
from llm_jax.objectives import denoise
from llm_jax.objectives.shared import noise as noises
from llm_jax.training import step

TOKENIZER = byte.create(sentinels=40)
SENTINELS, EOS, MASK = TOKENIZER.sentinels, TOKENIZER.eos_id, TOKENIZER.mask_id
texts = st.text(min_size=2, max_size=120).filter(lambda text: len(text.encode()) > 1)


def documents(found):
  return Memory([{'text': text} for text in found], denoise.Objective.encode, TOKENIZER)


def examples(rows, seed=0):
  return [rows.example(i, np.random.default_rng((seed, i))) for i in range(len(rows))]


def pieces(example, name, segments):
  """The ids of each piece of a row."""
  numbers = example[segments]
  return [example[name][numbers == k].tolist() for k in range(1, numbers.max() + 1)]


def reassembled(source, target):
  """The text of which spans were taken, from what stayed and the spans after their sentinels."""
  taken, last = {}, None
  for token in target:
    if token in SENTINELS:
      last = token
      taken[last] = []
    else:
      taken[last].append(token)
  assert list(taken) == list(SENTINELS[: len(taken)])  # in T5's order
  assert [token for token in source if token in SENTINELS] == list(taken)
  return [t for token in source for t in (taken[token] if token in taken else [token])]


@settings(max_examples=60, deadline=None)
@given(
  found=st.lists(texts, min_size=1, max_size=6),
  noise=st.sampled_from(['spans', 'mixture']),
  packing=st.sampled_from(['best_fit', 'none']),
)
def test_spans_come_back_byte_for_byte(found, noise, packing):
  objective = denoise.Objective(TOKENIZER, noise=noise, source_len=64, packing=packing)
  rows = objective.rows(documents(found), 48)
  if packing == 'none':
    assert all(len(rows.plan[i]) == 1 for i in range(len(rows)))
  whole = collections.defaultdict(bytes)
  for index, example in enumerate(examples(rows)):
    sources = pieces(example, 'source_tokens', 'source_segments')
    targets = pieces(example, 'targets', 'segments')
    read = pieces(example, 'tokens', 'segments')
    for (piece, _, _), source, target, ids in zip(
      rows.plan[index], sources, targets, read, strict=True
    ):
      assert source[-1] == target[-1] == EOS and ids == [TOKENIZER.bos_id, *target[:-1]]
      document, start, stop = rows.pieces[piece]
      back = np.array(reassembled(source[:-1], target[:-1])) - 7
      whole[document, start] = bytes(back.tolist())
      assert len(back) == stop - start >= 2
  for number, text in enumerate(found):
    parts = sorted((start, part) for (document, start), part in whole.items() if document == number)
    joined = b''.join(part for _, part in parts)
    assert joined == text.encode() or text.encode()[:-1] == joined  # but for a last single token


@settings(max_examples=60, deadline=None)
@given(text=texts, seed=st.integers(0, 99), permute=st.booleans())
def test_infilling_keeps_the_text_as_its_target(text, seed, permute):
  objective = denoise.Objective(TOKENIZER, noise='infilling', permute=permute, source_len=400)
  (example,) = examples(objective.rows(documents([text]), 400), seed)
  (source,) = pieces(example, 'source_tokens', 'source_segments')
  (target,) = pieces(example, 'targets', 'segments')
  assert bytes((np.array(target[:-1]) - 7).tolist()) == text.encode()
  count = len(text.encode())
  out = min(max(round(0.3 * count), 1), count - 1)
  kept = [token for token in source[:-1] if token != MASK]
  assert len(kept) == count - out and len(source) <= len(target)
  if not permute:
    pattern = b'.*'.join(
      re.escape(bytes((np.array(part, np.int64) - 7).tolist())) for part in split(source[:-1])
    )
    assert re.fullmatch(pattern, text.encode(), re.DOTALL)
  else:
    assert not collections.Counter(kept) - collections.Counter(target)


def split(source):
  parts = [[]]
  for token in source:
    parts = [*parts, []] if token == MASK else [*parts[:-1], [*parts[-1], token]]
  return parts


def test_sentences_are_permuted_and_nothing_else():
  text = 'One is here. Two? Three is this one! Four'
  tokens, ends = TOKENIZER.encode(text), noises.sentence_ends(TOKENIZER.decode, TOKENIZER.special)
  orders = {
    TOKENIZER.decode(noises._permuted(tokens, ends, np.random.default_rng(s))) for s in range(50)
  }
  assert len(orders) > 10 and text in orders
  parts = ['One is here.', ' Two?', ' Three is this one!', ' Four']
  assert all(part in order for order in orders for part in parts)
  assert all(len(order) == len(text) for order in orders)


def test_counts_are_those_of_t5():
  """random_spans_noise_mask of the code of the paper, at the lengths of its recipe."""
  spans = noises.Spans(SENTINELS, 0.15, 3.0)
  out, count = spans.counts(np.array([568]))
  assert (out, count) == ([85], [28])
  source, target = spans.lengths(np.array([568]))
  assert (source + 1, target + 1) == ([512], [114])  # with EOS
  starts = collections.Counter()
  for seed in range(400):
    found, _ = spans(np.arange(100, 140), np.random.default_rng(seed))
    assert found[0] == 100 and found[-1] == SENTINELS[1]
    starts[int(np.flatnonzero(found == SENTINELS[0])[0])] += 1
  # Where the first of two spans begins is uniform over what stays: 34 tokens in two parts.
  assert set(starts) == set(range(1, 34)) and max(starts.values()) < 400 / 33 + 5 * np.sqrt(
    400 / 33
  )


def test_the_mixture_has_all_seven_and_its_modes():
  objective = denoise.Objective(
    TOKENIZER, noise='mixture', modes=('r', 's', 'x'), source_len=128, packing='none'
  )
  rows = objective.rows(documents(['abcdefghijklmnopqrstuvwxyz0123456789' * 2] * 80), 128)
  seen = collections.Counter()
  for index, example in enumerate(examples(rows)):
    (source,) = pieces(example, 'source_tokens', 'source_segments')
    (target,) = pieces(example, 'targets', 'segments')
    mode, spans = TOKENIZER.decode(source[:1]), sum(token in SENTINELS for token in source)
    seen[mode, spans, len(target)] += 1
    text = TOKENIZER.decode(reassembled(source[1:-1], target[:-1]))
    assert text == 'abcdefghijklmnopqrstuvwxyz0123456789' * 2
    assert rows.kinds[rows.plan[index][0][0]] == rows.kinds[rows.plan[index][0][0]]
    if mode == 's':
      assert source[-2] == SENTINELS[0] and spans == 1
  out = [11, 11, 18, 36, 36, 11, 36]
  spans = [4, 1, 1, 12, 4, 1, 1]
  modes = 'rrsxxxx'
  expected = {(m, s, o + s + 1) for m, s, o in zip(modes, spans, out, strict=True)}
  assert set(seen) == expected and min(seen.values()) > 3


def test_other_epochs_take_other_parts_and_hold_the_same_text():
  objective = denoise.Objective(TOKENIZER)
  rows = objective.rows(documents(['some words that are long enough for it']), 64)
  first, second, again = (examples(rows, seed)[0] for seed in (0, 1, 0))
  assert not np.array_equal(first['source_tokens'], second['source_tokens'])
  np.testing.assert_array_equal(first['source_tokens'], again['source_tokens'])


@pytest.mark.slow
@pytest.mark.parametrize('noise', ['spans', 'infilling'])
def test_packed_pieces_learn_as_if_alone(noise):
  """Each with what is drawn for it; one row or several, one micro-batch or two, to 1e-10."""
  found = ['abcdefgh' * n for n in (1, 2, 1, 3)]
  with jax.enable_x64(True):
    options = encoder_decoder.VARIANTS['t5_small'] | shape(48)
    model = encoder_decoder.Model(vocab_size=TOKENIZER.vocab_size, **options | dict(head_dim=4))
    results = []
    for packing in ('none', 'best_fit'):
      objective = denoise.Objective(TOKENIZER, noise=noise, source_len=48, packing=packing)
      objective.noises = tuple(map(fixed, objective.noises))
      made = examples(objective.rows(documents(found), 48))
      batch = filled(made, 4)
      network, params = network_of(model, objective, batch)
      for count in (1, 2):
        results.append(step.gradient(params, batch, None, network=network, micro_batches=count))
    assert len(made) < 4
    grads, metrics = results[0]
    for other, said in results[1:]:
      assert_same(other, grads)
      assert_same(said, metrics)


def fixed(kind):
  """The same noise, which draws by the length of a text alone."""

  class Fixed(type(kind)):
    def __call__(self, tokens, rng):
      return super().__call__(tokens, np.random.default_rng(len(tokens)))

  return Fixed(*kind)


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    (dict(noise='words'), "objective.noise='words' must be one of spans, infilling, mixture"),
    (dict(rate=1.0), 'objective.rate=1.0 must be above 0 and below 1'),
    (dict(mean_span=0.5), 'objective.mean_span=0.5 must be at least 1'),
    (dict(noise='mixture', rate=0.2), 'those of the paper where noise=mixture'),
    (dict(modes=('a', 'b', 'c')), 'needs noise=mixture'),
    (dict(noise='mixture', modes=('a',)), 'must be three texts'),
  ],
)
def test_options_that_cannot_be(options, said):
  with pytest.raises(ValueError, match=said):
    denoise.Objective(TOKENIZER, **options)


def test_a_tokenizer_must_have_what_is_needed():
  with pytest.raises(ValueError, match='needs sentinels.*config.tokenizer.sentinels=100'):
    denoise.Objective(byte.create())
  assert denoise.Objective(byte.create(), noise='infilling').noises
  with pytest.raises(ValueError, match='have no room for a text of two tokens'):
    denoise.Objective(TOKENIZER, source_len=2).rows(documents(['ab']), 2)
