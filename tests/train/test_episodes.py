"""Reinforcement on episodes: what is trained on when a task takes several responses, and who gets which advantage."""

import dataclasses
import itertools
import shutil
import types

import jax
import numpy as np
import pytest

from dcore_jax import tokentree
from dcore_jax.chat.messages import Message, split_reasoning
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.learn.optimizer import init_state
from dcore_jax.rollout.engine import Completion, Engine
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.run.defaults import default_config
from dcore_jax.train import grpo_loop
from dcore_jax.train.metrics import Metrics
from dcore_jax.train.rollout_batch import (
  Episodes,
  by_rollout,
  prompt_means,
  rollout_metrics,
  sequences,
  short_tasks,
)
from dcore_jax.worlds.environment import Outcome
from dcore_jax.worlds.toolworld.world import ToolWorld
from tests.train import tiny_rl

GROUP = 3


class Script:
  """An engine that knows the solutions: thinks a different thought in each rollout, and then says what the reference does; the
  last rollout of a group ends its first turn without having called anything."""

  max_len = max_new = 1024

  def __init__(self, tokenizer, tasks):
    self.params = {'embed': np.zeros(1, np.float32)}
    self._tokenizer = tokenizer
    said = lambda turn: [*(print_calls([call]) for call in turn.calls), turn.answer]
    self._answers = [[answer for turn in task.turns for answer in said(turn)] for task in tasks]

  def stream(self, source, sampling):
    while arrivals := source(4):
      for tag, request in arrivals:
        _, place, g, number = request.key_id
        answer = 'done.' if g == GROUP - 1 else self._answers[place][number]
        text = (
          f'<think>\nthe subtask {g} {number} is'
          + ' wait' * g
          + f'\n</think>\n\n{answer}<|im_end|>'
        )
        tokens = np.array(self._tokenizer(text, add_special_tokens=False)['input_ids'], np.int32)
        logprobs = np.full(len(tokens), -0.5, np.float32)
        yield (
          tag,
          Completion(tokens, logprobs, logprobs, logprobs + 0.7, True, None, len(request.prompt)),
        )


@pytest.fixture(scope='module')
def tasks():
  return ToolWorld().tasks('multi_turn', 2, seed=3, split='train')


@pytest.fixture(scope='module')
def batch(tokenizer, tasks):
  source = Episodes(tokenizer, ToolWorld(), tasks)
  keys = [(0, p, g) for p in range(2) for g in range(GROUP)]
  return source.judge(
    [0, 1], source.sample(Script(tokenizer, tasks), [0, 0, 0, 1, 1, 1], keys, SamplingParams())
  )


def test_the_final_state_is_the_reward(batch, tasks):
  np.testing.assert_array_equal(batch.total_PG, [[3, 3, -3], [3, 3, -3]])
  assert [rollout.outcome.reason for rollout in batch.rollouts[:GROUP]] == ['', '', 'wrong state']
  metrics = rollout_metrics(batch)
  assert (
    metrics['reward'] == metrics['reward_multi_turn'] == 1 and metrics['all_right_fraction'] == 0
  )
  assert metrics['responses'] == np.mean(
    [task.steps + len(task.turns) for task in tasks for _ in range(2)] + [1, 1]
  )


def test_responses_branch_off_a_dialogue_without_thoughts(tokenizer, batch, tasks):
  """Each later prompt holds the answers before it and none of their thoughts; in the tree the dialogue is there once."""
  for rollout in batch.rollouts:
    for turn, (prompt, _) in enumerate(rollout.exchanges):
      text = tokenizer.decode(prompt)
      assert 'the subtask' not in text
      assert all(
        split_reasoning(said)[1].removesuffix('<|im_end|>') in text for said in rollout.texts[:turn]
      )
  rows = sequences(batch.rollouts)
  tree = tokentree.pack(rows, 1024)
  assert len(rows) == sum(len(rollout.exchanges) for rollout in batch.rollouts)
  sampled = sum(
    len(completion.tokens) for rollout in batch.rollouts for _, completion in rollout.exchanges
  )
  assert np.count_nonzero(tree.weight) == tree.weight.sum() == sampled
  # Two dialogues, each of all its rollouts, and what was sampled.
  dialogues = sum(
    max(
      len(prompt)
      for rollout in batch.rollouts[p * GROUP : (p + 1) * GROUP]
      for prompt, _ in rollout.exchanges
    )
    for p in range(2)
  )
  assert tree.live < 1.1 * (dialogues + sampled) and tree.dedup > 2


