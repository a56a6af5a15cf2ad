"""The paper's run on made-up files: every stage, as its command runs it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import dcore_8b, qwen3_8b, qwen3_14b
from dcore_jax.data.benchmark_tasks import TESTS
from dcore_jax.data.recipe import read_sources
from dcore_jax.run.checks import check_fields
from dcore_jax.run.config import read_config
from dcore_jax.run.pipeline import Pipeline
from dcore_jax.run.suites import with_published

ROOT = pathlib.Path(__file__).parents[2]


def test_published_figures_stand_beside_the_scores():
  score = {'category': 'overall', 'metric': 'pass^1', 'estimate': {}, 'published': None}
  other = {**score, 'metric': 'pass^2', 'published': 0.1}
  suites = {'tau2': {'scores': [score, other], 'notes': ['a note']}}
  shown = with_published(suites, {'tau2/overall/pass^1': 0.4, 'tau2/airline': 0.3, 'bfcl/x': 1.0})
  assert [each['published'] for each in shown['tau2']['scores']] == [0.4, 0.1]
  assert shown['tau2']['notes'] == ['a note', 'published tau2/airline 0.3: not measured']
  assert suites['tau2']['scores'][0]['published'] is None
  both = with_published(suites, {'tau2/overall': 0.5})['tau2']['scores']
  assert [each['published'] for each in both] == [0.5, 0.5]


def test_the_published_model_is_measured_alone():
  config = read_config(dcore_8b.get_config())
  check_fields(config)
  assert config.model.path == 'bowiehsu/D-CORE-8B' and config.stages == ('evaluate_base', 'report')
  changed = dcore_8b.get_config()
  changed.evaluate.suites = ('bfcl4', 'tau2')
  with pytest.raises(ValueError, match=r"published: \['acebench/overall'\] are of suites"):
    check_fields(read_config(changed))
  with pytest.raises(ValueError, match='nope'):
    dcore_8b.get_config('nope')


@pytest.mark.parametrize('module', [qwen3_8b, qwen3_14b])
def test_the_dry_form_has_the_same_sources(module):
  whole = read_config(module.get_config())
  dry = read_config(module.get_config('dry'))
  check_fields(dry)
  for part in ('seeds', 'prompts'):
    places = []
    for config in (whole, dry):
      found = read_sources(getattr(config.recipe, part), part)
      places.append({source.name: source.place for source in found})
    assert places[0] == places[1]
  assert whole.stages == dry.stages


def test_without_its_data_one_error_names_all(tmp_path, monkeypatch):
  monkeypatch.setenv('DCORE_DATA', str(tmp_path))
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
  with pytest.raises(ValueError) as error:
    Pipeline(qwen3_8b.get_config('dry'), tmp_path / 'w')
  said = str(error.value)
  for name in ('Team-ACE/ToolACE', 'Salesforce/APIGen-MT-5k', 'Tool-Use-Pivot-v1'):
    assert name in said
  assert 'toolrl/rlla_rl.json' in said and 'curl -L' in said and 'gsm8k' in said
  assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_the_dry_form_goes_through_all_stages(tmp_path):
  for name, read in TESTS.items():
    try:
      next(read())
    except ValueError as error:
      pytest.skip(f'{name}: {error}')
  environment = os.environ | {'DCORE_DATA': str(tmp_path / 'data'), 'HF_HUB_OFFLINE': '1'}

  def program(*arguments):
    subprocess.run([sys.executable, '-m', *arguments], check=True, cwd=ROOT, env=environment)

  program('experiments.made_up', f'--out={tmp_path / "data"}')
  workdir = tmp_path / 'w'
  train = ('experiments.train', '--config=configs/qwen3_8b.py:dry', f'--workdir={workdir}')
  program(*train)
  summary = json.loads((workdir / 'summary.json').read_text())
  assert list(summary['stages']) == ['base', 'sft', 'da_grpo']
  for stage in summary['stages'].values():
    assert stage['suites']['gsm8k']['scores'][0]['estimate']['n'] == 2
  assert summary['recipe']['seeds']['contaminated'] == 1
  assert summary['distill']['success_rate'] == 1
  assert summary['distill']['seeds'] == summary['recipe']['seeds']['seeds']
  assert (workdir / 'export' / 'model.safetensors').exists()
  assert (workdir / 'report.html').exists()
  before = (workdir / 'recipe' / 'result.json').stat().st_mtime_ns
  program(*train)
  assert (workdir / 'recipe' / 'result.json').stat().st_mtime_ns == before
