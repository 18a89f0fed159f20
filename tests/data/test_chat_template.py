"""Chat templates in the style of the well-known families: what an assistant says, found by prefixes
and by marks; one BOS, one end per turn; and templates that fail.
"""

import re

import numpy as np
import pytest

from llm_jax.data import chat_template
from llm_jax.data.chat_template import Template
from llm_jax.data.tokenizers import byte, hf

LOOP, END = '{% for m in messages %}', '{% endfor %}'
IS = "{%% if m.role == '%s' %%}"


def by_role(user, assistant, system='', before='{{ bos_token }}', asks=''):
  """A template; `assistant` has what is said, with its end, between marks."""
  parts = IS % 'user' + user + "{% elif m.role == 'assistant' %}" + assistant
  if system:
    parts += "{% elif m.role == 'system' %}" + system
  asks = f'{{% if add_generation_prompt %}}{asks}{{% endif %}}' if asks else ''
  return before + LOOP + parts + '{% endif %}' + END + asks


def said(after, before=''):
  """What an assistant says, marked."""
  return f'{before}{{% generation %}}{{{{ m.content }}}}{after}{{% endgeneration %}}'


N = "{{ '\\n' }}"
TEMPLATES = {  # and the special tokens that they bring
  'chatml': (
    by_role(
      f'<|im_start|>user{N}{{{{ m.content }}}}<|im_end|>{N}',
      said('<|im_end|>', f'<|im_start|>assistant{N}') + N,
      f'<|im_start|>system{N}{{{{ m.content }}}}<|im_end|>{N}',
      before='',
      asks=f'<|im_start|>assistant{N}',
    ),
    ('<|im_start|>', '<|im_end|>'),
  ),
  'llama3': (
    by_role(
      f'<|start|>user<|stop|>{N}{N}{{{{ m.content }}}}<|eot_id|>',
      said('<|eot_id|>', f'<|start|>assistant<|stop|>{N}{N}'),
      f'<|start|>system<|stop|>{N}{N}{{{{ m.content }}}}<|eot_id|>',
      asks=f'<|start|>assistant<|stop|>{N}{N}',
    ),
    ('<|start|>', '<|stop|>', '<|eot_id|>'),
  ),
  'llama2': (
    by_role('[INST] {{ m.content }} [/INST]', said(' {{ eos_token }}', ' '), asks=' '),
    (),
  ),
  'mistral': (by_role('[INST] {{ m.content }}[/INST]', said('{{ eos_token }}')), ()),
  'gemma': (
    by_role(
      f'<start_of_turn>user{N}{{{{ m.content | trim }}}}<end_of_turn>{N}',
      said('<end_of_turn>', f'<start_of_turn>model{N}') + N,
      asks=f'<start_of_turn>model{N}',
    ),
    ('<start_of_turn>', '<end_of_turn>'),
  ),
  'phi3': (
    by_role(
      f'<|user|>{N}{{{{ m.content }}}}<|end|>{N}',
      said('<|end|>', f'<|assistant|>{N}') + N,
      f'<|system|>{N}{{{{ m.content }}}}<|end|>{N}',
      before='',
      asks=f'<|assistant|>{N}',
    ),
    ('<|user|>', '<|assistant|>', '<|system|>', '<|end|>'),
  ),
  'zephyr': (
    by_role(
      f'<|user|>{N}{{{{ m.content }}}}{{{{ eos_token }}}}{N}',
      said('{{ eos_token }}', f'<|assistant|>{N}') + N,
      before='',
      asks=f'<|assistant|>{N}',
    ),
    (),
  ),
  'vicuna': (
    by_role(
      'USER: {{ m.content }} ',
      said('{{ eos_token }}', 'ASSISTANT: '),
      '{{ m.content }} ',
      asks='ASSISTANT: ',
    ),
    (),
  ),
  'alpaca': (
    by_role(
      f'### Instruction:{N}{{{{ m.content }}}}{N}{N}',
      said('', f'### Response:{N}') + N + N,
      f'{{{{ m.content }}}}{N}{N}',
      before='',
      asks=f'### Response:{N}',
    ),
    (),
  ),
  'command': (
    by_role(
      '<|turn|><|USER|>{{ m.content }}<|END|>',
      said('<|END|>', '<|turn|><|CHATBOT|>'),
      '<|turn|><|SYSTEM|>{{ m.content }}<|END|>',
      asks='<|turn|><|CHATBOT|>',
    ),
    ('<|turn|>', '<|USER|>', '<|CHATBOT|>', '<|SYSTEM|>', '<|END|>'),
  ),
  'deepseek': (
    by_role(
      f'User: {{{{ m.content }}}}{N}{N}', said('{{ eos_token }}', 'Assistant: '), asks='Assistant: '
    ),
    (),
  ),
  'glm': (  # no end of its own: the next turn's sign is none
    by_role(
      f'<|user|>{N}{{{{ m.content }}}}',
      said('', f'<|assistant|>{N}'),
      before='[gMASK]',
      asks=f'<|assistant|>{N}',
    ),
    ('[gMASK]', '<|user|>', '<|assistant|>'),
  ),
  'falcon': (
    by_role(
      f'User: {{{{ m.content }}}}{N}{N}', said('', 'Falcon: ') + N + N, before='', asks='Falcon: '
    ),
    (),
  ),
  'openchat': (
    by_role(
      'GPT4 User: {{ m.content }}<|end_of_turn|>',
      said('<|end_of_turn|>', 'GPT4 Assistant: '),
      asks='GPT4 Assistant: ',
    ),
    ('<|end_of_turn|>',),
  ),
}
ANSWERS = ['Hello there.', 'Two\nlines, and an \U0001f600', 'Bye']
TURNS = [
  {'role': 'user', 'content': 'Hi'},
  {'role': 'assistant', 'content': ANSWERS[0]},
  {'role': 'user', 'content': 'More, please'},
  {'role': 'assistant', 'content': ANSWERS[1]},
  {'role': 'user', 'content': 'Bye'},
  {'role': 'assistant', 'content': ANSWERS[2]},
]


