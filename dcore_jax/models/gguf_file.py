"""Reads a GGUF file, llama.cpp's format: its fields, and its tensors as float32.

The format is a header of named fields (numbers, texts, lists of them), a table of tensors and their
bytes, which are numbers or blocks of rounded numbers. The blocks are read by the `gguf` package.
The header is read here. The package's reader takes a text that the file's end cuts off for whole,
and counts up to any length that a file claims, which for 2^60 takes forever. Here every length is
compared with what is left of the file before anything is read.
"""

import math
import mmap
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, where no field says otherwise
_MOST_AXES = 4
_STRING = 8
_ARRAY = 9
# The format's numbers for the types of fields.
_NUMBERS = {
  0: np.dtype('<u1'),
  1: np.dtype('<i1'),
  2: np.dtype('<u2'),
  3: np.dtype('<i2'),
  4: np.dtype('<u4'),
  5: np.dtype('<i4'),
  6: np.dtype('<f4'),
  7: np.dtype('?'),
  10: np.dtype('<u8'),
  11: np.dtype('<i8'),
  12: np.dtype('<f8'),
}
_PLAIN = {
  GGMLQuantizationType.F32: np.dtype('<f4'),
  GGMLQuantizationType.F16: np.dtype('<f2'),
}


class Tensor(NamedTuple):
  """Where a tensor is; `shape` has the slowest axis first, as torch and numpy have it."""

  kind: GGMLQuantizationType
  shape: tuple[int, ...]
  begin: int
  end: int


