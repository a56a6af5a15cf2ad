"""Made-up files in exactly the schemas of the published data sets, to try a whole run on.

They lie below a data folder (DCORE_DATA) under the names that the configs use, where they go before
the hub. Their tasks are ToolWorld's.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.data.benchmark_tasks import bfcl_tests
from dcore_jax.data.seed_sources import load_seeds
from dcore_jax.data.seeds import Seed
from dcore_jax.files import replace_text

TOOLACE = 'Team-ACE/ToolACE/data.json'
XLAM = 'Salesforce/xlam-function-calling-60k/xlam_function_calling_60k.json'
APIGEN_MT = 'Salesforce/APIGen-MT-5k/apigen-mt_5k.json'
TOOLRL = 'toolrl/rlla_rl.json'
TOOLRL_SFT = 'toolrl/rlla_sft.json'
PIVOT = 'nvidia/Nemotron-RL-Agentic-Conversational-Tool-Use-Pivot-v1/train.jsonl'
GSM8K = 'transfer/gsm8k_test.jsonl'
_POLICY = 'Use a listed tool, or say why none fits.'


def write_made_up(out: pathlib.Path, count: int = 12) -> dict[str, int]:
  """Writes the files below `out`; returns the number of records of each.

  ToolACE's file has one test task of BFCL where that is installed, and xLAM's a broken record: a
  run has something to refuse.

  Args:
    out: the data folder.
    count: tasks of each kind of ToolWorld.
  """
  seeds = [
    seed
    for seed in load_seeds('toolworld', count=count, seed=7).seeds
    if len(seed.conversations) == 2
  ]
  by_kind = {kind: [s for s in seeds if s.kind == kind] for kind in {s.kind for s in seeds}}
  single, parallel = by_kind['single'], by_kind['parallel']
  toolace = [_toolace(seed) for seed in single + parallel + by_kind['irrelevant']]
  toolace += _test_task(toolace[0])
  broken = {'id': -1, 'query': 'broken', 'tools': '[', 'answers': '[]'}
  files = {
    TOOLACE: toolace,
    XLAM: [_xlam(number, seed) for number, seed in enumerate(single + parallel)] + [broken],
    APIGEN_MT: [_apigen_mt(seed) for seed in by_kind['sequential']],
    TOOLRL: [_toolrl(seed) for seed in single + parallel + by_kind['irrelevant']],
    TOOLRL_SFT: [_toolrl(seed) for seed in single],
    PIVOT: [_pivot(number, seed) for number, seed in enumerate(by_kind['sequential'])],
    GSM8K: [{'question': f'What is {n} plus {n}?', 'answer': f'#### {2 * n}'} for n in range(1, 9)],
  }
  for name, records in files.items():
    if name.endswith('.jsonl'):
      text = ''.join(json.dumps(record) + '\n' for record in records)
    else:
      text = json.dumps(records)
    replace_text(out / name, text)
  return {name: len(records) for name, records in files.items()}


def _test_task(record: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns a record that asks what a test task of BFCL asks; none where BFCL is not installed."""
  try:
    query = next(bfcl_tests()).query
  except ValueError:
    return []
  first, *others = record['conversations']
  return [{**record, 'conversations': [{**first, 'value': query}, *others]}]


def _tools(seed: Seed) -> list[dict[str, Any]]:
  """Returns the specs of the tools that a seed's system message lists as name(parameter, ...)."""
  specs = []
  for line in seed.conversations[0].content.partition('tools:\n')[2].splitlines():
    name, _, inside = line.rstrip(')').partition('(')
    parameters = [word.strip() for word in inside.split(',') if word.strip()]
    properties = {word: {'type': 'string', 'description': word} for word in parameters}
    schema = {'type': 'object', 'properties': properties, 'required': parameters}
    specs.append({'name': name, 'description': name.replace('_', ' '), 'parameters': schema})
  return specs


def _query(seed: Seed) -> str:
  return seed.conversations[-1].content


