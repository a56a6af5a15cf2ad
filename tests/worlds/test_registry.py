"""A world that is registered from outside the package serves everything that takes a world.

The toy world below is all that somebody has to write. It is evaluated, turned into seeds, distilled
from, trained on and chatted with, and nothing in the package knows its name.
"""

import types

import jax
import ml_collections
import numpy as np
import pytest

from configs import bfcl_world
from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.data.seed_sources import RL, load_seeds, training_seeds, training_tasks
from dcore_jax.data.seeds import Seed, decision_points
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.evaluate.held_out import evaluate_backend
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.backends import Reply
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.run.config import default_config, read_config
from dcore_jax.run.terminal import Chat
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.rl_loop import run_rl
from dcore_jax.train.sources import Episodes
from dcore_jax.train.stage_run import StageRun
from dcore_jax.worlds.acting import SandboxWorld
from dcore_jax.worlds.bfcl_world import BfclWorld
from dcore_jax.worlds.environment import UserTurn, WorldTask
from dcore_jax.worlds.registry import (
  WORLDS,
  find_world,
  make_world,
  open_sandbox,
  register_world,
  world_and_kind,
)
from dcore_jax.worlds.rollouts import act_through
from dcore_jax.worlds.toolworld.world import ToolWorld
from tests.distill.test_solve import oracle, run
from tests.run.test_terminal import Scripted
from tests.train import tiny_rl

THINK = '<think>\nreasoning.\n</think>\n\n'


class Counter:
  """The toy's sandbox: one tool, which adds to a number."""

  def __init__(self, total):
    self.state = {'total': total}

  def run(self, call):
    self.state['total'] += call.arguments.get('n', 0)
    return str(self.state['total'])


class Adding(SandboxWorld):
  """Add a number once, or twice and report."""

  kinds = ('once', 'twice')
  one_response = ('once',)

  def __init__(self, max_subtasks=4, start=0):
    self.start = start

  def tasks(self, kind, count, *, seed, split):
    return [self.task(kind, f'adding-{split}-{seed}-{kind}-{i}', i + 1) for i in range(count)]

  def task(self, kind, name, n):
    times = 1 + self.kinds.index(kind)
    turn = UserTurn(
      query=f'add {n} {kind}',
      calls=(ToolCall('add', {'n': n}),) * times,
      responses=tuple(str(self.start + n * (i + 1)) for i in range(times)),
      subtasks=tuple(f'add {n} number {i}' for i in range(times)),
      answer='done',
    )
    return WorldTask(name, kind, (turn,))

  def system_text(self, task):
    return 'tools:\nadd(n)'

  def listed(self, task):
    return ('add',)

  def sandbox_record(self, task, done):
    total = self.start + sum(call.arguments['n'] for call in done)
    return {'name': 'adding', 'total': total}

  @staticmethod
  def open_sandbox(record):
    return Counter(record['total'])


@pytest.fixture(autouse=True)
def registered():
  register_world('adding')(Adding)
  yield
  del WORLDS['adding']


@pytest.fixture
def config():
  config = default_config()
  config.world.name = 'adding'
  return config


def reference(task, number):
  """What a perfect model says in its response of this number."""
  (turn,) = task.turns
  if number == len(turn.calls):
    return THINK + turn.answer
  return THINK + print_calls([turn.calls[number]])


class Perfect:
  """A backend that knows the tasks; it is wrong about the requests in `wrong`."""

  model = 'perfect'
  usage = types.SimpleNamespace(record=dict)

  def __init__(self, tasks, wrong=()):
    self.tasks = {task.turns[0].query: task for task in tasks}
    self.wrong = wrong

  def stream(self, source, sampling):
    while arrivals := list(source(3)):
      for tag, request in arrivals:
        query = request.messages[1].content
        number = sum(message.role == 'assistant' for message in request.messages)
        text = THINK + 'no' if query in self.wrong else reference(self.tasks[query], number)
        yield tag, Reply(text, True, 1, 1)


def test_held_out_evaluation_shows_the_worlds_own_kinds(config, tokenizer, tmp_path):
  config.evaluate.tasks = 3
  world = Adding()
  tasks = [task for kind in world.kinds for task in world.tasks(kind, 3, seed=0, split='eval')]
  backend = Perfect(tasks, wrong=('add 2 twice',))
  figures = evaluate_backend(config, tmp_path, backend, tokenizer)
  assert figures['accuracy'] == {'once': 1.0, 'twice': pytest.approx(2 / 3)}
  assert figures['failures'] == {'once': {}, 'twice': {'wrong state': 1}}
  assert figures['accuracy_by_subtasks'] == {
    'twice': {'2': {'accuracy': pytest.approx(2 / 3), 'n': 3}}
  }
  assert len((tmp_path / 'trajectories.jsonl').read_text().splitlines()) == 6


