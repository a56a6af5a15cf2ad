"""Measures lazy reasoning: long, hesitating thoughts that end in a wrong answer.

The measure is from section 2 of the paper (docs/method.md, section 5.4). A reasoning text is lazy
if it hesitates at least `min_reflections` times, is longer than `min_tokens` tokens, and its item
is among the failures. The ratio is over all reasoning texts, right ones included. The defaults are
those of the released script, which gave the published ratios. The paper's text says more than 3
reflections and more than 300 tokens (min_reflections=4, min_tokens=300).
"""

import dataclasses
import json
import pathlib
import re
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from dcore_jax.files import decode_utf8

# Counted as substrings of the lower-cased text, as published: 'but' is also found in 'attribute'.
REFLECTION_WORDS = ('wait', 'but', 'alternatively', 'however')
# How bfcl-eval begins the result of an item for which the model could not be asked.
_FAILED = 'error'
# What the released code logs during reinforcement learning, over the whole response
# (docs/method.md, section 3.7).
LOGGED_WORDS = ('wait', 'but', 'however', 'alternatively', 'perhaps', 'because')

# BFCL categories behind each published ratio. Multi-turn leaves long_context out.
GROUPS = {
  'parallel': ('live_parallel', 'parallel'),
  'irrelevance': ('live_irrelevance', 'irrelevance'),
  'multi_turn': ('multi_turn_base', 'multi_turn_miss_func', 'multi_turn_miss_param'),
}


@dataclasses.dataclass(frozen=True)
class LazyRule:
  """When the reasoning of a wrong answer counts as lazy.

  Attributes:
    min_reflections: it reflects at least so often.
    min_tokens: it is longer than that.
    whole_words: words are counted and not substrings, so that 'attribute' holds no 'but'.
  """

  min_reflections: int
  min_tokens: int
  whole_words: bool = False

  def of(self, reasoning: str, n_tokens: int, wrong: bool) -> bool:
    """Says whether a reasoning is lazy."""
    if not wrong or n_tokens <= self.min_tokens:
      return False
    return count_reflections(reasoning, whole_words=self.whole_words) >= self.min_reflections


# 'released' is the script behind the published ratios, 'paper' is what the paper's text says.
RULES = {
  'released': LazyRule(3, 200),
  'paper': LazyRule(4, 300),
  'released_words': LazyRule(3, 200, whole_words=True),
  'paper_words': LazyRule(4, 300, whole_words=True),
}


@dataclasses.dataclass(frozen=True)
class Result:
  """One BFCL item.

  Attributes:
    id: the item's.
    reasonings: one reasoning text, or one for each assistant step of a multi-turn item.
  """

  id: str
  reasonings: tuple[str, ...]


def count_reflections(
  text: str, words: Sequence[str] = REFLECTION_WORDS, *, whole_words: bool = False
) -> int:
  """Counts how often the words occur in `text`, in any case, as substrings or as whole words."""
  # 'But' at the start of a sentence counts as well.
  lowered = text.lower()
  if whole_words:
    return len(re.findall(rf'\b(?:{"|".join(words)})\b', lowered))
  return sum(lowered.count(word) for word in words)


def is_lazy(
  reasoning: str, n_tokens: int, wrong: bool, *, min_reflections: int = 3, min_tokens: int = 200
) -> bool:
  """Says whether a text is lazy: it reflects often, exceeds `min_tokens`, and its item is wrong."""
  # The verdict and the length are tested first: they are cheap, and counting words reads the text.
  return bool(wrong) and n_tokens > min_tokens and count_reflections(reasoning) >= min_reflections


