"""What composed reasonings are made of: our own wordings, and the published outputs."""

import pytest

from dcore_jax.distill import compose
from dcore_jax.distill.wording import WORDINGS
from dcore_jax.evaluate.behaviour import lazy_reasoning, reasonings
from dcore_jax.evaluate.behaviour.anatomy import anatomy_figures, dissect

SUBTASKS = ['find the order', 'pay for it', 'tell Bela']
SOLVED = [compose.Solved(subtask, 'i use f.', '[f(a=1)]') for subtask in SUBTASKS]


@pytest.mark.parametrize('name', sorted(WORDINGS))
def test_what_is_composed_is_taken_apart(name):
  templates = WORDINGS[name].templates
  query = 'Do it. 1. all'
  found = dissect(compose.sequential(query, SUBTASKS, 2, SOLVED[2], templates))
  assert (found.form, found.subtasks, found.done, found.headings) == ('sequential', 3, 2, 1)
  assert found.parts == {'request', 'plan', 'done', 'subtask'}
  found = dissect(compose.parallel(query, SOLVED, templates))
  assert (found.form, found.subtasks, found.done, found.headings) == ('parallel', 3, 0, 3)
  assert found.parts == {'request', 'plan', 'subtask', 'reflect', 'close'}
  assert dissect(compose.irrelevant(query, 'no tool.', 'No.', templates)).form == 'missing'
  assert dissect(compose.finished(query, 'Done.', templates)).form == 'report'
  found = dissect(compose.single('I just call f.', '[f()]'))
  assert (found.form, found.parts, found.subtasks) == ('native', frozenset(), 0)


def test_figures_count_tasks_as_units():
  templates = WORDINGS['organism'].templates
  texts = [compose.parallel('q', SOLVED, templates), 'native', 'native', '']
  figures = anatomy_figures(texts, ['a', 'a', 'b', 'c'])
  assert figures['forms'] == {
    'sequential': 0,
    'parallel': 1,
    'missing': 0,
    'report': 0,
    'native': 3,
  }
  assert figures['parts']['plan']['count'] == 1
  assert figures['parts']['plan']['share']['mean'] == 0.25
  assert figures['parts']['plan']['share']['n'] == 3
  assert (figures['subtasks'], figures['done'], figures['all_solved']) == ({'3': 1}, {}, 1)


# Measured on the published outputs of D-CORE-14B.
PUBLISHED = {
  'parallel': {
    'forms': (0, 200, 0, 0, 0),
    'parts': (200, 200, 0, 200, 200, 200, 0, 0),
    'subtasks': {'1': 1, '2': 110, '3': 52, '4': 34, '6': 1, '8': 2},
    'all_solved': 199,
  },
  'live_parallel': {
    'forms': (1, 15, 0, 0, 0),
    'parts': (16, 16, 0, 16, 15, 15, 0, 0),
    'subtasks': {'2': 13, '3': 2, '4': 1},
    'all_solved': 15,
  },
  # Single calls are left to the model's own way of thinking.
  'simple': {
    'forms': (1, 22, 0, 0, 377),
    'parts': (23, 23, 0, 23, 22, 22, 0, 0),
    'subtasks': {'1': 17, '2': 5, '3': 1},
    'all_solved': 6,
  },
  # The 44 failing dialogues that the score file holds.
  'multi_turn_base': {
    'forms': (261, 0, 13, 156, 2),
    'parts': (274, 261, 101, 259, 0, 0, 13, 156),
    'subtasks': {'1': 98, '2': 80, '3': 44, '4': 21, '5': 8, '6': 9, '7': 1},
    'all_solved': 0,
  },
}


@pytest.mark.parametrize('category', PUBLISHED)
def test_published_traces(data_dir, category):
  folder = data_dir / 'dcore_published'
  if category == 'multi_turn_base':
    score = folder / f'score/D-CORE-14B/BFCL_v3_{category}_score.json'
    texts = [text for _, _, text in reasonings.read_logged(score)]
  else:
    result = folder / f'result/D-CORE-14B/BFCL_v3_{category}_result.json'
    items = lazy_reasoning.read_results(result).items
    texts = [text for item in items for text in item.reasonings]
  figures = anatomy_figures(texts, list(map(str, range(len(texts)))))
  expected = PUBLISHED[category]
  assert tuple(figures['forms'].values()) == expected['forms']
  assert tuple(part['count'] for part in figures['parts'].values()) == expected['parts']
  assert figures['subtasks'] == expected['subtasks']
  assert figures['all_solved'] == expected['all_solved']


def test_the_base_model_composes_nothing(data_dir):
  result = data_dir / 'dcore_published/result/Qwen3-8B/BFCL_v3_parallel_result.json'
  items = lazy_reasoning.read_results(result).items
  assert {dissect(text).form for item in items for text in item.reasonings} == {'native'}
