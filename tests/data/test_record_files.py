"""Files of records: a fault of the file is an error, a fault of a record is that record's alone."""

import gzip
import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcore_jax.data.record_files import MAX_DEPTH, Unreadable, read_records
from dcore_jax.data.records import load_records, sft_rows

ROW = {'prompt': 'hi', 'completion': 'ho\u2028é'}
ODD = {
  'list': '[1]',
  'number': '3',
  'null': 'null',
  'text': '"x"',
  'cut': '{"prompt": "a", "completion": ',
  'twice': '{"prompt": "a", "completion": "b", "prompt": "c"}',
  'nan': '{"prompt": "a", "completion": NaN}',
  'infinite': '{"prompt": "a", "completion": 1e999}',
  'surrogate': '{"prompt": "a", "completion": "\\ud800"}',
  'deep': '{"prompt": ' + '[' * 5000 + ']' * 5000 + '}',
  'huge': '{"prompt": ' + '9' * 5000 + '}',
  'brackets': '{"prompt": "]", "completion": ]}',
}


@pytest.mark.parametrize(
  'kind, suffix',
  [(kind, '.jsonl') for kind in ODD]
  # Where a record of a list ends can only be told while its brackets fit.
  + [(kind, '.json') for kind in ODD if kind not in ('cut', 'brackets')],
)
def test_an_odd_record_is_one_unreadable_row_wherever_it_stands(tmp_path, kind, suffix):
  path = tmp_path / f'rows{suffix}'
  good = json.dumps(ROW)
  for place in range(3):
    texts = [good, good]
    texts.insert(place, ODD[kind])
    path.write_text('\n'.join(texts) if suffix == '.jsonl' else '[' + ', '.join(texts) + ']')
    records = read_records(path)
    assert [isinstance(record, Unreadable) for record in records] == [
      number == place for number in range(3)
    ]
    found = sft_rows([str(path)], unreadable='drop')
    assert len(found.rows) == 2 and found.unreadable == 1
    with pytest.raises(ValueError, match=rf'rows{suffix}, row {place}, cannot be read: '):
      sft_rows([str(path)])
  path.write_text(ODD[kind] if suffix == '.jsonl' else f'[{ODD[kind]}]')
  with pytest.raises(ValueError, match='none of 1 records can be read'):
    sft_rows([str(path)], unreadable='drop')


def test_pairs_of_surrogates_and_deep_but_bearable_records_are_read(tmp_path):
  path = tmp_path / 'rows.jsonl'
  nested = '[' * (MAX_DEPTH - 1) + ']' * (MAX_DEPTH - 1)
  path.write_text('{"a": "\\ud83d\\ude00"}\n{"a": ' + nested + '}\n{"a": [' + nested + ']}')
  first, second, third = read_records(path)
  assert first == {'a': '😀'} and isinstance(second, dict) and isinstance(third, Unreadable)


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(st.characters(codec='utf-8')),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
  max_leaves=8,
)


@given(
  st.lists(st.dictionaries(st.text(st.characters(codec='utf-8')), VALUES, max_size=3), max_size=4),
  st.sampled_from([None, 2]),
  st.booleans(),
)
def test_lists_are_read_as_json_reads_them(tmp_path_factory, records, indent, ascii_only):
  path = tmp_path_factory.mktemp('files') / 'rows.json'
  path.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii_only), encoding='utf-8')
  assert read_records(path) == records


