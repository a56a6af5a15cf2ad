"""ACEBench, English: 973 tasks of function calling, and 50 of agents that act on a phone.

The ten single-turn normal categories are judged here (see `score`). Dialogues, special
tasks and agents are judged by ACEBench's own program if its checkout is named:

    acebench=DIR     a checkout of github.com/ACEBench/ACEBench; its data and prompts are used
    python=PATH      the interpreter with what it imports; default: this one
    agent=FOLDER     data_agent_*_result.json, as the checkout's generate.py writes them: agents act
                     in ACEBench's own simulation, which is not asked from here

FOLDER/replies.jsonl    the journal of replies: what was answered is not asked again
FOLDER/answers.jsonl    an answer a task; there when all have one
FOLDER/acebench/        the results in ACEBench's own layout, see `official`

Figures are per category, of each group (normal, special, agent: the mean over its categories), and
overall: 0.578 normal + 0.2676 special + 0.1545 agent, as in table 2 of the paper. Without all three
groups, 'overall' is of what there is, and its metric says so.
"""

import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dcore_jax.chat.messages import Message
from dcore_jax.evaluate.acebench import official
from dcore_jax.evaluate.acebench.score import judge
from dcore_jax.evaluate.acebench.tasks import (
  AGENT,
  ASKED,
  MULTI_TURN,
  SINGLE_TURN,
  SPECIAL,
  Task,
  read_prompts,
  read_tasks,
  write_messages,
)
from dcore_jax.evaluate.behaviour.lazy_reasoning import is_lazy
from dcore_jax.evaluate.questions.suite import ask_all, read_replies, said, thoughts_of
from dcore_jax.evaluate.suites import (
  Score,
  Served,
  Suite,
  SuiteResult,
  SuiteSettings,
  accuracy,
  register_suite,
)
from dcore_jax.files import read_json_lines
from dcore_jax.rollout.backends import Reply

LAYOUT_FOLDER = 'acebench'
GROUPS = {'normal': (*SINGLE_TURN, *MULTI_TURN), 'special': SPECIAL, 'agent': AGENT}
# ACEBench's weights of the groups. That they sum to 1.0001 is its own.
WEIGHTS = {'normal': 0.578, 'special': 0.2676, 'agent': 0.1545}
# The official program rounds to three digits.
_ROUNDING = 0.00051

# A task with {'result'} and, of agents, {'process'}.
Answered = tuple[Task, Mapping[str, Any]]
# A task with its verdict: (task, right, reason).
Judged = tuple[Task, bool, str]


