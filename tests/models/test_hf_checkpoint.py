"""Checkpoints that go in and out without losing a bit, in every family, and what is refused on the
way.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_reference import FAMILIES, TIED, TINY, make_model, save_model

from dcore_jax.config import ModelSection
from dcore_jax.models import hf_checkpoint
from dcore_jax.rollout.engine import Engine, Request
from dcore_jax.rollout.policy import load_policy
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes

save_torch = pytest.importorskip('safetensors.torch').save_file
torch = pytest.importorskip('torch', reason='torch is not installed: no reference to compare with')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', FAMILIES + TIED)
def test_import_then_export_gives_the_same_file(tmp_path, name, dtype):
  source = save_model(tmp_path / 'in', dtype, **TINY[name])
  for working in {
    jnp.dtype('float32'),
    jnp.dtype(dtype),
  }:  # a master copy in float32 loses nothing of bfloat16
    config, params = hf_checkpoint.load_params(source, working)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {working}
    hf_checkpoint.save_checkpoint(tmp_path / 'out', config, params, dtype=dtype, overwrite=True)
    assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == (
      source / 'model.safetensors'
    ).read_bytes()
  assert hf_checkpoint.load_config(tmp_path / 'out') == config


def test_every_bit_pattern_survives(tmp_path):
  """Denormals, infinities, NaN and both zeros, through a conversion and back."""
  source = save_model(tmp_path / 'in', 'bfloat16')

  def change(tensors):
    for name, shape in (
      ('model.embed_tokens.weight', (61, 32)),
      ('model.layers.1.mlp.up_proj.weight', (40, 32)),
    ):
      patterns = np.random.default_rng(0).integers(0, 2**16, shape).astype(np.uint16)
      patterns[0, :8] = [0x0001, 0x8001, 0x007F, 0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0]
      numbers = patterns.view(ml_dtypes.bfloat16)
      tensors[name] = np.where(np.isnan(numbers), ml_dtypes.bfloat16(np.nan), numbers)

  edit(source, change)
  config, params = hf_checkpoint.load_params(source)
  hf_checkpoint.save_checkpoint(tmp_path / 'out', config, params)
  assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == (
    source / 'model.safetensors'
  ).read_bytes()


@pytest.mark.parametrize('name', FAMILIES + TIED)
def test_export_loads_in_transformers_and_continues_alike(tmp_path, name, data_dir):
  import transformers

  config, params = hf_checkpoint.load_params(save_model(tmp_path / 'in', **TINY[name]))
  config = dataclasses.replace(config, eos_token_id=(3, 5), pad_token_id=5)
  hf_checkpoint.save_checkpoint(
    tmp_path / 'out',
    config,
    params,
    hf_checkpoint.ModelFiles(card='# A model', tokenizer_dir=data_dir / 'qwen3-tokenizer'),
    dtype='float32',
    shard_bytes=20_000,
  )
  assert (tmp_path / 'out' / 'tokenizer.json').is_file() and (
    tmp_path / 'out' / 'README.md'
  ).read_text() == '# A model'
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not any(report.values()), report
  assert (
    model.dtype == torch.float32 and model.config.rope_parameters['rope_theta'] == config.rope_theta
  )
  assert model.generation_config.eos_token_id == [3, 5]
  prompts = list(np.random.default_rng(2).integers(6, 61, (4, 9)).astype(np.int32))
  with torch.no_grad():
    want = [
      model.generate(
        torch.tensor(prompt[None].astype(np.int64)), do_sample=False, max_new_tokens=24
      )[0, 9:].tolist()
      for prompt in prompts
    ]
  sizes = EngineSizes(lanes=4, max_len=64)
  engine = Engine(params, config, stop_ids=config.stop_token_ids, sizes=sizes)
  got = engine.generate(
    [Request(prompt, (index,)) for index, prompt in enumerate(prompts)],
    SamplingParams(temperature=0.0, max_tokens=24),
  )
  assert [completion.tokens.tolist() for completion in got] == want and sum(map(len, want)) > 24


def test_sharded_checkpoints_load(tmp_path):
  make_model().save_pretrained(tmp_path / 'shards', max_shard_size='20KB')
  assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 2
  _, sharded = hf_checkpoint.load_params(tmp_path / 'shards')
  _, whole = hf_checkpoint.load_params(save_model(tmp_path / 'whole'))
  jax.tree.map(np.testing.assert_array_equal, sharded, whole)
  next(iter((tmp_path / 'shards').glob('*-00002-*.safetensors'))).unlink()
  with pytest.raises(ValueError, match='-00002-'):
    hf_checkpoint.load_params(tmp_path / 'shards')


def test_export_in_several_files(tmp_path):
  config, params = hf_checkpoint.load_params(save_model(tmp_path / 'in'))
  hf_checkpoint.save_checkpoint(
    tmp_path / 'out', config, params, dtype='float32', shard_bytes=20_000
  )
  files = sorted((tmp_path / 'out').glob('*.safetensors'))
  assert [file.name for file in files] == [
    f'model-{n:05d}-of-{len(files):05d}.safetensors' for n in range(1, len(files) + 1)
  ]
  index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
  stored = {file.name: load_file(file) for file in files}
  assert {name: file for file, tensors in stored.items() for name in tensors} == index['weight_map']
  sizes = {
    file: sum(tensor.nbytes for tensor in tensors.values()) for file, tensors in stored.items()
  }
  assert len(files) > 2 and max(sizes.values()) <= 20_000
  assert index['metadata'] == {
    'total_size': sum(sizes.values()),
    'total_parameters': config.param_count,
  }
  whole = load_file(tmp_path / 'in' / 'model.safetensors')
  for tensors in stored.values():
    for name, tensor in tensors.items():
      np.testing.assert_array_equal(tensor, whole.pop(name))
  assert not whole
  jax.tree.map(
    np.testing.assert_array_equal, hf_checkpoint.load_params(tmp_path / 'out')[1], params
  )


def test_imported_parameters_can_be_donated(tmp_path):
  """None of them is a view of a buffer or a file that jax does not own: a training step updates
  them in place.
  """
  import warnings

  _, params = hf_checkpoint.load_params(save_model(tmp_path))
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(params)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def edit(folder, change):
  """Rewrites the tensors of a checkpoint through `change(dict)`."""
  tensors = load_file(folder / 'model.safetensors')
  change(tensors)
  save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


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
  for part in (
    'missing model.layers.1.self_attn.q_norm.weight',
    'extra model.layers.0.self_attn.q_proj.bias',
    'model.layers.2.mlp.up_proj.weight has shape [32, 40], expected [40, 32]',
    'model.norm.weight has dtype I8',
  ):
    assert part in str(error.value)


def test_stored_copy_of_a_tied_head(tmp_path):
  save_model(tmp_path, **TINY['qwen3_tied'])
  edit(
    tmp_path,
    lambda tensors: tensors.update({'lm_head.weight': tensors['model.embed_tokens.weight'].copy()}),
  )
  assert 'head' not in hf_checkpoint.load_params(tmp_path)[1]
  edit(tmp_path, lambda tensors: tensors.update({'lm_head.weight': tensors['lm_head.weight'] + 1}))
  with pytest.raises(ValueError, match='lm_head.weight differs'):
    hf_checkpoint.load_params(tmp_path)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('name', ['qwen3', 'llama3_1', 'deepseek_coder'])
@pytest.mark.parametrize('place', ['model.', 'model.layers.1.self_attn.'])
def test_stored_rotary_frequencies_must_be_the_configs(tmp_path, place, name, dtype):
  save_model(tmp_path, **TINY[name])
  rotary_embedding = make_model(**TINY[name]).model.rotary_emb
  buffer = rotary_embedding.inv_freq.to(getattr(torch, dtype))
  plain = hf_checkpoint.load_params(tmp_path)[1]

  def store(values):
    tensors = {key: torch.from_numpy(value) for key, value in whole.items()}
    tensors[f'{place}rotary_emb.inv_freq'] = values
    tensors[f'{place}rotary_emb.cos_cached'] = torch.ones(1, 1, 4, 10)
    save_torch(tensors, tmp_path / 'model.safetensors', metadata={'format': 'pt'})

  whole = load_file(tmp_path / 'model.safetensors')
  store(buffer)
  read = hf_checkpoint.load_params(tmp_path)[1]
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), plain, read))
  for wrong in (buffer * 1.1, buffer[:-1], buffer.flip(0)):
    store(wrong.contiguous())
    with pytest.raises(ValueError, match='rotary_emb.inv_freq holds other frequencies'):
      hf_checkpoint.load_params(tmp_path)


def test_frequencies_from_before_a_linear_scaling_moved_into_them(tmp_path):
  """Its first version divided the positions."""
  save_model(tmp_path, **TINY['deepseek_coder'])
  unscaled = make_model(**TINY['deepseek_coder']).model.rotary_emb.inv_freq.numpy() * 4
  edit(tmp_path, lambda tensors: tensors.update({'model.rotary_emb.inv_freq': unscaled}))
  hf_checkpoint.load_params(tmp_path)


@pytest.mark.parametrize(
  'files, match',
  [
    ({'model.gguf': b'GGUF'}, 'model.gguf is a GGUF file.*convert it'),
    ({'adapter_config.json': b'{}', 'adapter_model.safetensors': b''}, 'LoRA adapter.*merge'),
    ({'adapter_model.safetensors': b'', 'config.json': b'{}'}, 'LoRA adapter.*merge'),
    ({'config.json': b'{}', 'pytorch_model.bin': b''}, 'is a pickle.*convert it'),
    ({'config.json': b'{}', 'pytorch_model-00001-of-00002.bin': b''}, 'is a pickle'),
  ],
)
def test_what_is_no_model_says_what_to_do(tmp_path, files, match):
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=match):
    hf_checkpoint.load_params(tmp_path)
  with pytest.raises(ValueError, match=match):
    load_policy(ModelSection(path=str(tmp_path)), seed=0)


@pytest.mark.parametrize(
  'name, content, match',
  [
    ('model.gguf', b'', 'is a GGUF file'),
    ('weights', b'GGUF\x03', 'is a GGUF file'),
    ('model.safetensors', b'1234', 'is a file; a model is the Hugging Face directory'),
  ],
)
def test_a_file_is_no_model(tmp_path, name, content, match):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=match):
    hf_checkpoint.load_config(tmp_path / name)
  with pytest.raises(ValueError, match=match):
    load_policy(ModelSection(path=str(tmp_path / name)), seed=0)


def test_truncated_or_absent_files_are_named(tmp_path):
  save_model(tmp_path)
  weights = tmp_path / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-100])
  with pytest.raises(
    ValueError, match='model.safetensors cannot be read: model.norm.weight lies at'
  ):
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
    patch.setattr(hf_checkpoint.tensor_files.FileWriter, 'write', full_disk)
    for place in (target, tmp_path / 'other'):
      with pytest.raises(OSError, match='no space'):
        hf_checkpoint.save_checkpoint(place, config, params, overwrite=True)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'out']
  assert before == {path.name: path.read_bytes() for path in target.iterdir()}
  beside = hf_checkpoint.ModelFiles(generation_config={'top_k': 20})
  hf_checkpoint.save_checkpoint(target, config, params, beside, overwrite=True)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['in', 'out']
  assert json.loads((target / 'generation_config.json').read_text()) == {'top_k': 20}
  assert load_file(target / 'model.safetensors')['model.norm.weight'].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
  'options, match',
  [
    ({'dtype': 'float16'}, 'float16'),
    ({'beside': hf_checkpoint.ModelFiles(tokenizer_dir='.')}, 'no tokenizer'),
  ],
)
def test_bad_export_options_are_refused(tmp_path, monkeypatch, options, match):
  monkeypatch.chdir(tmp_path)
  config, params = hf_checkpoint.load_params(save_model(tmp_path / 'in'))
  with pytest.raises(ValueError, match=match):
    hf_checkpoint.save_checkpoint(tmp_path / 'out', config, params, **options)
  assert [path.name for path in tmp_path.iterdir()] == ['in']
