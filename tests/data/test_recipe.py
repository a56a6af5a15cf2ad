"""A recipe gives so many seeds of each kind, says what became of the others, and is done once."""

import json

import pytest

from dcore_jax.data import made_up, recipe
from dcore_jax.data.overlap import TestTask
from dcore_jax.data.records import rl_points
from dcore_jax.data.seed_sources import load_seeds
from dcore_jax.distill.algorithm import distill
from dcore_jax.distill.scripted import ScriptedBackend
from dcore_jax.distill.solve import Distiller
from dcore_jax.distill.wording import WORDINGS
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.run.config import default_config, read_config

PIVOT = 'nvidia/Nemotron-RL-Agentic-Conversational-Tool-Use-Pivot-v1'


@pytest.fixture(name='data')
def fixture_data(tmp_path, monkeypatch):
  monkeypatch.setenv('DCORE_DATA', str(tmp_path / 'data'))
  # What BFCL asks is not needed to see that a test task is refused.
  task = TestTask('test/0', 'which of the seven bridges of the old town is open to lorries today')
  monkeypatch.setattr(made_up, 'bfcl_tests', lambda: iter([task]))
  monkeypatch.setattr('dcore_jax.data.collect_seeds.TESTS', {'bfcl': lambda: iter([task])})
  made_up.write_made_up(tmp_path / 'data', 6)


def config(**changes):
  c = default_config()
  c.stages = ('distill', 'rl')
  c.recipe.seeds.update(
    {
      'toolace': {'source': 'Team-ACE/ToolACE', 'single': 4, 'parallel': 2, 'irrelevant': -1},
      'xlam': {'source': 'Salesforce/xlam-function-calling-60k', 'parallel': 3},
      'apigen_mt': {'source': 'Salesforce/APIGen-MT-5k', 'count': -1},
      'toolworld': {'source': 'toolworld', 'sequential': 3},
    }
  )
  c.recipe.prompts.update(
    {
      'toolrl': {'source': 'toolrl/rlla_rl.json', 'count': 5},
      'pivot': {'source': PIVOT, 'count': 3},
    }
  )
  c.update(changes)
  return read_config(c)


def test_counts_by_kind_and_what_became_of_the_others(data, tmp_path):
  report = recipe.prepare(config(), tmp_path / 'w')
  sources = report['seeds']['sources']
  assert sources['toolace']['kinds'] == {
    'single': 4,
    'sequential': 0,
    'parallel': 2,
    'irrelevant': 6,
  }
  assert sources['xlam']['taken'] == sources['xlam']['kinds']['parallel'] == 3
  assert sources['xlam']['dropped'] == {'unreadable record': 1}
  assert sources['apigen_mt']['taken'] == sources['apigen_mt']['records']
  assert report['seeds']['contaminated'] == 1
  assert report['seeds']['contaminated_by'] == {'test/0': 1}
  seeds = recipe.read_part(tmp_path / 'w', 'seeds')
  assert len(seeds) == report['seeds']['seeds'] == len({seed.id for seed in seeds})
  prompts = recipe.read_part(tmp_path / 'w', 'prompts')
  assert len(prompts) == report['prompts']['prompts'] == 8
  # The file is what `rl.files` takes, too.
  assert len(rl_points([str(tmp_path / 'w' / 'prompts.jsonl')])) == 8
  table = recipe.format_report(report)
  assert 'test tasks 1' in table and 'unreadable record 1' in table
  # A second call changes nothing, and another recipe is refused.
  assert recipe.prepare(config(), tmp_path / 'w') == report
  with pytest.raises(ValueError, match='holds the seeds of another recipe'):
    recipe.prepare(config(seed=1), tmp_path / 'w')


def test_a_scripted_model_distils_every_seed(data, tmp_path):
  recipe.prepare(config(), tmp_path)
  seeds = recipe.read_part(tmp_path, 'seeds')
  for name in ('english', 'organism'):
    wording = WORDINGS[name]
    backend = ScriptedBackend(seeds, wording.prompts)
    outcomes = dict(distill(seeds, backend, SamplingParams(), Distiller(wording=wording)))
    assert len(outcomes) == len(seeds)
    assert not {outcome.reason for outcome in outcomes.values()} - {''}


def test_what_is_taken_does_not_depend_on_order_and_grows_with_the_count():
  seeds = load_seeds('toolworld', count=6, seed=0).seeds
  few = recipe.choose(seeds, {'single': 3, 'sequential': 2}, 0)
  assert [seed for seed in seeds if seed in few] == few and len(few) == 5
  backwards = recipe.choose(seeds[::-1], {'single': 3, 'sequential': 2}, 0)
  assert backwards[::-1] == few
  many = recipe.choose(seeds, {'single': 5, 'sequential': 2}, 0)
  assert all(seed in many for seed in few)
  assert recipe.choose(seeds, {'count': 3}, 0) != recipe.choose(seeds, {'count': 3}, 1)


