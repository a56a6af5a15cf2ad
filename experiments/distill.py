"""Self-distillation alone, with our engine or against any OpenAI-compatible endpoint:

    python -m experiments.distill --config=configs/nano.py --workdir=W
    python -m experiments.distill --config=configs/nano.py --workdir=W --backend=openai --base_url=http://HOST:8000/v1 --model=NAME

Killed, or left by its endpoint, it goes on when it is called again; what was answered is not asked twice. Prints the content
of W/distill/distill.json. `experiments.train --workdir=W` then goes on with the rows.
"""

import json
import pathlib
import sys

from absl import app, flags, logging

from dcore_jax.data.seed_sources import config_seeds
from dcore_jax.distill.stage import BACKENDS, run_distillation
from dcore_jax.files import write_json_atomic
from dcore_jax.progress import progress, stage
from dcore_jax.rollout.policy import local_backend
from dcore_jax.run.config import check_config, define_config
from dcore_jax.run.defaults import default_config

_CONFIG = define_config('configs/nano.py')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/nano', 'Results are in its folder distill.')
_BACKEND = flags.DEFINE_enum('backend', None, BACKENDS, 'Short for --config.distill.backend.')
_BASE_URL = flags.DEFINE_string('base_url', None, 'Short for --config.distill.base_url.')
_MODEL = flags.DEFINE_string(
  'model', None, 'Short for --config.distill.model: the name of the model at the endpoint.'
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  for name, flag in (('backend', _BACKEND), ('base_url', _BASE_URL), ('model', _MODEL)):
    if flag.value is not None:
      config.distill[name] = flag.value
  folder = pathlib.Path(_WORKDIR.value) / 'distill'
  try:
    config = check_config(config, default_config())
    seeds = config_seeds(config)
    with stage('distill'), progress(total=len(seeds), description='distill') as bar:
      summary = run_distillation(
        config, folder, seeds, lambda journal: local_backend(config, journal), progress=bar.update
      )
  except (ValueError, ConnectionError) as error:
    sys.exit(f'error: {error}')
  write_json_atomic(folder / 'result.json', summary)
  print(json.dumps(summary))


if __name__ == '__main__':
  app.run(main)
