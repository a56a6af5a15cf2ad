r"""Measures a model on held-out tasks of a config or on suites, with our engine or an endpoint.

    python -m experiments.evaluate --config=configs/nano.py --model=DIR --out=OUT
    python -m experiments.evaluate --config=configs/nano.py --out=OUT \
      --base_url=http://HOST:8000/v1 --model=NAME
    python -m experiments.evaluate --suite=gsm8k,humaneval --model=DIR --out=OUT --limit=100
    python -m experiments.evaluate --suite=math500 --out=OUT --suite_options='math500.seconds=60' \
      --base_url=http://HOST:8000/v1 --model=NAME

Without --suite it prints the content of OUT/result.json, whose figures are those of the pipeline's
stages. An endpoint is asked as section `distill` of the config says (concurrency, timeout,
request_retries, prices), and the config's tokenizer counts the tokens of its thoughts.

With --suite the config is not read. It prints the content of OUT/summary.json, and a table on
stderr; every suite has a folder OUT/NAME. The exit status is 1 where a suite failed.

The same command goes on where an earlier one was killed or lost its endpoint: no answered request
is sent again. Any OpenAI-compatible endpoint will do; the environment's OPENAI_API_KEY is its key.
"""

import json
import os
import pathlib
import sys
from typing import Any

from absl import flags

from dcore_jax.claims import hold
from dcore_jax.config import RunConfig
from dcore_jax.distill.stage import endpoint, prices
from dcore_jax.evaluate.held_out import evaluate_backend
from dcore_jax.evaluate.known_suites import SUITES
from dcore_jax.evaluate.suites import SuiteSettings
from dcore_jax.files import data_folder, write_json_atomic
from dcore_jax.progress import show_compiling, stage
from dcore_jax.rollout.policy import load_tokenizer, local_backend
from dcore_jax.run import help as help_lib
from dcore_jax.run import program, suites
from dcore_jax.run.config import define_config, read_config

_CONFIG = define_config('configs/nano.py')
_OUT = flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
_BASE_URL = flags.DEFINE_string('base_url', '', "Address of an endpoint; '' is our engine.")
_MODEL = flags.DEFINE_string(
  'model',
  '',
  "Hugging Face directory, or the name at the endpoint; '' is the config's model. With --suite "
  "also a name on the hub, and '' is the packaged organism.",
)
_SUITE = flags.DEFINE_string('suite', '', f'Suites, with commas between them: {sorted(SUITES)}.')

# What is for suites alone.
_SETTINGS = SuiteSettings()
_LIMIT = flags.DEFINE_integer(
  'limit', 0, 'Takes the first so many tasks of each category; 0: all.', lower_bound=0
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', _SETTINGS.temperature, '0 takes the likeliest token.', lower_bound=0.0
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', _SETTINGS.max_tokens, 'Tokens of a response.', lower_bound=1
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of sampling.')
_CONCURRENCY = flags.DEFINE_integer(
  'concurrency', _SETTINGS.concurrency, 'Requests under way at once.', lower_bound=1
)
_TIMEOUT = flags.DEFINE_float(
  'timeout', _SETTINGS.timeout, 'Seconds that a request may take.', lower_bound=0.001
)
_DATA = flags.DEFINE_string(
  'data', '', "Folder of third-party data; '' is the environment's DCORE_DATA, or ../shared/data."
)
_SUITE_OPTIONS = flags.DEFINE_string(
  'suite_options', '', 'Options of suites, SUITE.OPTION=VALUE with commas between them.'
)
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', '', 'Directory with the tokenizer of the model at an endpoint, for suites that ask.'
)
_LANES = flags.DEFINE_integer(
  'lanes', 0, 'Rollouts of our engine at once; 0: as many as requests.', lower_bound=0
)
_MAX_LEN = flags.DEFINE_integer(
  'max_len',
  0,
  'Tokens of prompt and answer of our engine; 0: max_tokens and 4,096, or the positions of the '
  'model.',
  lower_bound=0,
)
_FOR_SUITES = (
  *(_LIMIT, _TEMPERATURE, _MAX_TOKENS, _SEED, _CONCURRENCY, _TIMEOUT, _DATA, _SUITE_OPTIONS),
  *(_TOKENIZER, _LANES, _MAX_LEN),
)

help_lib.group('what is measured', _SUITE, _MODEL, _BASE_URL, _OUT)
help_lib.group('with --suite', *_FOR_SUITES)


def main() -> None:
  """Asks for the answers that are not there yet, and prints the figures of all."""
  folder = pathlib.Path(_OUT.value)
  if _SUITE.value:
    _run_suites(folder)
    return
  unread = [f'--{flag.name}' for flag in _FOR_SUITES if flag.present]
  if unread:
    raise ValueError(f'{", ".join(unread)}: for suites alone, and there is no --suite')
  changed = _CONFIG.value
  if _MODEL.value and not _BASE_URL.value:
    changed.model.path = _MODEL.value
  config = read_config(changed)
  what = f'{config.evaluate.tasks} held-out tasks a kind of {config.world.name}'
  print(f'measures on {what}; results go to {folder}', file=sys.stderr, flush=True)
  with hold(folder):
    result = _evaluate(config, folder)
  print(json.dumps(result))


def _run_suites(folder: pathlib.Path) -> None:
  if flags.FLAGS['config'].present:
    raise ValueError('--config: suites do not read it; leave it or --suite out')
  settings = SuiteSettings(
    limit=_LIMIT.value,
    temperature=_TEMPERATURE.value,
    max_tokens=_MAX_TOKENS.value,
    seed=_SEED.value,
    concurrency=_CONCURRENCY.value,
    timeout=_TIMEOUT.value,
    data=pathlib.Path(_DATA.value) if _DATA.value else data_folder(),
  )
  model = suites.Model(
    _MODEL.value,
    base_url=_BASE_URL.value,
    key=os.environ.get('OPENAI_API_KEY', '') if _BASE_URL.value else '',
    tokenizer=_TOKENIZER.value,
    lanes=_LANES.value,
    max_len=_MAX_LEN.value,
  )
  names = suites.read_names(_SUITE.value)
  print(
    f'measures on {", ".join(names)}; results go to {folder}/SUITE', file=sys.stderr, flush=True
  )
  options = suites.read_options(_SUITE_OPTIONS.value)
  summary = suites.run_suites(names, model, settings, options, folder)
  print(json.dumps(summary))
  if summary['suites']:
    print(suites.format_results(summary['suites']), file=sys.stderr)
  if summary['failed']:
    reasons = [f'suite {name} failed: {reason}' for name, reason in summary['failed'].items()]
    sys.exit('error: ' + '; '.join(reasons))


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
