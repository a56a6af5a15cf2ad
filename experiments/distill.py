r"""Self-distillation alone, with our engine or against any OpenAI-compatible endpoint.

    python -m experiments.distill --config=configs/nano.py --workdir=W
    python -m experiments.distill --config=configs/nano.py --workdir=W \
      --backend=openai --base_url=http://HOST:8000/v1 --model=NAME

Prints the content of W/distill/distill.json. Several hosts divide the seeds among them: the same
command on each, with --hosts. The same command goes on where an earlier one was
killed or lost its endpoint: no answered request is sent again. `experiments.train --workdir=W` then
trains on the rows.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from dcore_jax import distributed, host_watch
from dcore_jax.claims import hold
from dcore_jax.config import RunConfig
from dcore_jax.data import recipe
from dcore_jax.data.seed_sources import config_seeds
from dcore_jax.data.seeds import Seed
from dcore_jax.distill.stage import BACKENDS, run_distillation
from dcore_jax.files import write_json_atomic
from dcore_jax.progress import progress, show_compiling, stage
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.policy import local_backend
from dcore_jax.run import help as help_lib
from dcore_jax.run import program
from dcore_jax.run.config import define_config, read_config
from dcore_jax.run.needed import find_for_rows

_CONFIG = define_config('configs/nano.py')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/nano', 'Results go to its folder distill.')
_BACKEND = flags.DEFINE_enum('backend', None, BACKENDS, 'Short for --config.distill.backend.')
_BASE_URL = flags.DEFINE_string('base_url', None, 'Short for --config.distill.base_url.')
_MODEL = flags.DEFINE_string(
  'model', None, 'Short for --config.distill.model: the name of the model at the endpoint.'
)
_HOSTS = flags.DEFINE_string(
  'hosts', '', "'auto', or ADDRESS:PORT,COUNT,INDEX: this process is one of several, a host each."
)
_PATIENCE = flags.DEFINE_float(
  'patience', host_watch.PATIENCE, 'Seconds without a word from another host until this one ends.'
)

help_lib.group('the run', _WORKDIR)
help_lib.group('an endpoint', _BACKEND, _BASE_URL, _MODEL)
help_lib.group('several hosts', _HOSTS, _PATIENCE)


def main() -> None:
  """Distils the seeds of the config that have no rows yet, and prints the summary."""
  changed = _CONFIG.value
  for name, flag in (('backend', _BACKEND), ('base_url', _BASE_URL), ('model', _MODEL)):
    if flag.value is not None:
      changed.distill[name] = flag.value
  distributed.join(_HOSTS.value, _PATIENCE.value)
  config = read_config(changed)
  workdir = pathlib.Path(_WORKDIR.value)
  with hold(workdir):
    config = find_for_rows(config, workdir)
    if config.recipe.seeds:
      seeds = _recipe_seeds(config, workdir)
    else:
      seeds = config_seeds(config)
    summary = _distill(config, seeds, workdir / 'distill')
  if distributed.writes():
    print(json.dumps(summary))


def _recipe_seeds(config: RunConfig, workdir: pathlib.Path) -> list[Seed]:
  """Gathers the seeds of the recipe, where they are not there, and returns them."""
  # Not what reinforcement learning asks, whose sources need not be here.
  config = dataclasses.replace(config, stages=('distill',))
  print(recipe.format_report(recipe.prepare(config, workdir / recipe.FOLDER)), file=sys.stderr)
  return recipe.read_part(workdir / recipe.FOLDER, 'seeds')


def _distill(config: RunConfig, seeds: Sequence[Seed], folder: pathlib.Path) -> dict[str, Any]:
  def local(journal: pathlib.Path) -> LocalBackend:
    backend = local_backend(config, journal)
    show_compiling(backend.engine.prepare)
    return backend

  print(
    f'distils {len(seeds):,} seeds; rows and answers go to {folder}', file=sys.stderr, flush=True
  )
  with stage('distill'), progress(total=len(seeds), description='distill') as bar:
    summary = run_distillation(config, folder, seeds, local, progress=bar.update)
  write_json_atomic(folder / 'result.json', summary)
  return summary


if __name__ == '__main__':
  program.run(main)
