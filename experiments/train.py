"""Runs the pipeline: measure, distil, fine-tune, measure, DA-GRPO, measure, export, report.

    python -m experiments.train --config=configs/nano.py --workdir=W --stages=distill,sft

Finished stages are not run again, so the same command resumes a run.
"""

import pathlib
import sys

from absl import flags

from dcore_jax import distributed, host_watch
from dcore_jax.claims import hold
from dcore_jax.report.summary import format_changes
from dcore_jax.run import help as help_lib
from dcore_jax.run import program
from dcore_jax.run.checks import check_fields
from dcore_jax.run.config import define_config, read_config
from dcore_jax.run.pipeline import Pipeline

_CONFIG = define_config('configs/nano.py')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/nano', 'Folder of the results.')
_HOSTS = flags.DEFINE_string(
  'hosts', '', "'auto', or ADDRESS:PORT,COUNT,INDEX: this process is one of several, a host each."
)
_PATIENCE = flags.DEFINE_float(
  'patience', host_watch.PATIENCE, 'Seconds without a word from another host until this one ends.'
)
_STAGES = flags.DEFINE_list('stages', [], 'Only these stages; default: all of the config.')

help_lib.group('the run', _WORKDIR, _STAGES)
help_lib.group('several hosts', _HOSTS, _PATIENCE)


def main() -> None:
  """Runs the stages that are not done, and says what changed on held-out tasks."""
  config = _CONFIG.value
  if _STAGES.value:
    config.stages = tuple(_STAGES.value)
  distributed.join(_HOSTS.value, _PATIENCE.value)
  workdir = pathlib.Path(_WORKDIR.value)
  # A wrong config leaves no folder behind.
  config = read_config(config)
  check_fields(config)
  # Held before the model is loaded, which takes minutes.
  with hold(workdir):
    summary = Pipeline(config, workdir).run(announce=True)
  changes = format_changes(summary)
  if changes:
    print(changes, file=sys.stderr)
  print(f'summary: {workdir / "summary.json"}', file=sys.stderr)
  # Without the stage `report` there is none, or one of an earlier call.
  if (workdir / 'report.html').exists():
    print(f'report:  {workdir / "report.html"}', file=sys.stderr)


if __name__ == '__main__':
  program.run(main)
