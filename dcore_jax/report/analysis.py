"""Analyses the reasonings of a result: how long, how hesitant, how lazy, made of what.

OUT/analysis.json    figures, see `analyse`
OUT/analysis.csv     a row for each reasoning
OUT/analysis.svg     lengths, reflections and thoughts of right and wrong answers (the paper's
                     figures 8 to 10)
"""

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dcore_jax.evaluate.behaviour.anatomy import anatomy_figures, dissect
from dcore_jax.evaluate.behaviour.judge import Thought, agreement, draw_thoughts, judge
from dcore_jax.evaluate.behaviour.labels import (
  BEHAVIOURS,
  LABELS,
  behaviour_counts,
  count_behaviours,
  label_thought,
  split_thoughts,
)
from dcore_jax.evaluate.behaviour.lazy_reasoning import GROUPS, RULES, count_reflections
from dcore_jax.evaluate.behaviour.reasonings import Reasoning
from dcore_jax.files import replace_text, write_json_atomic
from dcore_jax.rollout.backends import Backend
from dcore_jax.statistics import estimate_mean, estimate_share, format_estimate

ALL = 'all'
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_BINS = 24  # of the histogram of lengths
_MOST = 12  # reflections from which responses share a bar
_COLOURS = {'right': '#2b7a4b', 'wrong': '#a83c2a'}


def analyse(
  reasonings: Sequence[Reasoning],
  out: pathlib.Path,
  backend: Backend | None = None,
  judged: int = 200,
) -> dict[str, Any]:
  """Analyses reasonings and writes JSON, CSV and figure.

  Args:
    reasonings: at least one.
    out: the folder that is written.
    backend: a judge that labels thoughts as well; None for the rules alone.
    judged: how many thoughts it is asked for, drawn at random.

  Returns:
    the content of analysis.json:
    'n': {'reasonings', 'tasks', 'right', 'wrong'}, the last two of reasonings;
    'lazy': {rule: {'kinds', 'groups', 'all'}} with {'lazy', 'total', 'ratio', 'estimate'} by kind,
      by group of `lazy_reasoning.GROUPS` whose categories are all there, and of all;
    'lengths' and 'reflections': see `_distribution`; 'reflections_words' counts whole words;
    'behaviours': {'right', 'wrong', 'all'} -> {label: announcements a response, estimate over
      tasks}; 'thoughts': {'right', 'wrong', 'all'} -> {label: {'count', 'share'}};
    'anatomy': see `anatomy_figures`, by kind and of all;
    'judge': see `agreement`; None without a judge.

  Raises:
    ValueError: no reasonings.
  """
  if not reasonings:
    raise ValueError('no reasonings to analyse')
  words = np.array([count_reflections(one.text, whole_words=True) for one in reasonings])
  substrings = np.array([count_reflections(one.text) for one in reasonings])
  wrong = np.array([one.wrong for one in reasonings])
  lengths = np.array([one.tokens for one in reasonings])
  thoughts = [split_thoughts(one.text) for one in reasonings]
  labels = [[label_thought(thought) for thought in each] for each in thoughts]
  found = {
    'n': {
      'reasonings': len(reasonings),
      'tasks': len({one.unit for one in reasonings}),
      'right': int((~wrong).sum()),
      'wrong': int(wrong.sum()),
    },
    'rules': {name: vars(rule) for name, rule in RULES.items()},
    'lazy': {name: _lazy(reasonings, name) for name in RULES},
    'lengths': _distribution(lengths, wrong, _length_edges(lengths)),
    'reflections': _distribution(substrings, wrong, list(range(_MOST + 1))),
    'reflections_words': _distribution(words, wrong, list(range(_MOST + 1))),
    'behaviours': _announcements(reasonings),
    'thoughts': _thought_shares(labels, wrong),
    'anatomy': {
      kind: anatomy_figures([one.text for one in group], [one.unit for one in group])
      for kind, group in _by_kind(reasonings).items()
    },
    'judge': None,
  }
  if backend is not None:
    named = []
    for one, each in zip(reasonings, thoughts, strict=True):
      named += [Thought(one.unit, thought) for thought in each]
    drawn = draw_thoughts(named, judged)
    found['judge'] = {'model': backend.model} | agreement(
      [label_thought(thought.text) for thought in drawn],
      judge(backend, drawn),
      [thought.unit for thought in drawn],
    )
  replace_text(out / 'analysis.csv', _table(reasonings, substrings, words))
  replace_text(out / 'analysis.svg', _svg(draw_analysis(found)))
  write_json_atomic(out / 'analysis.json', found)
  return found


