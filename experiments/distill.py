r"""Self-distillation alone, with our engine or against any OpenAI-compatible endpoint.

    python -m experiments.distill --config=configs/nano.py --workdir=W
    python -m experiments.distill --config=configs/nano.py --workdir=W \
      --backend=openai --base_url=http://HOST:8000/v1 --model=NAME

Prints the content of W/distill/distill.json. The same command goes on where an earlier one was
killed or lost its endpoint: no answered request is sent again. `experiments.train --workdir=W` then
trains on the rows.
"""

import json
import pathlib
from typing import Any

from absl import flags

from dcore_jax.claims import hold
from dcore_jax.config import RunConfig
from dcore_jax.data.seed_sources import config_seeds
from dcore_jax.distill.stage import BACKENDS, run_distillation
from dcore_jax.files import write_json_atomic
from dcore_jax.progress import progress, show_compiling, stage
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.policy import local_backend
from dcore_jax.run import program
from dcore_jax.run.config import define_config, read_config

_CONFIG = define_config('configs/nano.py')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/nano', 'Results go to its folder distill.')
_BACKEND = flags.DEFINE_enum('backend', None, BACKENDS, 'Short for --config.distill.backend.')
_BASE_URL = flags.DEFINE_string('base_url', None, 'Short for --config.distill.base_url.')
_MODEL = flags.DEFINE_string(
  'model', None, 'Short for --config.distill.model: the name of the model at the endpoint.'
)


def main() -> None:
  """Distils the seeds of the config that have no rows yet, and prints the summary."""
  changed = _CONFIG.value
  for name, flag in (('backend', _BACKEND), ('base_url', _BASE_URL), ('model', _MODEL)):
    if flag.value is not None:
      changed.distill[name] = flag.value
  config = read_config(changed)
  workdir = pathlib.Path(_WORKDIR.value)
  with hold(workdir):
    summary = _distill(config, workdir / 'distill')
  print(json.dumps(summary))


def _distill(config: RunConfig, folder: pathlib.Path) -> dict[str, Any]:
  seeds = config_seeds(config)

  def local(journal: pathlib.Path) -> LocalBackend:
    backend = local_backend(config, journal)
    show_compiling(backend.engine.prepare)
    return backend

  with stage('distill'), progress(total=len(seeds), description='distill') as bar:
    summary = run_distillation(config, folder, seeds, local, progress=bar.update)
  write_json_atomic(folder / 'result.json', summary)
  return summary


if __name__ == '__main__':
  program.run(main)
