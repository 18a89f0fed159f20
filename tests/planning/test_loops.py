"""Iterations of loops, where the compiler writes their number and where it does not."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from llm_jax.planning import costs, hlo_text, loops


def trip_count(text):
  program, entry = hlo_text.parse(text)
  computation = program[entry]
  return loops.trip_count(program, computation, computation.instructions['loop'])


def test_a_loop_counts_as_often_as_it_runs(written):
  assert trip_count(written) == 4  # the counter is 2, 4, 6, 8
  found = costs.costs(written)
  assert found.flops == 4 * 2 * 64 * 32 * 32 and not found.unknown_loops


@pytest.mark.parametrize(
  ('old', 'new', 'count'),
  [
    ('direction=LT', 'direction=LE', 5),
    ('constant(10)', 'constant(11)', 5),
    ('constant(10)', 'constant(1)', 0),
    ('direction=LT', 'direction=GT', None),
    (
      'body=%body',
      'body=%body, backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0"}}',
      7,
    ),
  ],
)
def test_the_number_follows_from_the_condition_or_is_written(written, old, new, count):
  assert trip_count(written.replace(old, new)) == count


def test_a_loop_of_unknown_length_counts_once(written):
  found = costs.costs(written.replace('direction=LT', 'direction=GT'))
  assert found.flops == 2 * 64 * 32 * 32 and found.unknown_loops == 1


def test_loops_within_loops_multiply():
  def run(x, w):
    inner = lambda x: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0]
    return lax.scan(lambda c, _: (inner(c), None), x, None, length=5)[0]

  compiled = jax.jit(run).lower(jnp.ones((32, 64)), jnp.ones((64, 64))).compile()
  assert costs.costs(compiled.as_text()).flops == 15 * 2 * 32 * 64 * 64
