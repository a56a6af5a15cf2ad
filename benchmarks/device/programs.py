"""Whole programs on the devices: a server that starts cold and warm, and a quick pipeline.

This process leaves the devices to them: a GPU's memory, and a TPU as a whole, belong to one process
at a time.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import startup
from benchmarks.device import rows
from benchmarks.device.rows import Row
from benchmarks.device.setting import Setting

# The kind of tasks that fine-tuning changes most.
_KIND = 'sequential'


def start(setting: Setting) -> Iterator[Row]:
  """Yields seconds until a server is ready, cold and warm, and until its first token."""
  part = 'startup'
  # Weights are made on the processor.
  jax.config.update('jax_platforms', 'cpu')
  name = 'organism' if setting.sizes.trained_name == 'tiny' else '135M'
  model = startup.make_model(name, setting.folder)
  cache = setting.folder / 'cache'
  for kind in ('cold', 'warm'):
    began = startup.start(model, kind, cache, setting.folder)
    yield rows.fact(part, f'{name}, {kind}, until it is ready', began.ready, 's', parts=began.parts)
    yield rows.fact(part, f'{name}, {kind}, compiling', began.seconds['compile'], 's')
    yield rows.fact(part, f'{name}, {kind}, until the first token', began.first_token, 's')
    late = began.counts['late']
    note = f'{late} programs were compiled behind the ready line, {began.seconds["late"]:.1f} s'
    yield rows.claim(part, f'{name}, {kind}, nothing is compiled late', not late, note, late=late)
    if kind == 'warm':
      again = began.counts['compiled']
      note = f'{again} programs were compiled again, although they had been kept'
      yield rows.claim(part, f'{name}, programs are kept', not again, note, compiled=again)


def pipeline(setting: Setting) -> Iterator[Row]:
  """Yields the time of the whole method with the organism, and what it came to."""
  part = 'pipeline'
  variant = setting.sizes.pipeline
  workdir = setting.folder / 'run'
  count = setting.machine.count
  command = [sys.executable, '-m', 'experiments.train', f'--config=configs/nano.py:{variant}']
  if count > 1:
    # Rows are divided over the devices; the config has 5 and 1 of them.
    command += [f'--config.sft.rows={count * -(-5 // count)}', f'--config.rl.rows={count}']
  began = time.perf_counter()
  done = subprocess.run(
    [*command, f'--workdir={workdir}'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  seconds = time.perf_counter() - began
  if done.returncode:
    said = done.stdout.strip().splitlines() or ['nothing']
    print(done.stdout, file=sys.stderr)
    yield rows.failed(part, f'nano:{variant}', f'status {done.returncode}, it said: {said[-1]}')
    return
  yield rows.fact(part, f'nano:{variant}, all stages', seconds, 's')
  summary = json.loads((workdir / 'summary.json').read_text(encoding='utf-8'))
  yield from outcome(part, summary, claimed=variant == 'quick')


def outcome(part: str, summary: dict[str, Any], *, claimed: bool) -> Iterator[Row]:
  """Yields the seconds of each stage, and what the held-out tasks say.

  Args:
    part: of the rows.
    summary: of the run.
    claimed: whether the run is long enough that fine-tuning has to show.
  """
  for stage, seconds in summary['seconds'].items():
    yield rows.fact(part, f'stage {stage}', seconds, 's')
  shares = {}
  for stage, figures in summary['stages'].items():
    # Tasks of several steps: the base model has all kinds of single ones right already.
    shares[stage] = figures['accuracy'].get(_KIND)
    if shares[stage] is not None:
      yield rows.fact(part, f'{_KIND} tasks right, {stage}', shares[stage], 'share')
  if claimed:
    before, after = shares['base'], shares['sft']
    note = (
      f'fine-tuning took {_KIND} tasks from {before:.0%} to {after:.0%}, on a CPU from 33 to 88 %'
    )
    yield rows.claim(part, 'fine-tuning helps', after > before, note)
