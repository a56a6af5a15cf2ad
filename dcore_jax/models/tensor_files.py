"""Safetensors files, read through a memory map and written tensor by tensor.

The format is a length, a JSON header and the bytes of all tensors. The library reads tensors whole
and writes files from dictionaries of whole tensors; here a slice of a file is a numpy view that
costs no memory, and what is written need not exist before its turn. Files are byte for byte those
of the library.
"""

import json
import math
import mmap
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dcore_jax.files import named_errors

DTYPES = {
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, the library's own limit
# So many bytes are converted at a time: small enough for any host, large enough to be fast.
_BLOCK = 16 << 20


class Entry(NamedTuple):
  """A tensor as a header has it; `dtype` is the format's code.

  Bytes begin..end of the file hold it, row by row.
  """

  dtype: str
  shape: tuple[int, ...]
  begin: int
  end: int


class MappedFile:
  """A file whose tensors are views of its memory map; a page is read when it is touched.

  Raises:
    ValueError: it is not there, is cut short, or its header does not describe it.
  """

  def __init__(self, path: pathlib.Path):
    try:
      with path.open('rb') as file:
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      self.entries = _read_header(self._map)
    except (OSError, ValueError) as error:
      raise ValueError(f'{path} cannot be read: {error}') from error

  def view(self, name: str) -> np.ndarray:
    """Returns a read-only view of a tensor, valid as long as someone holds it."""
    entry = self.entries[name]
    dtype = DTYPES[entry.dtype]
    return np.frombuffer(self._map, dtype, math.prod(entry.shape), entry.begin).reshape(entry.shape)

  def release(self, name: str) -> None:
    """Gives the pages of a tensor back.

    They stay in the system's cache, and no longer count as this process's memory.
    """
    entry = self.entries[name]
    # madvise takes whole pages. The page in which the tensor begins may belong to the one before.
    first = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
    if hasattr(mmap, 'MADV_DONTNEED') and entry.end > first:
      self._map.madvise(mmap.MADV_DONTNEED, first, entry.end - first)


def _read_header(data: mmap.mmap) -> dict[str, Entry]:
  length = int.from_bytes(data[:8], 'little')
  start = 8 + length
  # A damaged length could ask for terabytes; the shortest JSON object, {}, has two bytes.
  if not 2 <= length <= min(_LONGEST_HEADER, len(data) - 8):
    raise ValueError(f'its header is said to have {length} bytes, the file has {len(data)}')
  try:
    header = json.loads(data[8:start])
  except RecursionError as error:
    raise ValueError('its header has too many levels of brackets') from error
  if not isinstance(header, dict):
    raise ValueError('its header is no JSON object')
  # The metadata is text for people and tools, and no tensor.
  header.pop('__metadata__', None)
  entries = {}
  for name, record in header.items():
    try:
      begin, end = record['data_offsets']
      # JSON has numbers that are no sizes: 0.5, true, -1. A negative offset is named below.
      integers = all(type(number) is int for number in (begin, end, *record['shape']))
      if not integers or min(record['shape'], default=0) < 0:
        raise ValueError('no size')
      entry = Entry(
        dtype=str(record['dtype']),
        shape=tuple(record['shape']),
        begin=start + begin,
        end=start + end,
      )
    except (TypeError, KeyError, ValueError) as error:
      raise ValueError(f'its header describes {name} as {record!r}') from error
    # A file that was cut short has a whole header, and tensors that lie behind its end.
    if not start <= entry.begin <= entry.end <= len(data):
      raise ValueError(f'{name} lies at {entry.begin}..{entry.end} of {len(data)} bytes')
    if (
      entry.dtype in DTYPES and math.prod(entry.shape) * DTYPES[entry.dtype].itemsize != end - begin
    ):
      raise ValueError(f'{name} of shape {list(entry.shape)} has {end - begin} bytes')
    entries[name] = entry
  return entries


class FileWriter:
  """Writes a file whose tensors are known by shape before they exist, and come in the order of
  `names`.

  Args:
    path: the file; replaced when it exists.
    shapes: name -> shape.
    dtype: of all of them, one of `DTYPES`.
  """

  def __init__(self, path: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any):
    self._dtype = np.dtype(dtype)
    self._shapes = shapes
    self.names = sorted(shapes)
    # transformers refuses a file without this entry.
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    place = 0
    for name in self.names:
      end = place + math.prod(shapes[name]) * self._dtype.itemsize
      header[name] = {
        'dtype': _CODES[self._dtype],
        'shape': list(shapes[name]),
        'data_offsets': [place, end],
      }
      place = end
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    # The library pads the header to 8 bytes, so that tensors are aligned in a memory map.
    text += b' ' * (-len(text) % 8)
    self._left = list(self.names)
    self._path = path
    self._file = path.open('wb')
    # The header is complete before any tensor exists, because shapes and dtype fix all places.
    self._file.write(len(text).to_bytes(8, 'little') + text)

  def write(self, name: str, tensor: np.ndarray) -> None:
    """Appends a tensor, converted; views of any strides are fine.

    ValueError: not this one's turn, or another shape.
    """
    if not self._left or name != self._left[0] or tensor.shape != tuple(self._shapes[name]):
      raise ValueError(f'{name} {list(tensor.shape)} is not what comes next: {self._left[:1]}')
    rows = tensor.reshape(1, 1) if not tensor.ndim else tensor.reshape(len(tensor), -1)
    with named_errors(self._path):
      for block in _blocks(rows, self._dtype):
        self._file.write(block.view(np.uint8).data)
    del self._left[0]

  def close(self) -> None:
    """Closes the file, whether or not all tensors were written."""
    with named_errors(self._path):
      self._file.close()


def _blocks(matrix: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
  """Yields the rows as contiguous blocks in `dtype`."""
  height = max(1, _BLOCK // max(1, matrix.shape[1] * 4))
  for start in range(0, len(matrix), height):
    rows = matrix[start : start + height]
    # A transposed view: its neighbours in memory lie along the first axis.
    if rows.strides[0] < rows.strides[1]:
      block = np.empty(rows.shape, dtype)
      copy_transposed(rows.T, block)
      yield block
    else:
      yield contiguous(rows, dtype)


def contiguous(array: np.ndarray, dtype: Any) -> np.ndarray:
  """Returns the array, or a copy of it, row by row in `dtype`."""
  return (
    np.ascontiguousarray(_bits(array)).view(dtype)
    if array.dtype == dtype
    else np.ascontiguousarray(array, dtype)
  )


def copy_transposed(source: np.ndarray, target: np.ndarray) -> None:
  """Writes source.T into `target` for matrices, converted to the target's dtype."""
  # Some rows at a time go through a scratch whose rows are not a power of two apart. Columns of a
  # matrix 1,024 numbers wide all fall into the same few lines of the cache: numpy takes 33 ms for
  # 3,072 x 1,024 float32, and this takes 3 ms.
  rows, columns = source.shape
  scratch = np.empty((64, columns + 16), target.dtype)[:, :columns]
  filled = scratch
  if source.dtype == target.dtype:
    source = _bits(source)
    filled = _bits(scratch)
  target = _bits(target)
  scratch = _bits(scratch)
  for start in range(0, rows, 64):
    part = source[start : start + 64]
    filled[: len(part)] = part
    target[:, start : start + 64] = scratch[: len(part)].T


def _bits(array: np.ndarray) -> np.ndarray:
  """Returns the same memory as integers."""
  # numpy moves numbers of types that are not its own (bfloat16) one by one.
  return array.view(f'u{array.dtype.itemsize}')


def split(shapes: Mapping[str, Sequence[int]], itemsize: int, limit: int) -> dict[str, list[str]]:
  """Returns the tensors of each file of a model, in the order of the model.

  Args:
    shapes: of the tensors.
    itemsize: bytes of a number.
    limit: bytes of a file at most, but for a tensor that is larger by itself.
  """
  groups: list[list[str]] = []
  # The first tensor opens the first file, whatever its size.
  size = math.inf
  for name, shape in shapes.items():
    more = math.prod(shape) * itemsize
    if size + more > limit:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += more
  # transformers looks for this name first, and asks for no index beside it.
  if len(groups) == 1:
    return {'model.safetensors': groups[0]}
  return {
    f'model-{number:05d}-of-{len(groups):05d}.safetensors': names
    for number, names in enumerate(groups, 1)
  }


def index(
  files: Mapping[str, Sequence[str]], shapes: Mapping[str, Sequence[int]], itemsize: int
) -> dict[str, Any]:
  """Returns what model.safetensors.index.json says of `split`'s files."""
  # transformers writes both totals as well, in parameters and in bytes.
  numbers = sum(math.prod(shape) for shape in shapes.values())
  return {
    'metadata': {'total_parameters': numbers, 'total_size': numbers * itemsize},
    'weight_map': {name: file for file, names in files.items() for name in names},
  }