def without_marks(source):
  return re.sub(r'{% (end)?generation %}', '', source)


@pytest.fixture(scope='module', params=TEMPLATES)
def case(request):
  source, added = TEMPLATES[request.param]
  system = [{'role': 'system', 'content': 'Be kind.'}] if "'system'" in source else []
  return source, byte.create(added=added), [*system, *TURNS]


def pieces(encoded, tokenizer):
  """What is learned, a turn after the other, and the token that ends each."""
  starts = np.flatnonzero(np.diff(encoded.learned_T, prepend=0) == 1)
  found = [encoded.tokens_T[a:b] for a, b in zip(starts, encoded.ends_N, strict=True)]
  assert sum(map(len, found)) == encoded.learned_T.sum()
  return [(tokenizer.decode(ids), int(ids[-1])) for ids in found]


def test_masks_by_prefixes_are_those_by_marks(case):
  source, tokenizer, messages = case
  by_marks, by_prefixes = (Template(s, tokenizer) for s in (source, without_marks(source)))
  assert by_marks._marked and not by_prefixes._marked
  ours, theirs = by_prefixes.encode(messages), by_marks.encode(messages)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(a, b)
  assert by_marks.prompt_ids(messages[:-1]) == by_prefixes.prompt_ids(messages[:-1])


def test_one_bos_and_one_end_of_each_turn_that_is_learned(case):
  source, tokenizer, messages = case
  template = Template(source, tokenizer)
  encoded = template.encode(messages)
  assert np.sum(encoded.tokens_T == tokenizer.bos_id) == ('bos_token' in source)
  found = pieces(encoded, tokenizer)
  assert [text.strip() for text, _ in found] == ANSWERS
  assert {end for _, end in found} == {template.end} and tokenizer.special[template.end]
  ends = np.flatnonzero((encoded.tokens_T == template.end) & (encoded.learned_T == 1))
  np.testing.assert_array_equal(ends + 1, encoded.ends_N)


def test_what_a_model_is_asked_with_is_what_it_has_read(case):
  """A prompt is the conversation up to where the assistant speaks, token for token."""
  source, tokenizer, messages = case
  template = Template(source, tokenizer)
  encoded = template.encode(messages)
  starts = np.flatnonzero(np.diff(encoded.learned_T, prepend=0) == 1)
  turns = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
  for number, start in zip(turns, starts, strict=True):
    assert template.prompt_ids(messages[:number]) == encoded.tokens_T[:start].tolist()


