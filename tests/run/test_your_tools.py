"""The path of docs/your_tools.md, from a server and ten conversations to a model that is served."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dcore_jax.worlds.mcpworld.connection import close_all
from dcore_jax.worlds.mcpworld.sessions import close_pools
from dcore_jax.worlds.toolworld.world import ToolWorld

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = {'find_order', 'cancel_order', 'refund_order'}


def conversation(task):
  """A ToolWorld task as an agent's log has it."""
  (turn,) = task.turns
  messages = [
    {'role': 'system', 'content': task.policy},
    {'role': 'user', 'content': turn.query},
  ]
  for number, (call, output) in enumerate(zip(turn.calls, turn.responses, strict=True)):
    function = {'name': call.name, 'arguments': json.dumps(call.arguments)}
    made = {'id': f'call-{number}', 'type': 'function', 'function': function}
    messages.append({'role': 'assistant', 'content': None, 'tool_calls': [made]})
    messages.append({'role': 'tool', 'tool_call_id': made['id'], 'content': output})
  return {'messages': [*messages, {'role': 'assistant', 'content': turn.answer}]}


@pytest.fixture
def folder(tmp_path):
  """A person's folder: the server's state, its options and ten recorded conversations."""
  found = ToolWorld(2).tasks('single', 200, seed=3, split='train')
  found = [task for task in found if {call.name for call in task.turns[0].calls} <= TOOLS][:10]
  orders = {}
  for task in found:
    orders |= task.initial_state['orders']
  state = {**found[0].initial_state, 'orders': orders}
  (tmp_path / 'state.json').write_text(json.dumps(state))
  rows = [json.dumps(conversation(task)) for task in found]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(rows))
  options = {
    'command': f'{sys.executable} {ROOT}/tests/worlds/mcp_shop.py {tmp_path}/state.json',
    'tasks': f'{tmp_path}/tasks.jsonl',
    'reset': 'start_again',
    'listing': 'names',
    'start_timeout': 300,
    'timeout': 120,
  }
  (tmp_path / 'server.json').write_text(json.dumps(options))
  yield tmp_path
  close_pools()
  close_all()


def program(folder, *arguments, lines=''):
  """Runs a command of the guide; returns what it prints."""
  done = subprocess.run(
    [sys.executable, '-m', *arguments],
    cwd=folder,
    input=lines,
    text=True,
    capture_output=True,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.mark.slow
def test_ten_conversations_become_a_model(folder):
  pytest.importorskip('mcp', reason='the MCP SDK is not installed: pip install -e .[mcp]')
  made = json.loads(
    program(
      folder,
      'experiments.mcp_tasks',
      '--server=server.json',
      '--conversations=rows.jsonl',
      '--out=tasks.jsonl',
    )
  )
  assert (made['tasks'], made['held_out'], made['dropped']) == (10, 2, {})
  assert made['other_outputs'] == 0
  program(
    folder,
    'experiments.train',
    f'--config={ROOT}/configs/mcp_world.py:server.json,tiny',
    '--config.stages=("distill","sft","evaluate_sft","export")',
    '--workdir=runs/mine',
  )
  distilled = json.loads((folder / 'runs/mine/distill/distill.json').read_text())
  assert distilled['kept'] >= 4
  trajectories = (folder / 'runs/mine/evaluate_sft/trajectories.jsonl').read_text().splitlines()
  assert len(trajectories) == 2
  # The model of the run, with the server's tools: an empty line acts a held-out task out.
  said = program(
    folder,
    'experiments.chat',
    '--model=runs/mine/export',
    '--world=mcp:server.json',
    lines='\n/state\n',
  )
  assert 'find_order(customer)' in said and ('right after' in said or 'wrong: ' in said)
