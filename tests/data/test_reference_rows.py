"""Rows of reinforcement learning, and seeds: every form asks the same, and odd ones are dropped."""

import json

import pytest

from dcore_jax.chat.tool_calls import parse_calls
from dcore_jax.data.records import rl_points
from dcore_jax.data.seed_sources import config_seeds, load_seeds
from dcore_jax.data.seeds import Seed
from dcore_jax.run.config import default_config

TOOLS = [
  {
    'type': 'function',
    'function': {
      'name': 'get weather',
      'description': 'Weather.',
      'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}},
    },
  }
]
ASKED = [{'role': 'user', 'content': 'Weather in Paris?'}]
CALL = {'name': 'get weather', 'arguments': {'city': 'Paris'}}
WRAPPED = {'id': 'c', 'type': 'function', 'function': {**CALL, 'arguments': '{"city": "Paris"}'}}
REFERENCE = "[get_weather(city='Paris')]"


def write(path, records):
  path.write_text('\n'.join(json.dumps(record) for record in records))
  return str(path)


@pytest.mark.parametrize(
  'fields',
  [
    {'messages': [*ASKED, {'role': 'assistant', 'content': None, 'tool_calls': [WRAPPED]}]},
    {'messages': ASKED, 'ground_truth': [CALL]},
    {'messages': ASKED, 'ground_truth': [WRAPPED]},
    {'messages': ASKED, 'answer': json.dumps([CALL])},
    {'messages': ASKED, 'answer': REFERENCE},
    {'messages': ASKED, 'reference': CALL},
    {'messages': ASKED, 'reference': str([CALL])},
    {'messages': ASKED, 'reference': REFERENCE[1:-1]},
    {
      'prompt': ASKED,
      'reward_model': {
        'ground_truth': '<think> a <tool_call> </think>\n'
        f'<tool_call>\n{json.dumps(CALL)}\n</tool_call>'
      },
    },
    {'messages': ASKED, 'reference': ["get_weather(city='Paris')"]},
    {'conversations': ASKED, 'answer': f'<tool_call>\n{json.dumps(CALL)}\n</tool_call>'},
    {'prompt': ASKED, 'reward_model': {'ground_truth': [CALL], 'style': 'rule'}, 'ability': 'x'},
    {'prompt': 'Weather in Paris?', 'completion': f'<tool_call>{json.dumps(CALL)}</tool_call>'},
  ],
)
def test_every_form_asks_the_same(tmp_path, fields):
  path = write(tmp_path / 'rows.jsonl', [{**fields, 'tools': TOOLS}])
  (point,) = rl_points([path])
  assert point.reference == REFERENCE and point.kind == 'single' and point.id == 'rows-0'
  system, query = point.messages
  assert '"name": "get_weather"' in system.content and query.content == 'Weather in Paris?'
  (seed,) = load_seeds(path, count=1, seed=0).seeds
  assert list(seed.calls) == parse_calls(REFERENCE) and seed.conversations == point.messages


def test_words_and_longer_histories(tmp_path):
  messages = [
    *ASKED,
    {'role': 'assistant', 'content': '', 'tool_calls': [WRAPPED]},
    {'role': 'tool', 'tool_call_id': 'c', 'content': '18 C'},
  ]
  records = [
    {'messages': messages, 'tools': TOOLS, 'answer': 'It is 18 degrees.', 'id': 5},
    {'messages': [*messages, {'role': 'assistant', 'content': 'It is 18.', 'reasoning': 'hm'}]},
    {'messages': messages, 'answer': '<think> x </think>\n<response> yes (of course) </response>'},
  ]
  first, second, third = rl_points([write(tmp_path / 'rows.jsonl', records)])
  assert first.reference == 'It is 18 degrees.' and first.kind == 'irrelevant' and first.id == '5'
  assert [m.content for m in first.messages[2:]] == [
    REFERENCE,
    '<tool_response>\n18 C\n</tool_response>',
  ]
  assert third.reference == 'yes (of course)'
  assert second.reference == 'It is 18.' and second.messages[1].content == REFERENCE


ODD = [
  {'messages': [], 'answer': 'x'},
  {'messages': ASKED, 'answer': 3},
  {'messages': ASKED, 'answer': ''},
  {'messages': ASKED, 'answer': '[f(a=]'},
  {'messages': ASKED, 'answer': [{'f': {'a': [1]}}]},
  {'messages': ASKED, 'answer': 'x', 'reference': 'y'},
  {'messages': ASKED, 'answer': 'x', 'images': ['a']},
  {'messages': [*ASKED, {'role': 'assistant', 'content': 'x'}], 'answer': 'x'},
  {'messages': ASKED},
  {'messages': [{'role': 'user', 'content': 'x\ud800'}], 'answer': 'x'},
  {'instruction': 3, 'input': 'x', 'output': 'y'},
  {'what': 1},
  [1],
  None,
]


@pytest.mark.parametrize('odd', ODD)
def test_odd_rows_are_named_or_dropped_and_counted(tmp_path, odd, caplog):
  good = {'messages': ASKED, 'answer': 'x'}
  path = write(tmp_path / 'rows.jsonl', [odd, good])
  with pytest.raises(ValueError, match='rows.jsonl, row 0, cannot be read.*rl.unreadable'):
    rl_points([path])
  (point,) = rl_points([path], unreadable='drop')
  assert point.reference == 'x' and '1 of 2 records' in caplog.text
  with pytest.raises(ValueError, match='none of 1 records'):
    rl_points([write(tmp_path / 'odd.jsonl', [odd])], unreadable='drop')
  good = {'messages': ASKED, 'tools': TOOLS, 'answer': REFERENCE}
  found = load_seeds(write(tmp_path / 'seeds.jsonl', [odd, good]), count=1, seed=0)
  assert len(found.seeds) == 1 and found.dropped == {'unreadable record': 1}


def test_files_of_seeds(tmp_path):
  record = {
    'id': 's',
    'kind': 'single',
    'conversations': ASKED,
    'ground_truth': ["get_weather(city='Paris')"],
    'tool_response': ['18 C'],
    'answer': 'It is 18.',
  }
  lossy = record | {'tools': TOOLS}
  silent = record | {'conversations': [ASKED[0] | {'reasoning': 'x'}]}
  path = write(tmp_path / 'seeds.jsonl', [record, lossy, silent, [3]])
  config = default_config()
  config.distill.files = (path,)
  with pytest.raises(ValueError, match="seeds.jsonl, row 1, .*'tools'.*distill.unreadable"):
    config_seeds(config)
  config.distill.unreadable = 'drop'
  assert config_seeds(config) == [Seed.from_json(record)]
  points = rl_points([write(tmp_path / 'one.jsonl', [record])])
  assert [point.reference for point in points] == [REFERENCE, 'It is 18.']
