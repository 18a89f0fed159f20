"""A teacher beside an objective: what is asked for, and what is refused; nothing is run."""

import types
from typing import ClassVar

import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.objectives import clm, mlm, nsp
from llm_jax.objectives.shared import distilled
from llm_jax.objectives.shared.distilled import Options
from llm_jax.programs import teachers


def test_terms_are_those_that_are_asked_for(small):
  objective = clm.Objective(small.Tokenizer())
  made = distilled.beside(objective, None, Options(soft=0.7, hard=0.2, hidden=0.1), None)
  assert made.terms == {'clm': 0.2, 'soft': 0.7, 'hidden': 0.1} and made.watches
  assert objective.terms == {'clm': 1.0} and not objective.watches
  assert isinstance(made, clm.Objective) and not isinstance(objective, distilled.Distilled)
  plain = distilled.beside(objective, None, Options(), None)
  assert plain.terms == {'clm': 0.5, 'soft': 1.0} and not plain.watches
  assert not plain.trains('heads_teacher/model/x') and plain.trains('model/x')


@pytest.mark.parametrize(
  'options, words',
  [
    (dict(temperature=0.0), 'temperature=0.0 must be above 0'),
    (dict(hard=-1.0), 'hard=-1.0 must be at least 0'),
    (dict(soft=0.0), 'nothing is learned from config.teacher'),
    (dict(hidden_loss='cosines'), "did you mean 'cosine'"),
    (dict(cached=True, hidden=1.0), 'cached=True keeps answers alone'),
  ],
)
def test_options_out_of_range_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    Options(**options)


def test_an_objective_without_answers_learns_from_the_inside_alone(small):
  objective = nsp.Objective(small.Tokenizer())
  with pytest.raises(ValueError, match='has no answers that a student could learn'):
    distilled.beside(objective, None, Options(), None)
  with pytest.raises(ValueError, match='cached=True keeps one answer for each text'):
    distilled.beside(clm.Objective(small.Tokenizer()), None, Options(cached=True), None)
  made = distilled.beside(objective, None, Options(soft=0.0, relations=1.0), None)
  assert made.terms == {'nsp': 0.5, 'relations': 1.0}
  assert mlm.Objective.distils and not contracts.Objective.distils


class Asking(contracts.Objective):
  terms: ClassVar = {'x': 1.0}
  distils = answers_texts = True

  def __init__(self, needs_reference):
    self.needs_reference = needs_reference  # of each loss, as in `dpo`


def test_a_teacher_beside_leaves_the_reference_of_a_loss_as_it_is():
  of = lambda asks, options: distilled.beside(Asking(asks), None, options, None).needs_reference
  assert of(True, Options(soft=0.0, hidden=1.0)) and not of(False, Options())
  assert of(False, Options(cached=True))


def test_what_a_teacher_has_said_stands_beside_its_texts():
  rows = types.SimpleNamespace(texts=lambda index: [2, 0], cut=3)
  rows.example = lambda index, rng: {'label_weight': np.ones(4, np.float32)}
  made = distilled.AnsweredRows(rows, 2)
  assert made.cut == 3 and not made.example(0, None)[distilled.ANSWERS].any()
  made.reference = np.arange(6, dtype=np.float32).reshape(3, 2)
  said = made.example(0, None)[distilled.ANSWERS]
  np.testing.assert_array_equal(said, [[4, 5], [0, 1], [0, 0], [0, 0]])


def test_labels_are_matched_by_their_names():
  config = types.SimpleNamespace(teacher='T')
  of = lambda classes, task='multiclass': types.SimpleNamespace(classes=classes, task=task)
  order = lambda ours, theirs, task='multiclass': teachers._order(
    config, of(ours, task), of(theirs, task)
  )
  assert order(('a', 'b'), ('a', 'b')) is None
  assert order(('a', 'b', 'c'), ('c', 'a', 'b')) == [1, 2, 0]
  with pytest.raises(ValueError, match='other labels than the student: b, x'):
    order(('a', 'b'), ('a', 'x'))
  with pytest.raises(ValueError, match='set config.objective.classes to that'):
    order(('a', 'b'), ('b', 'a'), 'binary')
