"""Parity with transformers' Qwen3 in torch, and checkpoints that go in and out without losing a bit."""
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dcore_jax.models import decoder
from dcore_jax.models import hf_checkpoint
from torch_reference import TINY, make_model, save_model

torch = pytest.importorskip('torch', reason='torch is not installed: no reference to compare with')


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens):
  B, T = tokens.shape
  position = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  hidden = decoder.hidden_states(params, config, jnp.asarray(tokens), position, jnp.full((B, T), T))
  return jnp.einsum('btd,vd->btv', hidden, decoder.head_matrix(params))


@pytest.mark.parametrize('name', TINY)
def test_logits_equal_transformers(tmp_path, name):
  save_model(tmp_path, **TINY[name])
  config, params = hf_checkpoint.load_params(tmp_path)
  assert config.tie_word_embeddings == ('head' not in params)
  tokens = np.random.default_rng(0).integers(0, 61, (3, 17))
  with torch.no_grad():
    want = make_model(**TINY[name])(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(logits_of(config, params, tokens), want, atol=1e-4)
  cache = decoder.init_cache(config, 3, 20)
  step = jax.jit(decoder.extend, static_argnames='config')
  got = []
  for start, stop in ((0, 8), (8, 12), (12, 13), (13, 14), (14, 15), (15, 16), (16, 17)):
    hidden, cache = step(params, config, cache, jnp.asarray(tokens[:, start:stop]), jnp.full((3,), start))
    got.append(hidden @ decoder.head_matrix(params).T[None])
  np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=1e-4)


@pytest.mark.parametrize('name', ['plain', 'tied'])
def test_gradients_equal_torch(tmp_path, name):
  model = make_model(**TINY[name])
  save_model(tmp_path / 'hf', **TINY[name])
  config, params = hf_checkpoint.load_params(tmp_path / 'hf')
  tokens = np.random.default_rng(1).integers(0, 61, (2, 11))
  model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()

  def loss(values):
    logp = jax.nn.log_softmax(logits_of(config, values, tokens)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, jnp.asarray(tokens)[:, 1:, None], axis=-1))

  hf_checkpoint.save_checkpoint(tmp_path / 'grads', config, jax.jit(jax.grad(loss))(params), dtype='float32')
  got = load_file(tmp_path / 'grads' / 'model.safetensors')
  want = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
  assert got.keys() == want.keys()
  for name, gradient in want.items():
    assert np.abs(got[name] - gradient).max() <= 1e-4 * np.abs(gradient).max(), name


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['plain', 'tied'])
def test_import_then_export_gives_the_same_file(tmp_path, name, dtype):
  source = save_model(tmp_path / 'in', dtype, **TINY[name])
  for working in (jnp.float32, jnp.dtype(dtype)):  # bfloat16 fits in float32: a master copy in float32 loses nothing
    config, params = hf_checkpoint.load_params(source, working)
    hf_checkpoint.save_checkpoint(tmp_path / 'out', config, params, dtype=dtype, overwrite=True)
    assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == (source / 'model.safetensors').read_bytes()
  assert hf_checkpoint.load_config(tmp_path / 'out') == config


@pytest.mark.parametrize('name', ['plain', 'tied'])
def test_export_loads_in_transformers(tmp_path, name, data_dir):
  import transformers
  config, params = hf_checkpoint.load_params(save_model(tmp_path / 'in', **TINY[name]))
  config = dataclasses.replace(config, eos_token_id=(3, 5), pad_token_id=5)
  hf_checkpoint.save_checkpoint(tmp_path / 'out', config, params, dtype='float32',
                                tokenizer_dir=data_dir / 'qwen3-tokenizer')
  assert (tmp_path / 'out' / 'tokenizer.json').is_file()
  model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not any(report.values()), report
  assert model.dtype == torch.float32 and model.config.rope_parameters['rope_theta'] == 12345.0
  assert model.generation_config.eos_token_id == [3, 5]
  tokens = np.random.default_rng(2).integers(0, 61, (2, 9))
  with torch.no_grad():
    np.testing.assert_allclose(logits_of(config, params, tokens), model(torch.tensor(tokens)).logits.numpy(), atol=1e-4)


def test_sharded_checkpoints_load(tmp_path):
  make_model().save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
  assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 2
  _, sharded = hf_checkpoint.load_params(tmp_path / 'shards')
  _, whole = hf_checkpoint.load_params(save_model(tmp_path / 'whole'))
  jax.tree.map(np.testing.assert_array_equal, sharded, whole)
  next(iter((tmp_path / 'shards').glob('*-00002-*.safetensors'))).unlink()
  with pytest.raises(ValueError, match='-00002-'):
    hf_checkpoint.load_params(tmp_path / 'shards')


