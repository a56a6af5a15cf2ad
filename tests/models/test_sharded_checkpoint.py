"""Checkpoints in and out of arrays that are split: over the devices of one process, and over two
processes.
"""

import os
import pathlib
import socket
import subprocess
import sys

import pytest
from torch_reference import TINY, save_model

pytest.importorskip('torch', reason='torch is not installed: no checkpoint to read')

PROGRAM = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update('jax_numpy_rank_promotion', 'raise')
source, out, process, address = sys.argv[1:]
if address:
  jax.distributed.initialize(address, num_processes=2, process_id=int(process))
from dcore_jax import sharding
from dcore_jax.models import decoder, hf_checkpoint, tensor_files

def load(mesh, dtype=jnp.float32):
  placed = sharding.shardings(decoder.abstract_params(hf_checkpoint.load_config(source)), mesh)
  config, params = hf_checkpoint.load_params(source, dtype, shardings=placed)
  jax.tree.map(
    lambda leaf, place: np.testing.assert_(leaf.sharding.is_equivalent_to(place, leaf.ndim)),
    params,
    placed,
  )
  return config, params

"""

ONE_PROCESS = (
  PROGRAM
  + """
_, whole = hf_checkpoint.load_params(source)
for ways in ((1, 8, 1), (2, 2, 2), (4, 1, 2)):
  config, params = load(sharding.make_mesh(*ways))
  embed = params['embed']
  assert embed.sharding.shard_shape(embed.shape)[1] == config.hidden_size // ways[1]
  hf_checkpoint.save_checkpoint(out, config, params, dtype='float32', overwrite=True)
  written = pathlib.Path(out, 'model.safetensors').read_bytes()
  assert written == pathlib.Path(source, 'model.safetensors').read_bytes()
  assert all(leaf._npy_value is None for leaf in jax.tree.leaves(params)), (
    'a copy on the host stays with a parameter'
  )
  jax.tree.map(np.testing.assert_array_equal, params, whole)
_, halves = load(sharding.make_mesh(1, 8, 1), jnp.bfloat16)
jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), halves, whole)
print('done')
"""
)

TWO_PROCESSES = (
  PROGRAM
  + """
assert jax.process_count() == 2 and jax.device_count() == 4
config, params = load(sharding.make_mesh(1, 2, 2))
assert not any(leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
hf_checkpoint.save_checkpoint(out, config, params, dtype='float32', shard_bytes=20_000)
if process == '0':  # the other may look when the next export has begun
  assert sorted(path.name for path in pathlib.Path(out).parent.iterdir()) == ['in', 'out']

written = []
write = tensor_files.FileWriter.write
def counted(self, name, tensor):
  written.append(name)
  write(self, name, tensor)
tensor_files.FileWriter.write = counted
hf_checkpoint.save_checkpoint(
  out, config, params, dtype='float32', shard_bytes=20_000, overwrite=True
)
total = len(hf_checkpoint.stored_tensors(config))
assert 0 < len(written) < total, (len(written), total)

def full_disk(self, name, tensor):
  raise OSError('no space left')
if process == '1':
  tensor_files.FileWriter.write = full_disk
try:
  # One file, the first process's.
  hf_checkpoint.save_checkpoint(out, config, params, overwrite=True)
  hf_checkpoint.save_checkpoint(
    out, config, params, dtype='float32', shard_bytes=20_000, overwrite=True
  )
except OSError as error:
  assert process == '1' and 'no space' in str(error)
except RuntimeError as error:
  assert process == '0' and 'failed on processes [1]' in str(error), error
else:
  raise AssertionError('a process could not write, and nobody noticed')
if process == '0':  # which clears up
  assert sorted(path.name for path in pathlib.Path(out).parent.iterdir()) == ['in', 'out']
print('done')
"""
)


def start(program, devices, *arguments):
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  return subprocess.Popen(
    [sys.executable, '-c', program, *map(str, arguments)],
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[2],
  )


def finish(*processes):
  try:
    for process in processes:
      out, error = process.communicate(
        timeout=500
      )  # a guard against hanging; a quiet machine needs some seconds
      assert process.returncode == 0 and out.strip().endswith('done'), error[
        -3000:
      ]  # gloo prints before it
  finally:
    for process in processes:
      process.kill()


@pytest.mark.parametrize('name', ['qwen3_tied', 'qwen2'])
def test_slices_go_to_eight_devices_and_come_back(tmp_path, name):
  save_model(tmp_path / 'in', **TINY[name] | {'hidden_size': 32, 'vocab_size': 64})
  finish(start(ONE_PROCESS, 8, tmp_path / 'in', tmp_path / 'out', 0, ''))


def test_two_processes_write_one_directory(tmp_path):
  """Each reads its slices and writes its files; where one fails both say so, and what was there
  stays.
  """
  import torch
  import transformers

  save_model(tmp_path / 'in', hidden_size=32, vocab_size=64)
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  finish(
    *(
      start(TWO_PROCESSES, 2, tmp_path / 'in', tmp_path / 'out', process, address)
      for process in range(2)
    )
  )
  assert not list((tmp_path / 'out').glob('*index*')), 'the last export that succeeded was one file'
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not any(report.values()), report
  want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'in')
  for (name, ours), theirs in zip(
    model.state_dict().items(), want.state_dict().values(), strict=True
  ):
    assert torch.equal(ours, theirs.to(torch.bfloat16)), name
