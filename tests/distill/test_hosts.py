"""Distillation on several hosts: the rows of one, in the same order."""

import dataclasses
import json
import signal

import pytest

from dcore_jax.data.seeds import Seed
from dcore_jax.distill import divided
from dcore_jax.distill.algorithm import SeedOutcome
from dcore_jax.files import read_json, read_json_lines
from tests import hosts
from tests.distill.test_algorithm import some_seeds

TASKS = dict(single=4, sequential=5, parallel=4, irrelevant=3, multi_turn=2)


def start(folder, count, *flags):
  """`experiments.distill` on so many hosts, with made-up answers unless flags say otherwise."""
  fields = [f'--config.distill.tasks.{name}={number}' for name, number in TASKS.items()]
  command = [
    *('-m', 'experiments.distill', '--config=nano', f'--workdir={folder}', *fields, *flags),
    '--config.distill.shard_seeds=6',
  ]
  return [
    hosts.start([*command, f'--hosts={place}'], devices=2 // count) for place in hosts.places(count)
  ]


def rows_of(folder):
  rows = []
  for path in sorted((folder / 'distill').glob('rows-*.jsonl')):
    rows += read_json_lines(path)
  for row in rows:
    # The time is the one thing that no two runs share.
    del row['provenance']['seconds']
  return rows


def finish(processes):
  """What the first host prints; the others print nothing of their own."""
  said = []
  for process in processes:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    # Gloo, by which CPUs exchange data, prints on stdout.
    said.append([line for line in out.splitlines() if line.startswith('{')])
  assert len(said[0]) == 1 and not any(said[1:])
  return json.loads(said[0][0])


def same(summary, other):
  """Whether two summaries agree but for what the clock and the requests of a call say."""
  timed = ('seconds', 'usage', 'tokens_per_row')
  return all(summary[name] == other[name] for name in other if name not in timed)


def test_two_hosts_make_the_rows_of_one(tmp_path):
  scripted = '--config.distill.backend=scripted'
  two = finish(start(tmp_path / 'two', 2, scripted))
  one = finish(start(tmp_path / 'one', 1, scripted))
  assert one['rows'] and same(two, one) and two['usage'] == one['usage']
  assert rows_of(tmp_path / 'two') == rows_of(tmp_path / 'one')
  assert read_json(tmp_path / 'two' / 'distill' / 'distill.json') == two


@pytest.mark.slow
def test_an_engine_on_each_host_and_a_journal_that_others_read(tmp_path):
  engine = ['--config.distill.max_tokens=64', '--config.engine.lanes=8', '--config.mesh.fsdp=-1']
  one = finish(start(tmp_path / 'one', 1, *engine))
  # The second host ends in the middle: the first has nobody to exchange with.
  processes = start(tmp_path / 'two', 2, *engine)
  journal = tmp_path / 'two' / 'distill' / 'replies.host1.jsonl'
  while not journal.exists() or journal.read_text().count('\n') < 3:
    assert processes[1].poll() is None
  processes[1].kill()
  said = processes[0].communicate(timeout=600)[1]
  assert processes[0].returncode == -signal.SIGKILL
  assert 'host 1 of 0..1' in said and 'has died' in said
  known = len(journal.read_text().splitlines())
  # One process goes on, and asks nothing that either host was answered.
  again = finish(start(tmp_path / 'two', 1, *engine))
  assert same(again, one) and rows_of(tmp_path / 'two') == rows_of(tmp_path / 'one')
  assert again['usage']['from_journal'] >= known >= 3


def test_outcomes_come_back_as_they_were():
  seeds, _ = some_seeds(seed=0, **TASKS)
  for value in (None, [], [{'id': 'a', 'messages': [{'content': 'half \ud83d'}]}], seeds[0]):
    outcome = SeedOutcome(seed='s', kind='single', value=value, reason='why', calls=2, seconds=0.5)
    record = json.loads(json.dumps(divided._to_json(outcome)))
    back = divided._from_json(record)
    if isinstance(value, Seed):
      assert back.value.to_json() == value.to_json()
      back = dataclasses.replace(back, value=value)
    assert back == outcome