@pytest.mark.parametrize(
  ('entry', 'said'),
  [
    ('toolworld', 'must be a section'),
    ({'count': 1}, 'has no source'),
    ({'source': 'toolworld', 'cuont': 1}, r"unknown fields \['cuont'\]"),
    ({'source': 'toolworld', 'single': -2}, 'single = -2 must be a whole number'),
    ({'source': 'toolworld', 'single': 1, 'count': 1}, 'has both count and a number'),
    ({'source': 'toolworld', 'single': -1}, 'a world makes as many tasks'),
  ],
)
def test_an_entry_that_means_nothing_is_named(entry, said):
  with pytest.raises(ValueError, match='recipe.seeds.mine.*' + said):
    recipe.read_sources({'mine': entry}, 'recipe.seeds')


def test_a_recipe_excludes_what_it_replaces():
  c = default_config()
  c.stages = ('distill', 'rl')
  c.recipe.prompts.update({'mine': {'source': 'toolworld', 'count': 1}})
  c.rl.files = ('rows.json',)
  with pytest.raises(ValueError, match='recipe.prompts and rl.files both'):
    list(recipe.parts(read_config(c)))
  c.rl.files = ()
  c.rl.episodes = True
  with pytest.raises(ValueError, match='rl.episodes acts out'):
    list(recipe.parts(read_config(c)))


def pivot(action, **request):
  tools = [
    {'type': 'function', 'name': 'look', 'description': '', 'parameters': {}, 'strict': True}
  ]
  past = [
    {'role': 'developer', 'content': 'Be kind.'},
    {
      'role': 'user',
      'content': [
        {'type': 'input_text', 'text': 'Look '},
        {'type': 'input_text', 'text': 'twice.'},
      ],
    },
    {'type': 'reasoning', 'summary': []},
    {'role': 'assistant', 'content': 'I look.'},
    {'type': 'function_call', 'call_id': 'c1', 'name': 'look', 'arguments': '{}'},
    {'type': 'function_call_output', 'call_id': 'c1', 'output': 'nothing'},
  ]
  params = {'input': past, 'tools': tools, 'parallel_tool_calls': None, **request}
  return {'trajectory_id': 4, 'responses_create_params': params, 'expected_action': action}


def points(tmp_path, row):
  (tmp_path / 'rows.jsonl').write_text(json.dumps(row) + '\n')
  return rl_points([str(tmp_path / 'rows.jsonl')])


def test_pivot_rows_are_prompts_with_a_reference(tmp_path):
  call = {'type': 'function_call', 'name': 'look', 'arguments': '{"at": "it"}'}
  [point] = points(tmp_path, pivot(call))
  assert point.reference == "[look(at='it')]" and point.kind == 'single'
  assert [message.role for message in point.messages] == ['system', 'user', 'assistant', 'user']
  assert point.messages[0].content.startswith('Be kind.')
  assert point.messages[1].content == 'Look twice.'
  # Calls stand alone in the Python style: words beside them are thoughts, as in all rows.
  assert point.messages[2].content == '<think>\nI look.\n</think>\n\n[look()]'
  assert point.messages[3].content == '<tool_response>\nnothing\n</tool_response>'
  [point] = points(tmp_path, pivot({'type': 'function_call_batch', 'calls': [call, call]}))
  assert point.kind == 'parallel' and point.reference == "[look(at='it'), look(at='it')]"
  [point] = points(tmp_path, pivot({'type': 'message', 'content': 'Nothing is there.'}))
  assert point.kind == 'irrelevant' and point.reference == 'Nothing is there.'
  [seed] = load_seeds(str(tmp_path / 'rows.jsonl'), count=1, seed=0).seeds
  assert seed.dialogue == 'rows-trajectory4'


@pytest.mark.parametrize(
  ('row', 'said'),
  [
    (pivot({'type': 'nothing'}), 'expected_action is neither'),
    (pivot({'type': 'message', 'content': 'x'}, input='x'), 'holds no list `input`'),
    (
      pivot({'type': 'message', 'content': 'x'}, text={'format': 'json'}),
      "responses_create_params.*'text'",
    ),
    (pivot({'type': 'message', 'content': 'x'}, input=[{'type': 'image'}]), "type is 'image'"),
    ({**pivot({'type': 'message', 'content': 'x'}), 'odd': 1}, "'odd'"),
  ],
)
def test_a_pivot_row_that_says_more_is_refused(tmp_path, row, said):
  with pytest.raises(ValueError, match=said):
    points(tmp_path, row)
