"""Files that are to be answered: which field is meant, what a bad record costs, standard input."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from llm_jax.inference.records import Records, merged, spool


def asked(numbered):
  """Answers with the number and the text."""
  for number, record in numbered:
    yield {'answer': f'{number}:{record["text"]}'}


def texts(path, data=None, **options):
  return [row.get('answer') for row in Records(path, data or {}, **options).answered(asked)]


def test_every_kind_of_file_gives_the_same_records(tmp_path):
  rows = [{'id': i, 'review': text} for i, text in enumerate(['one, "two"', '学而 三', 'x'])]
  table = '\n'.join(['id,review', '0,"one, ""two"""', '1,学而 三', '2,x']) + '\n'
  tabs = '\n'.join(['id\treview', '0\tone, "two"', '1\t学而 三', '2\tx']) + '\n'
  lines = '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
  files = {'a.csv': table, 'a.tsv': tabs, 'a.jsonl': lines, 'a.txt': 'one, "two"\n学而 三\nx'}
  for name, content in files.items():
    (tmp_path / name).write_text(content)
    with gzip.open(tmp_path / f'{name}.gz', 'wt') as file:
      file.write(content)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
  wanted = ['0:one, "two"', '1:学而 三', '2:x']
  for path in sorted(tmp_path.iterdir()):
    assert texts(path) == wanted, path
    found = list(Records(path, {}).answered(asked))
    assert path.name.startswith('a.txt') or [str(row['id']) for row in found] == ['0', '1', '2']
    assert texts(path, text=None if 'txt' in path.name else 'review') == wanted


def test_which_field_is_meant(tmp_path):
  path = tmp_path / 'x.csv'
  path.write_text('id,title,body,text\n1,t1,b1,c1\n2,t2,b2,c2\n')
  assert texts(path) == ['0:c1', '1:c2']  # `text`, where the run says nothing
  assert texts(path, {'text': 'body'}) == ['0:b1', '1:b2']
  assert texts(path, {'text': 'body'}, text='title') == ['0:t1', '1:t2']
  pairs = list(Records(path, {'text': 'body', 'pair': 'title'}).answered(lambda x: pair(x)))
  assert [row['answer'] for row in pairs] == ['b1|t1', 'b2|t2']
  with pytest.raises(ValueError, match="--text=titel: no field of .*x.csv .did you mean 'title'.*"):
    Records(path, {}, text='titel')
  path.write_text('id,title,body\n1,t1,b1\n')
  with pytest.raises(ValueError, match="no field 'news'; name the one to read with --text=FIELD"):
    Records(path, {'text': 'news'})
  path.write_text('id,body,topic\n1,b1,sport\n')
  assert texts(path, {'text': 'news', 'label': 'topic'}) == ['0:b1']  # the only one with words
  with pytest.raises(ValueError, match='leave --text and --pair out'):
    Records(path, {}, text='body', whole=True)
  path.write_text('id,body,body\n1,b1,b2\n')
  with pytest.raises(ValueError, match="several columns are named 'body'"):
    Records(path, {})


def pair(numbered):
  for _, record in numbered:
    yield {'answer': f'{record["text"]}|{record["pair"]}'}


def test_a_bad_record_costs_itself_alone(tmp_path):
  (tmp_path / 'x.csv').write_bytes(
    b'text,n\nfine,1\nlost,1,2\nl\xe4ngst,3\n"open,4\nend"x,5\nlast,6\n'
  )
  (tmp_path / 'x.txt').write_bytes(b'\xef\xbb\xbffine\n\n   \nl\xe4ngst\nlast')
  records = Records(tmp_path / 'x.csv', {})
  found = list(records.answered(asked))
  assert [row.get('answer') for row in found] == ['0:fine', None, None, None, '4:last']
  errors = ['x.csv:3: 3 fields where the header has 2', 'x.csv:4: not UTF-8', 'x.csv:5: malformed']
  for row, said in zip(found[1:4], errors, strict=True):
    assert said in row['error'] and 'answer' not in row
  assert records.faults == 3
  assert texts(tmp_path / 'x.txt') == ['0:fine', '1:', '2:   ', None, '4:last']
  first = list(Records(tmp_path / 'x.txt', {}).answered(asked, first=2))
  assert [row.get('answer') for row in first] == ['2:   ', None, '4:last']

  def check(record):
    if len(record['text']) > 4:
      raise ValueError('too long')

  (tmp_path / 'x.txt').write_text('fine\nlonger\nlast\nlongest')
  found = list(Records(tmp_path / 'x.txt', {}).answered(asked, check=check))
  assert [row.get('answer') for row in found] == ['0:fine', None, '2:last', None]
  assert found[3]['error'].endswith('x.txt:4: too long')
  (tmp_path / 'x.txt').write_text('longer\n')
  with pytest.raises(ValueError, match=r'no record of .*x.txt can be read; .*x.txt:1: too long'):
    list(Records(tmp_path / 'x.txt', {}).answered(asked, check=check))


def test_a_field_that_the_answer_has_too_is_kept():
  assert merged({'label': 1, 'error': 2, 'a': 3}, {'label': 4}) == {
    'input_label': 1,
    'input_error': 2,
    'a': 3,
    'label': 4,
  }


@pytest.mark.parametrize(
  'content, text, suffix, wanted',
  [
    (b'\xef\xbb\xbf {"text": "a"}\n', None, '.jsonl', ['0:a']),
    (b'one\ntwo\n', None, '.txt', ['0:one', '1:two']),
    (b'id,news\n1,a b\n', 'news', '.csv', ['0:a b']),
    (b'id\tnews\n1\ta, b\n', 'news', '.tsv', ['0:a, b']),
  ],
)
def test_standard_input(tmp_path, content, text, suffix, wanted):
  first = spool(io.BytesIO(content), tmp_path, text)
  assert first.suffix == suffix and texts(first, text=text) == wanted
  stamp = first.name, first.stat().st_mtime_ns
  again = spool(io.BytesIO(content), tmp_path, text)
  assert (again.name, again.stat().st_mtime_ns) == stamp
  other = spool(io.BytesIO(content + content), tmp_path, text)
  assert other.name != again.name