def zstd(data):
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, 'zstd') as file:
    file.write(data)
  return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
  'suffix, pack', [('', bytes), ('.gz', gzip.compress), ('.zst', zstd)], ids=['plain', 'gz', 'zst']
)
def test_marks_compression_and_kinds(tmp_path, suffix, pack):
  line = json.dumps(ROW, ensure_ascii=False).encode()
  files = {
    'a.jsonl': b'\xef\xbb\xbf' + line + b'\r\n\n\xef\xbb\xbf' + line,
    'b.json': b'\xef\xbb\xbf [' + line + b',\n' + line + b']\n',
    'c.json': line + b'\n' + line,  # JSON lines under the other name
    'd.csv': '\ufeffprompt,completion,id\n"hi","ho\u2028é",\nhi,"ho\u2028é",\n'.encode(),
  }
  for name, data in files.items():
    path = tmp_path / (name + suffix)
    path.write_bytes(pack(data))
    assert load_records(str(path)) == [ROW, ROW]
  if suffix:
    for data in (b'no archive', pack(files['a.jsonl'])[:-9]):
      path.write_bytes(data)
      with pytest.raises(ValueError, match=f'd.csv{suffix} cannot be read'):
        load_records(str(path))


@pytest.mark.parametrize(
  'data, reason',
  [
    ('{"a": 1}'.encode('utf-16'), 'line 1 is not UTF-8'),
    ('{"a": 1}'.encode('utf-16-le'), 'line 1 is not UTF-8'),
  ],
)
def test_other_encodings_are_named(tmp_path, data, reason):
  for name in ('odd.jsonl', 'odd.json', 'odd.csv'):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f'{name}, {reason}'):
      sft_rows([str(tmp_path / name)], unreadable='drop')


@pytest.mark.parametrize(
  'name, text, reason',
  [
    ('a.json', '[{"a": 1}', 'the list never ends'),
    ('a.json', '[{"a": 1},\n]', 'line 2 is not JSON: a comma'),
    ('a.json', '[{"a": 1}] x', 'text follows the list'),
    ('a.json', '{"data":\n [{"a": 1}]}', 'expected a list of objects'),
    ('a.json', '3', 'expected a list of objects'),
    ('a.csv', 'prompt,prompt\n1,2', 'two columns have one name'),
    ('a.csv', 'prompt,"a"b\nc,d', 'a.csv, line 1 is not CSV'),
    ('a.txt', 'x', 'is no file of rows'),
  ],
)
def test_a_file_that_is_no_list_of_records_is_an_error(tmp_path, name, text, reason):
  path = tmp_path / name
  path.write_text(text)
  with pytest.raises(ValueError, match=reason):
    load_records(str(path))


@pytest.mark.parametrize(
  'odd, reason',
  [
    ('hi,ho,x', 'line 3 has more cells than the header'),
    ('"a"b,c', 'line 3 is not CSV'),
    ('"never closed,ho', 'line 3 is not CSV'),
    ('hi,caf\udce9', 'line 3 is not UTF-8 text: it holds the byte 0xe9'),
  ],
)
def test_an_odd_csv_row_is_one_unreadable_row(tmp_path, odd, reason):
  path = tmp_path / 'rows.csv'
  text = f'prompt,completion\nhi,ho!\n{odd}\n"good",day\nhi,ho\n'
  path.write_bytes(text.encode('utf-8', 'surrogateescape'))
  found = sft_rows([str(path)], unreadable='drop')
  assert [row['conversations'][-1]['content'] for row in found.rows] == ['ho!', 'day', 'ho']
  assert found.unreadable == 1
  with pytest.raises(ValueError, match=f'rows.csv, row 1, cannot be read: {reason}'):
    sft_rows([str(path)])


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json'])
def test_a_byte_that_is_not_utf8_makes_one_row_unreadable(tmp_path, name):
  lines = [json.dumps(ROW, ensure_ascii=False).encode() for _ in range(3)]
  lines[1] = lines[1].replace('é'.encode(), 'é'.encode('latin-1'))
  packed = b'[' + b',\n'.join(lines) + b']' if name == 'a.json' else b'\n'.join(lines)
  (tmp_path / name).write_bytes(packed)
  found = sft_rows([str(tmp_path / name)], unreadable='drop')
  assert len(found.rows) == 2 and found.unreadable == 1
  with pytest.raises(ValueError, match=f'{name}, row 1, .*not UTF-8 text: it holds the byte 0xe9'):
    sft_rows([str(tmp_path / name)])
