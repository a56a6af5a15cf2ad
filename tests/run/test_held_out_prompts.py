"""A run on published rows: what is set aside is trained on by no stage, and measured by all."""

import collections
import contextlib
import functools
import json

import numpy as np
import pytest
import tqdm

from configs import nano, smollm2_135m
from dcore_jax.data.made_up import write_made_up
from dcore_jax.data.records import rl_points
from dcore_jax.files import read_json_lines
from dcore_jax.run.checks import check_fields
from dcore_jax.run.config import read_config
from dcore_jax.run.pipeline import Pipeline
from dcore_jax.run.rl_source import rl_source
from dcore_jax.train import held_out_prompts, rl_loop
from dcore_jax.train.prompt_order import set_aside
from dcore_jax.train.sources import first_request


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(data folder, work directory) of the dry form."""
  folder = tmp_path_factory.mktemp('dry')
  data = folder / 'data'
  write_made_up(data)
  # Each dialogue goes on, in a row that is too long a prompt for RL.
  path = data / 'toolrl' / 'rlla_sft.json'
  rows = json.loads(path.read_text())
  later = [{**row, 'input': row['input'] + '\n<user> And now? </user>' * 80} for row in rows]
  path.write_text(json.dumps(rows + later))
  counts = []

  @contextlib.contextmanager
  def count(*, total, description, unit):
    bar = tqdm.tqdm(total=total, desc=description, unit=unit)
    yield bar
    counts.append((bar.n, total))

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('DCORE_DATA', str(data))
    patch.setattr(held_out_prompts, 'progress', count)
    config = smollm2_135m.get_config('dry')
    config.sft.max_rows = 0
    config.rl.validation = 4
    Pipeline(config, folder / 'w').run()
  (folder / 'w' / 'counts.json').write_text(json.dumps(counts))
  return data, folder / 'w'


def _suite(workdir, stage):
  folder = workdir / f'evaluate_{stage}' / 'suites' / 'prompts'
  scores = {}
  for score in json.loads((folder / 'result.json').read_text())['scores']:
    scores[score['metric']] = score['estimate']
  return scores, read_json_lines(folder / 'trajectories.jsonl')


def test_the_same_answers_are_measured_as_in_reinforcement(run):
  _, workdir = run
  validation = json.loads((workdir / 'da_grpo' / 'result.json').read_text())['validation']
  for stage, when in (('sft', 'before'), ('da_grpo', 'after')):
    scores, records = _suite(workdir, stage)
    by_prompt = collections.defaultdict(list)
    for record in records:
      by_prompt[record['id']].append(record['reward'])
    means = sorted(np.mean(rewards) for rewards in by_prompt.values())
    assert means == pytest.approx(sorted(validation['by_prompt'][when]['reward']))
    assert scores['reward']['mean'] == pytest.approx(validation[when]['reward'])
    assert scores['format']['mean'] == pytest.approx(validation[when]['reward_format'])
    assert scores['reward']['n'] == len(set(validation['by_prompt']['tasks']))


def test_answers_are_counted_as_they_come(run):
  _, workdir = run
  # Base and SFT. What reinforcement has measured of its model is not sampled again.
  assert json.loads((workdir / 'counts.json').read_text()) == [[8, 8], [8, 8], [0, 8]]


def test_every_model_is_measured_on_the_same_prompts(run):
  _, workdir = run
  asked = []
  for stage in ('base', 'sft', 'da_grpo'):
    asked.append([record['id'] for record in _suite(workdir, stage)[1]])
  assert asked[0] == asked[1] == asked[2] and len(asked[0]) == 4 * 2
  # Base, SFT and DA-GRPO: what a stage and reinforcement both measure is sampled once.
  assert len(list((workdir / 'checkpoints' / 'measured').iterdir())) == 3
  summary = json.loads((workdir / 'summary.json').read_text())
  for name, stage in summary['stages'].items():
    assert list(stage['suites']) == ['prompts', 'gsm8k'], name
  assert 'prompts' in (workdir / 'report.html').read_text()


def test_fine_tuning_leaves_out_every_row_of_a_held_out_task(run):
  data, workdir = run
  found = json.loads((workdir / 'sft' / 'result.json').read_text())
  points = rl_points([str(data / 'toolrl' / 'rlla_sft.json')])
  aside = {record['id'] for record in _suite(workdir, 'base')[1]}
  requests = {first_request(point.messages) for point in points if point.id in aside}
  related = [point for point in points if first_request(point.messages) in requests]
  # The later row of a dialogue is left out with the one that is measured.
  assert found['held_out'] == len(related) == 2 * len(requests) == 8
  assert found['rows'] == len(points) - len(related)


class _Asked(Exception):
  """A stage has said what it sets aside; the rest of it is not run."""


def test_repetitions_of_reinforcement_set_the_same_aside_as_fine_tuning(run, tmp_path, monkeypatch):
  data, workdir = run
  monkeypatch.setenv('DCORE_DATA', str(data))
  measured = {record['id'] for record in _suite(workdir, 'sft')[1]}
  asked = []

  def record(labels, count, seed):
    asked.append(set_aside(labels, count, seed))
    raise _Asked

  for module in (held_out_prompts, rl_loop):
    monkeypatch.setattr(module, 'set_aside', record)
  config = smollm2_135m.get_config('dry')
  config.sft.max_rows = 0
  config.rl.validation = 4
  config.rl.seed = 1
  pipeline = Pipeline(config, tmp_path / 'again')
  # Reinforcement would start from a fine-tuned model, which what is set aside does not depend on.
  base = pipeline.models.params('base')
  monkeypatch.setattr(pipeline.models, 'params', lambda name, dtype=None: base)
  # Asked before an engine is.
  measure = functools.partial(pipeline._evaluation._measure_prompts, None, tmp_path / 'measured')
  for stage in (pipeline.sft, pipeline.rl, measure):
    with pytest.raises(_Asked):
      stage()
  source, _ = rl_source(pipeline.config, pipeline.policy.tokenizer, pipeline.world)
  for aside in asked:
    assert {source.points[item].id for item in aside} == measured
  assert len(asked) == 3


@pytest.mark.parametrize('change', [dict(validation=0), dict(episodes=True, files=())])
@pytest.mark.parametrize('said', ['evaluate.suites', 'sft.hold_out'])
def test_what_is_set_aside_must_exist(change, said):
  config = nano.get_config('quick')
  config.rl.update(change)
  if said == 'sft.hold_out':
    config.sft.hold_out = True
  else:
    config.evaluate.suites = ('prompts',)
  with pytest.raises(ValueError, match=f'{said}.*no prompts are set aside'):
    check_fields(read_config(config))


def test_without_data_or_model_one_error_says_how_to_get_them(tmp_path, monkeypatch):
  monkeypatch.setenv('DCORE_DATA', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError) as error:
    Pipeline(smollm2_135m.get_config(), tmp_path / 'w')
  said = str(error.value)
  assert said.count('rlla_sft.json') == said.count('curl') * 3 == 3
  assert 'make smollm2' in said and 'HuggingFaceTB/SmolLM2-135M-Instruct' in said
  assert 'gsm8k_test.jsonl' in said and 'HumanEval' in said
  assert not (tmp_path / 'w').exists()


def test_variants():
  for variant in smollm2_135m.VARIANTS:
    check_fields(read_config(smollm2_135m.get_config(variant)))
  with pytest.raises(ValueError, match='nope'):
    smollm2_135m.get_config('nope')
