r"""Measures a model on the held-out tasks of a config, with our engine or at an endpoint.

    python -m experiments.evaluate --config=configs/nano.py --model=DIR --out=OUT
    python -m experiments.evaluate --config=configs/nano.py --out=OUT \
      --base_url=http://HOST:8000/v1 --model=NAME

Prints the content of OUT/result.json, whose figures are those of the pipeline's stages. The same
command goes on where an earlier one was killed or lost its endpoint: no answered request is sent
again. Any OpenAI-compatible endpoint will do. It is asked as section `distill` of the config says
(concurrency, timeout, request_retries, prices), and the config's tokenizer counts the tokens of its
thoughts.
"""

import json
import pathlib
from typing import Any

from absl import flags

from dcore_jax.claims import hold
from dcore_jax.config import RunConfig
from dcore_jax.distill.stage import endpoint, prices
from dcore_jax.evaluate.held_out import evaluate_backend
from dcore_jax.files import write_json_atomic
from dcore_jax.progress import show_compiling, stage
from dcore_jax.rollout.policy import load_tokenizer, local_backend
from dcore_jax.run import program
from dcore_jax.run.config import define_config, read_config

_CONFIG = define_config('configs/nano.py')
_OUT = flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
_BASE_URL = flags.DEFINE_string('base_url', '', "Address of an endpoint; '' is our engine.")
_MODEL = flags.DEFINE_string(
  'model', '', "Hugging Face directory, or the name at the endpoint; '' is the config's model."
)


def main() -> None:
  """Acts the tasks out that have no answers yet, and prints the figures of all."""
  changed = _CONFIG.value
  folder = pathlib.Path(_OUT.value)
  if _MODEL.value and not _BASE_URL.value:
    changed.model.path = _MODEL.value
  config = read_config(changed)
  with hold(folder):
    result = _evaluate(config, folder)
  print(json.dumps(result))


def _evaluate(config: RunConfig, folder: pathlib.Path) -> dict[str, Any]:
  tokenizer, _ = load_tokenizer(config.model)
  with stage('evaluate') as timer:
    journal = folder / 'replies.jsonl'
    if _BASE_URL.value:
      backend = endpoint(
        config.distill, _BASE_URL.value, _MODEL.value, journal, prices(config.distill)
      )
    else:
      backend = local_backend(config, journal)
      show_compiling(backend.engine.prepare)
    result = evaluate_backend(config, folder, backend, tokenizer)
  write_json_atomic(folder / 'result.json', result | {'seconds': timer.seconds})
  return result


if __name__ == '__main__':
  program.run(main)
