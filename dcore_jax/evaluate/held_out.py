"""Measures a model on held-out tasks of a world, the same tasks for each model.

FOLDER/trajectories.jsonl    every task as it went, thoughts included
FOLDER/replies.jsonl         where a backend answers: its journal, so that no answered request is
                             asked again
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from dcore_jax.chat.messages import Message
from dcore_jax.evaluate.behaviour.lazy_reasoning import is_lazy
from dcore_jax.evaluate.measure import measure
from dcore_jax.files import replace_text
from dcore_jax.progress import progress
from dcore_jax.rollout.backends import Backend
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.worlds.environment import World, WorldTask
from dcore_jax.worlds.registry import make_world
from dcore_jax.worlds.rollouts import Trajectory, act_through

# Added to the run's seed. The value is arbitrary: the eval split shares nothing with what is
# trained on, so it need not differ from the seeds of other task sets.
_EVALUATE = 3

# (world, tasks, sampling, progress) -> a trajectory for each task.
Actor = Callable[
  [World, Sequence[WorldTask], SamplingParams, Callable[[int], Any]], list[Trajectory]
]


def evaluate(config: Any, folder: pathlib.Path, actor: Actor, name: str) -> dict[str, Any]:
  """Acts out `config.evaluate.tasks` tasks of each kind and returns the figures of `measure`.

  Args:
    config: the whole config; its sections `evaluate` and `world`, and its `seed`, are read.
    folder: where the trajectories go.
    actor: acts tasks out with the model.
    name: the model's, for the progress bar.

  Raises:
    ValueError: no tasks, in the config or in the world, or a world that cannot be made.
  """
  section = config.evaluate
  # The sampling seed is the config's own: all models answer from the same random streams.
  world = make_world(config.world)
  sampling = SamplingParams(
    temperature=section.temperature, max_tokens=section.max_tokens, seed=config.seed
  )
  asked = held_out_tasks(config, world)
  trajectories = {}
  with progress(total=sum(map(len, asked.values())), description=f'evaluate {name}') as bar:
    for kind, tasks in asked.items():
      trajectories[kind] = actor(world, tasks, sampling, bar.update)
  folder.mkdir(parents=True, exist_ok=True)
  lines = []
  for kind, group in trajectories.items():
    lines += [json.dumps(_record(kind, trajectory)) + '\n' for trajectory in group]
  # Written in one go after the last task: a file that is there is complete.
  replace_text(folder / 'trajectories.jsonl', ''.join(lines))
  return measure(trajectories)


def held_out_tasks(config: Any, world: World) -> dict[str, list[WorldTask]]:
  """Draws the tasks that models are measured on, by kind; they follow from the config alone.

  Raises:
    ValueError: no tasks, in the config or in the world.
  """
  if config.evaluate.tasks < 1:
    raise ValueError(f'evaluate.tasks = {config.evaluate.tasks} must be at least 1')
  asked = {}
  # One list for each kind, because all figures are reported by kind.
  for kind in world.kinds:
    tasks = world.tasks(kind, config.evaluate.tasks, seed=config.seed + _EVALUATE, split='eval')
    # A world whose tasks come from a file may have none of a kind.
    if tasks:
      asked[kind] = tasks
  if not asked:
    raise ValueError(f'the world {config.world.name!r} has no held-out task')
  return asked


def evaluate_backend(
  config: Any, folder: pathlib.Path, backend: Backend, tokenizer: Any
) -> dict[str, Any]:
  """As `evaluate`, with a backend; the result also names the model and its use of tokens.

  Args:
    config, folder: see `evaluate`.
    backend: the model.
    tokenizer: counts the tokens of reasonings.

  Raises:
    ConnectionError: an endpoint that stays away; with a journal nothing that was answered is lost.
  """

  def actor(world, tasks, sampling, count):
    return act_through(backend, tokenizer, world, tasks, sampling, count)

  figures = evaluate(config, folder, actor, backend.model)
  # The backend alone knows which model answered and what it cost.
  return figures | {'model': backend.model, 'usage': backend.usage.record()}


def _record(kind: str, trajectory: Trajectory) -> dict[str, Any]:
  """Returns a trajectory as JSON; its assistant messages include their thoughts."""
  texts = iter(trajectory.texts)
  messages = []
  for message in trajectory.messages:
    if message.role == 'assistant':
      # Prompts show earlier answers without thoughts. The file is for reading them.
      message = Message('assistant', next(texts))
    messages.append(message.to_json())
  # The measure is per reasoning; a task counts as lazy if any of its reasonings does.
  wrong = not trajectory.outcome.correct
  reasonings = zip(trajectory.reasonings, trajectory.reasoning_tokens, strict=True)
  return {
    'id': trajectory.task.id,
    'kind': kind,
    'query': trajectory.task.turns[0].query,
    'correct': trajectory.outcome.correct,
    'reason': trajectory.outcome.reason,
    'lazy': any(is_lazy(text, tokens, wrong) for text, tokens in reasonings),
    'reasoning_tokens': trajectory.reasoning_tokens,
    'messages': messages,
  }