def test_its_tasks_are_seeds_which_execute(config):
  found = load_seeds('adding', count=2, seed=0)
  assert [seed.kind for seed in found.seeds] == ['single', 'single', 'sequential', 'sequential']
  assert found.records == 4
  for seed in found.seeds:
    assert Seed.from_json(seed.to_json()) == seed
    sandbox = open_sandbox(seed.world)
    assert tuple(sandbox.run(call) for call in seed.calls) == seed.tool_response
  assert len(list(decision_points(found.seeds[-1]))) == 3  # two calls and a report
  seeds = training_seeds(config, {'once': 1, 'twice': 2}, RL)
  assert [seed.id for seed in seeds] == [
    'adding-train-1002-once-0/0',
    'adding-train-1002-twice-0/0',
    'adding-train-1002-twice-1/0',
  ]
  with pytest.raises(ValueError, match="no number of tasks of kind \\['twice'\\]"):
    training_tasks(config, {'once': 1}, RL)
  # A misspelt kind would be tasks that nobody gets.
  for counts, wrong in (({'once': 1, 'twise': 2}, 'twise'), ({'Once': 0}, 'Once')):
    with pytest.raises(ValueError, match=f"no kind \\['{wrong}'\\]; it has \\['once', 'twice'\\]"):
      training_tasks(config, counts, RL)


def test_a_row_is_distilled_from_it():
  world = Adding()
  task = world.task('twice', 'task', 5)
  (seed,) = task_seeds(world, task)
  rows = run(seed, oracle(seed, task.turns[0].subtasks), verify='state')
  assert len(rows) == 3
  assert rows[-1]['conversations'][-1]['content'].endswith('done')


def test_one_step_of_reinforcement_acts_its_tasks_out(config, tmp_path):
  tasks = training_tasks(config, {'once': 2, 'twice': 2}, RL)
  source = Episodes(tiny_rl.TOKENIZER, make_world(config.world), tasks)
  assert source.kinds == ['once', 'once', 'twice', 'twice']
  options = tiny_rl.rl_config(steps=1, prompts=4, wave=4, group=2, capacity=256, validation=0)

  def make_engine(params):
    ends = [tiny_rl.TOKENIZER.eos_token_id]
    return Engine(params, tiny_rl.MODEL, stop_ids=ends, sizes=EngineSizes(lanes=8, max_len=128))

  with Metrics(tmp_path) as metrics:
    params, _ = run_rl(
      tiny_rl.params(),
      tiny_rl.POLICY,
      source,
      options,
      StageRun(metrics=metrics, checkpoints=tmp_path / 'checkpoints', seed=1),
      make_engine=make_engine,
      execution=Execution(),
    )
  (row,) = read_metrics(tmp_path, 'rl')
  assert row['reward_once'] == row['reward_twice'] == -3  # the model is random
  # Rewards do not differ, so it is the entropy part of DA-GRPO's advantage that moves the model.
  assert row['all_wrong_fraction'] == 1 and row['grad_norm'] > 0
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), params, tiny_rl.params())
  assert any(jax.tree.leaves(changed))


def test_a_chat_acts_its_tasks_out_and_calls_its_tool():
  world, kind = world_and_kind('adding', '')
  assert isinstance(world, Adding) and kind == 'once'
  voice = Scripted(THINK + '[add(n=1)]', '[add(n=40)]', 'done')
  chat = Chat(voice, world=world, kind=kind)
  chat.start()
  chat.take('')
  assert 'right after 1 answers' in voice.shown
  chat.take('add forty')
  assert voice.asked[-1][-1] == ('user', '<tool_response>\n40\n</tool_response>')


def test_a_config_names_a_world_and_its_options(config):
  config.world.options = ml_collections.ConfigDict({'start': 7})
  world = make_world(config.world)
  assert isinstance(world, Adding) and world.start == 7
  config.world.options = ml_collections.ConfigDict({'begin': 7})
  with pytest.raises(ValueError, match="world.options of 'adding'.*'begin'"):
    make_world(config.world)
  config.world.name = 'addition'
  with pytest.raises(
    ValueError, match="unknown world 'addition'.*'adding', 'bfcl', 'mcp', 'toolworld'"
  ):
    make_world(config.world)
  toolworld = make_world(default_config().world)
  assert isinstance(toolworld, ToolWorld) and toolworld.max_subtasks == 4


def test_a_name_belongs_to_one_world():
  assert register_world('adding')(Adding) is Adding
  with pytest.raises(ValueError, match="'adding' is already tests.worlds.test_registry.Adding"):
    register_world('adding')(ToolWorld)


def test_records_of_unknown_worlds_and_without_an_entry_are_errors():
  with pytest.raises(ValueError, match="unknown world 'narnia'"):
    open_sandbox({'name': 'narnia'})
  with pytest.raises(ValueError, match="a world 'adding' needs 'total'"):
    open_sandbox({'name': 'adding'})