def lazy_ratio(
  reasonings: Sequence[str],
  n_tokens: Sequence[int],
  wrong: Sequence[bool],
  *,
  min_reflections: int = 3,
  min_tokens: int = 200,
) -> dict[str, Any]:
  """Counts the lazy ones of B reasoning texts.

  Args:
    reasonings: B texts.
    n_tokens: B lengths.
    wrong: B verdicts on the items that the texts belong to.
    min_reflections, min_tokens: see `is_lazy`.

  Returns:
    {'lazy': int, 'total': B, 'ratio': lazy / total}; the ratio of no texts is 0.

  Raises:
    ValueError: the three have different lengths.
  """
  # Checked here and not by zip, so that the error gives all three lengths.
  if not len(reasonings) == len(n_tokens) == len(wrong):
    raise ValueError(
      f'{len(reasonings)} reasonings, {len(n_tokens)} token counts and {len(wrong)} verdicts'
    )
  lazy = 0
  for text, tokens, failed in zip(reasonings, n_tokens, wrong, strict=True):
    lazy += is_lazy(text, tokens, failed, min_reflections=min_reflections, min_tokens=min_tokens)
  return {
    # Count and total are returned too, so that ratios can be pooled.
    'lazy': lazy,
    'total': len(reasonings),
    'ratio': lazy / len(reasonings) if reasonings else 0.0,
  }


# --- BFCL's files ---


class Results(NamedTuple):
  """What a BFCL result file holds.

  Attributes:
    items: those with an answer.
    failed: ids of items whose inference failed.
    silent: how many answers have no field of thoughts.
  """

  items: list[Result]
  failed: set[str]
  silent: int


def read_results(path: pathlib.Path) -> Results:
  """Reads a BFCL result file.

  Raises:
    ValueError: a row that is no item, with file and line.
  """
  items = []
  failed = set()
  silent = 0
  for where, row in _rows(path):
    if not isinstance(row.get('id'), str) or not row.keys() & {'result', 'reasoning_content'}:
      raise ValueError(
        f'{where}: a result row needs id and result or reasoning_content, has {sorted(row)}'
      )
    if inference_failed(row):
      # An endpoint that fell silent says nothing about reasoning: such items are no lazy ones.
      failed.add(row['id'])
      continue
    if row.get('reasoning_content') is None:
      items.append(Result(row['id'], _no_thoughts(row['result'])))
      silent += 1
      continue
    try:
      # Multi-turn rows nest their texts by turn and step, and each step counts as one reasoning.
      items.append(Result(row['id'], tuple(_texts(row['reasoning_content']))))
    except TypeError as error:
      raise ValueError(
        f'{where}: reasoning_content is neither text nor lists of texts: {error}'
      ) from error
  return Results(items, failed, silent)


def _no_thoughts(result: Any) -> tuple[str, ...]:
  """Returns an empty text for an answer, or for each step of a multi-turn item.

  bfcl-eval leaves the field out where all thoughts are empty; its older versions wrote them.
  """
  steps = 1
  if isinstance(result, list) and result and all(isinstance(turn, list) for turn in result):
    steps = sum(map(len, result))
  return ('',) * steps


def inference_failed(row: dict[str, Any]) -> bool:
  """Says whether a row holds an error in the place of an answer."""
  # A row with reasoning was answered, even if its result begins with the word 'error'.
  if row.get('reasoning_content') is not None:
    return False
  # A failed request has no reasoning. Its result is missing, or holds the text of the error.
  result = row.get('result')
  if result is None or 'traceback' in row:
    return True
  return isinstance(result, str) and result.lower().startswith(_FAILED)


def read_failures(path: pathlib.Path) -> set[str]:
  """Reads the ids of the failing items from a BFCL score file.

  The first line of the file is its summary, every other line is a failing item.

  Raises:
    ValueError: a line that is neither, with file and line, or an empty file.
  """
  return {row['id'] for row in read_score_rows(path)}


def read_score_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the failing items of a BFCL score file, with all of their fields.

  Raises:
    ValueError: see `read_failures`.
  """
  rows = _rows(path)
  # Without its summary line the first failing item would be taken for the summary and lost.
  where, summary = next(rows, (str(path), None))
  if summary is None:
    raise ValueError(f'{path}: empty; a score file begins with its accuracy')
  if 'accuracy' not in summary:
    raise ValueError(
      f'{where}: a score file begins with its accuracy, this one with {sorted(summary)}'
    )
  failures = []
  for where, row in rows:
    # Only ids are compared with the result file. Other fields depend on the category.
    if 'id' not in row:
      raise ValueError(f'{where}: a failing item needs an id, has {sorted(row)}')
    failures.append(row)
  return failures


def _rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields ('file:line', record) for each line that is not blank."""
  # Only '\n' ends a line: reasoning may hold U+2028, at which splitlines would cut a record.
  for number, line in enumerate(decode_utf8(path.read_bytes(), str(path)).split('\n'), 1):
    if not line.strip():
      continue
    yield f'{path}:{number}', parse_row(line, f'{path}:{number}')