def _by_kind(reasonings: Sequence[Reasoning]) -> dict[str, list[Reasoning]]:
  kinds: dict[str, list[Reasoning]] = {}
  for one in reasonings:
    kinds.setdefault(one.kind, []).append(one)
  # One kind alone is all there is.
  return kinds | ({ALL: list(reasonings)} if len(kinds) > 1 else {})


def _lazy(reasonings: Sequence[Reasoning], name: str) -> dict[str, Any]:
  by_kind = _by_kind(reasonings)
  by_kind.pop(ALL, None)
  groups = {}
  for group, categories in GROUPS.items():
    # A ratio over some of its categories would look like the published one.
    if all(category in by_kind for category in categories):
      pooled = [one for category in categories for one in by_kind[category]]
      groups[group] = _lazy_ratio(pooled, name)
  return {
    'kinds': {kind: _lazy_ratio(group, name) for kind, group in by_kind.items()},
    'groups': groups,
    ALL: _lazy_ratio(reasonings, name),
  }


def _lazy_ratio(reasonings: Sequence[Reasoning], name: str) -> dict[str, Any]:
  flags = [RULES[name].of(one.text, one.tokens, one.wrong) for one in reasonings]
  units = [one.unit for one in reasonings]
  ratio = sum(flags) / len(flags)
  # With one reasoning a task this is a share of tasks, whose interval holds for rare ones as well.
  if len(set(units)) == len(units):
    estimate = estimate_share(ratio, len(flags))
  else:
    estimate = estimate_mean(flags, clusters=units, bounds=(0.0, 1.0))
  return {'lazy': sum(flags), 'total': len(flags), 'ratio': ratio, 'estimate': estimate}


def _length_edges(lengths: np.ndarray) -> list[int]:
  """Returns the edges of the bins: round numbers, with 1 % of the lengths above the last."""
  most = max(float(np.quantile(lengths, 0.99)), _BINS)
  width = int(np.ceil(most / _BINS))
  return [width * place for place in range(_BINS + 1)]


def _distribution(values: np.ndarray, wrong: np.ndarray, edges: Sequence[int]) -> dict[str, Any]:
  """Describes the values of right and of wrong answers.

  Returns:
    {'edges': lower ends of the bins, of which the last has no upper end, 'right' and 'wrong':
    {'n', 'mean', 'quantiles': {share: value}, 'counts': one a bin}}; without answers of a side its
    mean and quantiles are None.
  """
  found: dict[str, Any] = {'edges': list(edges)}
  for side, chosen in (('right', ~wrong), ('wrong', wrong)):
    part = values[chosen]
    counts, _ = np.histogram(part, [*edges, np.inf])
    found[side] = {
      'n': len(part),
      'mean': float(part.mean()) if len(part) else None,
      'quantiles': {str(q): float(np.quantile(part, q)) for q in _QUANTILES} if len(part) else None,
      'counts': counts.tolist(),
    }
  return found


def _sides(wrong: Sequence[bool]) -> dict[str, list[int]]:
  places = range(len(wrong))
  return {
    'right': [place for place in places if not wrong[place]],
    'wrong': [place for place in places if wrong[place]],
    ALL: list(places),
  }


def _announcements(reasonings: Sequence[Reasoning]) -> dict[str, Any]:
  counts = behaviour_counts([one.text for one in reasonings])
  units = [one.unit for one in reasonings]
  found = {}
  for side, places in _sides([one.wrong for one in reasonings]).items():
    owners = [units[place] for place in places]
    found[side] = {
      name: estimate_mean(column[places], clusters=owners) if places else None
      for name, column in counts.items()
    }
  return found


