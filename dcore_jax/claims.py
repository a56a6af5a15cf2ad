"""Folders of results: which description of what made them they belong to, and who works there."""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import socket
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

try:
  import fcntl
except ImportError:  # not on Windows, where folders are not held
  fcntl = None

from dcore_jax.files import is_writer, read_json, write_json_atomic
from dcore_jax.overrides import differences

_HOLDER = '.held_by.json'
# Folders that this process holds, and how often: a program that holds its folder calls functions
# that hold it as well.
_held: dict[str, int] = {}


def claim(
  path: pathlib.Path,
  mine: Mapping[str, Any],
  complaint: str,
  *,
  free: Collection[str] = (),
  defaults: Any = None,
  flag: str = '--workdir',
) -> None:
  """Writes down what a folder's results are made from, or checks that it was begun with the same.

  A program that resumes must not mix results of two configs, so that every folder of results holds
  such a record. Fields that only the record in the folder has are ignored: a later version of the
  program may have dropped them.

  Args:
    path: the JSON file of the record, in the folder that is claimed; written anew at every claim.
    mine: what the results depend on, as JSON.
    complaint: what the error says of the folder, up to the fields that differ.
    free: entries of the record that may differ.
    defaults: a config of which the record is the JSON form, or a mapping of the record's entries to
      configs. Fields that the record in the folder lacks take their values from here: the program
      had no such field when the folder was begun. Fields that are `free` there may differ.
    flag: of the program, that names another folder.

  Raises:
    ValueError: the folder belongs to another record; names the folder, every field that differs,
      and both its values.
  """
  record = json.loads(json.dumps(mine))  # tuples as lists, as they come back from the file
  if path.exists():
    theirs = read_json(path)
    if not isinstance(theirs, dict):
      raise ValueError(f'{str(path)!r} holds no JSON object: it is not the record of a run')
    compared = {name: value for name, value in record.items() if name not in free}
    different = differences(defaults or {}, theirs, compared)
    if different:
      raise ValueError(
        f'{str(path.parent)!r} {complaint} {"; ".join(different)}; name another {flag}, '
        'or give the old values'
      )
  write_json_atomic(path, record)


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other processes out of a folder of results while it is written.

  The system lets go of the folder when its holder ends, however that happens. Of several hosts the
  first one holds it for all. A folder on a file system without locks is not held, with a warning,
  and neither is one that cannot be written.

  Args:
    folder: made where it is missing.

  Raises:
    ValueError: another process holds it; says which, where, and since when. Or it is a file.
  """
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'{str(folder)!r} is a file, and not a folder for results')
  name = str(folder.resolve())
  if fcntl is None or _held.get(name) or not is_writer():
    _held[name] = _held.get(name, 0) + 1
    descriptor = None
  else:
    descriptor = _lock(folder)
    _held[name] = 1
  try:
    yield
  finally:
    _held[name] -= 1
    if descriptor is not None:
      os.close(descriptor)


def _lock(folder: pathlib.Path) -> int | None:
  """Locks the folder -> the descriptor of its lock; None where locks do not work."""
  path = folder / _HOLDER
  try:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  except PermissionError:
    return None  # whoever writes results says so
  except OSError as error:
    if error.errno == errno.EROFS:
      return None
    raise
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(descriptor)
    raise ValueError(f'{str(folder)!r} is in use by {_holder(path)}; wait for it') from None
  except OSError as error:
    os.close(descriptor)
    warnings.warn(
      f'{folder} cannot be locked ({error}): start no second program on it', stacklevel=4
    )
    return None
  # The file stays when the lock goes: another process may be about to lock it.
  record = {
    'pid': os.getpid(),
    'host': socket.gethostname(),
    'since': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }
  os.ftruncate(descriptor, 0)
  os.write(descriptor, json.dumps(record).encode())
  return descriptor


def _holder(path: pathlib.Path) -> str:
  """Who wrote the file of a folder that is held."""
  try:
    record = read_json(path)
    return f'process {record["pid"]} on {record["host"]}, since {record["since"]}'
  except (OSError, ValueError, KeyError, TypeError):
    return 'another process'  # which has not written yet who it is