@register_suite('acebench')
class AceBench(Suite):
  """ACEBench's English tasks.

  Args:
    settings: see `Suite`.
    acebench, python, agent: see the text of this file; '' is none.
  """

  def __init__(
    self, settings: SuiteSettings, acebench: str = '', python: str = '', agent: str = ''
  ):
    super().__init__(settings)
    if agent and not acebench:
      raise ValueError(f'agent={agent!r} needs acebench=DIR, whose program scores these results')
    self._checkout = pathlib.Path(acebench) if acebench else None
    self._python = python or sys.executable
    self._agent = pathlib.Path(agent) if agent else None

  def prepare(self) -> None:
    """Reads tasks and prompts, and starts the checkout's program once."""
    self._tasks()
    self._prompts()
    self._agent_results()
    if self._checkout:
      official.check_checkout(self._checkout, self._python)

  def answer(self, served: Served, folder: pathlib.Path, told: Callable[[int, int], None]) -> None:
    """Asks every task that has no answer in the journal."""
    prompts = self._prompts()
    asked = []
    for task in self._tasks():
      asked.append((task.id, write_messages(task, prompts, own=self._checkout is None)))
    ask_all(served, self.settings, folder, asked, told)

  def score(self, folder: pathlib.Path) -> tuple[SuiteResult, list[dict[str, Any]]]:
    """Judges the answers, with the checkout's program where there is one."""
    replies = read_replies(folder, self.name)
    answered: dict[str, list[Answered]] = {}
    left_out = []
    for task in self._tasks():
      reply = replies.get(task.id)
      reason = reply.error if reply else 'no answer in the file'
      if reason:
        left_out.append({'id': task.id, 'reason': reason})
      else:
        pair = task, {'result': said(reply.text)}
        answered.setdefault(task.category, []).append(pair)
    if not answered:
      raise ValueError(f'suite {self.name!r}: no request was answered; {left_out[0]["reason"]}')
    for category, pairs in self._agent_results().items():
      answered[category] = pairs
    layout = folder / LAYOUT_FOLDER
    official.write_results(layout, answered)
    judged = judge_single_turn(answered)
    notes = self._notes(replies)
    if self._checkout:
      found = official.score_results(layout, self._checkout, self._python, sorted(answered))
      notes += compare(judged, found)
      judged |= judge_by_ids(answered, found)
    else:
      for category, pairs in answered.items():
        if category not in judged:
          reason = "only ACEBench's own program judges it"
          left_out += [{'id': task.id, 'reason': reason} for task, _ in pairs]
    version = f'ACEBench en, {"its" if self._checkout else "our"} prompts'
    result = SuiteResult(self.name, version, figures(judged), notes, left_out)
    return result, self._trajectories(judged, replies, answered)

  def _trajectories(
    self,
    judged: Mapping[str, Sequence[Judged]],
    replies: Mapping[str, Reply],
    answered: Mapping[str, Sequence[Answered]],
  ) -> list[dict[str, Any]]:
    """Returns the tasks that have a verdict."""
    prompts = self._prompts()
    found = []
    for category, verdicts in judged.items():
      answers = {task.id: answer for task, answer in answered[category]}
      for task, right, reason in verdicts:
        if category in AGENT:
          # What the simulation was told; who spoke in between is in the checkout's own logs.
          asked: Sequence[Message] = (Message('user', task.record['question']),)
          text = '\n'.join(str(step) for step in answers[task.id]['process'])
          tokens = 0
        else:
          asked = write_messages(task, prompts, own=self._checkout is None)
          text = replies[task.id].text
          tokens = replies[task.id].completion_tokens
        found.append(_trajectory(task, (right, reason), asked, text, tokens))
    return found

  def _notes(self, replies: Mapping[str, Reply]) -> list[str]:
    notes = []
    if self.settings.limit:
      notes.append(
        f'The first {self.settings.limit} tasks of each category alone, which are no random sample.'
      )
    if not self._checkout:
      notes.append(
        "The prompts are this project's, and dialogues and special tasks have no verdict: "
        "acebench=DIR takes ACEBench's own prompts and program."
      )
    if not self._agent:
      notes.append('Agents were not run: they act in the simulation of a checkout, agent=FOLDER.')
    cut = sum(not reply.error and not reply.finished for reply in replies.values())
    if cut:
      notes.append(f'{cut} answers were cut off at {self.settings.max_tokens} tokens.')
    return notes

  def _tasks(self) -> list[Task]:
    tasks = []
    for category in ASKED:
      tasks += read_tasks(self._data(), category, self.settings.limit)
    return tasks

  def _data(self) -> pathlib.Path:
    return self._checkout or self.settings.data / 'acebench'

  def _prompts(self) -> dict[str, str]:
    return read_prompts(self._checkout)

  def _agent_results(self) -> dict[str, list[Answered]]:
    """Reads what the agents of another program did.

    Raises:
      ValueError: a task has no result.
    """
    found = {}
    for category in AGENT if self._agent else ():
      path = self._agent / f'data_{category}_result.json'
      if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing; the checkout's generate.py writes it")
      rows = {row['id']: row for row in read_json_lines(path)}
      pairs = []
      for task in read_tasks(self._data(), category, self.settings.limit):
        row = rows.get(task.id)
        if row is None or not {'result', 'process'} <= row.keys():
          raise ValueError(f'{str(path)!r} has no result of {task.id}')
        pairs.append((task, {'result': row['result'], 'process': row['process']}))
      found[category] = pairs
    return found


# --- verdicts ---


def judge_single_turn(
  answered: Mapping[str, Sequence[Answered]],
) -> dict[str, list[Judged]]:
  """Judges the categories that need no checkout."""
  judged = {}
  for category in SINGLE_TURN:
    for task, answer in answered.get(category, ()):
      verdict = judge(answer['result'], task.record['function'], task.reference['ground_truth'])
      judged.setdefault(category, []).append((task, verdict.valid, verdict.reason))
  return judged