def _json_calls(seed: Seed) -> list[dict[str, Any]]:
  return [{'name': call.name, 'arguments': dict(call.arguments)} for call in seed.calls]


def _said(speaker: str, text: str) -> dict[str, str]:
  return {'from': speaker, 'value': text}


def _toolace(seed: Seed) -> dict[str, Any]:
  system = (
    f'{_POLICY} Here is a list of functions in JSON format that you can invoke:\n'
    f'{json.dumps(_tools(seed))}\n'
    'Put it in the format of [func1(params_name=params_value)]. NO other text MUST be included.'
  )
  turns = [_said('user', _query(seed))]
  if seed.calls:
    turns.append(_said('assistant', print_calls(seed.calls)))
    turns += [_said('tool', output) for output in seed.tool_response]
  turns.append(_said('assistant', seed.answer or 'Done.'))
  return {'system': system, 'conversations': turns}


def _xlam(number: int, seed: Seed) -> dict[str, Any]:
  tools = []
  for tool in _tools(seed):
    parameters = {
      name: {'description': name, 'type': 'str'} for name in tool['parameters']['properties']
    }
    tools.append({**tool, 'parameters': parameters})
  # Other words than ToolACE's: the same request twice would be a duplicate.
  return {
    'id': number,
    'query': f'{_query(seed)} thanks',
    'tools': json.dumps(tools),
    'answers': json.dumps(_json_calls(seed)),
  }


def _apigen_mt(seed: Seed) -> dict[str, Any]:
  turns = [_said('human', _query(seed))]
  for call, output in zip(_json_calls(seed), seed.tool_response, strict=True):
    turns += [_said('function_call', json.dumps(call)), _said('observation', output)]
  turns.append(_said('gpt', seed.answer))
  return {'system': _POLICY, 'tools': json.dumps(_tools(seed)), 'conversations': turns}


def _toolrl(seed: Seed) -> dict[str, Any]:
  listed = '\n'.join(
    f'{number}. Name: {tool["name"]}\nDescription: {tool["description"]}\n'
    f'Parameters: {json.dumps(tool["parameters"]["properties"])}'
    for number, tool in enumerate(_tools(seed), 1)
  )
  calls = '\n'.join(
    json.dumps({'name': call['name'], 'parameters': call['arguments']})
    for call in _json_calls(seed)
  )
  answer = f'<tool_call>\n{calls}\n</tool_call>' if calls else f'<response>{seed.answer}</response>'
  return {
    'instruction': f'{_POLICY}\n\n**Available Tools**\n{listed}\n\n**Steps for Each Turn**\nThink.',
    'input': f'**Dialogue Records History**\n<user> {_query(seed)} </user>',
    'output': f'<think> I should use the appropriate tool. </think>\n{answer}',
  }


def _pivot(number: int, seed: Seed) -> dict[str, Any]:
  calls: Sequence[dict[str, Any]] = _json_calls(seed)
  named = [{**call, 'arguments': json.dumps(call['arguments'])} for call in calls]
  first, second = named[0], named[1]
  past = [
    {'role': 'system', 'content': _POLICY},
    {'role': 'user', 'content': _query(seed)},
    {'type': 'function_call', 'call_id': 'call_0', **first},
    {'type': 'function_call_output', 'call_id': 'call_0', 'output': seed.tool_response[0]},
  ]
  tools = [{'type': 'function', **tool, 'strict': True} for tool in _tools(seed)]
  return {
    'trajectory_id': number,
    'responses_create_params': {'input': past, 'tools': tools, 'parallel_tool_calls': False},
    'expected_action': {'type': 'function_call', **second},
    'scenario': None,
    'num_unique_actions': 2,
    'meta_info': {'turn': 1, 'step': 1, 'assistant_depth': 1},
    'qwen_235b_info': {'rewards': [0, 1], 'reward_mean': 0.5},
    'agent_ref': {'type': 'responses_api_agents', 'name': 'made_up'},
    'pass_rate': 0.5,
    'pass_rate_total': 2,
    'pass_rate_passed': 1,
  }
