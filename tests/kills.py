"""Kills the pipeline at random moments, again and again, and compares what comes out.

    python -m tests.kills --kills=50 --workdir=runs/kills

Two runs are left alone. The others are killed by SIGKILL after a time that is drawn, and started
again with the same command, until enough kills have hit and the last run has come to its end. Every
finished run must have the numbers, rows, weights and texts of the first, bit for bit, and nothing
twice. The end status is 1 where one differs. The sizes are of `nano:tiny` and below; they measure
nothing.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from dcore_jax.report.collect import stage_folders

ROOT = pathlib.Path(__file__).parents[1]
ESTIMATOR = 'da_grpo'
# Small enough for a minute a run on an idle core, with two or more checkpoints in each stage.
SIZES = {
  'evaluate.tasks': 2,
  'evaluate.max_tokens': 64,
  'distill.tasks.single': 4,
  'distill.tasks.sequential': 4,
  'distill.tasks.parallel': 4,
  'distill.tasks.irrelevant': 2,
  'distill.tasks.multi_turn': 2,
  'distill.shard_seeds': 4,
  'sft.epochs': 3,
  'sft.rows': 1,
  'sft.checkpoint_every': 2,
  'rl.steps': 2,
  'rl.wave': 2,
  'rl.max_tokens': 64,
  'rl.checkpoint_every': 1,
  'engine.lanes': 8,
}
# Words in the names of numbers that are times, or that tell of the process that came to the end.
_OF_TIME = ('seconds', 'per_second', 'tflops', 'mfu', 'resumed_at', 'usage', 'tokens_per_row')


def command(folder: pathlib.Path) -> list[str]:
  sizes = [f'--config.{name}={value}' for name, value in SIZES.items()]
  return [
    sys.executable,
    '-m',
    'experiments.train',
    '--config=configs/nano.py:tiny',
    f'--workdir={folder}',
    *sizes,
  ]


def stage_under_way(folder: pathlib.Path) -> str:
  """The first stage without a result."""
  for name, place in stage_folders(ESTIMATOR).items():
    if not (folder / place / 'result.json').exists():
      return name
  return 'report'


def attempt(folder: pathlib.Path, seconds: float | None) -> bool:
  """Runs the pipeline, for so many seconds at most -> whether it was killed.

  Raises:
    RuntimeError: it ended by itself, and not well.
  """
  process = subprocess.Popen(
    command(folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )
  try:
    # Its bars and messages are few; they fit into the pipe's buffer or are read at the end.
    _, said = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
  if process.returncode == -signal.SIGKILL:
    return True
  if process.returncode:
    raise RuntimeError(f'the run in {folder} ended with {process.returncode}: {said[-3000:]}')
  return False


def timeless(value: Any) -> Any:
  """JSON without what depends on the clock."""
  if isinstance(value, dict):
    kept = {}
    for name, inner in value.items():
      if not any(word in name for word in _OF_TIME):
        kept[name] = timeless(inner)
    return kept
  if isinstance(value, list):
    return [timeless(inner) for inner in value]
  return value


def contents(folder: pathlib.Path) -> dict[str, Any]:
  """What a finished run is compared by: file -> what is in it, without times."""
  found: dict[str, Any] = {}
  for path in sorted(folder.rglob('*')):
    name = str(path.relative_to(folder))
    if name.startswith(('checkpoints', 'tensorboard')) or not path.is_file():
      continue
    if path.suffix == '.json':
      if path.name not in ('seconds.json', '.held_by.json'):
        text = json.dumps(timeless(json.loads(path.read_text())), sort_keys=True)
        found[name] = text.replace(str(folder), 'W')
    elif path.name == 'replies.jsonl':
      # In the order of arrival; each request once.
      records = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
      found[name] = sorted(json.dumps(record, sort_keys=True) for record in records)
    elif path.suffix == '.jsonl':
      # Rows say how long their answers took.
      found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
    elif path.suffix == '.safetensors':
      found[name] = path.read_bytes()
  return found


def doubled(folder: pathlib.Path) -> list[str]:
  """What a file has twice."""
  twice = []
  steps = []
  for line in (folder / 'metrics.jsonl').read_text().splitlines():
    row = json.loads(line)
    steps.append((row['stage'], row['step']))
  if len(set(steps)) < len(steps):
    twice.append('rows of metrics.jsonl')
  for path in folder.rglob('replies.jsonl'):
    keys = [json.loads(line)['key'] for line in path.read_text().splitlines()]
    if len(set(keys)) < len(keys):
      twice.append(f'replies of {path.relative_to(folder)}')
  return twice


def differences(folder: pathlib.Path, whole: pathlib.Path) -> list[str]:
  """Names of files that are not those of the undisturbed run, and what is there twice."""
  mine = contents(folder)
  theirs = contents(whole)
  found = [
    name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)
  ]
  for path in folder.rglob('*'):
    if 'partial' in path.name or 'orbax-checkpoint-tmp' in path.name:
      found.append(f'{path.relative_to(folder)} is left over')
  return found + doubled(folder)


def main() -> None:
  # No absl flags: tests import this file beside programs that have flags of the same names.
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--kills', type=int, default=50, help='that have to hit a running stage')
  parser.add_argument('--workdir', default='runs/kills', help='folder of all runs')
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  parser.add_argument('--keep', action='store_true', help='take the undisturbed run that is there')
  given = parser.parse_args()
  root = pathlib.Path(given.workdir)
  whole = root / 'whole'
  # Runs of an earlier call, and nothing else that may be there.
  for path in [whole, *root.glob('run[0-9]*')]:
    if path.exists() and not (path == whole and given.keep):
      shutil.rmtree(path)
  attempt(whole, None)
  # A second one: its programs are compiled, as those of all that follow are.
  again = root / 'run0'
  began = time.monotonic()
  attempt(again, None)
  took = time.monotonic() - began
  bad = differences(again, whole)
  print(
    f'left alone: {took:.0f} s, {"differs in " + ", ".join(bad) if bad else "the same"}', flush=True
  )
  draw = random.Random(given.seed)
  by_stage: dict[str, int] = {}
  kills = 0
  runs = 1
  while kills < given.kills:
    folder = root / f'run{runs}'
    runs += 1
    while True:
      # A kill in every third of a run on average, so that each process comes some way.
      seconds = draw.uniform(0.03, 0.7) * took
      killed = attempt(folder, seconds if kills < given.kills else None)
      if not killed:
        break
      kills += 1
      stage = stage_under_way(folder)
      by_stage[stage] = by_stage.get(stage, 0) + 1
      print(f'kill {kills} after {seconds:.1f} s, in {stage}', flush=True)
    found = differences(folder, whole)
    bad += found
    print(f'{folder.name}: {"differs in " + ", ".join(found) if found else "the same"}', flush=True)
    if not found:
      shutil.rmtree(folder)
  print('\n| stage | kills |\n|---|---|')
  for stage, count in by_stage.items():
    print(f'| {stage} | {count} |')
  print(f'\n{kills} kills in {runs} runs; {len(bad)} differences')
  if bad:
    sys.exit(1)


if __name__ == '__main__':
  # A pipe that is full would stop a run that says much.
  os.environ.setdefault('TQDM_DISABLE', '1')
  main()