def judge_by_ids(
  answered: Mapping[str, Sequence[Answered]],
  found: Mapping[str, tuple[float, set[str]]],
) -> dict[str, list[Judged]]:
  """Returns the verdicts of ACEBench's program on all but the single-turn categories.

  Raises:
    ValueError: its failures do not give its accuracy, so that they were not read as they are meant.
  """
  judged = {}
  for category, pairs in answered.items():
    if category in SINGLE_TURN:
      continue
    accuracy_there, failed = found[category]
    verdicts = []
    for place, (task, _) in enumerate(pairs):
      right = (str(place) if category in AGENT else task.id) not in failed
      verdicts.append((task, right, '' if right else 'wrong'))
    share = sum(_units(verdicts)) / len(_units(verdicts))
    if abs(share - accuracy_there) > _ROUNDING:
      raise ValueError(
        f'eval_main.py gives {category} {accuracy_there:.3f}, and its failures {share:.3f}'
      )
    judged[category] = verdicts
  return judged


def compare(
  judged: Mapping[str, Sequence[Judged]], found: Mapping[str, tuple[float, set[str]]]
) -> list[str]:
  """Returns a note for each category where ACEBench's program and ours give another accuracy."""
  notes = []
  for category, verdicts in judged.items():
    ours = sum(_units(verdicts)) / len(_units(verdicts))
    theirs = found[category][0]
    if abs(ours - theirs) > _ROUNDING:
      notes.append(f'{category} is {ours:.3f} here and {theirs:.3f} by ACEBench.')
  return notes


def _units(judged: Sequence[Judged]) -> list[bool]:
  """Returns a verdict a task or dialogue, which is right if all of its turns are."""
  units: dict[str, bool] = {}
  for task, right, _ in judged:
    units[task.unit] = units.get(task.unit, True) and right
  return list(units.values())


# --- figures ---


def figures(judged: Mapping[str, Sequence[Judged]]) -> list[Score]:
  """Returns the figures of categories, of groups, and overall."""
  scores = []
  groups = {}
  for group, categories in GROUPS.items():
    members = []
    for category in categories:
      if category in judged:
        # Of an agent that does nothing we do not know: some of its tasks may begin as they end.
        floor = None if group == 'agent' else 0.0
        members.append(accuracy(category, _units(judged[category]), floor=floor))
    scores += members
    if len(members) == len(categories):
      shared = 1 / len(members)
      groups[group] = combine(group, 'accuracy', [(shared, score) for score in members])
  scores += groups.values()
  if len(groups) == len(GROUPS):
    weighted = [(WEIGHTS[group], score) for group, score in groups.items()]
    return [*scores, combine('overall', 'accuracy', weighted)]
  parts = [score for score in scores if score.category in judged]
  metric = f'accuracy of {len(parts)} of {sum(map(len, GROUPS.values()))} categories'
  return [*scores, combine('overall', metric, [(1 / len(parts), score) for score in parts])]


def combine(category: str, metric: str, parts: Sequence[tuple[float, Score]]) -> Score:
  """Returns a weighted sum of independent figures.

  Its interval combines the distances from each figure to the ends of its interval (the method of
  variance estimates recovery, Zou and Donner 2008), so that it has a width also where all is right.
  """
  mean = sum(weight * score.estimate['mean'] for weight, score in parts)
  below = above = variance = 0.0
  for weight, score in parts:
    estimate = score.estimate
    # One task says nothing of the share.
    low, high = estimate['interval'] or (0.0, 1.0)
    below += (weight * (estimate['mean'] - low)) ** 2
    above += (weight * (high - estimate['mean'])) ** 2
    variance += (weight * (estimate['standard_error'] or 0.0)) ** 2
  floors = [score.floor for _, score in parts]
  mean = min(mean, 1.0)
  estimate = {
    'mean': mean,
    'standard_error': math.sqrt(variance) or None,
    'interval': [max(0.0, mean - math.sqrt(below)), min(1.0, mean + math.sqrt(above))],
    'n': sum(score.estimate['n'] for _, score in parts),
    'unit': parts[0][1].estimate['unit'],
  }
  floor = None if None in floors else sum(weight * score.floor for weight, score in parts)
  return Score(category, metric, estimate, floor)


def _trajectory(
  task: Task, verdict: tuple[bool, str], asked: Sequence[Message], text: str, tokens: int
) -> dict[str, Any]:
  """Returns a task in the form of `held_out`; `tokens` are those of the whole text."""
  right, reason = verdict
  thoughts, count = thoughts_of(text, tokens)
  answer = {'role': 'assistant', 'content': text}
  return {
    'id': task.id,
    'kind': task.category,
    'query': task.record['question'],
    'correct': right,
    'reason': reason,
    'lazy': is_lazy(thoughts, count, not right),
    'reasoning_tokens': [count],
    'messages': [*(message.to_json() for message in asked), answer],
  }
