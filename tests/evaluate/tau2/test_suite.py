"""The suite of tau2-bench: figures, resuming, the scripted user, whose faults are whose.

The slow tests need tau2-bench's own environment, which `make tau2` makes.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcore_jax.evaluate.suites import Served, SuiteSettings, make_suite, write_result
from dcore_jax.evaluate.tau2 import environment as tau2_environment
from dcore_jax.evaluate.tau2 import score as tau2_score
from dcore_jax.evaluate.tau2.scripted_user import ScriptedUser, scripted_reply
from dcore_jax.evaluate.tau2.sides import Fault, Side, fault_of
from dcore_jax.evaluate.tau2.simulation import could_stop
from dcore_jax.evaluate.tau2.suite import Tau2, simulation_seed
from dcore_jax.files import data_folder, read_json, read_json_lines
from tests.evaluate.scripted_server import scripted_server
from tests.evaluate.tau2.agents import first_text, golden, silent

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
DATA = data_folder()
ENVIRONMENT = REPOSITORY / tau2_environment.FOLDER


def record(task, trial, reward=1.0, *, domain='airline', fault=None, **more):
  base = {'domain': domain, 'task': task, 'trial': trial, 'seed': 1, 'seconds': 1.0}
  base |= {'reward': None if fault else reward, 'fault': fault, 'ended': 'user_stop'}
  base |= {'breakdown': {'DB': reward}, 'problems': {'agent': {}, 'user': {}}, 'messages': []}
  return base | more


def fault(side, reason):
  return {'of': side, 'reason': reason, 'detail': ''}


# --- figures ---


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_hat_is_the_share_of_choices_that_are_all_right(trials, data):
  k = data.draw(st.integers(1, len(trials)))
  choices = list(itertools.combinations(trials, k))
  share = sum(all(choice) for choice in choices) / len(choices)
  assert tau2_score.pass_hat(sum(trials), len(trials), k) == pytest.approx(share, abs=1e-12)


def test_scores_are_of_tasks_and_leave_out_what_the_user_spoilt():
  records = [record('0', 0), record('0', 1), record('1', 0), record('1', 1, 0.0)]
  records += [record('2', 0, fault=fault('agent', 'context')), record('2', 1, 0.0)]
  # No verdict: this task has one trial left, and none of the two at once.
  records += [record('3', 0), record('3', 1, fault=fault('user', 'empty_reply'))]
  one, two = tau2_score.domain_scores('airline', records, 2, 0.25)
  assert (one.metric, one.estimate['n']) == ('pass^1', 4)
  assert one.estimate['mean'] == pytest.approx((1 + 1 / 2 + 0 + 1) / 4)
  assert (two.metric, two.estimate['n'], two.floor) == ('pass^2', 3, 0.25)
  assert two.estimate['mean'] == pytest.approx(1 / 3)


def test_the_overall_figure_is_the_mean_of_domains_of_any_size():
  records = [record(str(i), 0, float(i < 5)) for i in range(50)]
  records += [record(str(i), 0, float(i < 6), domain='retail') for i in range(10)]
  scores = tau2_score.domain_scores('airline', records, 1, 0.4)
  scores += tau2_score.domain_scores('retail', records, 1, 0.0)
  (overall,) = tau2_score.overall(scores, 2)
  assert overall.estimate['mean'] == pytest.approx((0.1 + 0.6) / 2)
  assert overall.floor == pytest.approx(0.2)
  errors = [score.estimate['standard_error'] for score in scores]
  assert overall.estimate['standard_error'] == pytest.approx(
    (errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2
  )
  low, high = overall.estimate['interval']
  assert low < 0.35 < high
  # One domain alone is no overall figure.
  assert tau2_score.overall(scores[:1], 2) == []


def test_faults_are_counted_by_who_made_them():
  cut = {'role': 'assistant', 'content': 'I', 'cut': True}
  wrong = {'agent': {'unknown_tool': 2}, 'user': {'failed_call': 1}}
  records = [
    record('0', 0, fault=fault('agent', 'arguments_not_json'), messages=[cut]),
    record('1', 0, fault=fault('user', 'empty_reply')),
    record('2', 0, 0.0, ended='never_stops'),
    record('3', 0, 0.0, ended='max_steps', problems=wrong),
    record('4', 0, fault=fault('harness', 'killed')),
  ]
  found = tau2_score.count_faults(records)
  assert found == {
    'airline': {
      'simulations': 5,
      'agent': {'arguments_not_json': 1, 'max_steps': 1},
      'user': {'empty_reply': 1, 'never_stops': 1},
      'harness': {'killed': 1},
      'agent_messages': {'unknown_tool': 2, 'cut_short': 1},
      'user_messages': {'failed_call': 1},
    }
  }
  notes = ' '.join(tau2_score.fault_notes(found))
  assert 'fault of the simulated user: empty_reply 1, never_stops 1.' in notes


# --- the suite, without its environment ---


@pytest.fixture
def suite(tmp_path):
  """A suite of two domains with three invented tasks each."""
  environment = tmp_path / 'environment'
  domains = environment / 'lib/python3.11/site-packages/tau2/data/tau2/domains'
  for domain in ('airline', 'retail'):
    folder = domains / domain
    folder.mkdir(parents=True)
    tasks = [{'id': str(i), 'evaluation_criteria': {'actions': []}} for i in range(4)]
    (folder / 'tasks.json').write_text(json.dumps(tasks))
    (folder / 'split_tasks.json').write_text(json.dumps({'base': ['2', '1', '0'], 'all': ['3']}))
  (environment / 'installed.txt').write_text(tau2_environment._contents())
  return Tau2(
    SuiteSettings(), ['airline', 'retail'], user='scripted', trials=2, environment=str(environment)
  )


def play(suite, monkeypatch, folder, count=100):
  """Answers with a worker that ends after so many jobs -> the jobs that it was given."""
  given = []

  def records(self, order, log):
    given.extend(order['jobs'])
    for job in order['jobs'][:count]:
      yield record(job['task'], job['trial'], 0.0 if job['trial'] is None else 1.0) | job
    if len(order['jobs']) > count:
      raise ConnectionError('it went away')

  monkeypatch.setattr(Tau2, '_records', records)
  told = []
  try:
    suite.answer(Served('http://127.0.0.1:1/v1', 'm'), folder, lambda *n: told.append(n))
  except ConnectionError:
    pass
  return given, told


def test_an_interrupted_evaluation_goes_on(suite, monkeypatch, tmp_path):
  folder = tmp_path / 'answers'
  # Six floors, then six of twelve simulations.
  given, told = play(suite, monkeypatch, folder, count=12)
  assert len(given) == 18 and told[-1] == (6, 12)
  lines = folder / 'simulations.jsonl'
  # A kill in the middle of a line.
  lines.write_bytes(lines.read_bytes()[:-7])
  given, told = play(suite, monkeypatch, folder)
  # Floors are not asked for again; the simulation that was cut short is.
  assert all(job['trial'] is not None for job in given)
  assert len(given) == 7 and (told[0], told[-1]) == ((5, 12), (12, 12))
  keys = [(row['domain'], row['task'], row['trial']) for row in read_json_lines(lines)]
  assert sorted(keys) == sorted(itertools.product(('airline', 'retail'), '012', (0, 1)))
  assert play(suite, monkeypatch, folder)[0] == []


def test_results_have_floors_and_say_what_is_missing(suite, monkeypatch, tmp_path):
  folder = tmp_path / 'answers'
  with pytest.raises(ValueError, match='no simulations'):
    suite.score(folder)
  play(suite, monkeypatch, folder, count=17)
  result, trajectories = suite.score(folder)
  write_result(folder, result, trajectories)
  scores = {(score.category, score.metric): score for score in result.scores}
  # The last simulation of retail is missing: its other trial still counts.
  assert scores['retail', 'pass^1'].estimate['n'] == 3
  assert scores['retail', 'pass^2'].estimate['n'] == 2
  assert scores['overall', 'pass^2'].floor == 0.0
  assert list(result.left_out) == [{'id': 'retail-2-1', 'reason': 'not run'}]
  assert len(trajectories) == 11 and trajectories[0]['id'] == 'airline-0-0'
  assert any('scripted' in note for note in result.notes)
  assert (folder / 'scores.csv').exists()


def test_a_limit_takes_the_first_tasks_and_is_noted(suite, monkeypatch, tmp_path):
  suite.settings = SuiteSettings(limit=2)
  given, _ = play(suite, monkeypatch, tmp_path / 'answers')
  assert {job['task'] for job in given} == {'0', '1'}
  result, _ = suite.score(tmp_path / 'answers')
  assert any('first 2 tasks' in note for note in result.notes)


def test_seeds_belong_to_task_and_trial():
  seeds = [
    simulation_seed(s, d, t, n) for s, d, t, n in itertools.product((0, 1), 'ab', 'cd', (0, 1))
  ]
  assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
  assert simulation_seed(0, 'a', 'c', 0) == seeds[0]


@pytest.mark.parametrize(
  'options,message',
  [
    ({'user': 'scripted', 'domains': 'airline,bank'}, 'domains'),
    ({'user': 'scripted', 'tasks': 'tau4'}, 'tasks'),
    ({'user': 'scripted', 'trials': 0}, 'trials'),
    ({'user': 'nobody'}, 'user'),
    ({}, 'user_base_url'),
    ({'user': 'scripted', 'turns': 3}, 'turns'),
  ],
)
def test_options_that_mean_nothing_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    make_suite('tau2', SuiteSettings(), options)


def test_a_key_that_is_not_set_is_missed_before_a_model_is_loaded(suite, monkeypatch):
  monkeypatch.delenv('NO_SUCH_KEY', raising=False)
  suite.user_key_env = 'NO_SUCH_KEY'
  with pytest.raises(ValueError, match='NO_SUCH_KEY'):
    suite.prepare()


def test_thoughts_and_calls_are_in_the_trajectories():
  messages = [
    {'role': 'user', 'content': 'Cancel it.'},
    {
      'role': 'assistant',
      'content': None,
      'reasoning': 'Look first.',
      'tool_calls': [{'name': 'look', 'arguments': {'id': 'Ä'}}],
    },
  ]
  found = tau2_score.trajectory(record('0', 0, 0.0, messages=messages))
  assert (found['query'], found['correct'], found['reason']) == ('Cancel it.', False, 'wrong: DB')
  # Its trials are one unit of `report.compare`.
  assert (found['id'], found['kind'], found['task']) == ('airline-0-0', 'airline', '0')
  assert found['messages'][1]['content'] == (
    '<think>\nLook first.\n</think>\n\n'
    '<tool_call>\n{"name": "look", "arguments": {"id": "Ä"}}\n</tool_call>'
  )


# --- the user and the worker, without tau2 ---


def test_the_scripted_user_tells_what_it_knows_and_stops():
  instructions = {
    'reason_for_call': 'You want to cancel.\n',
    'known_info': 'You are Emma.',
    'task_instructions': 'Insist.',
    'unknown_info': None,
  }

  def reply(said, text):
    return scripted_reply(instructions, said, text)

  assert reply(0, 'Hi! How can I help you today?') == 'You want to cancel.\nYou are Emma.'
  assert reply(1, 'Who are you?') == 'Insist.'
  assert reply(2, 'Shall I?') == reply(9, 'Shall I?') == 'Yes, please go ahead.'
  assert reply(10, 'Shall I?') == reply(2, 'Done.') == '###STOP###'
  assert reply(2, 'Is there anything else?') == '###STOP###'
  assert reply(1, 'YOU ARE BEING TRANSFERRED TO A HUMAN AGENT. PLEASE HOLD ON.') == '###TRANSFER###'
  assert scripted_reply('All of it.', 0, 'Hi!') == 'All of it.'
  assert scripted_reply('All of it.', 1, 'Go on.') == '###STOP###'


def error(name, text='', package='litellm.exceptions', base=Exception):
  return type(name, (base,), {'__module__': package})(text)


def test_errors_of_requests_have_reasons():
  away = error('InternalServerError', 'Connection error.')
  away.__cause__ = error('APIConnectionError', package='openai')
  # As our server says it, and litellm repeats only a part.
  long = error('BadRequestError', 'the prompt has 900 tokens')
  long.__context__ = error('BadRequestError', "{'code': 'context_length_exceeded'}", 'openai')
  assert fault_of('agent', long).reason == 'context'
  cases = {
    'arguments_not_json': json.JSONDecodeError('bad', '{', 1),
    'arguments_not_an_object': error('ValidationError', package='pydantic_core'),
    'context': error('BadRequestError', "This model's maximum context length is 512 tokens"),
    'bad_request': error('BadRequestError', 'no such field'),
    'timeout': error('Timeout'),
    'server_error': error('InternalServerError', '500'),
    'unreachable': away,
    'refused': error('AuthenticationError'),
  }
  for reason, raised in cases.items():
    found = fault_of('user', raised)
    assert (found.side, found.reason) == ('user', reason)
    assert found.final == (reason in ('unreachable', 'refused'))


class Said(types.SimpleNamespace):
  """A message of tau2, as far as a side reads it."""

  tool_calls = usage = raw_data = None

  def has_text_content(self):
    return bool(self.content)

  def is_tool_call(self):
    return False


@pytest.mark.parametrize(
  ('said', 'reason'), [('Cancel it.', None), ('', 'empty_reply'), ('{', 'arguments_not_json')]
)
def test_a_side_tells_what_it_says_and_is_to_blame_for_what_it_does_not(said, reason):
  """It stands where tau2's orchestrator asks: around the very method that tau2's own sides have."""

  def message(**fields):
    if fields['content'] == '{':
      raise json.JSONDecodeError('bad', '{', 1)
    return Said(**fields)

  told = []
  side = Side('user', ScriptedUser(said, message), told.append)
  state = side.get_init_state()
  hello = Said(role='assistant', content='Hi!')
  if reason is None:
    answer, state = side.generate_next_message(hello, state)
    assert (answer.content, state) == (said, 1)
    assert told[1]['message']['content'] == said
  else:
    with pytest.raises(Fault) as caught:
      side.generate_next_message(hello, state)
    assert (caught.value.side, caught.value.reason) == ('user', reason)
  assert told[0] == {'turn': 'user'}


def test_a_user_who_was_not_asked_again_could_not_stop():
  def spoken(*roles):
    return [types.SimpleNamespace(role=role) for role in roles]

  assert could_stop(spoken('assistant', 'user', 'assistant'))
  assert not could_stop(spoken('user', 'assistant', 'tool', 'assistant', 'tool'))


def work(tasks, folder, **order):
  """Runs the worker with a harness that does what the tasks' names say -> its lines."""
  side = {'base_url': 'http://127.0.0.1:9/v1', 'model': 'm'}
  jobs = [{'domain': 'airline', 'task': task, 'trial': 0, 'seed': 1} for task in tasks]
  order = {'agent': side, 'user': None, 'jobs': jobs, 'time_limit': 20, 'concurrency': 4} | order
  worker = subprocess.Popen(
    [sys.executable, REPOSITORY / 'tests/evaluate/tau2/fake_harness.py'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    encoding='utf-8',
    cwd=folder,
  )
  # Its input stays open: when it ends, the worker does.
  worker.stdin.write(json.dumps(order) + '\n')
  worker.stdin.flush()
  lines = [json.loads(line) for line in worker.stdout]
  worker.stdin.close()
  assert worker.wait(60) == 0
  return {line.get('task', 'stop'): line for line in lines}


def test_each_simulation_ends_and_says_whose_fault_it_was(tmp_path):
  tasks = ('good', 'dies', 'raises', 'empty user', 'elsewhere', 'writes', 'starts')
  found = work(tasks, tmp_path)
  assert set(found) == set(tasks)
  good = found['good']
  assert (good['reward'], good['fault'], good['ended']) == (1.0, None, 'user_stop')
  assert good['messages'] == [{'role': 'assistant', 'content': 'hello'}]
  assert good['problems'] == {'agent': {'unknown_tool': 1}, 'user': {}}
  sides = {task: (line['fault'] or {}).get('of') for task, line in found.items()}
  harness = dict.fromkeys(('dies', 'raises', 'elsewhere', 'writes', 'starts'), 'harness')
  assert sides == {'good': None, 'empty user': 'user'} | harness
  assert found['dies']['fault']['reason'] == 'killed'
  for task in ('elsewhere', 'writes', 'starts'):
    assert 'PermissionError' in found[task]['fault']['detail']
  assert not (tmp_path / 'written').exists()


def test_a_time_limit_ends_a_simulation_whatever_it_does(tmp_path):
  found = work(('slow user', 'endless sum'), tmp_path, time_limit=0.5)
  sides = {task: (line['fault']['of'], line['fault']['reason']) for task, line in found.items()}
  # The call was the agent's.
  assert sides == {'slow user': ('user', 'time_limit'), 'endless sum': ('agent', 'time_limit')}
  assert found['slow user']['messages']


def test_an_endpoint_that_is_not_there_ends_all(tmp_path):
  found = work(('nobody there', *'abcdefgh'), tmp_path, concurrency=1)
  assert found == {'stop': {'stop': 'the endpoint of the agent is unreachable: no such port'}}


# --- with tau2-bench itself ---


def answered(folder, tasks, limit, agent_of, **options):
  """Plays the scripted user against a scripted agent -> (scores by category, what is left out)."""
  if tau2_environment.package_of(ENVIRONMENT) is None:
    pytest.skip('make tau2 installs tau2-bench')
  settings = SuiteSettings(limit=limit, concurrency=2, data=DATA)
  if tasks == 'tau3' and not (DATA / 'tau3').exists():
    pytest.skip('no corrected tasks in the data folder')
  options = {'tasks': tasks, 'user': 'scripted', 'environment': str(ENVIRONMENT)} | options
  suite = Tau2(settings, **options)
  suite.prepare()
  groups = suite._tasks()
  agent = agent_of([task for group in groups.values() for task in group.values()])
  with scripted_server(agent) as url:
    suite.answer(Served(url, 'm'), folder, lambda done, total: None)
  result, _ = suite.score(folder)
  return {score.category: score for score in result.scores}, list(result.left_out)


@pytest.mark.slow
@pytest.mark.parametrize('tasks', ['package', 'tau3'])
def test_the_reference_actions_solve_every_task(tmp_path, tasks):
  scores, left_out = answered(tmp_path, tasks, 3, golden, domains='airline,retail')
  assert {name: score.estimate['mean'] for name, score in scores.items()} == dict.fromkeys(
    ('airline', 'retail', 'overall'), 1.0
  )
  assert left_out == []


@pytest.mark.slow
def test_who_does_nothing_gets_the_floor(tmp_path):
  scores, left_out = answered(tmp_path, 'package', 4, lambda tasks: silent)
  for score in scores.values():
    assert score.estimate['mean'] == score.floor < 1
  assert left_out == []
  # The first tasks of airline want a refusal.
  assert scores['airline'].floor > 0


@pytest.mark.slow
def test_faults_of_an_agent_are_counted_and_not_raised(tmp_path):
  def agent(body):
    function = {'name': 'no_such_tool', 'arguments': '{}'}
    taken = sum(message['role'] == 'tool' for message in body['messages'])
    if taken:
      # Not an object, and cut off.
      function = {'name': 'get_user_details', 'arguments': '{"user_id": '}
    call = {'id': f'c{taken}', 'type': 'function', 'function': function}
    return {'role': 'assistant', 'content': None, 'tool_calls': [call]}

  scores, left_out = answered(tmp_path, 'package', 1, lambda tasks: agent, domains=['retail'])
  assert scores['retail'].estimate['mean'] == 0 and left_out == []
  found = read_json(tmp_path / 'faults.json')['retail']
  assert found['agent'] == {'arguments_not_json': 1}
  assert found['agent_messages'] == {'unknown_tool': 1}


@pytest.mark.slow
def test_a_user_at_an_endpoint_and_its_faults(tmp_path):
  """It never stops in the first task, though it is done, and says nothing in the second."""

  def user(body):
    prompt = body['messages'][0]['content']
    place = next(i for i, task in enumerate(tasks) if first_text(task).split('\n')[0] in prompt)
    return ('Go on.', '', '###STOP###')[place]

  folder = tmp_path / 'suite'
  tasks = []

  def agent_of(found):
    tasks.extend(found)
    return silent

  with scripted_server(user) as url:
    endpoint = {'user': 'endpoint', 'user_base_url': url, 'user_model': 'u'}
    scores, left_out = answered(
      folder, 'package', 3, agent_of, domains='airline', max_steps=6, **endpoint
    )
  assert left_out == [{'id': 'airline-1-0', 'reason': 'user: empty_reply'}]
  assert scores['airline'].estimate['n'] == 2
  found = read_json(folder / 'faults.json')['airline']
  assert found['user'] == {'empty_reply': 1, 'never_stops': 1} and found['agent'] == {}
