"""Models and real rows: what is read, and what is refused by name."""
import json

import pytest

from dcore_jax.chat.tool_calls import parse_calls
from dcore_jax.run import sources
from dcore_jax.run.defaults import default_config


def toolrl_row(output):
  return {'instruction': 'Tools:\n1. Name: Get Top/Apps\nDescription: x\n\n**Steps for Each Turn**\nformat', 'input': '<user> hi </user>',
          'output': output}


def test_toolrl_row_becomes_a_decision_point():
  output = ('<think> use the <tool_call> tags </think>\n<tool_call>\n{"name": "Get Top/Apps", "parameters": {"n": 3}}\n'
            '{"name": "a.2b", "parameters": {}}\n</tool_call>')
  point, thought = sources.toolrl_point(toolrl_row(output), 'r')
  assert point.reference == '[Get_Top_Apps(n=3), a._2b()]'
  assert '1. Name: Get_Top_Apps\n' in point.messages[0].content and 'Steps for Each Turn' not in point.messages[0].content
  assert thought == 'use the <tool_call> tags'
  point, _ = sources.toolrl_point(toolrl_row('<think> x </think>\n<response> which one? </response>'), 'r')
  assert point.reference == 'which one?'


@pytest.mark.parametrize(('row', 'message'), [
    ({'input': 'x'}, 'lacks instruction, output'), (toolrl_row('<think> x </think>'), 'neither calls nor a response'),
    (toolrl_row('<think>x</think><tool_call>\n{"name": 3}\n</tool_call>'), 'needs a name and parameters'),
    (toolrl_row('<think>x</think><tool_call>\n{"name"\n</tool_call>'), 'not JSON')])
def test_bad_rows_are_named(row, message):
  with pytest.raises(ValueError, match=message) as error:
    sources.toolrl_point(row, 'row-17')
  assert 'row-17' in str(error.value)


def test_files_that_cannot_be_parsed_name_the_line(tmp_path):
  (tmp_path / 'rows.jsonl').write_text('{"a": 1}\n\n{"a": \n')
  with pytest.raises(ValueError, match='rows.jsonl, line 3'):
    sources.read_rows(tmp_path / 'rows.jsonl')
  (tmp_path / 'rows.json').write_text('{"a": 1}')
  with pytest.raises(ValueError, match='expected a list of objects'):
    sources.read_rows(tmp_path / 'rows.json')


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
  rows = sources.sft_rows(['dcore_sft_sample/rows.json', 'toolrl/rlla_sft.json'])
  assert len(rows) == 402 and [len(r['conversations']) for r in rows[:2]] == [5, 7]
  assert json.dumps(rows)


def test_the_organism_loads_and_fits():
  policy = sources.load_policy(default_config().model, seed=0)
  assert policy.stop_ids == [policy.tokenizer.convert_tokens_to_ids('<|im_end|>')]
  assert policy.config.param_count * 2 <= 12e6  # bytes in bf16
  assert sum(f.stat().st_size for f in sources.ORGANISM.glob('*.safetensors')) <= 12e6
