"""Measures a model on the held-out tasks of a config, with our engine or at any OpenAI-compatible endpoint:

    python -m experiments.evaluate --config=configs/nano.py --model=DIR --out=OUT
    python -m experiments.evaluate --config=configs/nano.py --base_url=http://HOST:8000/v1 --model=NAME --out=OUT

Killed, or left by its endpoint, it goes on when it is called again; what was answered is not asked twice. Prints the content
of OUT/result.json, whose figures are those of the pipeline's stages. An endpoint is asked as section `distill` says
(concurrency, timeout, request_retries, prices); the tokens of its thoughts are counted by the config's tokenizer.
"""

import json
import pathlib
import sys

from absl import app, flags, logging

from dcore_jax.distill.stage import endpoint, prices
from dcore_jax.evaluate.held_out import evaluate_backend
from dcore_jax.files import write_json_atomic
from dcore_jax.progress import stage
from dcore_jax.rollout.policy import load_tokenizer, local_backend
from dcore_jax.run.config import check_config, define_config
from dcore_jax.run.defaults import default_config

_CONFIG = define_config('configs/nano.py')
_OUT = flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
_BASE_URL = flags.DEFINE_string('base_url', '', "An endpoint's; '' is our engine.")
_MODEL = flags.DEFINE_string(
  'model', '', "Hugging Face directory, or the name at the endpoint. '' is the config's model."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  config, folder = _CONFIG.value, pathlib.Path(_OUT.value)
  if _MODEL.value and not _BASE_URL.value:
    config.model.path = _MODEL.value
  try:
    config = check_config(config, default_config())
    tokenizer, _ = load_tokenizer(config.model)
    with stage('evaluate') as timer:
      journal = folder / 'replies.jsonl'
      if _BASE_URL.value:
        backend = endpoint(
          config.distill, _BASE_URL.value, _MODEL.value, journal, prices(config.distill)
        )
      else:
        backend = local_backend(config, journal)
      result = evaluate_backend(config, folder, backend, tokenizer)
  except (ValueError, ConnectionError) as error:
    sys.exit(f'error: {error}')
  write_json_atomic(folder / 'result.json', result | {'seconds': timer.seconds})
  print(json.dumps(result))


if __name__ == '__main__':
  app.run(main)
