"""Records of all forms as conversations, and what is none."""

import json

import pytest

from llm_jax.data import conversations
from llm_jax.data.sources import chat

ONE = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]


@pytest.mark.parametrize(
  'record',
  [
    {'messages': ONE},
    {'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]},
    {'instruction': 'q', 'input': '', 'output': 'a'},
    {'instruction': 'q', 'output': 'a'},
    {'prompt': 'q', 'completion': 'a'},
    {'prompt': 'q', 'response': 'a'},
    {'text': 'q', 'target': 'a'},
  ],
)
def test_forms(record):
  assert conversations.messages(record) == ONE
  if 'messages' not in record and 'conversations' not in record:
    found = conversations.messages(record | {'system': 's'})
    assert found == [{'role': 'system', 'content': 's'}, *ONE]


def test_tools_stand_between():
  call = {'role': 'assistant', 'content': None, 'tool_calls': [{'name': 'f'}]}
  found = conversations.messages(
    {'messages': [ONE[0], call, {'role': 'tool', 'content': '3', 'name': 'f'}, ONE[1]]}
  )
  assert [message['role'] for message in found] == ['user', 'assistant', 'tool', 'assistant']
  assert found[1] == call | {'content': ''} and found[2]['name'] == 'f'
  assert conversations.prompt(found) == found[:3]


@pytest.mark.parametrize(
  ('record', 'said'),
  [
    ({'messages': []}, 'without a message'),
    ({'messages': 'hi'}, "must be a list of objects with role and content, not 'hi'"),
    ({'messages': ['hi']}, 'must be a list of objects'),
    ({'messages': [ONE[1]]}, 'must begin with system or user, not with assistant'),
    ({'messages': [ONE[0], ONE[0]]}, 'message 2 .* of user and follows on one of user; assistant'),
    (
      {'messages': [*ONE, {'role': 'system', 'content': 's'}]},
      'message 3 .* of system and follows on one of assistant; user or tool may',
    ),
    ({'messages': [{'role': 'humam', 'content': 'q'}]}, "message 1 .* the role 'humam'; known"),
    ({'messages': [{'role': 'user', 'content': ['q']}]}, r'message 1 .*a text .*, not \\[.q.\\]'),
    ({'instruction': 3, 'output': 'a'}, 'what user says must be a text, not 3'),
    ({'text': 'q', 'target': ' '}, "what assistant says must be a text, not ' '"),
    ({'text': 'q'}, 'has no conversation, only text; it needs messages'),
  ],
)
def test_what_is_none(record, said):
  with pytest.raises(ValueError, match=said.replace('\\\\', '\\')):
    conversations.messages(record)


def test_files_of_lines_and_of_lists(tmp_path):
  lines, whole = tmp_path / 'a.jsonl', tmp_path / 'b.json'
  lines.write_text(
    json.dumps({'messages': ONE, 'id': 1}) + '\n\n' + json.dumps({'id': 2, 'text': 'x'})
  )
  whole.write_text(json.dumps([{'instruction': 'q', 'input': '', 'output': 'a', 'id': 3}]))
  source = chat.Source(str(tmp_path))
  assert [source[i] for i in range(len(source))] == [
    {'messages': ONE},
    {},
    {'instruction': 'q', 'input': '', 'output': 'a'},
  ]
  assert source.where(1).endswith('a.jsonl:3') and source.where(2).endswith('b.json: record 0')
  assert chat.Source(str(tmp_path), fields=('id',))[2]['id'] == 3
  with pytest.raises(ValueError, match=r"a.jsonl:1: no field 'to'; there are: messages, id"):
    chat.Source(str(tmp_path), fields=('to',))[0]
  whole.write_text('{"a": 1}')
  with pytest.raises(ValueError, match='b.json: a dict, not a list of conversations'):
    len(chat.Source(str(whole)))
  whole.write_text('[1]')
  with pytest.raises(ValueError, match='b.json: record 0: a int, not a JSON object'):
    chat.Source(str(whole))[0]
  whole.write_text('[]')
  with pytest.raises(ValueError, match='is an empty corpus: 1 files of no record'):
    chat.Source(str(whole))
