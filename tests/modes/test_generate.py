"""`--mode=generate`: each prompt of a file its own answer, whatever the others are."""

import json
import pathlib
import types

import pytest

from llm_jax.generation.sampling import Sampling
from llm_jax.inference.filling import Filled
from llm_jax.modes.generate import generate

SAMPLING = Sampling(max_new_tokens=3)


class Session:
  """Says the number of each prompt; takes none longer than four characters."""

  origin, most, beside = pathlib.Path('nowhere'), None, ()
  config = types.SimpleNamespace(data={'pair': 'other'})

  def __init__(self, causal=True):
    self.causal = causal

  def check_prompt(self, prompt, sampling):
    if len(prompt) > 4:
      raise ValueError(f'{len(prompt)} and {sampling.max_new_tokens} are too many')

  def completions(self, prompts, sampling, stop):
    for number, prompt in prompts:
      if number == self.most:
        raise KeyboardInterrupt
      yield f'{prompt.upper()}{number}{"".join(stop)}'

  def fillings(self, texts):
    for text in texts:
      yield Filled(text.upper(), ((('a', 0.75), ('b', 0.25)),))


@pytest.fixture
def source(tmp_path):
  path = tmp_path / 'x.csv'
  path.write_text('id,text\n1,ab\n2,too long\n3,\n4,cd\n')
  return path


def test_one_bad_prompt_costs_itself_alone(source, tmp_path, capsys, caplog):
  target = tmp_path / 'y.jsonl'
  generate(Session(), None, source, target, SAMPLING, ['!'])
  first, second, third, fourth = [json.loads(line) for line in open(target)]
  assert first == {'id': '1', 'prompt': 'ab', 'text': 'AB0!'}
  assert third == {'id': '3', 'prompt': '', 'text': '2!'} and fourth['text'] == 'CD3!'
  assert second.pop('error').endswith('x.csv:3: 8 and 3 are too many')
  assert second == {'id': '2', 'input_text': 'too long'}
  assert '1 records have no answer but `error`' in caplog.text
  generate(Session(), None, source, None, SAMPLING, text='text')
  said = capsys.readouterr().out.splitlines()
  assert said[0] == 'abAB0' and said[1].startswith('error: ') and said[2:] == ['2', 'cdCD3']


def test_what_was_drawn_does_not_depend_on_an_interruption(source, tmp_path):
  target, session = tmp_path / 'y.jsonl', Session()
  session.most = 3
  with pytest.raises(KeyboardInterrupt):
    generate(session, None, source, target, SAMPLING)
  session.most = None
  generate(session, None, source, target, SAMPLING)
  generate(session, None, source, tmp_path / 'z.jsonl', SAMPLING)
  assert target.read_text() == (tmp_path / 'z.jsonl').read_text()


def test_masks(source, tmp_path, capsys):
  generate(Session(causal=False), None, source, tmp_path / 'y.jsonl', SAMPLING)
  first = json.loads((tmp_path / 'y.jsonl').read_text().splitlines()[0])
  assert first == {'id': '1', 'prompt': 'ab', 'text': 'AB', 'masks': [[['a', 0.75], ['b', 0.25]]]}
  generate(Session(causal=False), ['a', 'b'], None, None, SAMPLING)
  assert capsys.readouterr().out == 'A\n  a 0.750  b 0.250\nB\n  a 0.750  b 0.250\n'