def test_a_rollouts_advantage_is_on_all_its_responses_and_nowhere_else(
  tokenizer, model, batch, tasks
):
  config = default_config().rl
  config.update(
    dict(
      estimator='grpo',
      prompts=2,
      updates=1,
      group=GROUP,
      capacity=1024,
      rows=1,
      max_tokens=64,
      kl_coefficient=0.0,
    )
  )
  script = Script(tokenizer, tasks)
  loop = grpo_loop.GrpoLoop(
    model, tokenizer, script, Episodes(tokenizer, ToolWorld(), tasks), range(2), config, seed=0
  )
  loop._score = lambda params, data: (np.where(data.weight, -0.5, 0), np.where(data.weight, 0.2, 0))
  tree = loop._pack(batch.rollouts)
  (old,), (scores,) = loop._old_policy(None, [tree], [batch.rollouts])
  tree = loop._with_advantages(tree, batch.rollouts, old, batch.total_PG)
  assert scores.gap.max() == 0 and len(scores.gap) < np.count_nonzero(tree.weight)
  np.testing.assert_array_equal(
    tree.extras['old_logp'], np.where(tree.weight > 0, np.float32(-0.5), 0)
  )
  wanted = np.float32([1, 1, -2]) / np.sqrt(3)
  for index, values in enumerate(by_rollout(tree, batch.rollouts).gather(tree.extras['advantage'])):
    sampled = np.concatenate(
      [np.r_[np.zeros(len(p)), np.ones(len(c.tokens))] for p, c in batch.rollouts[index].exchanges]
    )
    np.testing.assert_allclose(values, sampled * wanted[index % GROUP], rtol=1e-5)


def test_a_rollout_alone_has_no_variance_where_its_reward_is_zero(batch):
  """As advantages see it: its reward stands for its advantage."""
  alone = lambda reward: dataclasses.replace(
    batch,
    kinds=batch.kinds[:1],
    rollouts=batch.rollouts[:1],
    **{
      name: np.full((1, 1), reward, np.float32)
      for name in ('total_PG', 'format_PG', 'correctness_PG')
    },
    right_PG=np.ones((1, 1), bool),
  )
  assert [rollout_metrics(alone(reward))['zero_variance_fraction'] for reward in (0, 3)] == [1, 0]


def test_no_two_responses_of_a_step_share_a_random_stream(tokenizer, tasks):
  """Keys are (step, task, rollout, response)."""
  seen = []

  class Noted(Script):
    def stream(self, source, sampling):
      def noted(free):
        arrivals = source(free)
        seen.extend(request.key_id for _, request in arrivals)
        return arrivals

      return super().stream(noted, sampling)

  config = default_config().rl
  config.update(dict(prompts=2, updates=1, group=GROUP, wave=1, max_tokens=64))
  engine = Noted(tokenizer, [tasks[0]] * 2)
  loop = grpo_loop.GrpoLoop.__new__(grpo_loop.GrpoLoop)
  loop.config, loop.seed, loop.source, loop.engine, loop.items, loop.journal = (
    config,
    0,
    Episodes(tokenizer, ToolWorld(), [tasks[0]] * 2),
    engine,
    range(2),
    None,
  )
  loop.rollouts(7)
  assert (
    len(set(seen)) == len(seen) > 2 * GROUP
    and {key[0] for key in seen} == {7}
    and {key[1] for key in seen} == {0, 1}
  )


def test_tasks_with_long_first_prompts_are_dropped_and_counted(tokenizer, tasks):
  world = ToolWorld()
  lengths = [Episodes(tokenizer, world, [task]).longest_prompt for task in tasks]
  assert lengths[0] != lengths[1]
  assert short_tasks(tokenizer, world, tasks, min(lengths)) == ([tasks[int(np.argmin(lengths))]], 1)
  assert short_tasks(tokenizer, world, tasks, max(lengths)) == (tasks, 0)


@dataclasses.dataclass
class Talk:
  """An episode of three turns whatever is said, of which it replays a few letters; right where the first text is the longest."""

  messages: list[Message]
  texts: list[str] = dataclasses.field(default_factory=list)

  @property
  def done(self):
    return len(self.texts) == 3

  def step(self, text):
    self.texts.append(text)
    self.messages += [
      Message('assistant', text[:24:2]),
      Message('user', f'and Karo {len(self.texts)}'),
    ]

  def outcome(self):
    return Outcome(max(self.texts, key=len) is self.texts[0], '', 3)