@pytest.mark.parity
@pytest.mark.parametrize('name', TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(name, tmp_path):
  """With BOS before them where the tokenizer puts it there and the template does not; and with an
  end where theirs has none.
  """
  transformers = pytest.importorskip('transformers')
  source, added = TEMPLATES[name]
  byte.create(added=added).export(str(tmp_path), causal=True, max_len=999, token_types=False)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  theirs.chat_template = source
  tokenizer = hf.load(str(tmp_path))
  found = theirs.apply_chat_template(
    TURNS, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
  )
  ids, mask = np.array(found['input_ids']), np.array(found['assistant_masks'])
  encoded = Template(source, tokenizer).encode(TURNS)
  tokens, learned = encoded.tokens_T, encoded.learned_T
  if 'bos_token' not in source:
    assert tokens[0] == tokenizer.bos_id and not learned[0]
    tokens, learned = tokens[1:], learned[1:]
  if len(tokens) != len(ids):  # an EOS of ours per turn
    ours = np.flatnonzero((tokens == tokenizer.eos_id) & (learned == 1))
    assert len(ours) == 3
    tokens, learned = np.delete(tokens, ours), np.delete(learned, ours)
  np.testing.assert_array_equal(tokens, ids)
  np.testing.assert_array_equal(learned, mask)


@pytest.mark.parametrize('mark', ['{%generation%}', '{%-  generation -%}'])
def test_marks_are_known_however_they_are_written(mark):
  source, added = TEMPLATES['chatml']
  other = Template(source.replace('{% generation %}', mark), byte.create(added=added))
  for a, b in zip(
    other.encode(TURNS), Template(source, other.tokenizer).encode(TURNS), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_marks_that_leave_the_end_out_do_not_unlearn_it():
  source = TEMPLATES['chatml'][0].replace(
    '<|im_end|>{% endgeneration %}', '{% endgeneration %}<|im_end|>'
  )
  tokenizer = byte.create(added=TEMPLATES['chatml'][1])
  for a, b in zip(
    Template(source, tokenizer).encode(TURNS),
    Template(TEMPLATES['chatml'][0], tokenizer).encode(TURNS),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('name', chat_template.KNOWN)
def test_ours(name):
  template = Template(chat_template.text(name), byte.create(added=TEMPLATES['chatml'][1]))
  assert [text for text, _ in pieces(template.encode(TURNS), template.tokenizer)] == ANSWERS


def test_a_template_is_a_name_a_file_or_itself(tmp_path):
  path = tmp_path / 'mine.jinja'
  path.write_text('{{ messages }}')
  assert chat_template.text(str(path)) == chat_template.text('{{ messages }}') == '{{ messages }}'
  assert chat_template.text(None) == chat_template.text('plain')
  with pytest.raises(ValueError, match="template='chatnl' is no file, and none of plain, chatml"):
    chat_template.text('chatnl')


@pytest.mark.parametrize(
  ('source', 'said'),
  [
    ("{{ raise_exception('no system here') }}", 'fails: TemplateError: no system here'),
    ('{% for m in messages %}', 'cannot be read in line 1'),
    ('{{ messages[7].content }}', 'fails: UndefinedError'),
    ("{{ ''.__class__.__mro__ }}", 'fails: SecurityError'),
    ("{{ strftime_now('%d') }}", "fails: UndefinedError: 'strftime_now' is undefined"),
    ('{{ messages[0].content }}', 'leaves out what is said'),
    (
      '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
      'does not end within 1,000,000 steps',
    ),
    ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'fails: RecursionError'),
    (
      '{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}',
      'renders the messages before number 2 otherwise.*put {% generation %}',
    ),
  ],
)
def test_templates_that_fail(source, said):
  with pytest.raises(ValueError, match=f'the chat template .*{said}'):
    Template(source, byte.create())


def test_a_turn_in_which_nothing_is_said():
  template = Template(chat_template.text('bare'), byte.create())
  silent = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': ''}]
  assert pieces(template.encode(silent), template.tokenizer) == [('', template.end)]


def test_an_end_that_is_no_token_is_said(caplog):
  chatml = chat_template.text('chatml')
  Template(chatml, byte.Tokenizer(added=('<|im_start|>', '<|im_end|>')))
  Template(chat_template.text(None), byte.Tokenizer())
  assert not caplog.records
  Template(chatml, byte.Tokenizer())
  assert "'<|im_end|>', which is no token of this tokenizer" in caplog.text
