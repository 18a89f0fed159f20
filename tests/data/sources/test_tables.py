"""JSON Lines, CSV, TSV, Parquet: the same documents from each, and each form of bad input named by
file and line.
"""

import csv as python_csv
import gzip
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.sources import csv, jsonl, parquet

ROWS = [
  {'text': 'plain', 'other': 'p', 'label': 'x'},
  {'text': 'comma, "quote" and\nline end', 'other': 'q', 'label': 'y'},
  {'text': '中文，好', 'other': 'r', 'label': 'x'},
  {'text': '', 'other': '', 'label': 'z'},
]
WANT = [{'text': row['text'], 'pair': row['other'], 'label': row['label']} for row in ROWS]


def documents(source):
  return [source[i] for i in range(len(source))]


def write_csv(path, rows=ROWS, **options):
  with open(path, 'w', newline='', encoding='utf-8') as file:
    writer = python_csv.DictWriter(file, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
  return str(path)


def write_jsonl(path, rows=ROWS):
  content = ''.join(json.dumps(row) + '\n' for row in rows).encode()
  path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)
  return str(path)


def write_parquet(path, rows=ROWS, **options):
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
  return str(path)


def test_each_format_gives_the_same_documents(tmp_path):
  options = dict(pair='other', label='label')
  sources = [
    jsonl.Source(write_jsonl(tmp_path / 'a.jsonl'), **options),
    jsonl.Source(write_jsonl(tmp_path / 'a.jsonl.gz'), **options),
    csv.Source(write_csv(tmp_path / 'a.csv'), **options),
    csv.Source(
      write_csv(tmp_path / 'b.csv', delimiter=';', lineterminator='\n'), delimiter=';', **options
    ),
    parquet.Source(write_parquet(tmp_path / 'a.parquet', row_group_size=3), **options),
  ]
  for source in sources:
    assert documents(source) == WANT
    assert documents(pickle.loads(pickle.dumps(source))) == WANT
    assert source[-1] == WANT[-1] and source[1] == WANT[1]
    with pytest.raises(IndexError):
      source[len(WANT)]
  assert len({source.fingerprint for source in sources}) == len(sources)
  assert documents(jsonl.Source(str(tmp_path))) == [{'text': row['text']} for row in ROWS] * 2


def test_an_objective_may_read_further_fields(tmp_path):
  rows = [dict(row, words=row['text'].split(), number=n) for n, row in enumerate(ROWS)]
  as_strings = [dict(row, words=' '.join(row['words']), number=str(row['number'])) for row in rows]
  asked = dict(text='', label='label', fields=('words', 'number'))
  want = [{key: row[key] for key in ('words', 'number', 'label')} for row in rows]
  assert documents(jsonl.Source(write_jsonl(tmp_path / 'a.jsonl', rows), **asked)) == want
  assert documents(parquet.Source(write_parquet(tmp_path / 'a.parquet', rows), **asked)) == want
  table = csv.Source(write_csv(tmp_path / 'a.csv', as_strings), **asked)
  assert documents(table) == [{key: row[key] for key in want[0]} for row in as_strings]
  given = jsonl.Source(str(tmp_path / 'a.jsonl'), target='label')
  assert documents(given) == [{'text': row['text'], 'target': row['label']} for row in ROWS]
  assert given.fingerprint != jsonl.Source(str(tmp_path / 'a.jsonl'), label='label').fingerprint
  kept = jsonl.Source(str(tmp_path / 'a.jsonl'), fields=('other',))
  assert documents(kept) == [{key: row[key] for key in ('text', 'other')} for row in ROWS]
  assert kept.fingerprint != jsonl.Source(str(tmp_path / 'a.jsonl')).fingerprint


@pytest.mark.parametrize(
  'options, said',
  [
    (dict(fields=('wrods',)), r"no field 'wrods' \(did you mean 'words'.*option `fields`"),
    (dict(fields=('label',)), "names 'label', which is taken"),
    (dict(fields=('words', 'words')), "names 'words', which is taken"),
    (dict(text=''), "text='' leaves no field"),
    (dict(target='lable'), r"no field 'lable' .did you mean 'label'.*option `target`"),
  ],
)
def test_further_fields_that_cannot_be(tmp_path, options, said):
  path = write_csv(tmp_path / 'a.csv', [dict(text='t', label='x', words='w')])
  with pytest.raises(ValueError, match=said):
    csv.Source(path, **options)


def test_labels_take_the_forms_of_the_contract(tmp_path):
  rows = [{'text': 't', 'label': label} for label in ('a', 3, True, 2.5, ['b', 'c'], [])]
  want = ['a', '3', 'True', 2.5, ['b', 'c'], []]
  source = jsonl.Source(write_jsonl(tmp_path / 'a.jsonl', rows), label='label')
  assert [document['label'] for document in documents(source)] == want
  for name, label in (('int', 3), ('bool', True), ('float', 2.5), ('list', ['b', 'c'])):
    path = write_parquet(tmp_path / f'{name}.parquet', [{'text': 't', 'label': label}])
    assert parquet.Source(path, label='label')[0]['label'] == {'int': '3', 'bool': 'True'}.get(
      name, label
    )


