"""Against enumeration of all sequences of tags."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import crf
from llm_jax.nn.options import Options

TAGS, WORDS = 5, 6
log_partition, marginals, viterbi, best_score, score = map(
  jax.jit, (crf.log_partition, crf.marginals, crf.viterbi, crf.best_score, crf.score)
)


@pytest.fixture(autouse=True)
def double_precision():
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', False)


def moves_of(rng, tags=TAGS, forbidden=None):
  sizes = ((tags,), (tags,), (tags, tags), (tags, tags), (tags,), (tags,))
  moves = [rng.normal(size=size) for size in sizes]
  if forbidden is not None:
    moves[2] = np.where(forbidden, crf.FORBIDDEN, moves[2])
  return crf.Moves(*map(jnp.asarray, moves))


def row_of(rng, chains, length, tags=TAGS):
  """A row with holes of texts, given as lists of bits; [1, T, C] logits, [1, T] chain, the indices
  of each text's words.
  """
  bits = [bit for chain in chains for bit in chain]
  positions = np.sort(rng.choice(length, len(bits), replace=False))
  chain = np.zeros((1, length), np.int32)
  chain[0, positions] = bits
  texts = np.split(positions, np.cumsum([len(chain) for chain in chains])[:-1])
  return rng.normal(size=(1, length, tags)), chain, texts


def by_hand(logits_TC, chain_T, positions, moves, tags_NW):
  """The scores of N taggings of one text, as the docstring of the module has it."""
  m, bits, y = [np.asarray(x) for x in moves], chain_T[positions], np.asarray(tags_NW).T
  total = sum(logits_TC[position, tags] for position, tags in zip(positions, y, strict=True))
  total += m[1 if bits[0] & crf.GAP else 0][y[0]]
  for i in range(1, len(y)):
    total += m[3 if bits[i] & crf.GAP else 2][y[i - 1], y[i]]
  return total + m[4 if bits[-1] & crf.LAST else 5][y[-1]]


def enumerated(logits_TC, chain_T, positions, moves):
  every = list(itertools.product(range(logits_TC.shape[-1]), repeat=len(positions)))
  return every, by_hand(logits_TC, chain_T, positions, moves, every)


WORD, FIRST, GAP, LAST = crf.WORD, crf.FIRST, crf.GAP, crf.LAST
WHOLE = [WORD | FIRST, WORD, WORD, WORD, WORD, WORD | LAST]
TORN = [WORD | FIRST | GAP, WORD, WORD | GAP, WORD, WORD, WORD]


@pytest.mark.parametrize('bits', [WHOLE, TORN, [WORD | FIRST | LAST], [WORD | FIRST]])
def test_log_partition_marginals_and_viterbi_are_those_of_enumeration(bits):
  rng = np.random.default_rng(len(bits))
  moves = moves_of(rng)
  logits, chain, (positions,) = row_of(rng, [bits], 11)
  every, scores = enumerated(logits[0], chain[0], positions, moves)
  log_z = np.log(np.sum(np.exp(scores - scores.max()))) + scores.max()
  assert abs(float(log_partition(logits, chain, moves)[0]) - log_z) < 1e-12 * max(1, abs(log_z))
  p = np.exp(scores - log_z)
  wanted = np.zeros(logits.shape[1:])
  for y, position in zip(np.transpose(every), positions, strict=True):
    np.add.at(wanted[position], y, p)
  found = np.asarray(marginals(jnp.asarray(logits), chain, moves)[0])
  np.testing.assert_allclose(found, wanted, atol=1e-12)
  best = np.zeros(chain.shape[1], int)
  best[positions] = every[int(np.argmax(scores))]
  assert viterbi(jnp.asarray(logits), chain, moves)[0].tolist() == best.tolist()
  assert float(best_score(logits, chain, moves)[0]) == pytest.approx(scores.max(), abs=1e-12)
  for index in rng.choice(len(every), 3, replace=False):
    tags = rng.integers(0, TAGS, chain.shape)  # whatever stands where no word is
    tags[0, positions] = every[index]
    given = float(score(jnp.asarray(logits), tags, chain, moves)[0])
    assert given == pytest.approx(scores[index], abs=1e-12)


def test_texts_of_a_row_are_chains_of_their_own():
  rng = np.random.default_rng(0)
  moves = moves_of(rng, 3)
  chains = [
    [WORD | FIRST, WORD | LAST],
    [WORD | FIRST, WORD, WORD | GAP],
    [WORD | FIRST | GAP | LAST],
  ]
  logits, chain, texts = row_of(rng, chains, 12, 3)
  apart = [enumerated(logits[0], chain[0], positions, moves) for positions in texts]
  log_z = sum(np.log(np.sum(np.exp(scores))) for _, scores in apart)
  assert float(log_partition(logits, chain, moves)[0]) == pytest.approx(log_z, abs=1e-12)
  best = np.concatenate([every[int(np.argmax(scores))] for every, scores in apart])
  found = viterbi(jnp.asarray(logits), chain, moves)[0]
  assert found[np.concatenate(texts)].tolist() == best.tolist()
  tags = np.zeros(chain.shape, int)
  tags[0, np.concatenate(texts)] = [1, 2, 0, 0, 1, 2]
  parts = [by_hand(logits[0], chain[0], p, moves, tags[:, p])[0] for p in texts]
  given = float(score(jnp.asarray(logits), tags, chain, moves)[0])
  assert given == pytest.approx(sum(parts), abs=1e-12)
  joined = chain & ~FIRST  # negative control: without the bound it is another number
  joined[0, texts[0][0]] |= FIRST
  assert abs(float(log_partition(logits, joined, moves)[0]) - log_z) > 0.01


def test_what_stands_before_a_text_changes_no_bit_of_its_tags():
  rng = np.random.default_rng(1)
  moves = moves_of(rng, 3)
  logits = rng.normal(size=(2, 8, 3)).astype(np.float32)
  logits[1, :4] *= 50
  logits[1, 4:] = logits[0, 4:]
  chain = np.array([[WORD | FIRST, WORD, 0, WORD | LAST, WORD | FIRST, 0, WORD, WORD | LAST]] * 2)
  moves = crf.Moves(*(x.astype(np.float32) for x in moves))
  found = np.asarray(marginals(jnp.asarray(logits), chain, moves))
  assert (found[0, 4:] == found[1, 4:]).all() and (found[0, :4] != found[1, :4]).any()


def test_an_empty_row_has_nothing():
  moves, chain = moves_of(np.random.default_rng(0)), np.zeros((1, 11), np.int32)
  logits, tags = jnp.ones((1, 11, TAGS)), np.ones((1, 11), int)
  for value in (
    log_partition(logits, chain, moves),
    score(logits, tags, chain, moves),
    best_score(logits, chain, moves),
  ):
    assert value.tolist() == [0]
  assert not viterbi(logits, chain, moves).any()
  assert not np.asarray(marginals(logits, chain, moves)).any()


def test_forbidden_moves_have_probability_0_and_finite_gradients():
  rng = np.random.default_rng(3)
  forbidden = rng.random((TAGS, TAGS)) < 0.5
  np.fill_diagonal(forbidden, False)
  moves = moves_of(rng, forbidden=forbidden)
  logits, chain, (positions,) = row_of(rng, [WHOLE], 11)

  def pairs(scores_CC):
    return jnp.sum(log_partition(logits, chain, moves._replace(next_CC=scores_CC)))

  expected_CC = np.asarray(jax.grad(pairs)(moves.next_CC))  # how often each move is made
  assert (expected_CC[forbidden] == 0).all() and (expected_CC[~forbidden] > 0).all()
  assert expected_CC.sum() == pytest.approx(WORDS - 1, abs=1e-9)
  best = viterbi(jnp.asarray(logits), chain, moves)[0][positions]
  assert not forbidden[best[:-1], best[1:]].any()
  every, scores = enumerated(logits[0], chain[0], positions, moves)
  free = [i for i, y in enumerate(every) if not forbidden[list(y[:-1]), list(y[1:])].any()]
  log_z = np.log(np.sum(np.exp(scores[free])))
  assert float(log_partition(logits, chain, moves)[0]) == pytest.approx(log_z, abs=1e-9)
  assert best.tolist() == list(every[free[int(np.argmax(scores[free]))]])
  open_moves = moves_of(np.random.default_rng(3))._replace(next_CC=jnp.zeros((TAGS, TAGS)))
  free_CC = np.asarray(
    jax.grad(lambda x: jnp.sum(log_partition(logits, chain, open_moves._replace(next_CC=x))))(
      open_moves.next_CC
    )
  )
  assert (free_CC > 0).all()  # negative control


def test_transitions_start_at_nothing():
  (first, both, last), _ = crf.Transitions(Options(dim=4), 3).init_with_output(jax.random.key(0))
  assert (first.shape, both.shape, last.shape) == ((3,), (3, 3), (3,))
  assert not any(np.asarray(x).any() for x in (first, both, last))
