"""Takes composed reasonings apart: which sentences of D-CORE's templates a reasoning holds.

A composed reasoning repeats the request, lists its subtasks, lists those that are done, and thinks
about one of them or about all (docs/method.md, section 1.7). The sentences differ between wordings.
They are found by phrases: those of our wordings up to their first placeholder, and for the
published models those that their outputs show.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dcore_jax.distill.wording import WORDINGS, Templates
from dcore_jax.statistics import estimate_mean

# In the order in which a reasoning holds them.
PARTS = ('request', 'plan', 'done', 'subtask', 'reflect', 'close', 'missing', 'report')
# sequential: a plan, and one subtask of it. parallel: a plan whose subtasks are independent.
# missing: the request cannot be carried out. report: tells the user what was done. native: nothing
# of a template.
FORMS = ('sequential', 'parallel', 'missing', 'report', 'native')

_ITEM = re.compile(r'\s*\d+\s?\.')


def _phrases(templates: Templates) -> dict[str, str]:
  texts = {
    'request': templates.open,
    'plan': templates.plan,
    'done': templates.done,
    'subtask': templates.now,
    'reflect': templates.reflect,
    'close': templates.close,
    'missing': templates.irrelevant,
    'report': templates.finished,
  }
  return {part: text.split('{', 1)[0].strip().lower() for part, text in texts.items()}


# By wording, and by part: the phrase, in lower case.
PHRASES = {name: _phrases(wording.templates) for name, wording in WORDINGS.items()}
PHRASES['published'] = {
  'request': 'analyze the overall task',
  'plan': 'break it down into the following subtasks',
  'done': 'already solve the subtask',
  'subtask': 'analyze the execution process of subtask',
  'reflect': 'no dependencies between these subtasks',
  'close': 'output a parallel tool call',
  'missing': "user's query is missing",
  'report': 'have used tools to complete this task',
}


@dataclasses.dataclass(frozen=True)
class Anatomy:
  """What a reasoning is made of.

  Attributes:
    form: one of FORMS.
    parts: which of PARTS it has.
    subtasks: how many the plan lists.
    done: how many are listed as done.
    headings: how many subtasks have a heading with a reasoning below.
  """

  form: str
  parts: frozenset[str]
  subtasks: int
  done: int
  headings: int


def dissect(text: str) -> Anatomy:
  """Takes a reasoning apart, by the wording of which it holds most."""
  lowered = text.lower()
  best: dict[str, int] = {}
  phrases: dict[str, str] = {}
  for known in PHRASES.values():
    places = {part: lowered.find(phrase) for part, phrase in known.items()}
    places = {part: place for part, place in places.items() if place >= 0}
    if len(places) > len(best):
      best = places
      phrases = known
  return Anatomy(
    form=_form(best.keys()),
    parts=frozenset(best),
    subtasks=_items(lowered, best.get('plan')),
    done=_items(lowered, best.get('done')),
    headings=lowered.count(phrases['subtask']) if 'subtask' in best else 0,
  )


def _form(parts: Any) -> str:
  # A report may quote any request, and a plan stands in no other form than these two.
  if 'plan' in parts:
    return 'parallel' if 'reflect' in parts else 'sequential'
  for form in ('missing', 'report'):
    if form in parts:
      return form
  return 'native'


def _items(text: str, place: int | None) -> int:
  """Counts the numbered lines that follow the line in which `place` is."""
  if place is None:
    return 0
  count = 0
  for line in text[place:].split('\n')[1:]:
    if not _ITEM.match(line):
      break
    count += 1
  return count


def anatomy_figures(texts: Sequence[str], units: Sequence[str]) -> dict[str, Any]:
  """Returns how many reasonings have which form and part.

  Args:
    texts: the reasonings, at least one.
    units: the task of each.

  Returns:
    {'n', 'forms': {form: count}, 'parts': {part: {'count', 'share': estimate over tasks}},
    'subtasks', 'done': {number: reasonings whose list has so many}, 'all_solved': parallel
    reasonings with a heading for each subtask}.
  """
  found = [dissect(text) for text in texts]
  forms = Counter(one.form for one in found)
  parts = {}
  for part in PARTS:
    flags = [part in one.parts for one in found]
    share = estimate_mean(flags, clusters=units, bounds=(0.0, 1.0))
    parts[part] = {'count': sum(flags), 'share': share}
  parallel = [one for one in found if one.form == 'parallel']
  return {
    'n': len(found),
    'forms': {form: forms[form] for form in FORMS},
    'parts': parts,
    'subtasks': _numbers(one.subtasks for one in found if 'plan' in one.parts),
    'done': _numbers(one.done for one in found if 'done' in one.parts),
    'all_solved': sum(one.headings == one.subtasks for one in parallel),
  }


def _numbers(values: Any) -> dict[str, int]:
  counts = Counter(values)
  return {str(value): counts[value] for value in sorted(counts)}
