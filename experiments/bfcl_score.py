"""Scores published BFCL v3 result files again with the checker of bfcl-eval 2025.6.16:

    python -m experiments.bfcl_score --results=DIR --scores=DIR --out=OUT

`make harnesses` installs the checker. Prints {category: {"correct", "total", "accuracy",
"published"}} as JSON; OUT/bfcl_scores.json says more, OUT/trajectories.jsonl holds every scored
item. Without --scores nothing is compared. Items that cannot be scored are listed on stderr and in
OUT; the exit status is then 1.
"""

import json
import pathlib
import sys

from absl import flags

from dcore_jax.evaluate.bfcl import score as bfcl_score
from dcore_jax.run import program

_RESULTS = flags.DEFINE_string('results', None, 'Folder of BFCL result files.', required=True)
_SCORES = flags.DEFINE_string('scores', None, 'Folder of the score files published with them.')
_OUT = flags.DEFINE_string('out', None, 'Folder of the scores.', required=True)
_PRINTED = ('correct', 'total', 'accuracy', 'published')


def main() -> None:
  """Scores the files and prints the counts."""
  found = bfcl_score.score(
    pathlib.Path(_RESULTS.value),
    pathlib.Path(_SCORES.value) if _SCORES.value else None,
    pathlib.Path(_OUT.value),
    note=lambda text: print(text, file=sys.stderr),
  )
  printed = {
    category: {name: counts[name] for name in _PRINTED}
    for category, counts in found['categories'].items()
  }
  print(json.dumps(printed))
  # A program that reads the counts alone must not take them for those of the whole benchmark.
  if left_out := bfcl_score.count_left_out(found):
    sys.exit(f'{left_out} left out of the scores, see {_OUT.value}/{bfcl_score.SCORES_FILE}')


if __name__ == '__main__':
  program.run(main)
