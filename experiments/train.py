"""Runs the pipeline: python -m experiments.train --config=configs/nano.py --workdir=W [--stages=distill,sft]"""

import pathlib
import sys

from absl import app, flags, logging

from dcore_jax import distributed
from dcore_jax.report.summary import format_changes
from dcore_jax.run.config import define_config
from dcore_jax.run.pipeline import Pipeline

_CONFIG = define_config('configs/nano.py')
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/nano', 'Where results are and go; finished stages are not run again.'
)
_HOSTS = flags.DEFINE_string(
  'hosts', '', "'auto', or ADDRESS:PORT,COUNT,INDEX: this process is one of several, a host each."
)
_STAGES = flags.DEFINE_list('stages', [], 'Only these stages; default: all of the config.')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)  # orbax logs dozens of lines a checkpoint
  config = _CONFIG.value
  if _STAGES.value:
    config.stages = tuple(_STAGES.value)
  try:
    distributed.join(_HOSTS.value)
    pipeline = Pipeline(config, pathlib.Path(_WORKDIR.value))
    summary = pipeline.run()
  except (ValueError, ConnectionError) as error:
    sys.exit(f'error: {error}')
  changes = format_changes(summary)
  print(
    f'{changes}\n' * bool(changes) + f'summary: {pipeline.workdir / "summary.json"}\n'
    f'report:  {pipeline.workdir / "report.html"}',
    file=sys.stderr,
  )


if __name__ == '__main__':
  app.run(main)
