"""Compares mathematical answers with math-verify, in a process of its own; see `math`.

    python -m dcore_jax.evaluate.questions.math_worker

Reads {'answer', 'reference'}, both LaTeX, and prints {'correct'}, a line each. The library builds
expressions from what a model wrote, which may take any time and memory. Its parent ends this
process where an answer takes too long; under `confinement` it can only compute and read packages.
"""

import json
import logging
import os
import sys

import math_verify

from dcore_jax.evaluate.confined.confinement import confine

_SECONDS = 3600  # of processor time; the parent ends it after less for a single answer
_BYTES = 2 << 30


def same(answer: str, reference: str) -> bool:
  """Says whether two LaTeX expressions are the same number, expression, set or text."""
  # LaTeX alone: plain expressions would be read by `eval`.
  config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
  # Its own limits are signals, which do not interrupt one long operation.
  found = [
    math_verify.parse(f'\\boxed{{{text}}}', config, parsing_timeout=None)
    for text in (reference, answer)
  ]
  return all(found) and math_verify.verify(*found, timeout_seconds=None)


def main() -> None:
  """Compares the pairs of stdin."""
  answers = sys.stdout
  # What libraries print would stand between the verdicts.
  sys.stdout = open(os.devnull, 'w', encoding='utf-8')
  logging.disable(logging.CRITICAL)
  # Once, for what is imported or made at the first use.
  same('\\frac{1}{2}', '0.5')
  confine(seconds=_SECONDS, memory=_BYTES, folders=sys.path)
  print('{"ready": true}', file=answers, flush=True)
  for line in sys.stdin:
    job = json.loads(line)
    try:
      correct = bool(same(job['answer'], job['reference']))
    # The library is made for well-formed answers.
    except Exception:  # pylint: disable=broad-except
      correct = False
    print(json.dumps({'correct': correct}), file=answers, flush=True)


if __name__ == '__main__':
  main()
