"""What a training set looks like, in numbers counted by hand."""

import types

import numpy as np
import pytest

from llm_jax.data import documents
from llm_jax.data.tokenizers import byte
from llm_jax.programs import summary
from llm_jax.serving import served

UNKNOWN = 1


def _tokenizer(**others):
  special = dict(pad_id=0, unk_id=UNKNOWN, cls_id=2, sep_id=3, mask_id=None, bos_id=2, eos_id=3)
  return types.SimpleNamespace(vocab_size=50, **(special | others))


def corpus(*records):
  """Records as documents: their arrays and values are given."""
  arrays = lambda record: {
    key: np.asarray(value, np.int32) if key.endswith('tokens') else value
    for key, value in record.items()
  }
  return documents.Memory(list(records), lambda record, _: arrays(record), _tokenizer())


def test_numbers_of_several_corpora():
  first = corpus(
    {'tokens': [9], 'label': 'a'},
    {'tokens': [9, UNKNOWN], 'label': 'b'},
    {'tokens': [9] * 3, 'pair_tokens': [9] * 2, 'label': 'a'},
  )
  second = corpus({'tokens': [9] * 9 + [UNKNOWN], 'target_tokens': [UNKNOWN] * 100, 'label': 'c'})
  found = summary.of([first, second], _tokenizer(), ('a', 'b', 'c', 'd'))
  assert found.documents == found.sampled == 4
  assert [found.lengths[bound] for bound in (1, 2, 4, 8, 16)] == [0.25, 0.5, 0.5, 0.75, 1]
  assert found.unknown_share == 2 / 18  # what is to be written is not asked
  assert found.classes == {'a': 0.5, 'b': 0.25, 'c': 0.25, 'd': 0}


def test_several_labels_and_tags_are_counted_one_by_one():
  several = corpus({'tokens': [9], 'label': ['a', 'b']}, {'tokens': [9], 'label': []})
  assert summary.of([several], _tokenizer(), ('a', 'b')).classes == {'a': 0.5, 'b': 0.5}
  tagged = corpus({'tokens': [9], 'tags': ['O', 'O', 'B']}, {'tokens': [9], 'tags': ['O']})
  assert summary.of([tagged], _tokenizer(), ('B', 'O')).classes == {'B': 0.25, 'O': 0.75}
  none = corpus({'tokens': [9]})
  assert summary.of([none], _tokenizer(), ('B', 'O')).classes == {}
  many = [str(n) for n in range(summary.MOST_CLASSES + 1)]
  assert summary.of([corpus({'tokens': [9], 'label': '1'})], _tokenizer(), many).classes == {}


def test_only_the_first_documents_are_read(monkeypatch):
  monkeypatch.setattr(summary, 'SAMPLE', 2)
  monkeypatch.setattr(summary, 'SAMPLE_TOKENS', 3)
  found = summary.of(
    [
      corpus({'tokens': [UNKNOWN, 9, 9, UNKNOWN]}),
      corpus({'tokens': [9]}, {'tokens': [UNKNOWN] * 90}),
    ],
    _tokenizer(),
    (),
  )
  assert (found.documents, found.sampled, found.unknown_share) == (3, 2, 0.25)


def test_a_special_token_that_stands_for_another_is_not_unknown():
  assert summary.unknown_id(_tokenizer(unk_id=3)) is None  # GPT-2's is its end of a text
  assert summary.of([corpus({'tokens': [3]})], _tokenizer(unk_id=3), ()).unknown_share is None
  assert summary.unknown_id(byte.create()) == byte.Tokenizer.unk_id


def test_what_is_written_is_read_again(tmp_path):
  assert summary.read(tmp_path) is None
  found = summary.of([corpus({'tokens': [9], 'label': 'ü'})], _tokenizer(), ('ü',))
  summary.write(tmp_path, found)
  assert summary.read(tmp_path) == found and 'ü' in (tmp_path / summary.FILE).read_text()
  for text in ('{', '[]', '{"lengths": {}}', '{"lengths": {"x": 1}}'):
    (tmp_path / summary.FILE).write_text(text)
    with pytest.raises(ValueError, match='does not describe a training set'):
      summary.read(tmp_path)


def test_of_a_folder_without_it_the_service_says_so_once(tmp_path, caplog):
  session = types.SimpleNamespace(
    origin=tmp_path, tokenizer=_tokenizer(), causal=False, reads_source=False
  )
  session.program = types.SimpleNamespace(objective=None)
  with caplog.at_level('INFO'):
    assert served._seen(session, 'old') == served.Seen(UNKNOWN, (), None)
  assert caplog.text.count('says nothing of the training set') == 1
