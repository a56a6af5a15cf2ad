"""Figures of tau2-bench from its simulations: pass^k, floors, and whose faults there were.

A record is a line of `worker`. A simulation says nothing about the agent if the simulated user
or the harness has failed; it has no verdict and is left out.
"""

import collections
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax.chat.call_text import CLOSE_THOUGHTS, OPEN_THOUGHTS
from dcore_jax.evaluate.suites import Score
from dcore_jax.statistics import estimate_mean

_SIDES = ('agent', 'user', 'harness')

# (domain, task, trial)
Key = tuple[str, str, int]


def judged(record: Mapping[str, Any]) -> bool:
  """Whether a simulation says something about the agent."""
  fault = record['fault']
  return fault is None or fault['of'] == 'agent'


def _correct(record: Mapping[str, Any]) -> bool:
  return record['reward'] is not None and math.isclose(record['reward'], 1.0, abs_tol=1e-6)


def pass_hat(right: int, trials: int, k: int) -> float:
  """Computes the probability that k of the trials, drawn without replacement, are all right."""
  return math.comb(right, k) / math.comb(trials, k)


def domain_scores(
  domain: str, records: Sequence[Mapping[str, Any]], trials: int, floor: float | None
) -> list[Score]:
  """Returns pass^1 to pass^trials of a domain; a k that no task has verdicts for is left out."""
  verdicts: dict[str, list[bool]] = {}
  for record in records:
    if record['domain'] == domain and judged(record):
      verdicts.setdefault(record['task'], []).append(_correct(record))
  scores = []
  for k in range(1, trials + 1):
    # A task whose user failed has fewer verdicts than trials.
    values = [pass_hat(sum(found), len(found), k) for found in verdicts.values() if len(found) >= k]
    if values:
      # Who does nothing does so in each trial: its pass^k is its pass^1.
      estimate = estimate_mean(values, bounds=(0.0, 1.0))
      scores.append(Score(domain, f'pass^{k}', estimate, floor))
  return scores


def overall(scores: Sequence[Score], domains: int) -> list[Score]:
  """Returns the unweighted means over the domains, as published tables have them."""
  groups: dict[str, list[Score]] = {}
  for score in scores:
    groups.setdefault(score.metric, []).append(score)
  found = []
  for metric, group in groups.items():
    # The mean of some domains is not the mean of all.
    if len(group) == domains:
      floors = [score.floor for score in group]
      floor = None if None in floors else sum(floors) / domains
      estimate = mean_of_domains([score.estimate for score in group])
      found.append(Score('overall', metric, estimate, floor))
  return found


