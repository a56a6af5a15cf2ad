"""Models and real rows: what is read, and what is refused by name."""

import json
import shutil

import pytest

from dcore_jax.chat.tool_calls import parse_calls
from dcore_jax.data import records as sources
from dcore_jax.files import read_rows
from dcore_jax.rollout import policy as policies
from dcore_jax.run.config import default_config


def test_files_that_cannot_be_parsed_name_the_line(tmp_path):
  (tmp_path / 'rows.jsonl').write_text('{"a": 1}\n\n{"a": \n')
  with pytest.raises(ValueError, match='rows.jsonl, line 3'):
    read_rows(tmp_path / 'rows.jsonl')
  (tmp_path / 'rows.json').write_text('{"a": 1}')
  with pytest.raises(ValueError, match='expected a list of objects'):
    read_rows(tmp_path / 'rows.json')


def test_a_missing_data_folder_is_one_clear_error(monkeypatch, tmp_path):
  monkeypatch.setenv('DCORE_DATA', str(tmp_path / 'nowhere'))
  with pytest.raises(ValueError, match='toolrl/rlla_sft.json.*nowhere.*DCORE_DATA'):
    sources.rl_points(['toolrl/rlla_sft.json'])


def test_published_rows(data_dir, monkeypatch):
  monkeypatch.setenv('DCORE_DATA', str(data_dir))
  points = sources.rl_points(['toolrl/rlla_sft.json'])
  assert len(points) == 400
  calls = [parse_calls(p.reference) for p in points]
  assert sum(c is None for c in calls) == 54  # answered in words
  found = sources.sft_rows(['dcore_sft_sample/rows.json', 'toolrl/rlla_sft.json'])
  rows = found.rows
  assert (
    len(rows) == 402
    and [len(r['conversations']) for r in rows[:2]] == [5, 7]
    and not found.unreadable
  )
  assert json.dumps(rows)
  packed = sources.sft_rows(
    ['dcore_sft_sample/packed_16k.jsonl']
  ).rows  # the same two rows, put together
  assert [row['conversations'] for row in packed] == [row['conversations'] for row in rows[:2]]


CHAT = {
  'conversations': [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'ho'}]
}
XLAM = {
  'id': 1,
  'query': 'q',
  'tools': '[{"name": "f", "parameters": {}}]',
  'answers': '[{"name": "f", "arguments": {}}]',
}


def write(path, records):
  path.write_text('\n'.join(map(json.dumps, records)))
  return str(path)


def test_a_schema_is_recognised_or_named_and_an_unknown_one_is_an_error(tmp_path):
  path = write(tmp_path / 'mixed.jsonl', [CHAT, XLAM])
  assert [row['id'] for row in sources.sft_rows([path]).rows] == ['mixed-0', '1']
  assert [
    row['id'] for row in sources.sft_rows(['xlam:' + write(tmp_path / 'x.jsonl', [XLAM])]).rows
  ] == ['1']
  with pytest.raises(
    ValueError, match="mixed.jsonl, row 0, cannot be read as xlam: it lacks 'answers'"
  ):
    sources.sft_rows([f'xlam:{path}'])
  path = write(tmp_path / 'odd.jsonl', [CHAT, {'text': 'x', 'label': 3}])
  with pytest.raises(
    ValueError, match=r"odd.jsonl, row 1, .*no known schema has the fields \['label', 'text'\]"
  ):
    sources.sft_rows([path])
  found = sources.sft_rows([path], unreadable='drop')
  assert len(found.rows) == 1 and found.unreadable == 1


def test_unreadable_records_are_an_error_or_counted(tmp_path, caplog):
  broken = XLAM | {'answers': '[]'}
  path = write(tmp_path / 'x.jsonl', [XLAM, broken, XLAM])
  with pytest.raises(
    ValueError, match='x.jsonl, row 1, cannot be read as xlam: the list of calls is empty'
  ):
    sources.sft_rows([path])
  found = sources.sft_rows([path], unreadable='drop')
  assert len(found.rows) == 2 and found.unreadable == 1
  assert '1 of 3 records' in caplog.text and 'row 1' in caplog.text
  with pytest.raises(ValueError, match='none of 1 records can be read'):
    sources.sft_rows([write(tmp_path / 'y.jsonl', [broken])], unreadable='drop')
  for option in (dict(unreadable='ignore'), dict(call_style='xml')):
    with pytest.raises(ValueError, match=f'sft.{next(iter(option))}'):
      sources.sft_rows([path], **option)
  (tmp_path / 'empty.jsonl').write_text('')
  with pytest.raises(ValueError, match='empty.jsonl holds no records'):
    sources.sft_rows([str(tmp_path / 'empty.jsonl')])


def test_parquet_files_and_folders_go_through_datasets(tmp_path, monkeypatch):
  import datasets

  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  (tmp_path / 'folder').mkdir()
  # Two records of different fields: Arrow fills both with nulls, which must not make fields of
  # them.
  data = datasets.Dataset.from_list(
    [
      {**CHAT, 'query': None, 'tools': None, 'answers': None},
      {**{k: str(v) for k, v in XLAM.items() if k != 'id'}, 'conversations': None},
    ]
  )
  data.to_parquet(str(tmp_path / 'folder' / 'train.parquet'))
  expected = [
    CHAT['conversations'],
    sources.sft_rows([write(tmp_path / 'x.jsonl', [XLAM])]).rows[0]['conversations'],
  ]
  assert [
    row['conversations']
    for row in sources.sft_rows([str(tmp_path / 'folder' / 'train.parquet')]).rows
  ] == expected
  assert [
    row['conversations'] for row in sources.sft_rows([str(tmp_path / 'folder')]).rows
  ] == expected
  # A configuration is what the card of the folder says it is.
  (tmp_path / 'folder' / 'README.md').write_text(
    '---\nconfigs:\n- config_name: part\n  data_files: train.parquet\n---\n'
  )
  rows = sources.sft_rows([f'{tmp_path / "folder"}#part']).rows
  assert [row['conversations'] for row in rows] == expected
  with pytest.raises(ValueError, match="folder#nope' cannot be read"):
    sources.sft_rows([f'{tmp_path / "folder"}#nope'])
  with pytest.raises(ValueError, match='is not there'):
    sources.sft_rows(['nowhere/rows.jsonl'])


def test_the_organism_loads_and_fits():
  policy = policies.load_policy(default_config().model, seed=0)
  assert policy.stop_ids == [policy.tokenizer.convert_tokens_to_ids('<|im_end|>')]
  assert policy.config.param_count * 2 <= 12e6  # bytes in bf16
  assert sum(f.stat().st_size for f in policies.ORGANISM.glob('*.safetensors')) <= 12e6


def test_every_stop_token_of_a_generation_config_counts(tmp_path):
  folder = shutil.copytree(policies.ORGANISM, tmp_path / 'model')
  config = default_config().model
  config.path = str(folder)
  for ids, more in (([3, 573], {3}), (4, {4}), (None, set())):
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': ids}))
    policy = policies.load_policy(config, seed=0)
    assert set(policy.stop_ids) == more | {policy.tokenizer.eos_token_id}
  (folder / 'generation_config.json').write_text('{"eos_token_id": ["x"]}')
  with pytest.raises(ValueError, match='generation_config.json: eos_token_id'):
    _ = policies.load_policy(config, seed=0).stop_ids
