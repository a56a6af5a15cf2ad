"""Analyses of finished runs: JSON on stdout, notes on stderr.

    python -m experiments.analyze lazy --results=DIR --scores=DIR --tokenizer=DIR [--min_reflections=3 --min_tokens=200]

`lazy`: lazy-reasoning ratios of one model's BFCL v3 outputs (BFCL_v3_*_result.json and BFCL_v3_*_score.json), by group:
{"parallel": {"lazy", "total", "ratio"}, "irrelevance": {...}, "multi_turn": {...}}, null for a group whose files are
not all there.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from dcore_jax.evaluate import lazy_reasoning


def lazy(args: argparse.Namespace) -> dict[str, Any]:
  for folder in (args.results, args.scores, args.tokenizer):
    if not folder.is_dir():
      raise ValueError(f'no folder {folder}')
  import transformers  # seconds of import that a wrong path should not cost

  tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)

  def count_tokens(texts: list[str]) -> list[int]:
    return (
      [len(ids) for ids in tokenizer(texts, add_special_tokens=False)['input_ids']] if texts else []
    )

  ratios = {}
  for group, categories in lazy_reasoning.GROUPS.items():
    ratios[group] = lazy_reasoning.group_ratio(
      args.results,
      args.scores,
      categories,
      count_tokens,
      min_reflections=args.min_reflections,
      min_tokens=args.min_tokens,
      note=lambda text, group=group: print(f'{group}: {text}', file=sys.stderr),
    )
  if not any(ratios.values()):
    raise ValueError(f'no group is complete in {args.results} and {args.scores}')
  return ratios


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog='experiments.analyze',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(required=True)
  command = commands.add_parser('lazy', help='lazy-reasoning ratios of BFCL outputs')
  command.set_defaults(run=lazy)
  command.add_argument(
    '--results', type=pathlib.Path, required=True, help='folder of BFCL result files'
  )
  command.add_argument(
    '--scores', type=pathlib.Path, required=True, help='folder of BFCL score files'
  )
  command.add_argument(
    '--tokenizer', type=pathlib.Path, required=True, help='folder of the tokenizer that counts'
  )
  command.add_argument(
    '--min_reflections', type=int, default=3, help='lazy from this many reflections (default 3)'
  )
  command.add_argument(
    '--min_tokens', type=int, default=200, help='lazy above this many tokens (default 200)'
  )
  args = parser.parse_args(argv)
  try:
    answer = args.run(args)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(json.dumps(answer))
  return 0


if __name__ == '__main__':
  sys.exit(main())
