"""Measures a model on the prompts that reinforcement learning sets aside, as a suite does.

A prompt gets as many answers as in training, from the random streams of the loop's own measurement.
So models before and after each stage are compared on the same prompts and streams, and the figures
of the model that RL starts from are those that RL reports as `before`.
"""

from collections.abc import Sequence
from typing import Any

from dcore_jax.chat.messages import Message
from dcore_jax.config import RlSection, RunConfig
from dcore_jax.data.rows import SftRow
from dcore_jax.evaluate.behaviour.lazy_reasoning import is_lazy
from dcore_jax.evaluate.questions.suite import thoughts_of
from dcore_jax.evaluate.suites import Score, SuiteResult
from dcore_jax.progress import progress
from dcore_jax.rollout.engine import Engine
from dcore_jax.statistics import estimate_mean
from dcore_jax.train.journal import RolloutJournal
from dcore_jax.train.prompt_order import PromptOrder, set_aside, training_order
from dcore_jax.train.rollout_batch import Rollout, RolloutBatch
from dcore_jax.train.sampler import Sampler
from dcore_jax.train.sources import Questions, first_request

# Its name in `evaluate.suites`, beside the registered suites: it needs no server.
SUITE = 'prompts'
_VERSION = 'prompts that rl.validation sets aside'
_SHARES = (0.0, 1.0)


def check_fields(config: RunConfig) -> None:
  """Checks that prompts are set aside where the config says something of them.

  Raises:
    ValueError: none are.
  """
  for said, says in (
    (SUITE in config.evaluate.suites, f'evaluate.suites names {SUITE!r}'),
    (config.sft.hold_out, 'sft.hold_out is set'),
  ):
    if said and (config.rl.episodes or not config.rl.validation):
      raise ValueError(
        f'{says}, and no prompts are set aside: rl.validation is {config.rl.validation}, '
        f'rl.episodes {config.rl.episodes}'
      )


def without_held_out(
  rows: Sequence[SftRow], source: Questions, config: RlSection, seed: int
) -> list[SftRow]:
  """Returns the rows that begin with another request than every prompt that is set aside.

  Args:
    rows: of fine-tuning.
    source: what reinforcement learning asks.
    config: section `rl`.
    seed: of what is set aside.

  Raises:
    ValueError: no row is left.
  """
  aside = set()
  for item in set_aside(source.labels, config.validation, seed):
    aside.add(first_request(source.points[item].messages))
  kept = [row for row in rows if first_request(row.messages) not in aside]
  if not kept:
    raise ValueError(
      f'sft.hold_out: all {len(rows)} rows are of tasks that rl.validation = {config.validation} '
      'sets aside'
    )
  return kept


def measure_prompts(
  engine: Engine,
  source: Questions,
  config: RlSection,
  journal: RolloutJournal,
  *,
  seed: int,
  held_out_seed: int,
) -> tuple[SuiteResult, list[dict[str, Any]]]:
  """Returns the figures, whose units are tasks, and a trajectory for each answer.

  Args:
    engine: with the weights that are measured.
    source: what reinforcement learning asks.
    config: section `rl`.
    journal: of measurements, see `Sampler`.
    seed: of prompt order and sampling.
    held_out_seed: of what is set aside.
  """
  aside = set_aside(source.labels, config.validation, held_out_seed)
  items = training_order(source.kinds, aside)
  order = PromptOrder(items=items, prompts=config.prompts, seed=seed)
  sampler = Sampler(engine, source, order, config, measured=journal)
  with progress(total=len(aside) * config.group, description=SUITE, unit='answer') as bar:
    batch = sampler.measure(aside, bar.update)
  # Answers to one prompt, and prompts of one task, are not independent.
  tasks = []
  for item in aside:
    tasks += [source.labels[item].task] * config.group
  scores = []
  for metric, values_PG, bounds in (
    ('format', batch.format_PG, _SHARES),
    ('reward', batch.total_PG, source.reward_bounds),
    ('right', batch.right_PG, _SHARES),
  ):
    found = estimate_mean(values_PG.ravel(), clusters=tasks, bounds=bounds)
    scores.append(Score('held_out', metric, found))
  result = SuiteResult(SUITE, _VERSION, scores, _notes(batch, len(set(tasks)), config))
  return result, _trajectories(batch, source, aside)


def _notes(batch: RolloutBatch, tasks: int, config: RlSection) -> list[str]:
  P, G = batch.total_PG.shape
  notes = [f'{P} prompts of {tasks} tasks, {G} answers each at temperature {config.temperature:g}.']
  unfinished = sum(not rollout.exchanges[0].completion.finished for rollout in batch.rollouts)
  if unfinished:
    notes.append(f'{unfinished} of {P * G} answers were cut off at {config.max_tokens} tokens.')
  return notes


def _trajectories(
  batch: RolloutBatch, source: Questions, items: Sequence[int]
) -> list[dict[str, Any]]:
  G = batch.total_PG.shape[1]
  records = []
  for number, rollout in enumerate(batch.rollouts):
    prompt, answer = divmod(number, G)
    scored = {
      'task': source.labels[items[prompt]].task,
      'correct': bool(batch.right_PG[prompt, answer]),
      'format': float(batch.format_PG[prompt, answer]),
      'reward': float(batch.total_PG[prompt, answer]),
    }
    point = source.points[items[prompt]]
    records.append(_trajectory(point.id, point.messages, rollout, scored))
  return records


def _trajectory(
  name: str, messages: Sequence[Message], rollout: Rollout, scored: dict[str, Any]
) -> dict[str, Any]:
  """Returns an answer in the form of `held_out`, with its task and rewards."""
  completion = rollout.exchanges[0].completion
  text = rollout.texts[0]
  thoughts, tokens = thoughts_of(text, len(completion.tokens))
  reason = ''
  if not scored['correct']:
    reason = 'wrong' if completion.finished else 'unfinished'
  asked = [message.to_json() for message in messages]
  return {
    'id': name,
    'kind': SUITE,
    'query': messages[-1].content,
    'reason': reason,
    'lazy': is_lazy(thoughts, tokens, not scored['correct']),
    'reasoning_tokens': [tokens],
    'messages': [*asked, {'role': 'assistant', 'content': text}],
    **scored,
  }
