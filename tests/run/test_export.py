"""Exports of a run's stages and checkpoints, and the card that goes with them."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import nano
from dcore_jax.learn.optimizer import init_state, make_optimizer
from dcore_jax.models.hf_checkpoint import ModelFiles, load_params, save_checkpoint
from dcore_jax.overrides import to_json
from dcore_jax.report.model_card import model_card
from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.run import export
from dcore_jax.run.config import read_config
from dcore_jax.run.pipeline import Pipeline
from dcore_jax.train.checkpoint import STATE, Checkpoints
from tests.report.example_run import a_summary

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run that was killed in its RL stage: SFT is there, RL has checkpoints at steps 2 and 10."""
  workdir = tmp_path_factory.mktemp('run')
  Pipeline(nano.get_config('quick'), workdir)
  summary = a_summary()
  del summary['stages']['da_grpo']
  (workdir / 'summary.json').write_text(json.dumps(summary))
  config, params = load_params(ORGANISM)
  save_checkpoint(
    workdir / 'sft',
    config,
    moved(params, 0.25),
    ModelFiles(tokenizer_dir=ORGANISM),
    dtype='float32',
  )
  (workdir / 'checkpoints' / 'da_grpo' / 'rollouts').mkdir(parents=True)
  with Checkpoints(workdir / 'checkpoints' / 'da_grpo' / STATE) as saved:
    for step in (2, 10):
      saved.save(step, init_state(moved(params, step), make_optimizer()), {'seconds': 1.0})
  return workdir


def moved(params, amount):
  return jax.tree.map(lambda leaf: leaf + amount, params)


def expected(amount):
  return {
    name: tensor.astype(np.float32) + np.float32(amount)
    for name, tensor in load_file(ORGANISM / 'model.safetensors').items()
  }


def assert_holds(out, tensors):
  got = load_file(out / 'model.safetensors')
  assert got.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(got[name], tensor, err_msg=name)


@pytest.mark.parametrize(
  'place, stage, step, amount',
  [
    ('', 'da_grpo', 10, 10),
    ('checkpoints/da_grpo', 'da_grpo', 10, 10),
    ('checkpoints/da_grpo/2', 'da_grpo', 2, 2),
    ('sft', 'sft', None, 0.25),
  ],
)
def test_what_a_path_stands_for(run, tmp_path, place, stage, step, amount):
  found = export.export(run / place, tmp_path / 'out', dtype='float32')
  assert (found.stage, found.step) == (stage, step)
  assert_holds(tmp_path / 'out', expected(amount))
  assert (tmp_path / 'out' / 'tokenizer.json').is_file() and (
    tmp_path / 'out' / 'chat_template.jinja'
  ).is_file()
  written = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
  assert 573 in written['eos_token_id'] and written['pad_token_id'] == 571
  card = (tmp_path / 'out' / 'README.md').read_text()
  assert f'of the stage `{stage}`' in card or f'after the stage `{stage}`' in card
  assert ('not measured' in card) == (step is not None) and '| before training | 94.5%' in card


def test_a_hugging_face_directory_is_converted(run, tmp_path):
  export.export(ORGANISM, tmp_path / 'wide', dtype='float32')
  assert_holds(tmp_path / 'wide', expected(0))
  # As transformers writes a tokenizer with several templates.
  template = pathlib.Path('additional_chat_templates', 'tool_use.jinja')
  (tmp_path / 'wide' / template.parent).mkdir()
  (tmp_path / 'wide' / template).write_text('tools')
  export.export(tmp_path / 'wide', tmp_path / 'narrow')
  assert (tmp_path / 'narrow' / 'model.safetensors').read_bytes() == (
    ORGANISM / 'model.safetensors'
  ).read_bytes()
  assert not (tmp_path / 'narrow' / 'README.md').exists()
  assert (tmp_path / 'narrow' / template).read_text() == 'tools'
  shutil.copytree(run, tmp_path / 'run')
  (tmp_path / 'wide' / 'README.md').write_text('# Card')
  shutil.move(
    tmp_path / 'wide', tmp_path / 'run' / 'export'
  )  # what a run has exported keeps its card
  export.export(tmp_path / 'run' / 'export', tmp_path / 'again')
  assert (tmp_path / 'again' / 'README.md').read_text() == '# Card'