def parse_row(line: str, where: str) -> dict[str, Any]:
  """Parses a line of a BFCL file; raises ValueError with `where` if it is no JSON object."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where}: not JSON: {error}') from error
  if not isinstance(row, dict):
    raise ValueError(f'{where}: expected an object, got {type(row).__name__}')
  return row


def _texts(content: Any) -> Iterator[str]:
  """Yields the text, or the texts of nested lists (turn -> step), in order."""
  if content is None or isinstance(content, str):
    # Some endpoints give null for a step without thoughts, and others ''.
    yield content or ''
  elif isinstance(content, list):
    for item in content:
      yield from _texts(item)
  else:
    raise TypeError(f'got {type(content).__name__}')


def find_category(folder: pathlib.Path, category: str, kind: str) -> pathlib.Path | None:
  """Finds the file of a BFCL category in `folder` or below it.

  Args:
    folder: where to look.
    category: such as 'live_parallel'.
    kind: 'result' or 'score'.

  Returns:
    The path; None where there is none.

  Raises:
    ValueError: there is more than one.
  """
  # bfcl-eval writes a folder for each model; the digit is the version of BFCL.
  found = sorted(folder.rglob(f'BFCL_v[0-9]_{category}_{kind}.json'))
  # Two models below one folder would be mixed.
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
  """Computes the lazy ratio over the pooled reasoning texts of some categories.

  Args:
    results_dir: where the result files are.
    scores_dir: where the score files are.
    categories: BFCL's names; `GROUPS` has those of the published ratios.
    count_tokens: B texts -> their token counts, special tokens not added.
    min_reflections, min_tokens: see `is_lazy`.
    note: takes a text that says which files are missing, or what was left out.

  Returns:
    As `lazy_ratio`, over the items that have an answer, with the number of the others as `left_out`
    where there are any: their inference failed, or the score file judges them and the result file
    lacks them. None where a file is missing, or no item has thoughts.

  Raises:
    ValueError: an unreadable row, or a score file that judges other items than its result file has.
  """
  files = {}
  for category in categories:
    files[category, 'result'] = find_category(results_dir, category, 'result')
    files[category, 'score'] = find_category(scores_dir, category, 'score')
  # A ratio over some of its categories would look like the published one without being comparable.
  absent = [f'{category} {kind}' for (category, kind), path in files.items() if path is None]
  if absent:
    note(f'no file for {", ".join(absent)}')
    return None
  reasonings = []
  wrong = []
  left_out = 0
  silent = 0
  for category in categories:
    # Texts are pooled and not averaged by category, so that a category weighs by its texts.
    found = read_results(files[category, 'result'])
    failures = read_failures(files[category, 'score'])
    known = found.failed.union(item.id for item in found.items)
    missing = failures - known
    # No failure in common means that the two files are of different runs or models.
    if missing and len(missing) == len(failures):
      raise ValueError(
        f'{files[category, "score"]} judges {len(missing)} items that '
        f'{files[category, "result"]} lacks, such as {min(missing)!r}, and none that it has'
      )
    failed = len(found.failed)
    if failed or missing:
      note(f'{category}: {failed} failed inferences and {len(missing)} missing items left out')
    if found.silent:
      note(f'{category}: {found.silent} answers without thoughts, which are not lazy')
    left_out += failed + len(missing)
    silent += found.silent
    for item in found.items:
      reasonings += item.reasonings
      # Each text of an item has the verdict of the whole item, as in the released script.
      wrong += [item.id in failures] * len(item.reasonings)
  # A ratio of 0 would look like a model that is never lazy.
  if (left_out or silent) and not any(reasonings):
    note(f'no answer with thoughts in {", ".join(categories)}')
    return None
  ratio = lazy_ratio(
    reasonings,
    count_tokens(reasonings),
    wrong,
    min_reflections=min_reflections,
    min_tokens=min_tokens,
  )
  return ratio | {'left_out': left_out} if left_out else ratio
