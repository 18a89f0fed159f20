"""Whether a model's answers are the same alone and in company, to the bit, on this platform.

Batches have one shape, so nothing but the platform can make them differ: a compiler that adds up in
another order for another row, say. It is tried before the service is ready.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_jax.inference.session import Session

TEXTS = ('a', 'some text', 'and one that is a little longer than the others', 'word ' * 40)


def records(session: Session) -> list[dict[str, Any]]:
  """Records of the kind that a model answers, of unequal lengths."""
  objective = session.program.objective
  if objective is None:
    return []
  sample = next(iter(type(objective).sample_records(session.config.objective)))
  short = {key: x for key, x in sample.items() if key not in ('label', 'labels', 'answers')}
  long = {key: ' '.join([x] * 3) if isinstance(x, str) else x for key, x in short.items()}
  return [short, long, short]


def differing(session: Session, kinds: Sequence[str], mask: str = '[MASK]') -> list[str]:
  """Which of some kinds of answers differ.

  Args:
    session: a model that is ready.
    kinds: of 'embed', 'answer', 'fill'.
    mask: what is filled in.
  """
  tried: dict[str, tuple[Callable[[list[Any]], Sequence[Any]], list[Any]]] = {
    'embed': (session.embed, list(TEXTS)),
    'answer': (lambda some: list(session.answers(some)), records(session)),
    'fill': (session.fill, [f'{mask} {text[:20]}' for text in TEXTS]),
  }
  return [kind for kind in kinds if not _same(*tried[kind])]


def _same(run: Callable[[list[Any]], Sequence[Any]], items: list[Any]) -> bool:
  together = run(items)
  return all(_equal(run([item])[0], one) for item, one in zip(items, together, strict=True))


def _equal(one: Any, other: Any) -> bool:
  if isinstance(one, np.ndarray):
    return np.array_equal(one, other)
  return bool(one == other)