def test_the_pipeline_exports_with_a_card(tmp_path):
  config = nano.get_config('quick')
  config.stages = ('export',)
  Pipeline(config, tmp_path).run()
  card = (tmp_path / 'export' / 'README.md').read_text()
  assert (
    'the model organism of dcore_jax, not trained further' in card
    and '"estimator": "da_grpo"' in card
  )


@pytest.mark.parametrize(
  'place, match',
  [('', 'neither a run'), ('nowhere', 'neither a run'), ('3', 'config.json of a run')],
)
def test_other_places_are_refused(tmp_path, place, match):
  (tmp_path / 'checkpoints' / 'sft' / '3' / 'tree').mkdir(parents=True)
  with pytest.raises(ValueError, match=match):
    export.export(tmp_path / ('checkpoints/sft/3' if place == '3' else place), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_run_without_training_is_refused(tmp_path):
  Pipeline(nano.get_config('quick'), tmp_path / 'run')
  with pytest.raises(ValueError, match='nothing has been trained'):
    export.export(tmp_path / 'run', tmp_path / 'out')


def test_damaged_and_foreign_checkpoints_are_refused(run, tmp_path):
  shutil.copytree(run, tmp_path / 'run')
  step = tmp_path / 'run' / 'checkpoints' / 'da_grpo' / STATE / '10'
  chunk = max(
    (file for file in step.rglob('*') if file.is_file()), key=lambda file: file.stat().st_size
  )
  content = bytearray(chunk.read_bytes())
  content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
  chunk.write_bytes(bytes(content))
  with pytest.raises(ValueError, match='da_grpo/state/10'):
    export.export(tmp_path / 'run', tmp_path / 'out')
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  config['model']['init'] = json.loads((ORGANISM / 'config.json').read_text()) | {'hidden_size': 96}
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r'params/embed is .*\[640, 192\], expected .*\[640, 96\]'):
    export.export(step.parent / '2', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_the_program(run, tmp_path):
  command = [
    sys.executable,
    '-m',
    'experiments.export',
    f'--checkpoint={run}',
    f'--out={tmp_path / "out"}',
  ]
  again = []
  for extra in ([], [], ['--overwrite', '--dtype=float32']):
    done = subprocess.run([*command, *extra], cwd=ROOT, capture_output=True, text=True, check=False)
    again.append(done.returncode)
    if done.returncode:
      assert 'not empty' in done.stderr and 'Traceback' not in done.stderr
  assert again == [0, 1, 0]
  assert_holds(tmp_path / 'out', expected(10))


def test_the_card_names_files_and_hides_where_they_lie():
  config = nano.get_config()
  config.model.path = '/home/someone/models/Qwen3-8B/'
  config.sft.files = ('/home/someone/rows.jsonl', 'Team-ACE/ToolACE')
  record = to_json(read_config(config))
  card = model_card(record, load_params(ORGANISM)[0], stage='da_grpo', summary=a_summary())
  assert (
    'someone' not in card and '`Qwen3-8B`' in card and '`rows.jsonl`, `Team-ACE/ToolACE`' in card
  )
  assert 'Self-distillation' not in card  # rows were given
  assert '| after da_grpo | 96.9%' in card and card.startswith('---\nlibrary_name: transformers\n')
  assert 'reward `toolrl`' in card


def test_the_card_says_who_wrote_the_rows_and_what_was_rewarded():
  config = nano.get_config('agentic')
  config.distill.update(
    dict(
      backend='openai',
      base_url='http://fleet.someone:8000/v1',
      model='Qwen3-32B',
      reference='pseudo',
      wording='/home/someone/words.json',
      files=('/home/someone/seeds.jsonl',),
    )
  )
  config.distill.labels.base_url = 'http://labels.someone:8000/v1'
  record = to_json(read_config(config))
  card = model_card(record, load_params(ORGANISM)[0], stage='da_grpo', summary=a_summary())
  assert 'someone' not in card and '"words.json"' in card and '"seeds.jsonl"' in card
  assert 'with `Qwen3-32B`, which saw pseudo-labels' in card and 'the model itself' not in card
  assert (
    '16 whole tasks x 8 rollouts' in card
    and 'rewarded by the state' in card
    and 'reward `toolrl`' not in card
  )
