r"""Makes seeds of self-distillation from any mix of sources, without duplicates or test tasks.

    python -m experiments.seeds --source=toolworld --source=toolrl/rlla_sft.json --out=seeds.jsonl
    python -m experiments.seeds --source=bfcl --count=500 --source=taubench \
      --source=Team-ACE/ToolACE --out=seeds.jsonl

Sources are the worlds (toolworld, bfcl, and those that a module named by --register brings), tau2,
taubench[:FILE], files of seeds, and data sets by path or hub name in any schema of
data/row_schemas.py or data/reference_rows.py.

A seed that repeats a test task of BFCL or tau2-bench, in words or in calls, is refused with its
whole dialogue. That needs both packages (`make harnesses`); with --allow_unchecked, seeds are
compared with the tests that can be read.

Prints counts by kind as JSON. Its `unchecked` says for each test that is missing how many seeds
were not compared with it. Refusals go to stderr.
`experiments.distill --config.distill.files="('seeds.jsonl',)"` takes the file.
"""

import importlib
import json
import pathlib
import sys

from absl import app, flags

from dcore_jax.data.collect_seeds import collect, load_overlap
from dcore_jax.files import replace_text
from dcore_jax.run import help as help_lib
from dcore_jax.run import program

_SOURCES = flags.DEFINE_multi_string(
  'source', [], 'Where seeds come from; may be given several times.'
)
_REGISTER = flags.DEFINE_multi_string('register', [], 'Python modules that register worlds.')
_OUT = flags.DEFINE_string('out', None, 'JSON-lines file to write.')
_COUNT = flags.DEFINE_integer('count', 100, 'Tasks of each kind, where a source makes its tasks.')
_SEED = flags.DEFINE_integer('seed', 0, 'What such a source draws from.')
_ALLOW_UNCHECKED = flags.DEFINE_bool(
  'allow_unchecked', False, 'Write seeds although a test is missing that they should differ from.'
)

help_lib.group('what is read', _SOURCES, _COUNT, _SEED, _REGISTER)
help_lib.group('what is written', _OUT, _ALLOW_UNCHECKED)


def main() -> None:
  """Writes the seeds and prints what became of every source."""
  if not _SOURCES.value or not _OUT.value:
    raise app.UsageError('needs --source and --out')
  for module in _REGISTER.value:
    try:
      importlib.import_module(module)
    except ImportError as error:
      raise ValueError(f'--register: {error}') from error
  overlap, absent = load_overlap(allow_unchecked=_ALLOW_UNCHECKED.value)
  for name, reason in absent.items():
    print(f'not compared with the test tasks of {name}: {reason}', file=sys.stderr)
  seeds, report = collect(_SOURCES.value, overlap, count=_COUNT.value, seed=_SEED.value)
  if not seeds:
    raise ValueError(f'no seed is left: {report["refused"]} repeat test tasks')
  for refusal in report['refusals']:
    print(
      f'refused: {refusal["seed"]} repeats the {refusal["by"]} of {refusal["test"]}',
      file=sys.stderr,
    )
  lines = [json.dumps(seed.to_json()) + '\n' for seed in seeds]
  replace_text(pathlib.Path(_OUT.value), ''.join(lines))
  report['test_tasks'] = overlap.tasks
  report['unchecked'] = {name: len(seeds) for name in absent}
  report['out'] = _OUT.value
  print(json.dumps(report))


if __name__ == '__main__':
  program.run(main)