class GgufFile:
  """A file's fields by name, and its tensors by name, which are read when they are asked for.

  Attributes:
    path: of the file.
    fields: name -> a number, a text, a list of texts, or an array of numbers.
    tensors: name -> type, shape and place.

  Raises:
    ValueError: it is not there, no GGUF file, cut short, or its header contradicts itself.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      with path.open('rb') as file:
        # An empty file cannot be mapped, and is no GGUF file either.
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      self.fields, self.tensors = _read_header(self._map)
    except (OSError, ValueError) as error:
      raise ValueError(f'{path} cannot be read as a GGUF file: {error}') from error

  def dequantized(self, name: str) -> np.ndarray:
    """Returns a tensor as float32."""
    tensor = self.tensors[name]
    per_block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    stored = np.frombuffer(self._map, np.uint8, tensor.end - tensor.begin, tensor.begin)
    if tensor.kind in _PLAIN:
      return stored.view(_PLAIN[tensor.kind]).astype(np.float32).reshape(tensor.shape)
    rows = stored.reshape(*tensor.shape[:-1], tensor.shape[-1] // per_block * block_bytes)
    # A damaged scale makes NaN of its block, for which whoever uses the numbers looks.
    with np.errstate(all='ignore'):
      return dequantize(rows, tensor.kind).reshape(tensor.shape)


class _Cursor:
  """A place in the file that moves over what is read."""

  def __init__(self, data: mmap.mmap):
    self._data = data
    self.place = 0

  def take(self, count: int, what: str) -> bytes:
    """Returns the next `count` bytes; ValueError where the file has fewer."""
    left = len(self._data) - self.place
    if count > left:
      raise ValueError(
        f'{what} at byte {self.place} has {count} bytes, and the file has {left} left'
      )
    self.place += count
    return self._data[self.place - count : self.place]

  def integer(self, form: str, what: str) -> int:
    """Returns an integer of a `struct` format."""
    return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

  def text(self, what: str) -> str:
    """Returns a text, which is stored behind its length."""
    start = self.place
    data = self.take(self.integer('<Q', what), what)
    try:
      return data.decode('utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(f'{what} at byte {start} is not UTF-8: {error.reason}') from error

  def numbers(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
    """Returns a copy of `count` numbers."""
    return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)


def _read_header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, Tensor]]:
  cursor = _Cursor(data)
  if cursor.take(4, 'its beginning') != _MAGIC:
    raise ValueError('it does not begin with GGUF')
  version = cursor.integer('<I', 'its version')
  if version not in _VERSIONS:
    # The bytes of a small number the other way round.
    swapped = ', written for a big-endian machine' if version and not version & 0xFFFF else ''
    raise ValueError(f'its version is {version}{swapped}; readable are {list(_VERSIONS)}')
  tensor_count = cursor.integer('<Q', 'the number of tensors')
  field_count = cursor.integer('<Q', 'the number of fields')
  fields: dict[str, Any] = {}
  # A count that is too large ends where the file ends: each turn reads some bytes.
  for _ in range(field_count):
    name = cursor.text('the name of a field')
    if name in fields:
      raise ValueError(f'field {name} is there twice')
    fields[name] = _value(cursor, cursor.integer('<I', f'the type of {name}'), name)
  described = _tensor_table(cursor, tensor_count)
  alignment = fields.get('general.alignment', _ALIGNMENT)
  if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
    raise ValueError(f'general.alignment is {alignment!r}, expected a power of two')
  start = -(-cursor.place // alignment) * alignment
  tensors = {}
  for name, (kind, shape, offset) in described.items():
    size = _byte_count(name, kind, shape)
    tensors[name] = Tensor(
      kind=kind,
      shape=shape,
      begin=start + offset,
      end=start + offset + size,
    )
    if tensors[name].end > len(data):
      raise ValueError(
        f'tensor {name} ends at byte {tensors[name].end} of {len(data)}: the file is cut short'
      )
  return fields, tensors


def _value(cursor: _Cursor, kind: int, name: str) -> Any:
  """The value of a field."""
  if kind == _STRING:
    return cursor.text(name)
  if kind in _NUMBERS:
    return cursor.numbers(_NUMBERS[kind], 1, name)[0].item()
  if kind != _ARRAY:
    raise ValueError(f'{name} has the unknown type {kind}')
  kind = cursor.integer('<I', name)
  count = cursor.integer('<Q', name)
  if kind in _NUMBERS:
    return cursor.numbers(_NUMBERS[kind], count, name)
  if kind != _STRING:
    # No writer makes lists of lists, and lists that are nested a million deep would be an attack.
    raise ValueError(f'{name} is a list of the unknown type {kind}')
  return [cursor.text(f'an entry of {name}') for _ in range(count)]


def _tensor_table(
  cursor: _Cursor, count: int
) -> dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]]:
  """name -> (type, shape, offset in the bytes of all tensors)."""
  table = {}
  for _ in range(count):
    name = cursor.text('the name of a tensor')
    if name in table:
      raise ValueError(f'tensor {name} is there twice')
    axes = cursor.integer('<I', name)
    if not 1 <= axes <= _MOST_AXES:
      raise ValueError(f'tensor {name} has {axes} axes, expected 1 to {_MOST_AXES}')
    # As Python integers: a product of these may be larger than 64 bits.
    shape = tuple(cursor.integer('<Q', name) for _ in range(axes))[::-1]
    code = cursor.integer('<I', name)
    try:
      kind = GGMLQuantizationType(code)
    except ValueError:
      raise ValueError(
        f'tensor {name} has the type {code}, which the gguf package does not know'
      ) from None
    table[name] = (kind, shape, cursor.integer('<Q', name))
  return table


def _byte_count(name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
  """The bytes of a tensor; ValueError where it cannot be read or its rows are no whole blocks."""
  per_block, block_bytes = GGML_QUANT_SIZES[kind]
  if not math.prod(shape) or shape[-1] % per_block:
    raise ValueError(
      f'tensor {name} of type {kind.name} has shape {list(shape)}, '
      f'expected rows of blocks of {per_block}'
    )
  if kind not in _PLAIN:
    try:
      with np.errstate(all='ignore'):
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
      raise ValueError(
        f'tensor {name} has the type {kind.name}, which the gguf package does not dequantise'
      ) from None
  return math.prod(shape) // per_block * block_bytes
