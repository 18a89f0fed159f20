"""How unsure an answer is, beside SciPy and by hand."""

import numpy as np
import pytest
from scipy import stats

from llm_jax.objectives.shared.uncertainty import uncertainty


def test_classes():
  for p_C in np.random.default_rng(0).dirichlet([0.3] * 5, 50):
    found = uncertainty(p_C.astype(np.float32))
    assert found['entropy'] == pytest.approx(stats.entropy(p_C), abs=1e-5)
    first, second, *_ = sorted(p_C, reverse=True)
    assert found['margin'] == pytest.approx(first - second, abs=1e-6)


def test_several_labels():
  for p_C in np.random.default_rng(1).uniform(size=(50, 4)):
    found = uncertainty(p_C, multilabel=True)
    each = [stats.entropy([p, 1 - p]) for p in p_C]
    assert found['entropy'] == pytest.approx(sum(each), abs=1e-9)
    assert found['margin'] == pytest.approx(min(abs(p - (1 - p)) for p in p_C), abs=1e-9)
    assert found['entropy'] != pytest.approx(uncertainty(p_C)['entropy'])


@pytest.mark.parametrize(
  ('p_C', 'multilabel', 'entropy', 'margin'),
  [
    ([1.0, 0.0], False, 0.0, 1.0),
    ([1.0], False, 0.0, 1.0),  # a text with one candidate
    ([np.float32(1.0000001), 0.0], False, 0.0, 1.0),  # as a softmax may round
    ([0.5, 0.5], False, np.log(2), 0.0),
    ([1.0, 0.0], True, 0.0, 1.0),
    ([0.5, 1.0], True, np.log(2), 0.0),
  ],
)
def test_at_the_ends(p_C, multilabel, entropy, margin):
  found = uncertainty(p_C, multilabel)
  assert found == {'entropy': pytest.approx(entropy), 'margin': margin}
  assert '-' not in str(found)
