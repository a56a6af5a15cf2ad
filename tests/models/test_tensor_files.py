"""The file format against the safetensors library, both ways, and damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dcore_jax.models import tensor_files

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def some_tensors(dtype):
  rng = np.random.default_rng(0)
  shapes = {'b.weight': (5, 7), 'a.weight': (130, 65), 'a.bias': (3,), 'scalar': ()}
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_files_are_those_of_the_library(tmp_path, dtype):
  tensors = some_tensors(dtype)
  save_file(tensors, tmp_path / 'theirs.safetensors', metadata={'format': 'pt'})
  writer = tensor_files.FileWriter(
    tmp_path / 'ours.safetensors', {name: t.shape for name, t in tensors.items()}, dtype
  )
  for name in writer.names:
    writer.write(name, tensors[name])
  writer.close()
  assert (tmp_path / 'ours.safetensors').read_bytes() == (
    tmp_path / 'theirs.safetensors'
  ).read_bytes()
  mapped = tensor_files.MappedFile(tmp_path / 'theirs.safetensors')
  assert mapped.entries.keys() == tensors.keys()
  for name, tensor in tensors.items():
    assert mapped.view(name).dtype == tensor.dtype
    np.testing.assert_array_equal(mapped.view(name), tensor)
    mapped.release(name)
    np.testing.assert_array_equal(mapped.view(name), tensor)  # read again


@pytest.mark.parametrize(
  'source, target', [(np.float32, BFLOAT16), (BFLOAT16, np.float32), (np.float32, np.float32)]
)
def test_writing_transposes_and_converts(tmp_path, monkeypatch, source, target):
  monkeypatch.setattr(tensor_files, '_BLOCK', 4 * 40 * 70)  # several blocks, and a remainder
  matrix = np.random.default_rng(1).normal(size=(70, 200)).astype(source)
  writer = tensor_files.FileWriter(tmp_path / 'file', {'t': (200, 70), 'u': (70, 200)}, target)
  writer.write('t', matrix.T)
  writer.write('u', matrix)
  writer.close()
  written = load_file(tmp_path / 'file')
  np.testing.assert_array_equal(written['t'], matrix.T.astype(target))
  np.testing.assert_array_equal(written['u'], matrix.astype(target))


def test_tensors_out_of_turn_are_refused(tmp_path):
  writer = tensor_files.FileWriter(tmp_path / 'file', {'a': (2, 3), 'b': (2,)}, np.float32)
  for name, shape in (('b', (2,)), ('a', (3, 2))):
    with pytest.raises(ValueError, match=f'{name} .* is not what comes next'):
      writer.write(name, np.zeros(shape, np.float32))
  writer.close()


def damaged(change):
  """The bytes of a file whose header went through `change(dict)`."""
  header = {'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}
  changed = change(header)
  text = json.dumps(header if changed is None else changed).encode()
  return len(text).to_bytes(8, 'little') + text + bytes(8)


@pytest.mark.parametrize(
  'content, match',
  [
    (b'', 'cannot be read'),
    (b'\x00' * 12, 'header'),
    (b'\xff' * 64, 'header'),
    (damaged(lambda h: h)[:-1], 'a lies at'),
    (damaged(lambda h: h['a'].update(shape=[3])), r'a of shape \[3\] has 8 bytes'),
    (damaged(lambda h: h['a'].update(data_offsets=[-8, 0])), 'a lies at'),
    (damaged(lambda h: {'a': {'dtype': 'F32'}}), 'describes a as'),
    (damaged(lambda h: [1]), 'no JSON object'),
    (damaged(lambda h: {'a': 3}), 'describes a as 3'),
    (b'\x02' + bytes(7) + b'{', 'header'),
    (b'\x03' + bytes(7) + b'{a}', 'cannot be read'),
  ],
)
def test_damaged_files_are_named(tmp_path, content, match):
  (tmp_path / 'broken').write_bytes(content)
  with pytest.raises(ValueError, match=match) as error:
    tensor_files.MappedFile(tmp_path / 'broken')
  assert 'broken' in str(error.value)


def test_transposed_copies():
  rng = np.random.default_rng(2)
  for rows, columns in ((1, 1), (63, 5), (64, 64), (65, 130), (200, 3)):
    wide = rng.normal(size=(rows, 2 * columns)).astype(np.float32)[:, ::2]
    target = np.empty((columns, rows), BFLOAT16)
    tensor_files.copy_transposed(wide, target)
    np.testing.assert_array_equal(target, wide.T.astype(BFLOAT16))