def edit(folder, change):
  """Rewrites the tensors of a checkpoint through `change(dict)`."""
  tensors = load_file(folder / 'model.safetensors')
  change(tensors)
  save_file(tensors, folder / 'model.safetensors')


def test_every_wrong_tensor_is_named_in_one_error(tmp_path):
  save_model(tmp_path)

  def change(tensors):
    del tensors['model.layers.1.self_attn.q_norm.weight']
    tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(40, np.float32)
    tensors['model.layers.2.mlp.up_proj.weight'] = np.zeros((32, 40), np.float32)
    tensors['model.norm.weight'] = np.zeros(32, np.int8)

  edit(tmp_path, change)
  with pytest.raises(ValueError) as error:
    hf_checkpoint.load_params(tmp_path)
  for part in ('missing model.layers.1.self_attn.q_norm.weight', 'extra model.layers.0.self_attn.q_proj.bias',
               'model.layers.2.mlp.up_proj.weight has shape [32, 40], expected [40, 32]',
               'model.norm.weight has dtype I8'):
    assert part in str(error.value)


def test_stored_copy_of_a_tied_head(tmp_path):
  save_model(tmp_path, **TINY['tied'])
  edit(tmp_path, lambda tensors: tensors.update({'lm_head.weight': tensors['model.embed_tokens.weight'].copy()}))
  assert 'head' not in hf_checkpoint.load_params(tmp_path)[1]
  edit(tmp_path, lambda tensors: tensors.update({'lm_head.weight': tensors['lm_head.weight'] + 1}))
  with pytest.raises(ValueError, match='lm_head.weight differs'):
    hf_checkpoint.load_params(tmp_path)


def test_truncated_or_absent_files_are_named(tmp_path):
  save_model(tmp_path)
  weights = tmp_path / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-100])
  with pytest.raises(ValueError, match='model.safetensors cannot be read'):
    hf_checkpoint.load_params(tmp_path)
  weights.unlink()
  with pytest.raises(ValueError, match='model.safetensors'):
    hf_checkpoint.load_params(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='config.json is not JSON'):
    hf_checkpoint.load_config(tmp_path)
  shutil.rmtree(tmp_path)
  with pytest.raises(ValueError, match='config.json is missing'):
    hf_checkpoint.load_config(tmp_path)


def test_a_failed_export_leaves_what_was_there(tmp_path, monkeypatch):
  config, params = hf_checkpoint.load_params(save_model(tmp_path / 'in'))
  target = tmp_path / 'out'
  hf_checkpoint.save_checkpoint(target, config, params, dtype='float32')
  before = {path.name: path.read_bytes() for path in target.iterdir()}
  with pytest.raises(FileExistsError, match='not empty'):
    hf_checkpoint.save_checkpoint(target, config, params)
  layers = {name: leaf for name, leaf in params['layers'].items() if name != 'q'}
  smaller = {**params, 'layers': layers, 'spare': params['embed']}
  with pytest.raises(ValueError, match=r"missing \['layers'\]\['q'\]; extra \['spare'\]"):
    hf_checkpoint.save_checkpoint(target, config, smaller, overwrite=True)

  def full_disk(*args, **kwargs):
    raise OSError('no space left')

  with monkeypatch.context() as patch:
    patch.setattr(hf_checkpoint.safetensors.numpy, 'save_file', full_disk)
    for place in (target, tmp_path / 'other'):
      with pytest.raises(OSError, match='no space'):
        hf_checkpoint.save_checkpoint(place, config, params, overwrite=True)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'out']
  assert before == {path.name: path.read_bytes() for path in target.iterdir()}
  hf_checkpoint.save_checkpoint(target, config, params, overwrite=True, generation_config={'top_k': 20})
  assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'out']
  assert json.loads((target / 'generation_config.json').read_text()) == {'top_k': 20}
  assert load_file(target / 'model.safetensors')['model.norm.weight'].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize('options, match', [
    ({'dtype': 'float16'}, 'float16'), ({'tokenizer_dir': '.'}, 'no tokenizer')])
def test_bad_export_options_are_refused(tmp_path, monkeypatch, options, match):
  monkeypatch.chdir(tmp_path)
  config, params = hf_checkpoint.load_params(save_model(tmp_path / 'in'))
  with pytest.raises(ValueError, match=match):
    hf_checkpoint.save_checkpoint(tmp_path / 'out', config, params, **options)
  assert [path.name for path in tmp_path.iterdir()] == ['in']
