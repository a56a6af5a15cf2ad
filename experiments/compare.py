"""Compares two result folders task by task:

    python -m experiments.compare A B --out=OUT

A and B are work directories of runs, folders of `experiments.evaluate`, or folders of
`experiments.bfcl_score`. OUT gets compare.html (figures with intervals, and both traces of every
task that only one of the two got right), compare.json and compare.csv. Differences are B - A over
the common tasks; what is left out goes to stderr.
"""

import pathlib
import sys

from absl import flags

from dcore_jax.report.compare import compare
from dcore_jax.run import program
from dcore_jax.statistics import format_estimate

_OUT = flags.DEFINE_string('out', None, 'Folder of the comparison.', required=True)


def main(a: str, b: str) -> None:
  """Writes the comparison and prints the changes of accuracy."""
  out = pathlib.Path(_OUT.value)
  found = compare(
    pathlib.Path(a), pathlib.Path(b), out, note=lambda text: print(text, file=sys.stderr)
  )
  for shown in found['comparisons']:
    for kind, figures in shown['kinds'].items():
      accuracy = figures['accuracy']
      # A suite has the same name on both sides, and it may be that of its only kind of tasks.
      models = ' -> '.join(dict.fromkeys(filter(None, shown['models'])))
      label = ' '.join(dict.fromkeys(filter(None, (models, kind))))
      change = format_estimate(accuracy['difference'], 1, 100)
      print(
        f'{label}: {change} points right; {accuracy["gained"]} gained, '
        f'{accuracy["lost"]} lost, p = {accuracy["p_value"]:.3f}'
      )
      for name in ('format', 'reward'):
        if name in figures:
          change = format_estimate(figures[name]['difference'], 2)
          a, b = (figures[name][side] for side in ('a', 'b'))
          print(f'{label}, {name}: {a:.2f} -> {b:.2f}, {change}')
  print(f'page: {out / "compare.html"}')


if __name__ == '__main__':
  program.run(main, arguments=('A', 'B'))
