"""Reinforcement on episodes: what is trained on when a task takes several responses, and who gets
which advantage.
"""

import dataclasses
import itertools
import shutil
import types
import warnings

import jax
import numpy as np
import pytest

from dcore_jax.chat.messages import Message, split_reasoning
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.learn import advantages, grpo
from dcore_jax.learn.optimizer import init_state
from dcore_jax.rollout.engine import Completion, Engine
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.run.config import default_config
from dcore_jax.train.mini_batches import sampled_responses
from dcore_jax.train.prompt_order import PromptOrder
from dcore_jax.train.rollout_batch import prompt_means, rollout_metrics
from dcore_jax.train.sampler import Sampler
from dcore_jax.train.sources import Episodes, short_tasks
from dcore_jax.worlds.environment import Outcome
from dcore_jax.worlds.toolworld.world import ToolWorld
from tests.train import tiny_rl

GROUP = 3


class Script:
  """An engine that knows the solutions: thinks a different thought in each rollout, and then says
  what the reference does; the last rollout of a group ends its first turn without having called
  anything.
  """

  max_len = max_new = 1024

  def __init__(self, tokenizer, tasks):
    self.params = {'embed': np.zeros(1, np.float32)}
    self._tokenizer = tokenizer

    def said(turn):
      return [*(print_calls([call]) for call in turn.calls), turn.answer]

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
  """Each later prompt holds the answers before it and none of their thoughts; in the tree the
  dialogue is there once.
  """
  for rollout in batch.rollouts:
    for turn, (prompt, _) in enumerate(rollout.exchanges):
      text = tokenizer.decode(prompt)
      assert 'the subtask' not in text
      assert all(
        split_reasoning(said)[1].removesuffix('<|im_end|>') in text for said in rollout.texts[:turn]
      )
  responses = [each for rollout in batch.rollouts for each in sampled_responses(rollout)]
  tree = grpo.pack_responses(responses, 1024)
  assert len(responses) == sum(len(rollout.exchanges) for rollout in batch.rollouts)
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


def test_a_rollouts_advantage_is_on_all_its_responses_and_nowhere_else(batch):
  rollouts = [sampled_responses(rollout) for rollout in batch.rollouts]
  rollouts = grpo.with_advantages(rollouts, batch.total_PG, advantages.grpo_advantages)
  assert all(len(responses) > 1 for responses in rollouts[: GROUP - 1])
  wanted = np.float32([1, 1, -2]) / np.sqrt(3)
  for index, responses in enumerate(rollouts):
    for response in responses:
      np.testing.assert_allclose(response.advantage, wanted[index % GROUP], rtol=1e-5)
  responses = [response for made in rollouts for response in made]
  tree = grpo.lay_values(grpo.pack_responses(responses, 1024), responses, {'advantage', 'old_logp'})
  np.testing.assert_array_equal(
    tree.extras['old_logp'], np.where(tree.weight > 0, np.float32(-0.5), 0)
  )
  assert not tree.extras['advantage'][tree.weight == 0].any()
  laid = tree.gather(tree.extras['advantage'])
  for response, values in zip(responses, laid, strict=True):
    np.testing.assert_array_equal(values[len(response.prompt) :], response.advantage)


def test_a_rollout_alone_has_no_variance_where_its_reward_is_zero(batch):
  """As advantages see it: its reward stands for its advantage."""

  def alone(reward):
    return dataclasses.replace(
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
  source = Episodes(tokenizer, ToolWorld(), [tasks[0]] * 2)
  order = PromptOrder(items=range(2), prompts=2, seed=0)
  Sampler(engine, source, order, config).rollouts(7)
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
  """An episode of three turns whatever is said, of which it replays a few letters; right where the
  first text is the longest.
  """

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
  stop_ids = [tiny_rl.TOKENIZER.eos_token_id]
  return kind(params, tiny_rl.MODEL, stop_ids=stop_ids, sizes=EngineSizes(lanes=8, max_len=240))


def test_an_engine_computes_the_new_part_of_a_dialogue_and_its_log_probabilities_are_the_trainers():
  """Two tasks, three rollouts each, three turns: what the trainer scores on the tree is what the
  engine reported of the tokens that it drew, though a later prompt shows another text than was
  sampled.
  """
  config = tiny_rl.rl_config(estimator='grpo', group=3, kl_coefficient=0.0, capacity=256)
  engine = talk_engine(tiny_rl.params())
  source = talks(2)
  learner = tiny_rl.make_learner(engine, source, config)
  batch = tiny_rl.make_sampler(engine, source, config).step(0).batch
  prompts = [[prompt.tolist() for prompt, _ in rollout.exchanges] for rollout in batch.rollouts]
  assert [len(turns) for turns in prompts] == [3] * 6

  def shared(a, b):
    return sum(
      1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    )

  new = sum(
    len(after) - shared(before, after)
    for turns in prompts
    for before, after in zip(turns, turns[1:], strict=False)
  )
  first = {tuple(turns[0]) for turns in prompts}
  assert (
    engine.stats.prefill_tokens
    <= sum(map(len, first)) + new
    < 0.5 * sum(len(p) for turns in prompts for p in turns)
  )
  batch.total_PG[:] = [[3, -3, 3], [-3, -3, 3]]
  start = init_state(tiny_rl.params(), learner.programs.tx)
  # An episode's responses share little here, so that no row holds a group.
  with pytest.warns(UserWarning, match='2 of 2 groups of rollouts need more .* rl.capacity = 256'):
    state, update = learner.update(start, None, batch)
  numbers = update.numbers(engine)
  assert numbers['scored_fraction'] < 1 and numbers['logp_gap_max'] < 1e-5
  assert numbers['grad_norm'] > 0 and int(state.step) == 2
  assert numbers['cut_groups'] == 2
  with warnings.catch_warnings(action='error'):  # once a run
    learner.update(state, None, batch)
  # The world finds some of them right; without thoughts that are closed they are not what is to be
  # learned.
  assert any(rollout.outcome.correct for rollout in batch.rollouts) and not batch.right_PG.any()
  batch.right_PG[0, 1:] = True
  assert prompt_means(batch)['right_fraction'] == [pytest.approx(2 / 3), 0]


def test_a_resumed_run_reads_its_episodes_from_the_journal_and_goes_on_as_if_nothing_had_been(
  tmp_path,
):
  """Three steps at one go; and two, of which the second's checkpoint is lost, that again without an
  engine, and a third.
  """

  class Idle(Engine):
    def stream(self, source, sampling):
      raise AssertionError('sampled again')

  def train(folder, steps, kind=Engine):
    config = tiny_rl.rl_config(steps=steps, group=3, capacity=256, validation=0)
    return tiny_rl.train_on(
      folder, talks(4), config, engine=lambda params: talk_engine(params, kind)
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