@pytest.mark.parametrize(
  'line, said',
  [
    ('{"text": ', r'bad.jsonl:3: not a JSON object'),
    ('["text"]', r'bad.jsonl:3: a list'),
    ('{"txt": "a", "label": "x"}', r"bad.jsonl:3: no field 'text' \(did you mean 'txt'"),
    ('{"text": 5, "label": "x"}', r"bad.jsonl:3: field 'text' is 5, of type int"),
    ('{"text": "\\ud800", "label": "x"}', r'bad.jsonl:3: .*surrogate'),
    ('{"text": "a"}', r"bad.jsonl:3: no field 'label'"),
    ('{"text": "a", "label": [null]}', r'bad.jsonl:3: .* lists a name that is missing'),
    ('{"text": "a", "label": NaN}', r'bad.jsonl:3: .*finite'),
    ('{"text": "a", "label": {"b": 1}}', r'bad.jsonl:3: .*of type dict'),
    ('{"text": "\xe9", "label": "x"}', r'bad.jsonl:3: not a JSON object in UTF-8'),
  ],
)
def test_a_bad_json_line_is_named(tmp_path, line, said):
  (tmp_path / 'bad.jsonl').write_bytes(
    b'\xef\xbb\xbf{"text": "a", "label": "x"}\r\n\n' + line.encode('latin-1') + b'\n'
  )
  source = jsonl.Source(str(tmp_path / 'bad.jsonl'), label='label')
  assert source[0] == {'text': 'a', 'label': 'x'}
  with pytest.raises(ValueError, match=said):
    source[1]


@pytest.mark.parametrize(
  'content, said',
  [
    ('text,label\na,x\nb\n', r'bad.csv:3: 1 fields where the header has 2'),
    ('text,label\na,x\n"b,x\nc,y\n', r'bad.csv:3: malformed'),
    ('text,label\n', 'empty corpus'),
  ],
)
def test_a_bad_csv_record_is_named(tmp_path, content, said):
  (tmp_path / 'bad.csv').write_text(content)
  with pytest.raises(ValueError, match=said):
    len(csv.Source(str(tmp_path / 'bad.csv')))


def test_bad_csv_columns_and_options(tmp_path):
  (tmp_path / 'a.csv').write_text('txt,label,label\na,x,\n')
  with pytest.raises(ValueError, match=r"a.csv, header: no field 'text' \(did you mean 'txt'"):
    csv.Source(str(tmp_path / 'a.csv'))
  with pytest.raises(ValueError, match="2 columns are named 'label'"):
    csv.Source(str(tmp_path / 'a.csv'), text='txt', label='label')
  with pytest.raises(ValueError, match='one character'):
    csv.Source(str(tmp_path / 'a.csv'), delimiter='||')
  (tmp_path / 'b.csv').write_text('\ufefftext,label\n\na,\n')
  unlabelled = csv.Source(str(tmp_path / 'b.csv'), label='label')
  assert unlabelled[0] == {'text': 'a'} and unlabelled.where(0).endswith('b.csv:3')
  (tmp_path / 'c.csv').write_bytes(b'text\n\xff\n')
  with pytest.raises(ValueError, match=r'c.csv:2: not UTF-8'):
    len(csv.Source(str(tmp_path / 'c.csv')))
  (tmp_path / 'd.csv').write_text('')
  with pytest.raises(ValueError, match='d.csv is empty; its first line must name the columns'):
    csv.Source(str(tmp_path / 'd.csv'))


def test_quotes_in_a_tsv_are_plain_characters(tmp_path):
  (tmp_path / 'a.tsv').write_text('text\tlabel\n"so it begins\t1\n5" disk\t0\n')
  want = [{'text': '"so it begins', 'label': '1'}, {'text': '5" disk', 'label': '0'}]
  assert documents(csv.Source(str(tmp_path / 'a.tsv'), label='label')) == want
  (tmp_path / 'a.csv').write_text((tmp_path / 'a.tsv').read_text())
  assert documents(csv.Source(str(tmp_path / 'a.csv'), label='label', delimiter=r'\t')) == want


def test_a_csv_field_may_be_long(tmp_path):
  path = write_csv(tmp_path / 'long.csv', [{'text': 'long ' * 60_000}])
  assert csv.Source(path)[0]['text'] == 'long ' * 60_000


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(alphabet='a,;"\n \t一', max_size=8), min_size=1, max_size=6))
def test_csv_comes_back_from_what_python_wrote(tmp_path_factory, texts):
  path = write_csv(
    tmp_path_factory.mktemp('csv') / 'x.csv', [{'text': text, 'n': 'n'} for text in texts]
  )
  source = csv.Source(path)
  assert [source[i]['text'] for i in reversed(range(len(source)))] == texts[::-1]


def test_bad_parquet(tmp_path):
  (tmp_path / 'fake.parquet').write_text('no table')
  with pytest.raises(ValueError, match='fake.parquet: not a Parquet file'):
    parquet.Source(str(tmp_path / 'fake.parquet'))
  path = write_parquet(
    tmp_path / 'a.parquet', [{'text': 'a', 'label': ['x']}, {'text': 'b', 'label': [None]}]
  )
  with pytest.raises(ValueError, match=r"no field 'labels' \(did you mean 'label'"):
    parquet.Source(path, label='labels')
  with pytest.raises(ValueError, match=r'a.parquet, row group 0, row 1: .*missing'):
    parquet.Source(path, label='label')[1]


def test_several_parquet_files_follow_one_another(tmp_path):
  for part in range(3):
    write_parquet(
      tmp_path / f'{part}.parquet', [{'text': f'{part} {i}'} for i in range(5)], row_group_size=2
    )
  source = parquet.Source(str(tmp_path))
  assert [document['text'] for document in documents(source)] == [
    f'{part} {i}' for part in range(3) for i in range(5)
  ]


def test_a_header_that_another_delimiter_cuts(tmp_path):
  path = tmp_path / 'x.csv'
  path.write_text('text;label\na;b\n')
  with pytest.raises(ValueError, match="one column, 'text;label'; where ';' separates columns"):
    csv.Source(str(path))
  assert csv.Source(str(path), delimiter=';')[0] == {'text': 'a'}
  assert csv.Source(str(path), text='text;label')[0] == {'text': 'a;b'}
