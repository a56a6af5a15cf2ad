"""The columns of BFCL's tables: weighted sums of the shares of right tasks of categories.

Version 3, as the paper reports it (method.md, section 5.3):

    Live          pooled over the six live categories
    Non-Live      mean of {mean of simple, java, javascript}, multiple, parallel, parallel_multiple
    Multi-Turn    mean of the four categories of many turns
    Irrelevance   mean of irrelevance and live_irrelevance
    Relevance     live_relevance
    overall       mean of Live, Multi-Turn, and Non-Live with irrelevance as a fifth part

Version 4: non-live and live without relevance and irrelevance, 10 % each; irrelevance 10 %;
multi-turn 30 %; agentic 40 %, half of it memory and half web search.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax.evaluate.suites import Score
from dcore_jax.statistics import TASKS, wilson_interval

# Parts of a column with their weights. A part is a category, or a mean of others.
Weights = Mapping[str, float]
Counts = Mapping[str, tuple[int, int]]  # category -> (right tasks, tasks)
Sizes = Mapping[str, int]  # category -> all tasks that it has, asked or not

_LIVE_CALLS = ('live_simple', 'live_multiple', 'live_parallel', 'live_parallel_multiple')
_LIVE = (*_LIVE_CALLS, 'live_irrelevance', 'live_relevance')
_TURNS = (
  'multi_turn_base',
  'multi_turn_miss_func',
  'multi_turn_miss_param',
  'multi_turn_long_context',
)
_SIMPLE_V3 = ('simple', 'java', 'javascript')
_SIMPLE_V4 = ('simple_python', 'simple_java', 'simple_javascript')
_OTHERS = ('multiple', 'parallel', 'parallel_multiple')
# In per cent. Memory is half of the 40 % of agentic tasks.
_OVERALL_V4 = {'Non-Live': 10, 'Live': 10, 'Irrelevance': 10, 'Multi-Turn': 30, 'Memory': 20}
MEMORY = ('memory_kv', 'memory_rec_sum')
CATEGORIES_V3 = (*_SIMPLE_V3, *_OTHERS, 'irrelevance', *_LIVE, *_TURNS)
CATEGORIES_V4 = (*_SIMPLE_V4, *_OTHERS, 'irrelevance', *_LIVE, *_TURNS, *MEMORY)


def columns_v3(sizes: Sizes) -> dict[str, Weights]:
  """Returns the columns of version 3, 'overall' last."""
  live = _pooled(_LIVE, sizes)
  simple = _mean(_SIMPLE_V3)
  non_live = _mean((simple, *_OTHERS))
  turns = _mean(_TURNS)
  return {
    'Live': live,
    'Non-Live': non_live,
    'Relevance': _mean(('live_relevance',)),
    'Irrelevance': _mean(('irrelevance', 'live_irrelevance')),
    'Multi-Turn': turns,
    'overall': _mean((live, _mean((simple, *_OTHERS, 'irrelevance')), turns)),
  }


def columns_v4(sizes: Sizes) -> dict[str, Weights]:
  """Returns the columns of version 4, 'overall' last.

  Web search is not run. 'overall' has the weights of the other parts, made to add up to 1.
  """
  columns = {
    'Non-Live': _mean((_mean(_SIMPLE_V4), *_OTHERS)),
    'Live': _pooled(_LIVE_CALLS, sizes),
    'Relevance': _mean(('live_relevance',)),
    'Irrelevance': _mean(('irrelevance', 'live_irrelevance')),
    'Multi-Turn': _mean(_TURNS),
    'Memory': _mean(MEMORY),
  }
  overall: dict[str, float] = {}
  for name, weight in _OVERALL_V4.items():
    _add(overall, columns[name], weight / sum(_OVERALL_V4.values()))
  return columns | {'overall': overall}


def score_columns(columns: Mapping[str, Weights], counts: Counts) -> list[Score]:
  """Estimates the columns of whose every category there are judged tasks.

  Their floor is what a model gets that says nothing.
  """
  scores = []
  for name, weights in columns.items():
    if all(counts.get(category, (0, 0))[1] for category in weights):
      floor = sum(weight * floor_of(category) for category, weight in weights.items())
      scores.append(Score(name, 'accuracy', estimate_column(weights, counts), floor))
  return scores


def floor_of(category: str) -> float:
  """The share of tasks that are right where the model says nothing."""
  return float('irrelevance' in category)


def estimate_column(weights: Weights, counts: Counts) -> dict[str, Any]:
  """Estimates a weighted sum of shares of independent tasks.

  The interval is made of Wilson's intervals of the shares, which also hold near 0 and 1 (the method
  of variance estimates recovery, Zou and Donner 2008).

  Args:
    weights: of categories; they add up to 1.
    counts: of at least these categories.

  Returns:
    See `statistics`; its n counts the tasks of all categories.
  """
  mean = 0.0
  below = above = variance = 0.0
  n = 0
  for category, weight in weights.items():
    right, tasks = counts[category]
    share = right / tasks
    low, high = wilson_interval(share, tasks)
    mean += weight * share
    below += (weight * (share - low)) ** 2
    above += (weight * (high - share)) ** 2
    # A single task tells nothing of a variance; its interval does.
    variance += weight**2 * share * (1 - share) / max(1, tasks - 1)
    n += tasks
  interval = [max(0.0, mean - math.sqrt(below)), min(1.0, mean + math.sqrt(above))]
  return {
    'mean': mean,
    # A spread of 0 is a sample of equal tasks, and no certainty.
    'standard_error': math.sqrt(variance) or None,
    'interval': interval if n > 1 else None,
    'n': n,
    'unit': TASKS,
  }


def _mean(parts: Sequence[str | Weights]) -> dict[str, float]:
  """The weights of the mean of parts, each a category or weights itself."""
  weights: dict[str, float] = {}
  for part in parts:
    _add(weights, {part: 1.0} if isinstance(part, str) else part, 1 / len(parts))
  return weights


def _add(weights: dict[str, float], part: Weights, share: float) -> None:
  for category, weight in part.items():
    weights[category] = weights.get(category, 0.0) + share * weight


def _pooled(categories: Sequence[str], sizes: Sizes) -> dict[str, float]:
  """The weights of a share of all tasks of some categories.

  They are of all tasks also where only the first of each category were asked, so that the share
  stays an estimate of the same figure.
  """
  total = sum(sizes[category] for category in categories)
  return {category: sizes[category] / total for category in categories}
