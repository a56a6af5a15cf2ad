"""Renders the report of a run again from its files, or checks its summary.

    python -m experiments.report --workdir=runs/nano
    python -m experiments.report --workdir=runs/nano --check

It prints where the page is. With --check nothing is written.
"""

import pathlib

from absl import flags

from dcore_jax.files import read_json
from dcore_jax.report.report import TRACES_FILE, write_report
from dcore_jax.report.summary import validate_summary
from dcore_jax.run import program
from dcore_jax.train.metrics import read_metrics

_WORKDIR = flags.DEFINE_string('workdir', None, 'Work directory of a run.', required=True)
_CHECK = flags.DEFINE_bool('check', False, 'Check summary.json and write nothing.')


def main() -> None:
  """Writes the report of a run, or checks its summary."""
  workdir = pathlib.Path(_WORKDIR.value)
  summary = read_json(workdir / 'summary.json')
  validate_summary(summary)
  if _CHECK.value:
    return
  traces = workdir / TRACES_FILE
  found = read_json(traces) if traces.exists() else []
  print(write_report(workdir, summary, read_metrics(workdir), found))


if __name__ == '__main__':
  program.run(main)