class TalkWorld:
  def episode(self, task):
    return Talk([Message('user', f'find the order of {task.id} ' * 8)])


def talks(count):
  tasks = [
    types.SimpleNamespace(kind='talk', id=name, steps=2, turns=(0,))
    for name in ('Karo', 'Bela', 'Dima', 'Elif')
  ]
  return Episodes(tiny_rl.TOKENIZER, TalkWorld(), tasks[:count])


def talk_engine(params, kind=Engine):
  return kind(
    params, tiny_rl.MODEL, stop_ids=[tiny_rl.TOKENIZER.eos_token_id], lanes=8, max_len=240
  )


def test_an_engine_computes_the_new_part_of_a_dialogue_and_its_log_probabilities_are_the_trainers():
  """Two tasks, three rollouts each, three turns: what the trainer scores on the tree is what the engine reported of the tokens
  that it drew, though a later prompt shows another text than was sampled."""
  config = tiny_rl.rl_config(estimator='grpo', group=3, kl_coefficient=0.0, capacity=256)
  engine, source = talk_engine(tiny_rl.params()), talks(2)
  loop = grpo_loop.GrpoLoop(
    tiny_rl.MODEL, tiny_rl.TOKENIZER, engine, source, range(2), config, seed=1
  )
  batch, _, _ = loop.batch(0)
  prompts = [[prompt.tolist() for prompt, _ in rollout.exchanges] for rollout in batch.rollouts]
  assert [len(turns) for turns in prompts] == [3] * 6
  shared = lambda a, b: sum(
    1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b))
  )
  new = sum(
    len(after) - shared(before, after)
    for turns in prompts
    for before, after in zip(turns, turns[1:])
  )
  first = {tuple(turns[0]) for turns in prompts}
  assert (
    engine.stats.prefill_tokens
    <= sum(map(len, first)) + new
    < 0.5 * sum(len(p) for turns in prompts for p in turns)
  )
  batch.total_PG[:] = [[3, -3, 3], [-3, -3, 3]]
  state, update = loop.update(init_state(tiny_rl.params(), loop.tx), None, batch)
  numbers = update.numbers(engine)
  assert numbers['scored_fraction'] < 1 and numbers['logp_gap_max'] < 1e-5
  assert numbers['grad_norm'] > 0 and int(state.step) == 2
  # The world finds some of them right; without thoughts that are closed they are not what is to be learned.
  assert any(rollout.outcome.correct for rollout in batch.rollouts) and not batch.right_PG.any()
  batch.right_PG[0, 1:] = True
  assert prompt_means(batch)['right_fraction'] == [pytest.approx(2 / 3), 0]


def test_a_resumed_run_reads_its_episodes_from_the_journal_and_goes_on_as_if_nothing_had_been(
  tmp_path,
):
  """Three steps at one go; and two, of which the second's checkpoint is lost, that again without an engine, and a third."""

  class Idle(Engine):
    def stream(self, source, sampling):
      raise AssertionError('sampled again')

  def train(folder, steps, kind=Engine):
    config = tiny_rl.rl_config(steps=steps, group=3, capacity=256, validation=0)
    with Metrics(folder) as metrics:
      return grpo_loop.run_rl(
        tiny_rl.params(),
        tiny_rl.MODEL,
        tiny_rl.TOKENIZER,
        talks(4),
        config,
        metrics,
        folder / 'checkpoints',
        make_engine=lambda params: talk_engine(params, kind),
        seed=1,
      )

  whole, _ = train(tmp_path / 'whole', 3)
  train(tmp_path / 'parts', 2)
  shutil.rmtree(tmp_path / 'parts' / 'checkpoints' / 'state' / '2')
  assert train(tmp_path / 'parts', 2, Idle)[1]['resumed_at'] == 1
  parts, result = train(tmp_path / 'parts', 3)
  assert result['resumed_at'] == 2
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  rows = tiny_rl.timeless(tmp_path / 'whole')
  assert rows == tiny_rl.timeless(tmp_path / 'parts') and [row['responses'] for row in rows] == [
    3,
    3,
    3,
  ]