def mean_of_domains(estimates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Estimates the unweighted mean of independent estimates.

  Its interval combines theirs (the method of variance estimates recovery, Zou and Donner 2008), so
  that a domain whose tasks all went alike still has its uncertainty.
  """
  count = len(estimates)
  mean = sum(estimate['mean'] for estimate in estimates) / count
  errors = [estimate['standard_error'] or 0.0 for estimate in estimates]
  interval = None
  if all(estimate['interval'] for estimate in estimates):
    below = math.hypot(*(found['mean'] - found['interval'][0] for found in estimates))
    above = math.hypot(*(found['interval'][1] - found['mean'] for found in estimates))
    interval = [mean - below / count, mean + above / count]
  return {
    'mean': mean,
    'standard_error': math.hypot(*errors) / count or None,
    'interval': interval,
    'n': sum(estimate['n'] for estimate in estimates),
    'unit': estimates[0]['unit'],
  }


def list_left_out(
  tasks: Mapping[str, Any], records: Mapping[Key, Mapping[str, Any]], trials: int
) -> list[dict[str, Any]]:
  """Returns the simulations without a verdict."""
  found = []
  for domain, group in tasks.items():
    for name in group:
      for trial in range(trials):
        record = records.get((domain, name, trial))
        reason = 'not run'
        if record is not None:
          if judged(record):
            continue
          fault = record['fault']
          reason = f'{fault["of"]}: {fault["reason"]}'
        found.append({'id': f'{domain}-{name}-{trial}', 'reason': reason})
  return found


# --- faults ---


def count_faults(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Counts what went wrong, by domain and by who did it.

  Returns:
    {domain: {'simulations', 'agent', 'user', 'harness', 'agent_messages', 'user_messages'}}. The
    three in the middle count simulations that a side has ended, by reason. The last two count a
    side's messages that were wrong in part, of which a simulation may have many: calls of unknown
    tools, calls with other arguments than the tool takes, calls that the tool refused, and texts
    that were cut short.
  """
  counts: dict[str, Any] = {}
  for record in records:
    found = counts.setdefault(
      record['domain'],
      {'simulations': 0}
      | {side: collections.Counter() for side in _SIDES}
      | {'agent_messages': collections.Counter(), 'user_messages': collections.Counter()},
    )
    found['simulations'] += 1
    side, reason = _ending(record)
    if side:
      found[side][reason] += 1
    for name in ('agent', 'user'):
      found[f'{name}_messages'].update(record['problems'][name])
    for message in record['messages']:
      if message.get('cut'):
        name = 'agent' if message['role'] == 'assistant' else 'user'
        found[f'{name}_messages']['cut_short'] += 1
  return counts


def _ending(record: Mapping[str, Any]) -> tuple[str, str]:
  """Returns which side has ended a simulation wrongly, and how; ('', '') where none has."""
  if record['fault']:
    return record['fault']['of'], record['fault']['reason']
  if record['ended'] == 'never_stops':
    return 'user', 'never_stops'
  if record['ended'] in ('max_steps', 'too_many_errors'):
    return 'agent', record['ended']
  return '', ''


def fault_notes(faults: Mapping[str, Any]) -> list[str]:
  """Says in sentences what `count_faults` has counted."""
  names = {
    'agent': 'ended by a fault of the agent',
    'user': 'ended by a fault of the simulated user',
    'harness': 'ended by a fault of the harness',
    'agent_messages': 'wrong messages of the agent',
    'user_messages': 'wrong messages of the simulated user',
  }
  notes = []
  for domain, found in faults.items():
    for part, text in names.items():
      if found[part]:
        counted = ', '.join(f'{reason} {n}' for reason, n in sorted(found[part].items()))
        notes.append(f'{domain}, {found["simulations"]} simulations, {text}: {counted}.')
  return notes


# --- trajectories ---


def trajectory(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a simulation in the form of `held_out`."""
  correct = _correct(record)
  side, reason = _ending(record)
  if not correct and not side:
    # Which part of the verdict was wrong: the database, what was told, ...
    failed = [part for part, value in record['breakdown'].items() if value < 1]
    side, reason = 'wrong', ' '.join(failed)
  messages = [_shown(message) for message in record['messages']]
  texts = [message['content'] for message in messages if message['role'] == 'user']
  return {
    'id': f'{record["domain"]}-{record["task"]}-{record["trial"]}',
    'kind': record['domain'],
    # What `report.compare` takes as the unit: the trials of a task are not independent.
    'task': record['task'],
    'query': texts[0] if texts else '',
    'correct': correct,
    'reason': '' if correct else f'{side}: {reason}',
    'seconds': record['seconds'],
    'messages': messages,
  }


def _shown(message: Mapping[str, Any]) -> dict[str, str]:
  """Returns a message with its thoughts and calls as text."""
  parts = []
  if message.get('reasoning'):
    parts.append(f'{OPEN_THOUGHTS}\n{message["reasoning"].strip()}\n{CLOSE_THOUGHTS}\n')
  if message['content']:
    parts.append(message['content'])
  for call in message.get('tool_calls', ()):
    parts.append(f'<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>')
  return {'role': message['role'], 'content': '\n'.join(parts)}
