"""Which prompts of a source belong together, and how those that are held out are sampled."""

import collections

import numpy as np
import pytest

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.data.row_schemas import toolrl_point
from dcore_jax.data.seeds import DecisionPoint, Seed, decision_points
from dcore_jax.run.checks import check_tasks
from dcore_jax.run.config import default_config, read_config
from dcore_jax.run.rl_source import rl_source
from dcore_jax.train import sampler as sampling
from dcore_jax.train.prompt_order import Label, PromptOrder, set_aside
from dcore_jax.train.sampler import Sampler
from dcore_jax.train.sources import Prompt, Questions
from dcore_jax.worlds.registry import make_world


def questions(tokenizer, points):
  prompts = []
  for point in points:
    text = ' '.join(message.content for message in point.messages)
    prompts.append(Prompt(point, np.array(tokenizer(text)['input_ids'], np.int32)))
  return Questions(tokenizer, prompts, 'toolrl')


@pytest.fixture
def config():
  config = default_config()
  config.rl.tasks = {'single': 6, 'sequential': 8, 'parallel': 8, 'irrelevant': 6, 'multi_turn': 8}
  config.rl.max_prompt_tokens = 10_000
  return config


@pytest.mark.parametrize('episodes', [False, True])
def test_every_kind_of_a_world_is_held_out_by_whole_tasks(config, tokenizer, episodes):
  config.rl.episodes = episodes
  config = read_config(config)
  world = make_world(config.world)
  source, _ = rl_source(config, tokenizer, world)
  aside = set_aside(source.labels, 16, seed=0)
  held_out = {source.labels[number].task for number in aside}
  rest = {label.task for number, label in enumerate(source.labels) if number not in aside}
  assert held_out.isdisjoint(rest) and len(held_out | rest) == 36
  # Turns of a dialogue are seeds of other kinds, and its own kind is held out nevertheless.
  assert {source.labels[number].kind for number in aside} == set(world.kinds)
  assert 12 <= len(aside) <= 16


def test_turns_and_steps_of_a_recorded_dialogue_are_one_task(tokenizer):
  """By the name that its seeds share; without one by how they begin."""
  call = ToolCall('f', {'a': 1})
  first = (Message('system', 's'), Message('user', 'do one'))
  later = (*first, Message('assistant', 'done'), Message('user', 'and two'))
  named = [('x', first), ('x', later), ('y', first)]
  points = []
  for number, (dialogue, messages) in enumerate(named):
    seed = Seed(
      id=str(number),
      kind='sequential' if number == 1 else 'single',
      conversations=messages,
      calls=(call, call) if number == 1 else (call,),
      tool_response=('1', '1') if number == 1 else ('1',),
      dialogue=dialogue,
    )
    points += decision_points(seed)
  labels = questions(tokenizer, points).labels
  assert [label.task for label in labels] == ['x', 'x', 'x', 'y']
  assert [label.kind for label in labels] == ['sequential and single'] * 3 + ['single']
  unnamed = [DecisionPoint(p.id, p.kind, p.messages, p.reference) for p in points]
  other = DecisionPoint('o', 'single', (first[0], Message('user', 'do three')), '[f(a=1)]')
  tasks = [label.task for label in questions(tokenizer, [*unnamed, other]).labels]
  assert len(set(tasks[:4])) == 1 and tasks[4] != tasks[0]


def test_rows_of_one_toolrl_dialogue_are_one_task(tokenizer):
  """Each row holds the dialogue so far in one message."""
  begin = '**Dialogue Records History**\n<user> Is it far? </user>'
  texts = [begin, begin + '\n\n<tool_call>\n{}\n</tool_call>', begin.replace('far', 'near')]
  points = []
  for number, text in enumerate(texts):
    record = {
      'instruction': 'tools',
      'input': text,
      'output': '<think>t</think><response> ok </response>',
    }
    points.append(toolrl_point(record, f'row-{number}')[0])
  tasks = [label.task for label in questions(tokenizer, points).labels]
  assert tasks[0] == tasks[1] != tasks[2]


class Recording:
  """A source that keeps the streams it was asked with."""

  fingerprint = 0

  def __init__(self, labels):
    self.labels = labels
    self.streams = collections.defaultdict(set)

  def sample(self, engine, chosen, keys, sampling):
    for item, key in zip(chosen, keys, strict=True):
      self.streams[item].add(key)
    return []

  def judge(self, chosen, rollouts):
    return None


def test_a_held_out_prompt_keeps_its_streams_beside_others(monkeypatch):
  monkeypatch.setattr(sampling, 'rollout_metrics', lambda batch: {})
  monkeypatch.setattr(sampling, 'prompt_means', lambda batch: {})
  labels = [Label(task=str(n), kind='a', stream=100 + n) for n in range(4)]
  # Two prompts that are the same have streams of their own.
  labels.append(Label(task='4', kind='a', stream=100))
  found = []
  for items in ([2], [0, 1, 2, 3, 4]):
    source = Recording(labels)
    order = PromptOrder(items=range(5), prompts=1, seed=0)
    Sampler(None, source, order, default_config().rl).measured(items)
    found.append(source.streams)
  assert found[0][2] == found[1][2] and len(found[0][2]) == default_config().rl.group
  assert len(set.union(*found[1].values())) == 5 * default_config().rl.group


@pytest.mark.parametrize('section', ['rl', 'distill'])
def test_a_kind_that_the_world_lacks_is_named_before_anything_runs(config, section):
  config[section].tasks = dict(config[section].tasks) | {'sequental': 3}
  made = read_config(config)
  world = make_world(made.world)
  with pytest.raises(ValueError, match=rf"^{section}.tasks: .*'sequental'.*'sequential'"):
    check_tasks(made, world)
  # Where the stage is not run, or has files, nobody draws these tasks.
  config.stages = ('evaluate_base',)
  check_tasks(read_config(config), world)
  config.stages = (section,)
  config[section].files = ('rows.jsonl',)
  check_tasks(read_config(config), world)
