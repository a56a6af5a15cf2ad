"""What sweeps make of figures: tables, verdicts, files, and the figures of the paper's findings."""

import csv
import io
import pathlib
import pickle
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import nano
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.run import ablation
from dcore_jax.run.ablation import (
  families,
  reinforcement,
  runs,
  self_distillation,
  sizes,
  sweep,
  tables,
  thoughts,
  variance,
)
from dcore_jax.run.config import read_config
from dcore_jax.statistics import difference_probability, holm
from dcore_jax.train.rollout_batch import Rollout, RolloutBatch

EXACT = {'difference': 0.0, 'standard_error': None, 'interval': None, 'n': 1, 'unit': 'runs'}


def records(values):
  """A record for each setting and run: {setting: [figures]}."""
  return [
    {'setting': setting, 'seed': seed, 'checkpoint': 0, 'figures': figures}
    for setting, found in values.items()
    for seed, figures in enumerate(found)
  ]


def spread(figure, mean, runs=4):
  return [{figure: mean + 0.01 * (seed - 1.5)} for seed in range(runs)]


def test_holm_is_bonferroni_for_the_smallest():
  assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  assert holm([]) == [] and holm([0.7, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_only_raises(probabilities):
  adjusted = holm(probabilities)
  assert all(p <= q <= 1 for p, q in zip(probabilities, adjusted, strict=True))
  order = np.argsort(probabilities, kind='stable')
  assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_probability_is_student_s():
  # t = 2 with 4 degrees of freedom.
  found = difference_probability({'difference': 1.0, 'standard_error': 0.5, 'n': 5})
  assert found == pytest.approx(0.11611652)
  assert difference_probability(EXACT) is None


def test_settings_are_paired_by_seed_and_checkpoint():
  found = []
  for checkpoint in range(2):
    for seed in range(2):
      key = {'seed': seed, 'checkpoint': checkpoint}
      base = 0.1 * seed + 0.3 * checkpoint
      found.append({'setting': 'a', **key, 'figures': {'accuracy': base}})
      # The last run of b is not there yet.
      if (seed, checkpoint) != (1, 1):
        found.append({'setting': 'b', **key, 'figures': {'accuracy': base + 0.2 + 0.01 * seed}})
  table = tables.make_table(('a', 'b'), found, against={'b': 'a'}, published={'b': {'tau': 3.0}})
  change = table[1]['against_first']['accuracy']
  assert change['n'] == 3 and change['difference'] == pytest.approx(0.2 + 0.01 / 3)
  assert change['p_holm'] == change['p'] < 0.001
  assert table[0]['against_first'] == {} and table[1]['published'] == {'tau': 3.0}
  text = tables.format_rows({'table': table}, ('accuracy',))
  assert 'against a: +0.203' in text and 'paper: tau 3.0' in text


@pytest.mark.parametrize(
  ('after', 'answer'), [(0.9, 'holds here'), (0.1, 'does not hold'), (0.5, 'is not decided')]
)
def test_a_verdict_follows_from_intervals(after, answer):
  other = [{'accuracy': after + 0.02 * (-1) ** seed} for seed in range(4)]
  values = {'base': spread('accuracy', 0.5), 'base_grpo': spread('accuracy', 0.5)}
  values |= {'rows_all': other, 'rows_all_grpo': other}
  table = sizes.size_table(records(values))
  assert answer in sizes.size_verdict(table)
  assert 'not measured' in sizes.size_verdict(table[:2])
  assert [row['published']['bfcl_multi_turn'] for row in table] == [33.0, 26.8, 57.5, 67.4]


def test_verdicts_of_the_other_findings():
  better = [{'accuracy': 0.6 + 0.03 * s} for s in range(4)]
  values = {'llama_start': spread('accuracy', 0.1), 'llama': better}
  values |= {'qwen2.5_start': spread('accuracy', 0.1), 'qwen2.5': better}
  table = families.family_table(records(values))
  assert 'holds here' in families.family_verdict(table)
  assert 'not measured' in families.family_verdict(table[:2])
  figures = [{'decomposition': 0.1 + 0.1 * s, 'reflection': 9 - 0.1 * s} for s in range(3)]
  after = [{'decomposition': 3 + 0.2 * s, 'reflection': 1 - 0.2 * s} for s in range(3)]
  table = thoughts.behaviour_table(records({'base': figures, 'sft': after}))
  assert 'holds here' in thoughts.behaviour_verdict(table)
  before = [{'reward_deviation': 1 + 0.1 * s, 'zero_variance_fraction': 0.1} for s in range(3)]
  after = [{'reward_deviation': 0.2, 'zero_variance_fraction': 0.7 + 0.01 * s} for s in range(3)]
  found = [record | {'tokens': {}} for record in records({'base': before, 'sft': after})]
  assert 'holds here' in variance.variance_verdict(variance.variance_table(found))
  direct = [{'slope': -0.2 - 0.01 * s, 'accuracy_several': 0.2} for s in range(3)]
  prompted = [{'slope': 0.0, 'accuracy_several': 0.7 + 0.01 * s} for s in range(3)]
  table = thoughts.composition_table(records({'direct': direct, 'prompted': prompted}))
  assert 'holds here' in thoughts.composition_verdict(table)
  taught = [{'accuracy': 0.5 + 0.03 * s} for s in range(4)]
  values = {'algorithm_1': spread('accuracy', 0.8), 'self_distillation': taught}
  table = self_distillation.self_distillation_table(records(values))
  assert 'holds here' in self_distillation.self_distillation_verdict(table)


def a_run(setting, seed, reward, zero):
  """A run of an RL suite on two prompts set aside."""
  figures = {'reward': reward, 'reflections': 0.1}
  by_prompt = {'reward': [reward] * 2, 'reflections': [0.1 + 0.01 * seed] * 2}
  return {
    'setting': setting.name,
    'alpha': None,
    'delta': None,
    'seed': seed,
    'checkpoint': 0,
    'accuracy': {'single': 0.9},
    'end': {'zero_variance_fraction': zero},
    'evaluated_reflections': 0.2,
    'validation': {'after': figures, 'by_prompt': {'after': by_prompt}},
  }


def test_psi_is_compared_with_its_placebo():
  grpo, psi, *_, placebo = reinforcement.PSI
  found = []
  for seed in range(4):
    noise = 0.01 * seed
    found.append(a_run(grpo, seed, 3 + noise, 0.4))
    found.append(a_run(psi, seed, 3.1 + 2 * noise, 0.8 + noise))
    found.append(a_run(placebo, seed, 3.1 + noise * (3 - seed), 0.4 + 2 * noise))
  table = reinforcement.compare_settings(reinforcement.PSI, found)
  names = [row['setting'] for row in table]
  assert names == ['grpo', 'da_grpo', 'psi_placebo']
  assert 'against_placebo' in table[1] and 'against_placebo' not in table[2]
  said = reinforcement.psi_verdict(table)
  assert 'differs from its placebo in zero_variance_fraction' in said
  assert 'reward +0.0' in said
  page = tables.markdown(
    {'suite': 'psi', 'table': table}, reinforcement.REINFORCEMENT['psi'].panels
  )
  assert 'reward, change' in page and 'zero_variance_fraction, against the placebo' in page
  alike = [a_run(psi, 0, 3, 0.4), a_run(placebo, 0, 3, 0.4)]
  table = reinforcement.compare_settings(reinforcement.PSI, alike)
  assert 'is not known to differ' in reinforcement.psi_verdict(table)


def test_a_table_becomes_files(tmp_path):
  values = {'base': spread('accuracy', 0.3), 'rows_all': spread('accuracy', 0.6)}
  table = sizes.size_table(records(values))
  content = {'suite': 'distill_size', 'verdict': 'it holds', 'table': table}
  tables.write_pages(tmp_path, content, sizes.SUITE.panels)
  page = (tmp_path / 'distill_size.md').read_text()
  assert 'it holds.' in page and 'paper: tau' in page and '| base | 0.300 [' in page
  rows = list(csv.DictReader(io.StringIO((tmp_path / 'distill_size.csv').read_text())))
  paper = [row for row in rows if row['kind'] == 'published' and row['setting'] == 'rows_all']
  assert [float(row['value']) for row in paper] == [57.5, 36.6]
  ours = [row for row in rows if row['kind'] == 'figures']
  assert all(float(row['low']) < float(row['value']) < float(row['high']) for row in ours)
  assert (tmp_path / 'distill_size.png').read_bytes()[:4] == b'\x89PNG'


def test_figures_of_composition_and_behaviours():
  verdicts = [(1, True), (1, True), (2, True), (2, False), (3, False), (3, False)]
  found = thoughts.composition_figures(verdicts)
  assert (found['accuracy_1'], found['accuracy_2'], found['accuracy_several']) == (1, 0.5, 0.25)
  assert found['slope'] == pytest.approx(-0.5)
  assert 'slope' not in thoughts.composition_figures([(1, True)])
  said = [{'role': 'user', 'content': 'wait'}, {'role': 'assistant', 'content': 'wait, subtask 1'}]
  silent = [{'role': 'assistant', 'content': 'done'}]
  counts = thoughts.behaviour_figures([{'messages': said}, {'messages': silent}])
  assert counts == {'decomposition': 0.5, 'reflection': 0.5, 'verification': 0, 'deduction': 0}


def test_figures_of_variance():
  tokens = np.array([5, 6] * 6)
  entropies = np.array([0.1, 0.9] * 6, np.float32)
  completion = SimpleNamespace(tokens=tokens, entropies=entropies)
  total_PG = np.array([[1.0, 1.0], [1.0, 3.0]], np.float32)
  batch = RolloutBatch(
    kinds=['single'] * 2,
    rollouts=[Rollout(exchanges=[(tokens, completion)], texts=['']) for _ in range(4)],
    total_PG=total_PG,
    format_PG=total_PG,
    correctness_PG=total_PG,
    right_PG=total_PG > 0,
  )
  figures = variance.spread_figures(batch)
  assert figures['reward_deviation'] == pytest.approx(np.sqrt(2) / 2)
  assert (figures['zero_variance_fraction'], figures['all_right_fraction']) == (0.5, 0.5)
  assert figures['entropy'] == pytest.approx(0.5)
  found = variance.open_tokens(batch, SimpleNamespace(decode=str))
  assert [one['token'] for one in found['highest']] == ['[6]', '[5]']
  assert found['lowest'][0] == {'token': '[5]', 'entropy': pytest.approx(0.1), 'count': 24}


def test_shares_and_equal_tokens():
  assert sizes.scaled({'single': 3, 'parallel': 0, 'multi_turn': 1}, 0.25) == {
    'single': 1,
    'parallel': 0,
    'multi_turn': 1,
  }
  assert self_distillation.equal_steps({'calls': 100}, 32) == 3
  assert self_distillation.equal_steps({'calls': 0}, 32) == 1


@pytest.mark.parametrize('family', ['llama', 'qwen2'])
def test_a_poured_model_has_the_familys_shape_and_near_queries(family):
  qwen = DecoderConfig(
    vocab_size=16,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    tie_word_embeddings=True,
  )
  assert qwen.qk_norm
  drawn = decoder.init_params(qwen, jax.random.key(0))
  config, made = families.poured(drawn, qwen, family)
  shapes = jax.tree.map(lambda spec: spec.shape, decoder.abstract_params(config))
  assert jax.tree.map(lambda leaf: leaf.shape, made) == shapes
  # White inputs get queries of about the size that the norm would give them.
  x_BD = np.random.default_rng(0).normal(size=(400, 64)) * np.asarray(
    drawn['layers']['attn_norm'][0]
  )
  q_BNH = np.einsum('bd,dnh->bnh', x_BD, np.asarray(made['layers']['q'][0]))
  np.testing.assert_allclose(np.sqrt((q_BNH**2).mean(axis=(0, 2))), 1, rtol=0.05)


def square(job):
  return job.seed**2


def test_jobs_run_in_order_and_travel_to_other_processes():
  config = read_config(nano.get_config('tiny'))
  jobs = [runs.Job('psi', 'grpo', config, pathlib.Path('w'), seed=n, checkpoint=n) for n in (0, 2)]
  assert list(runs.run_jobs(square, jobs)) == [(0, 0), (1, 4)]
  assert pickle.loads(pickle.dumps(jobs)) == jobs
  assert [str(job.folder) for job in jobs] == ['w/grpo/seed0', 'w/grpo/checkpoint2_seed2']


@pytest.mark.slow
def test_jobs_side_by_side():
  config = read_config(nano.get_config('tiny'))
  jobs = [runs.Job('psi', 'grpo', config, pathlib.Path('w'), seed=n) for n in range(3)]
  assert sorted(runs.run_jobs(square, jobs, 2)) == [(0, 0), (1, 1), (2, 4)]


def test_a_sweep_needs_a_process(tmp_path):
  config = nano.get_config('tiny')
  with pytest.raises(ValueError, match='jobs = 0'):
    ablation.run_suite('psi', config, tmp_path, seeds=1, processes=0)


@pytest.mark.slow
@pytest.mark.parametrize('suite', sorted(set(ablation.SUITES) - {'alpha_delta', 'decomposition'}))
def test_every_suite_runs_and_resumes(tmp_path, suite):
  """At the smallest size, where figures mean nothing."""
  config = nano.get_config('tiny')
  first = ablation.run_suite(suite, config, tmp_path, seeds=1)
  assert first['verdict'] in ablation.format_table(first)
  assert {row['setting'] for row in first['table']} == {run['setting'] for run in first['runs']}
  for ending in ('json', 'md', 'csv', 'png'):
    assert (tmp_path / f'{suite}.{ending}').stat().st_size
  assert ablation.run_suite(suite, config, tmp_path, seeds=1) == first
  assert sweep.SEEDS[suite] >= 1
