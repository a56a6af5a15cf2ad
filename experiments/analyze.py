"""Analyses of finished outputs: JSON on stdout, notes on stderr.

    python -m experiments.analyze lazy --results=DIR --scores=DIR --tokenizer=DIR

`lazy` gives the lazy-reasoning ratios of one model's BFCL v3 outputs, by group:
{"parallel": {"lazy", "total", "ratio"}, "irrelevance": {...}, "multi_turn": {...}}. A group is null
where some of its files (BFCL_v3_*_result.json and BFCL_v3_*_score.json) are missing. Items without
an answer, since their inference failed or they are missing, are not part of a ratio: `left_out`
says how many.
"""

import json
import pathlib
import sys
from typing import Any

from absl import app, flags

from dcore_jax.evaluate import lazy_reasoning
from dcore_jax.run import program

_RESULTS = flags.DEFINE_string('results', None, 'Folder of BFCL result files.')
_SCORES = flags.DEFINE_string('scores', None, 'Folder of BFCL score files.')
_TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Folder of the tokenizer that counts tokens.')
_MIN_REFLECTIONS = flags.DEFINE_integer(
  'min_reflections', 3, 'Reflections from which a text may be lazy.'
)
_MIN_TOKENS = flags.DEFINE_integer('min_tokens', 200, 'Tokens above which a text may be lazy.')


def lazy(
  results: pathlib.Path,
  scores: pathlib.Path,
  tokenizer: pathlib.Path,
  *,
  min_reflections: int = 3,
  min_tokens: int = 200,
) -> dict[str, Any]:
  """Returns the ratio of every group, None for a group whose files are not all there.

  Raises:
    ValueError: a folder is missing, or no group is complete.
  """
  for folder in (results, scores, tokenizer):
    if not folder.is_dir():
      raise ValueError(f'no folder {folder}')
  import transformers  # takes seconds, which a wrong path should not cost

  encode = transformers.AutoTokenizer.from_pretrained(tokenizer)

  def count_tokens(texts: list[str]) -> list[int]:
    if not texts:
      return []
    return [len(ids) for ids in encode(texts, add_special_tokens=False)['input_ids']]

  ratios = {}
  for group, categories in lazy_reasoning.GROUPS.items():
    ratios[group] = lazy_reasoning.group_ratio(
      results,
      scores,
      categories,
      count_tokens,
      min_reflections=min_reflections,
      min_tokens=min_tokens,
      note=lambda text, group=group: print(f'{group}: {text}', file=sys.stderr),
    )
  if not any(ratios.values()):
    raise ValueError(f'no group is complete in {results} and {scores}')
  return ratios


def main(command: str) -> None:
  """Prints what the command gives."""
  assert command == 'lazy'  # the only one so far
  if not (_RESULTS.value and _SCORES.value and _TOKENIZER.value):
    raise app.UsageError('lazy needs --results, --scores and --tokenizer')
  ratios = lazy(
    pathlib.Path(_RESULTS.value),
    pathlib.Path(_SCORES.value),
    pathlib.Path(_TOKENIZER.value),
    min_reflections=_MIN_REFLECTIONS.value,
    min_tokens=_MIN_TOKENS.value,
  )
  print(json.dumps(ratios))


if __name__ == '__main__':
  program.run(main, commands=('lazy',))
