import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.nn import crf

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('as_in_use')]


def test_the_crf_is_that_of_pytorch_crf():
  """pytorch-crf 0.7.2: log-likelihood, its gradient, and Viterbi, texts of different lengths."""
  import torch
  import torchcrf

  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  rows, length, tags = 4, 7, 5
  theirs = torchcrf.CRF(tags, batch_first=True)
  lengths = np.array([7, 4, 1, 5])
  mask = np.arange(length) < lengths[:, None]
  logits = rng.normal(size=(rows, length, tags)).astype(np.float32)
  given = rng.integers(0, tags, (rows, length))
  emissions = torch.tensor(logits, requires_grad=True)
  value = theirs(emissions, torch.tensor(given), torch.tensor(mask), reduction='none')
  value.sum().backward()
  first, both, last = (
    jnp.asarray(x.detach().numpy())
    for x in (theirs.start_transitions, theirs.transitions, theirs.end_transitions)
  )
  moves = crf.Moves(first, first, both, both, last, last)
  chain = crf.WORD * mask
  chain[:, 0] |= crf.FIRST
  chain[np.arange(rows), lengths - 1] |= crf.LAST

  def likelihood(x):
    return crf.score(x, given, chain, moves) - crf.log_partition(x, chain, moves)

  ours = likelihood(jnp.asarray(logits))
  np.testing.assert_allclose(ours, value.detach().numpy(), atol=1e-5)
  gradient = jax.grad(lambda x: jnp.sum(likelihood(x)))(jnp.asarray(logits))
  np.testing.assert_allclose(gradient, emissions.grad.numpy(), atol=1e-5)
  best = theirs.decode(torch.tensor(logits), torch.tensor(mask))
  found = crf.viterbi(jnp.asarray(logits), chain, moves)
  assert [row[:n].tolist() for row, n in zip(found, lengths, strict=True)] == best
  other = np.roll(given, 1, axis=1)  # negative control
  with pytest.raises(AssertionError):
    moved = crf.score(jnp.asarray(logits), other, chain, moves)
    np.testing.assert_allclose(
      moved - crf.log_partition(jnp.asarray(logits), chain, moves), ours, atol=1e-5
    )
