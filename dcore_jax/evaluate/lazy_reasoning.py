"""Lazy reasoning: long, hesitating thoughts that end in a wrong answer (paper section 2; method 5.4).

A reasoning text is lazy when it hesitates at least `min_reflections` times, is longer than `min_tokens` tokens, and its
item is among the failures. The ratio is over all reasoning texts, right ones included. Defaults are those of the
released script, which the published ratios come from; the paper's text says more than 3 reflections and more than 300
tokens (min_reflections=4, min_tokens=300).
"""

import dataclasses
import json
import pathlib
from typing import Any, Callable, Iterator, Sequence

# Counted as substrings of the lower-cased text, as published: 'but' is also found in 'attribute' and 'distribute'.
REFLECTION_WORDS = ('wait', 'but', 'alternatively', 'however')
# The list that the reference logs during reinforcement learning (method 3.7), over the whole response.
LOGGED_WORDS = ('wait', 'but', 'however', 'alternatively', 'perhaps', 'because')

# BFCL categories behind each published ratio. Multi-turn leaves long_context out.
GROUPS = {
  'parallel': ('live_parallel', 'parallel'),
  'irrelevance': ('live_irrelevance', 'irrelevance'),
  'multi_turn': ('multi_turn_base', 'multi_turn_miss_func', 'multi_turn_miss_param'),
}


@dataclasses.dataclass(frozen=True)
class Result:
  """One BFCL item: its id and its reasoning texts (one, or one per assistant step of a multi-turn item)."""

  id: str
  reasonings: tuple[str, ...]


def count_reflections(text: str, words: Sequence[str] = REFLECTION_WORDS) -> int:
  """How often the words occur in `text`, as substrings and in any case."""
  lowered = text.lower()
  return sum(lowered.count(word) for word in words)


def is_lazy(
  reasoning: str, n_tokens: int, wrong: bool, *, min_reflections: int = 3, min_tokens: int = 200
) -> bool:
  """Whether a text of `n_tokens` tokens is lazy: reflections >= min_reflections, n_tokens > min_tokens, and wrong."""
  return bool(wrong) and n_tokens > min_tokens and count_reflections(reasoning) >= min_reflections


def lazy_ratio(
  reasonings: Sequence[str],
  n_tokens: Sequence[int],
  wrong: Sequence[bool],
  *,
  min_reflections: int = 3,
  min_tokens: int = 200,
) -> dict[str, Any]:
  """{'lazy': int, 'total': int, 'ratio': lazy / total} of B reasoning texts; the ratio of none is 0."""
  if not len(reasonings) == len(n_tokens) == len(wrong):
    raise ValueError(
      f'{len(reasonings)} reasonings, {len(n_tokens)} token counts and {len(wrong)} verdicts'
    )
  lazy = sum(
    is_lazy(*row, min_reflections=min_reflections, min_tokens=min_tokens)
    for row in zip(reasonings, n_tokens, wrong)
  )
  return {
    'lazy': lazy,
    'total': len(reasonings),
    'ratio': lazy / len(reasonings) if reasonings else 0.0,
  }


# -- BFCL's files -----------------------------------------------------------------------------------------------------


def read_results(path: pathlib.Path) -> list[Result]:
  """Items of a BFCL result file. Raises ValueError naming file and line of a row that is not one."""
  results = []
  for where, row in _rows(path):
    if 'id' not in row or 'reasoning_content' not in row:
      raise ValueError(f'{where}: a result row needs id and reasoning_content, has {sorted(row)}')
    try:
      results.append(Result(row['id'], tuple(_texts(row['reasoning_content']))))
    except TypeError as error:
      raise ValueError(
        f'{where}: reasoning_content is neither text nor lists of texts: {error}'
      ) from error
  return results


def read_failures(path: pathlib.Path) -> set[str]:
  """Ids of the failing items of a BFCL score file: every line but the first, which is the summary."""
  failures, i = set(), -1
  for i, (where, row) in enumerate(_rows(path)):
    if i == 0 and 'accuracy' not in row:
      raise ValueError(
        f'{where}: a score file begins with its accuracy, this one with {sorted(row)}'
      )
    if i > 0 and 'id' not in row:
      raise ValueError(f'{where}: a failing item needs an id, has {sorted(row)}')
    if i > 0:
      failures.add(row['id'])
  if i < 0:
    raise ValueError(f'{path}: empty; a score file begins with its accuracy')
  return failures


def _rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """('file:line', record) of each line that is not blank."""
  with open(path, encoding='utf-8') as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except ValueError as error:
        raise ValueError(f'{path}:{number}: not JSON: {error}') from error
      if not isinstance(row, dict):
        raise ValueError(f'{path}:{number}: expected an object, got {type(row).__name__}')
      yield f'{path}:{number}', row


def _texts(content: Any) -> Iterator[str]:
  """The text, or the texts of nested lists (turn -> step), in order."""
  if isinstance(content, str):
    yield content
  elif isinstance(content, list):
    for item in content:
      yield from _texts(item)
  else:
    raise TypeError(f'got {type(content).__name__}')


def find_category(folder: pathlib.Path, category: str, kind: str) -> pathlib.Path | None:
  """The file of a BFCL category in `folder` or below; kind is 'result' or 'score'; None where there is none."""
  found = sorted(folder.rglob(f'BFCL_v[0-9]_{category}_{kind}.json'))
  if len(found) > 1:
    raise ValueError(f'more than one {kind} file of {category}: {", ".join(map(str, found))}')
  return found[0] if found else None


def group_ratio(
  results_dir: pathlib.Path,
  scores_dir: pathlib.Path,
  categories: Sequence[str],
  count_tokens: Callable[[list[str]], Sequence[int]],
  *,
  min_reflections: int = 3,
  min_tokens: int = 200,
  note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
  """Lazy ratio over the pooled reasoning texts of some categories; None, with a note, unless all their files are there.

  Args:
    count_tokens: token counts of B texts, special tokens not added.

  Raises:
    ValueError: an unreadable row, or a score file that speaks of items which its result file lacks.
  """
  files = {
    (category, kind): find_category(folder, category, kind)
    for category in categories
    for kind, folder in (('result', results_dir), ('score', scores_dir))
  }
  absent = [f'{category} {kind}' for (category, kind), path in files.items() if path is None]
  if absent:
    note(f'no file for {", ".join(absent)}')
    return None
  reasonings, wrong = [], []
  for category in categories:
    results, failures = (
      read_results(files[category, 'result']),
      read_failures(files[category, 'score']),
    )
    strangers = failures - {result.id for result in results}
    if strangers:
      raise ValueError(
        f'{files[category, "score"]} judges {len(strangers)} items that {files[category, "result"]} '
        f'lacks, such as {min(strangers)!r}'
      )
    for result in results:
      reasonings += result.reasonings
      wrong += [result.id in failures] * len(result.reasonings)
  return lazy_ratio(
    reasonings,
    count_tokens(reasonings),
    wrong,
    min_reflections=min_reflections,
    min_tokens=min_tokens,
  )
