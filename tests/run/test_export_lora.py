"""Runs with adapters: exported merged, and as directories that `peft` loads."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import nano
from dcore_jax.learn import lora
from dcore_jax.learn.optimizer import init_state, make_optimizer
from dcore_jax.models.hf_checkpoint import ModelFiles, load_params, save_checkpoint
from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.run import export
from dcore_jax.run.pipeline import Pipeline
from dcore_jax.train.checkpoint import STATE, Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
PEFT = ROOT / '.peft'


def adapters_of(config, section, seed):
  rng = np.random.default_rng(seed)

  def draw(spec):
    return rng.normal(0, 0.05, spec.shape).astype(np.float32)

  return jax.tree.map(draw, lora.abstract_adapters(config, section))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with adapters: SFT is complete, RL has a checkpoint at step 2."""
  workdir = tmp_path_factory.mktemp('run')
  options = nano.get_config('quick')
  options.lora.update(dict(rank=4, alpha=8.0, targets=('q', 'v', 'o', 'down')))
  section = Pipeline(options, workdir).config.lora
  config, params = load_params(ORGANISM)
  trained = {}
  for stage, state, seed in (('sft', '', 1), ('da_grpo', STATE, 2)):
    trained[stage] = adapters_of(config, section, seed)
    with Checkpoints(workdir / 'checkpoints' / stage / state) as saved:
      saved.save(2, init_state(trained[stage], make_optimizer()), {'seconds': 1.0})
  attached = lora.attach(lora.Frozen(params, 2.0), trained['sft'])
  files = ModelFiles(tokenizer_dir=ORGANISM)
  save_checkpoint(workdir / 'sft', config, attached, files, dtype='float32')
  return workdir, config, params, trained


def same(folder, params, tolerance=1e-6):
  _, got = load_params(folder)

  def close(one, other):
    np.testing.assert_allclose(one, other, atol=tolerance)

  jax.tree.map(close, got, params)


def both(params, trained):
  return lora.merge(
    lora.attach(lora.Frozen(params, 2.0), lora.joined(trained['sft'], trained['da_grpo']))
  )


def test_a_stage_is_saved_merged(run):
  workdir, _, params, trained = run
  same(workdir / 'sft', lora.merge(lora.attach(lora.Frozen(params, 2.0), trained['sft'])))


def test_checkpoints_of_both_stages_are_exported_merged(run, tmp_path):
  workdir, _, params, trained = run
  export.export(workdir / 'checkpoints' / 'sft', tmp_path / 'sft', dtype='float32')
  same(tmp_path / 'sft', lora.merge(lora.attach(lora.Frozen(params, 2.0), trained['sft'])))
  # The newest weights of a run: those of RL, beside what SFT has left.
  found = export.export(workdir / 'checkpoints' / 'da_grpo', tmp_path / 'rl', dtype='float32')
  assert (found.stage, found.step) == ('da_grpo', 2)
  same(tmp_path / 'rl', both(params, trained))


def test_adapters_of_rl_are_joined_with_those_of_sft(run, tmp_path):
  workdir, config, _, trained = run
  out = tmp_path / 'peft'
  found = export.export_adapters(workdir, out)
  assert found.stage == 'da_grpo'
  record = json.loads((out / 'adapter_config.json').read_text())
  assert (record['r'], record['lora_alpha']) == (8, 16.0)
  assert record['target_modules'] == ['down_proj', 'o_proj', 'q_proj', 'v_proj']
  assert record['base_model_name_or_path'] == str(ORGANISM.absolute())
  tensors = load_file(out / 'adapter_model.safetensors')
  assert len(tensors) == 2 * 4 * config.num_hidden_layers
  module = 'base_model.model.model.layers.1.self_attn.o_proj'
  a = tensors[f'{module}.lora_A.weight']
  b = tensors[f'{module}.lora_B.weight']
  assert a.shape == (8, config.num_attention_heads * config.head_dim)
  assert b.shape == (config.hidden_size, 8)
  np.testing.assert_array_equal(a[:4], trained['sft']['o']['a'][1].reshape(-1, 4).T)
  np.testing.assert_array_equal(b[:, 4:], trained['da_grpo']['o']['b'][1].T)
  with pytest.raises(FileExistsError):
    export.export_adapters(workdir, out)
  export.export_adapters(workdir / 'checkpoints' / 'sft' / '2', out, overwrite=True)
  assert json.loads((out / 'adapter_config.json').read_text())['r'] == 4


def test_a_run_without_adapters_has_none_to_export(tmp_path):
  Pipeline(nano.get_config('quick'), tmp_path / 'run')
  save_checkpoint(tmp_path / 'run' / 'sft', *load_params(ORGANISM), dtype='float32')
  for path in (tmp_path / 'run', tmp_path / 'run' / 'sft', ORGANISM):
    with pytest.raises(ValueError, match='no adapters'):
      export.export_adapters(path, tmp_path / 'out')


@pytest.mark.slow
@pytest.mark.skipif(not (PEFT / 'peft').is_dir(), reason='needs `make peft`')
def test_peft_computes_what_the_merged_model_does(run, tmp_path):
  """In a process of its own: logits of base and adapters against those of the merged directory."""
  pytest.importorskip('torch')
  workdir, *_ = run
  export.export_adapters(workdir, tmp_path / 'peft')
  export.export(workdir / 'checkpoints' / 'da_grpo', tmp_path / 'whole', dtype='float32')
  text = """
import sys, torch, transformers, peft
def load(path):
  return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
tokens = torch.arange(40, 60)[None]
model = peft.AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
  got = model(tokens).logits
  want = load(sys.argv[2])(tokens).logits
  base = load(model.peft_config['default'].base_model_name_or_path)(tokens).logits
print((got - want).abs().max().item(), (base - want).abs().max().item())
"""
  path = os.pathsep.join([str(PEFT), os.environ.get('PYTHONPATH', '')])
  done = subprocess.run(
    [sys.executable, '-c', text, str(tmp_path / 'peft'), str(tmp_path / 'whole')],
    env=os.environ | {'PYTHONPATH': path, 'HF_HUB_OFFLINE': '1'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  gap, moved = map(float, done.stdout.split())
  assert gap < 1e-3 < moved
