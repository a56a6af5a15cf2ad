"""Analyses of finished outputs: JSON on stdout, notes on stderr.

    python -m experiments.analyze lazy --results=DIR --scores=DIR --tokenizer=DIR

`lazy` gives the lazy-reasoning ratios of one model's BFCL v3 outputs, by group:
{"parallel": {"lazy", "total", "ratio"}, "irrelevance": {...}, "multi_turn": {...}}. A group is null
where some of its files (BFCL_v3_*_result.json and BFCL_v3_*_score.json) are missing. Items without
an answer, since their inference failed or they are missing, are not part of a ratio: `left_out`
says how many.

    python -m experiments.analyze reasonings --results=PATH --out=OUT
    python -m experiments.analyze reasonings --results=DIR --scores=DIR --tokenizer=DIR --out=OUT

`reasonings` takes a trajectories.jsonl (or its folder), or BFCL result and score files; with
--scores alone it takes the failing dialogues that multi-turn score files hold. OUT gets
analysis.json, analysis.csv and analysis.svg: lazy reasoning by the released and by the paper's
thresholds, with words as substrings and whole; lengths and reflections of right and wrong answers;
thoughts by label; and which sentences of composed traces a reasoning holds. With --judge_base_url
and --judge_model a model labels a sample of the thoughts as well; OUT/judge.jsonl keeps what it
answered.
"""

import json
import pathlib
import sys
from typing import Any

from absl import app, flags

from dcore_jax.evaluate.behaviour import lazy_reasoning, reasonings
from dcore_jax.report.analysis import analyse
from dcore_jax.rollout.endpoint import OpenAIBackend
from dcore_jax.run import help as help_lib
from dcore_jax.run import program
from dcore_jax.statistics import format_estimate

_RESULTS = flags.DEFINE_string(
  'results', None, 'Folder of BFCL result files; reasonings: or a trajectories.jsonl.'
)
_SCORES = flags.DEFINE_string('scores', None, 'Folder of BFCL score files.')
_TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Folder of the tokenizer that counts tokens.')
_OUT = flags.DEFINE_string('out', None, 'reasonings: folder of the analysis.')
_JUDGE_BASE_URL = flags.DEFINE_string('judge_base_url', '', 'reasonings: endpoint of a judge.')
_JUDGE_MODEL = flags.DEFINE_string('judge_model', '', "reasonings: the judge's name there.")
_JUDGE_THOUGHTS = flags.DEFINE_integer(
  'judge_thoughts', 200, 'reasonings: thoughts that the judge labels.', lower_bound=1
)
_MIN_REFLECTIONS = flags.DEFINE_integer(
  'min_reflections', 3, 'Reflections from which a text may be lazy.'
)
_MIN_TOKENS = flags.DEFINE_integer('min_tokens', 200, 'Tokens above which a text may be lazy.')

help_lib.group('what is read', _RESULTS, _SCORES, _TOKENIZER)
help_lib.group('with lazy', _MIN_REFLECTIONS, _MIN_TOKENS)
help_lib.group('with reasonings', _OUT, _JUDGE_BASE_URL, _JUDGE_MODEL, _JUDGE_THOUGHTS)


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
  count_tokens = reasonings.token_counter(tokenizer)
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


def _analyse() -> None:
  """Analyses a result, and prints the lazy ratios of all reasonings."""
  if not (_OUT.value and (_RESULTS.value or _SCORES.value)):
    raise app.UsageError('reasonings needs --out, and --results or --scores')
  if bool(_JUDGE_BASE_URL.value) != bool(_JUDGE_MODEL.value):
    raise app.UsageError('a judge needs --judge_base_url and --judge_model')
  results = pathlib.Path(_RESULTS.value) if _RESULTS.value else None
  scores = pathlib.Path(_SCORES.value) if _SCORES.value else None
  out = pathlib.Path(_OUT.value)
  for path in filter(None, (results, scores)):
    if not path.exists():
      raise ValueError(f'no file or folder {path}')
  count_tokens = (
    reasonings.token_counter(pathlib.Path(_TOKENIZER.value)) if _TOKENIZER.value else None
  )
  if scores:
    if count_tokens is None:
      raise app.UsageError('BFCL files have no token counts: name a --tokenizer')
    found = reasonings.read_bfcl(
      results,
      scores,
      count_tokens,
      note=lambda text: print(text, file=sys.stderr),
    )
  else:
    found = reasonings.read_acted(results, count_tokens)
  backend = None
  if _JUDGE_BASE_URL.value:
    backend = OpenAIBackend(_JUDGE_BASE_URL.value, _JUDGE_MODEL.value, journal=out / 'judge.jsonl')
  figures = analyse(found, out, backend, _JUDGE_THOUGHTS.value)
  for rule, ratios in figures['lazy'].items():
    print(f'lazy, {rule}: {format_estimate(ratios["all"]["estimate"], 1, 100, " %")}')
  if figures['judge'] and figures['judge']['agreement']:
    kappa = figures['judge']['kappa']['kappa']
    print(f'judge: {format_estimate(figures["judge"]["agreement"], 1, 100, " %")} agree')
    print(f'judge: kappa {"undefined" if kappa is None else f"{kappa:.2f}"}')
  print(f'analysis: {out / "analysis.json"}')


def main(command: str) -> None:
  """Prints what the command gives."""
  if command == 'reasonings':
    _analyse()
    return
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
  program.run(main, commands=('lazy', 'reasonings'))