def _thought_shares(labels: Sequence[Sequence[str]], wrong: np.ndarray) -> dict[str, Any]:
  found = {}
  for side, places in _sides(wrong.tolist()).items():
    counts = dict.fromkeys(LABELS, 0)
    for place in places:
      for label in labels[place]:
        counts[label] += 1
    total = sum(counts.values())
    found[side] = {
      label: {'count': count, 'share': count / total if total else None}
      for label, count in counts.items()
    }
  return found


def _table(reasonings: Sequence[Reasoning], substrings: np.ndarray, words: np.ndarray) -> str:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  lazy = [f'lazy_{name}' for name in RULES]
  header = ['kind', 'id', 'step', 'right', 'tokens', 'reflections', 'reflections_words']
  writer.writerow([*header, *lazy, *BEHAVIOURS, 'form', 'subtasks', 'done'])
  for place, one in enumerate(reasonings):
    counts = count_behaviours(one.text)
    parts = dissect(one.text)
    row = [one.kind, one.task, one.step, int(not one.wrong), one.tokens]
    row += [int(substrings[place]), int(words[place])]
    row += [int(rule.of(one.text, one.tokens, one.wrong)) for rule in RULES.values()]
    row += [counts[name] for name in BEHAVIOURS]
    writer.writerow([*row, parts.form, parts.subtasks, parts.done])
  return text.getvalue()


def format_lazy(found: dict[str, Any]) -> str:
  """Writes the lazy ratios of an analysis as a text table: a column a rule, a row a group.

  Groups are those of the published ratios where all of their categories are there, else kinds.
  """
  rules = found['lazy']
  some = next(iter(rules.values()))
  lines = ['lazy, %'.ljust(14) + ''.join(f'{rule:>32s}' for rule in rules)]
  for name in (ALL, *(some['groups'] or some['kinds'])):
    line = name.ljust(14)
    for ratios in rules.values():
      by_name = {ALL: ratios[ALL]} | ratios['kinds'] | ratios['groups']
      line += f'{format_estimate(by_name[name]["estimate"], 1, 100):>32s}'
    lines.append(line)
  return '\n'.join(lines)


def draw_analysis(found: dict[str, Any]) -> Figure:
  """Draws lengths, reflections and thoughts of right and wrong answers."""
  figure = Figure(figsize=(11, 3.2), layout='constrained')
  lengths, reflections, thoughts = figure.subplots(1, 3)
  _histogram(lengths, found['lengths'], 'tokens of a reasoning')
  _histogram(reflections, found['reflections'], 'reflections of a reasoning')
  places = np.arange(len(BEHAVIOURS))
  for number, side in enumerate(('right', 'wrong')):
    shares = [100 * (found['thoughts'][side][name]['share'] or 0) for name in BEHAVIOURS]
    thoughts.bar(places + 0.4 * (number - 0.5), shares, 0.36, color=_COLOURS[side], label=side)
  thoughts.set_xticks(places, BEHAVIOURS, fontsize=8)
  thoughts.set_ylabel('% of thoughts')
  for axes in (lengths, reflections, thoughts):
    axes.spines[['top', 'right']].set_visible(False)
  lengths.legend(frameon=False)
  return figure


def _svg(figure: Figure) -> str:
  # Equal results give equal files: ids from a fixed salt, and no date.
  with matplotlib.rc_context({'svg.hashsalt': 'analysis'}):
    text = io.StringIO()
    figure.savefig(text, format='svg', metadata={'Date': None})
  return text.getvalue()


def _histogram(axes: Axes, found: dict[str, Any], label: str) -> None:
  edges = found['edges']
  # The last bin is open; it is drawn as wide as the others.
  ends = [*edges, 2 * edges[-1] - edges[-2]]
  for side, colour in _COLOURS.items():
    part = found[side]
    if part['n']:
      shares = 100 * np.array(part['counts']) / part['n']
      axes.stairs(shares, ends, color=colour, fill=True, alpha=0.25)
      axes.stairs(shares, ends, color=colour, label=f'{side} ({part["n"]:,})')
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  axes.set_xlabel(f'{label} (last bar: {edges[-1]:,} and more)', fontsize=8)
  axes.set_ylabel('% of reasonings')
