"""Reads the reasonings of any result: trajectories.jsonl, or BFCL's result and score files.

A reasoning is what a model thought for one response. It is wrong where its task is.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from dcore_jax.chat.call_text import split_answer
from dcore_jax.chat.thoughts import bare_thoughts
from dcore_jax.evaluate.behaviour import lazy_reasoning
from dcore_jax.evaluate.trajectories import find_trajectories, read_trajectories
from dcore_jax.progress import SLOW, progress

# B texts -> their token counts.
CountTokens = Callable[[list[str]], Sequence[int]]

_COUNTED = 512  # texts of a call of the tokenizer: between two calls progress is shown
_SCORE_FILE = re.compile(r'BFCL_v\d_(\w+)_score\.json')


@dataclasses.dataclass(frozen=True)
class Reasoning:
  """One reasoning.

  Attributes:
    kind: the kind or category of its task.
    task: the id of its task, unique within the kind.
    step: its number among the responses of the task.
    text: the thoughts; '' where the model answered without.
    tokens: their number.
    wrong: the task failed.
  """

  kind: str
  task: str
  step: int
  text: str
  tokens: int
  wrong: bool

  @property
  def unit(self) -> str:
    """The name of the task among those of all kinds: what is independent of other units."""
    return f'{self.kind} {self.task}'


def read_acted(path: pathlib.Path, count_tokens: CountTokens | None = None) -> list[Reasoning]:
  """Reads a trajectories.jsonl, or the only one of a folder.

  Args:
    path: the file or the folder.
    count_tokens: for records that lack `reasoning_tokens`.

  Raises:
    ValueError: no file, several, an unreadable record, or lengths that nobody can tell.
  """
  if path.is_dir():
    files = find_trajectories(path)
    if len(files) > 1:
      raise ValueError(f'{path} holds the models {", ".join(files)}: name the folder of one')
    (path,) = files.values()
  reasonings = []
  uncounted = []
  for record in read_trajectories(path):
    texts = [_thoughts(item) for item in record['messages'] if item['role'] == 'assistant']
    lengths = record.get('reasoning_tokens')
    if not isinstance(lengths, list) or len(lengths) != len(texts):
      lengths = [-1] * len(texts)
    for step, (text, length) in enumerate(zip(texts, lengths, strict=True)):
      wrong = not record['correct']
      found = Reasoning(record['kind'], record['id'], step, text, int(length), wrong)
      if length < 0:
        uncounted.append(len(reasonings))
      reasonings.append(found)
  if uncounted and count_tokens is None:
    raise ValueError(
      f'{path}: {len(uncounted)} reasonings have no reasoning_tokens; a tokenizer is needed'
    )
  if uncounted:
    counts = count_tokens([reasonings[place].text for place in uncounted])
    for place, length in zip(uncounted, counts, strict=True):
      reasonings[place] = dataclasses.replace(reasonings[place], tokens=int(length))
  return reasonings


def _thoughts(message: dict[str, Any]) -> str:
  apart = message.get('reasoning_content')
  if isinstance(apart, str):
    return apart
  content = message['content']
  block, answer = split_answer(content if isinstance(content, str) else '')
  # Thoughts that the budget cut off have no closing tag, and are thoughts all the same.
  return bare_thoughts(block or (answer if answer.lstrip().startswith('<think>') else ''))


def read_bfcl(
  results: pathlib.Path | None,
  scores: pathlib.Path,
  count_tokens: CountTokens,
  note: Callable[[str], None] = lambda text: None,
) -> list[Reasoning]:
  """Reads all categories of a folder of BFCL results that have scores.

  Args:
    results, scores: the folders; files may lie below them. Without `results` the failing dialogues
      are read that score files of multi-turn categories hold. Such a sample has no right answers.
    count_tokens: of a text; special tokens are not added.
    note: takes a text on what is left out.

  Raises:
    ValueError: an unreadable row, or nothing to read.
  """
  drafts = []
  for category in sorted({found[1] for found in map(_named, scores.rglob('*.json')) if found}):
    score = lazy_reasoning.find_category(scores, category, 'score')
    if results is None:
      drafts += [(category, task, step, text, True) for task, step, text in read_logged(score)]
      continue
    result = lazy_reasoning.find_category(results, category, 'result')
    if result is None:
      note(f'{category} has no result file and is left out')
      continue
    failures = lazy_reasoning.read_failures(score)
    found = lazy_reasoning.read_results(result)
    if found.failed:
      note(f'{category}: {len(found.failed)} failed inferences left out')
    for item in found.items:
      for step, text in enumerate(item.reasonings):
        drafts.append((category, item.id, step, text, item.id in failures))
  if not drafts:
    what = f'category of {results} with scores' if results else 'logged dialogue'
    raise ValueError(f'no {what} in {scores}')
  counts = count_tokens([text for _, _, _, text, _ in drafts])
  reasonings = []
  for (kind, task, step, text, wrong), length in zip(drafts, counts, strict=True):
    reasonings.append(Reasoning(kind, task, step, text, int(length), wrong))
  return reasonings


def find_lazy(reasonings: Sequence[Reasoning], rule: str = 'released') -> list[Reasoning]:
  """Returns the reasonings that are lazy by a rule of `lazy_reasoning.RULES`, in their order."""
  lazy = lazy_reasoning.RULES[rule].of
  return [one for one in reasonings if lazy(one.text, one.tokens, one.wrong)]


def token_counter(folder: pathlib.Path) -> CountTokens:
  """Returns a function that counts tokens by the tokenizer of a folder, special ones not added."""
  import transformers  # takes seconds, which a wrong path should not cost

  encode = transformers.AutoTokenizer.from_pretrained(folder)

  def count_tokens(texts: list[str]) -> list[int]:
    if not texts:
      return []
    counts = []
    starts = range(0, len(texts), _COUNTED)
    for start in progress(starts, description='count tokens', unit='batch', delay=SLOW):
      part = texts[start : start + _COUNTED]
      counts += [len(ids) for ids in encode(part, add_special_tokens=False)['input_ids']]
    return counts

  return count_tokens


def _named(path: pathlib.Path) -> re.Match | None:
  return _SCORE_FILE.fullmatch(path.name)


def read_logged(path: pathlib.Path) -> list[tuple[str, int, str]]:
  """Returns (item, step, reasoning) of the dialogues that a multi-turn score file holds."""
  found = []
  for item in lazy_reasoning.read_score_rows(path):
    step = 0
    log = item.get('inference_log')
    for turn in log if isinstance(log, list) else []:
      # Between turns stand lists with the states of the APIs.
      for name, messages in turn.items() if isinstance(turn, dict) else ():
        if not name.startswith('step_'):
          continue
        for message in messages:
          if message.get('role') == 'assistant':
            found.append((item['id'], step, str(message.get('reasoning_content') or '')))
            step += 1
  return found
