"""Scores of new text against the examples of the libraries' own pages, and what is refused."""

import pytest
from rouge_score import rouge_scorer

from llm_jax.core import contracts
from llm_jax.evaluators import _written, generation, summarization, translation
from llm_jax.evaluators._written import Written
from llm_jax.objectives import mlm, seq2seq


class Rows:
  """Rows of two texts each."""

  def texts(self, index):
    return [2 * index, 2 * index + 1]

  def prompt(self, text):
    return [text]


def evaluated(evaluator, texts):
  """What it says of such texts, of which the model writes the last parts."""
  rows = Rows()
  validation = contracts.Validation(
    objective=seq2seq.Objective,
    terms={},
    tokenizer=None,
    batches=lambda: (),
    losses=None,
    predict=None,
    rows=[(rows, index) for index in range(len(texts) // 2)],
    record=lambda _, text: {'text': texts[text].asked, 'target': texts[text].wanted},
    write=lambda prompts, options: [texts[prompt[0]].found for prompt in prompts],
  )
  return evaluator.evaluate(validation)


def test_the_example_of_sacrebleu():
  """https://github.com/mjpost/sacrebleu, 'Using SacreBLEU from Python', with its first references;
  the command line of the same page gives the numbers with both.
  """
  found = ['The dog bit the man.', "It wasn't surprising.", 'The man had just bitten him.']
  wanted = [
    ['The dog bit the man.', 'It was not unexpected.', 'The man bit him first.'],
    ['The dog had bit the man.', 'No one was surprised.', 'The man had bitten the dog.'],
  ]
  made = translation.Evaluator().metrics
  assert round(made['bleu'].corpus_score(found, wanted).score, 2) == 48.53
  assert round(made['chrf'].corpus_score(found, wanted).score, 2) == 59.73
  texts = [Written('', *pair) for pair in zip(wanted[0], found, strict=True)]
  numbers, _ = evaluated(translation.Evaluator(), [*texts, texts[0]])
  assert numbers['bleu_signature'] == 'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0'
  assert (
    numbers['bleu']
    == made['bleu'].corpus_score([*found, found[0]], [[*wanted[0], wanted[0][0]]]).score
  )
  other, _ = evaluated(translation.Evaluator(tokenize='char'), [*texts, texts[0]])
  assert other['bleu'] != numbers['bleu'] and 'tok:char' in other['bleu_signature']


def test_summaries_with_line_breaks_and_without():
  wanted = 'The cat sat.\nThe dogs were running home.'
  found = 'Dogs run home.\nA cat sat there.'
  flat = Written('', wanted.replace('\n', ' '), found.replace('\n', ' '))
  kinds = ['rouge1', 'rouge2', 'rougeL', 'rougeLsum']
  for text in (Written('', wanted, found), flat):
    for stemmer in (True, False):
      numbers, _ = evaluated(summarization.Evaluator(stemmer=stemmer), [text] * 2)
      expected = rouge_scorer.RougeScorer(kinds, use_stemmer=stemmer).score(text.wanted, text.found)
      assert {kind: numbers[kind] for kind in kinds} == {
        kind: score.fmeasure for kind, score in expected.items()
      }
      lines = (numbers['rougeLsum'] != numbers['rougeL']) == (text is not flat)
      assert lines and f'stemmer:{"porter" if stemmer else "none"}' in numbers['rouge_signature']


def test_any_text_and_code():
  texts = [
    Written('def f(x):\n', '  return x + 1\n', '  return x + 1'),
    Written('def g(x):\n', '  return x', '  return ('),
    Written('(', 'kitten', 'sitting'),
    Written('', '', ''),
  ]
  numbers, report = evaluated(generation.Evaluator(parse='whole'), texts)
  assert numbers['exact_match'] == 0.5
  assert numbers['edit_distance'] == pytest.approx((1 / 8 + 3 / 7) / 4)
  assert numbers['parses'] == 0.5
  assert numbers['token_f1'] == (1 + 0.5 + 0 + 1) / 4
  answers, _ = evaluated(generation.Evaluator(parse='answer'), texts)
  assert answers['parses'] == 0.75
  worst = [line.split(': ')[1] for line in report.splitlines() if ' wanted: ' in line]
  assert worst == ['kitten', '  return x', '  return x + 1\\n', ''][:4]


def test_a_report_shows_the_ten_worst_on_a_line_each():
  texts = [Written(f'{n}\x1b', 'a' * 400, 'a' * n) for n in range(14)]
  lines = _written.worst(texts, lambda text: len(text.found))
  assert lines[0] == 'the 10 worst:' and len(lines) == 41
  assert lines[2] == '     asked: 0\\x1b' and lines[3].endswith('a...') and len(lines[3]) == 312


class Model:
  max_len = 64


def test_what_is_refused():
  evaluator = translation.Evaluator(max_new_tokens=64)
  writing = type('Objective', (contracts.Objective,), {'writes': True})()
  with pytest.raises(ValueError, match='max_new_tokens=64 of .*less than config.model.max_len=64'):
    evaluator.check(writing, Model())
  translation.Evaluator(max_new_tokens=63).check(writing, Model())
  with pytest.raises(ValueError, match='scores new text, and the objective .*mlm asks for none'):
    evaluator.check(object.__new__(mlm.Objective), Model())
  with pytest.raises(ValueError, match="tokenize='13b' must be one of"):
    translation.Evaluator(tokenize='13b')
  with pytest.raises(ValueError, match="parse='all' must be one of answer, whole"):
    generation.Evaluator(parse='all')
  validation = contracts.Validation(None, {}, None, None, None, None)
  with pytest.raises(ValueError, match='several models .* new text has none'):
    evaluator.evaluate(validation)
