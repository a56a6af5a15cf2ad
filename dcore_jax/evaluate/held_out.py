"""Held-out tasks of every kind, the same ones whichever model is measured.

FOLDER/trajectories.jsonl    every task as it went, thoughts included
FOLDER/replies.jsonl         the journal of completions, where a backend answers: what was answered is not asked again
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from dcore_jax.chat.messages import Message
from dcore_jax.evaluate.lazy_reasoning import is_lazy
from dcore_jax.evaluate.rollouts import Trajectory, act_through, measure
from dcore_jax.files import replace_text
from dcore_jax.progress import progress
from dcore_jax.rollout.backends import Backend
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.worlds.environment import World
from dcore_jax.worlds.toolworld.tasks import KINDS
from dcore_jax.worlds.toolworld.world import ToolWorld

_EVALUATE = 3  # added to the run's seed; the eval split shares no entity with what is trained on

Actor = Callable[[World, Sequence[Any], SamplingParams, Callable[[int], Any]], list[Trajectory]]


def evaluate(
  config: ml_collections.ConfigDict, folder: pathlib.Path, actor: Actor, name: str
) -> dict[str, Any]:
  """Acts out `config.evaluate.tasks` tasks of each kind -> figures (`evaluate.rollouts.measure`); the tasks go to `folder`.

  Args:
    config: the whole pipeline config; sections `evaluate` and `world`, and its `seed`.
    folder: results.
    actor: (world, tasks, sampling, progress) -> a trajectory a task.
    name: of the model, for the progress bar.

  Raises:
    ValueError: no tasks.
  """
  if config.evaluate.tasks < 1:
    raise ValueError(f'evaluate.tasks = {config.evaluate.tasks} must be at least 1')
  c, world = config.evaluate, ToolWorld(config.world.max_subtasks)
  sampling = SamplingParams(temperature=c.temperature, max_tokens=c.max_tokens, seed=config.seed)
  trajectories = {}
  with progress(total=c.tasks * len(KINDS), description=f'evaluate {name}') as bar:
    for kind in KINDS:
      tasks = world.tasks(kind, c.tasks, seed=config.seed + _EVALUATE, split='eval')
      trajectories[kind] = actor(world, tasks, sampling, bar.update)
  folder.mkdir(parents=True, exist_ok=True)
  lines = [
    json.dumps(_record(kind, t)) + '\n' for kind, group in trajectories.items() for t in group
  ]
  replace_text(folder / 'trajectories.jsonl', ''.join(lines))
  return measure(trajectories)


def evaluate_backend(
  config: ml_collections.ConfigDict, folder: pathlib.Path, backend: Backend, tokenizer: Any
) -> dict[str, Any]:
  """As `evaluate`, with a backend; `tokenizer` counts the tokens of reasonings.

  Raises:
    ConnectionError: an endpoint that stays away; with a journal nothing that was answered is lost.
  """
  actor = lambda world, tasks, sampling, told: act_through(
    backend, tokenizer, world, tasks, sampling, told
  )
  return evaluate(config, folder, actor, backend.model) | {
    'model': backend.model,
    'usage': backend.usage.record(),
  }


def _record(kind: str, t: Trajectory) -> dict[str, Any]:
  """A trajectory as JSON; its assistant messages carry the reasoning, which later prompts did not show."""
  texts = iter(t.texts)
  messages = [Message(m.role, next(texts)) if m.role == 'assistant' else m for m in t.messages]
  lazy = any(is_lazy(r, n, not t.outcome.correct) for r, n in zip(t.reasonings, t.reasoning_tokens))
  return {
    'id': t.task.id,
    'kind': kind,
    'query': t.task.turns[0].query,
    'correct': t.outcome.correct,
    'reason': t.outcome.reason,
    'lazy': lazy,
    'reasoning_tokens': t.reasoning_tokens,
    'messages': [m.to_json() for m in messages],
  }