def test_a_chat_refuses_kinds_that_the_world_does_not_have():
  assert world_and_kind('none', '') == (None, '')
  assert world_and_kind('toolworld', '')[1] == 'sequential'
  with pytest.raises(ValueError, match="unknown kind 'single' of world 'adding'"):
    world_and_kind('adding', 'single')


@pytest.mark.parametrize('name', ['toolworld', 'bfcl'])
def test_every_world_keeps_the_protocols_promises(name, tokenizer):
  """References are right when they are acted out, and a record opens the state that it names."""
  try:
    world = find_world(name)()
  except ValueError as error:
    pytest.skip(str(error))
  for kind in world.kinds:
    tasks = world.tasks(kind, 3, seed=1, split='eval')
    assert world.tasks(kind, 2, seed=1, split='eval') == tasks[:2]
    assert not set(tasks_ids(tasks)) & set(tasks_ids(world.tasks(kind, 3, seed=1, split='train')))
    for task in tasks:
      done = task.turns[0].calls
      after = open_sandbox(world.sandbox_record(task, done))
      before = open_sandbox(world.sandbox_record(task, ()))
      for call in done:
        before.run(call)
      assert before.state == after.state and task.kind == kind
  with pytest.raises(ValueError, match='unknown split'):
    world.tasks(world.kinds[0], 1, seed=1, split='test')


def tasks_ids(tasks):
  return [task.id for task in tasks]


class Policy:
  """A scripted policy for any world: it says what the reference does, and thinks before."""

  model = 'policy'

  def __init__(self, world, tasks):
    self.answers = {}
    for task in tasks:
      said = []
      for turn in task.turns:
        if task.kind in world.one_response and turn.calls:
          said.append(print_calls(list(turn.calls)))
        else:
          said += [print_calls([call]) for call in turn.calls]
          said.append(turn.answer)
      self.answers[world.episode(task).messages[1].content] = said

  def stream(self, source, sampling):
    while arrivals := list(source(2)):
      for tag, request in arrivals:
        number = sum(message.role == 'assistant' for message in request.messages)
        yield tag, Reply(THINK + self.answers[request.messages[1].content][number], True, 1, 1)


def test_bfcls_tasks_are_episodes(tokenizer):
  """A policy that follows the references is right in all of them, and is paid for it."""
  try:
    world = BfclWorld(max_subtasks=2, classes=('MessageAPI', 'TicketAPI'))
  except ValueError as error:
    pytest.skip(str(error))
  tasks = [task for kind in world.kinds for task in world.tasks(kind, 4, seed=2, split='train')]
  source = Episodes(tokenizer, world, tasks)
  assert set(source.kinds) == set(world.kinds) and source.longest_prompt > 0
  assert source.responses == max(task.steps + len(task.turns) for task in tasks)
  made = act_through(Policy(world, tasks), tokenizer, world, tasks, SamplingParams())
  assert [trajectory.outcome.reason for trajectory in made] == [''] * len(tasks)
  batch = source.judge(range(len(tasks)), made)
  assert (batch.total_PG == 3).all() and batch.right_PG.all()
  assert all(len(task.turns[0].subtasks) == 2 for task in tasks if task.kind == 'parallel')


@pytest.mark.parametrize(
  'options',
  [{'max_subtasks': 5}, {'classes': ('Nope',)}, {'classes': ()}, {'extra_functions': 0}],
  ids=str,
)
def test_bfcl_refuses_options_that_it_cannot_keep(options):
  try:
    BfclWorld()
  except ValueError as error:
    pytest.skip(str(error))
  with pytest.raises(ValueError, match='|'.join(options)):
    BfclWorld(**options)


def test_bfcls_lists_can_be_short():
  """The same tasks, with the functions that they need and one more."""
  try:
    whole = BfclWorld()
  except ValueError as error:
    pytest.skip(str(error))
  short = BfclWorld(extra_functions=1)
  for kind in whole.kinds:
    many = whole.tasks(kind, 8, seed=4, split='train')
    few = short.tasks(kind, 8, seed=4, split='train')
    for one, other in zip(many, few, strict=True):
      assert one.turns == other.turns and set(one.without) <= set(other.without)
      called = {call.name for turn in other.turns for call in turn.calls}
      listed = short.listed(other)
      assert called <= listed < whole.listed(one)
      if kind != 'irrelevant':
        assert len(listed) == len(called) + 1


def test_the_config_of_bfcls_world_says_what_is_missing(monkeypatch, tmp_path):
  config = read_config(bfcl_world.get_config())
  try:
    world = make_world(config.world)
  except ValueError as error:
    pytest.skip(str(error))
  assert isinstance(world, BfclWorld) and config.rl.episodes
  (task,) = world.tasks('single', 1, seed=0, split='train')
  assert task.classes == ('MessageAPI',) and len(world.listed(task)) == 2
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(ValueError, match='^BFCL is not installed: .*make harnesses'):
    make_world(config.world)
