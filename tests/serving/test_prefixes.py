"""Caches of prompts that begin alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.serving.prefixes import Prefixes


def kept(*prompts, most=2, forgets=False):
  found = Prefixes(most, 4, forgets)
  for ids in prompts:
    found.keep(ids, f'cache of {len(ids)}')
  return found


def test_whole_pieces_are_shared_and_never_all_of_a_prompt():
  found = kept(range(12))
  assert found.find([*range(10), 99, 99]) == ('cache of 12', 8)
  assert found.find(range(13)) == ('cache of 12', 12)
  assert found.find(range(12)) == ('cache of 12', 8)  # the last token must be read for what follows
  assert found.find(range(4)) == found.find([7] * 12) == (None, 0)


def test_the_ones_that_were_used_last_are_kept():
  found = kept([1] * 4, [2] * 4)
  found.find([1] * 5)
  found.keep([3] * 4, 'new')
  assert found.find([1] * 5)[1] == 4 and found.find([2] * 5)[1] == 0
  assert kept([1] * 4, most=0).find([1] * 5) == (None, 0)
  longer = kept([1] * 4, [1] * 8, [2] * 4)
  assert longer.find([2] * 5)[1] == 4 and longer.find([1] * 9)[1] == 8  # two, not three


def test_a_cache_that_forgets_is_whole_or_of_no_use():
  found = kept(range(12), forgets=True)
  assert found.find([*range(10), 99, 99]) == (None, 0)
  assert found.find(range(13)) == ('cache of 12', 12)


@given(st.lists(st.lists(st.integers(0, 1), max_size=20), max_size=6), st.booleans())
def test_what_is_found_begins_as_the_prompt_does(prompts, forgets):
  found, caches = Prefixes(3, 4, forgets), {}
  for prompt in prompts:
    cache, length = found.find(prompt)
    assert (
      length % 4 == 0 and (cache is None) == (length == 0) and length <= max(len(prompt) - 1, 0)
    )
    if cache is not None:
      assert caches[cache][:length] == tuple(prompt[:length])
      assert not forgets or len(caches[cache]) == length
    whole = tuple(prompt[: len(prompt) - len(prompt) % 4])
    caches[len(caches)] = whole
    found.keep(whole, len(caches) - 1)


@pytest.mark.parametrize('forgets', [False, True])
def test_without_any_nothing_is_found(forgets):
  assert Prefixes(2, 4, forgets).find([1, 2]) == (None, 0)
