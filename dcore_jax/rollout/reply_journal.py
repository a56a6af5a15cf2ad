"""A journal of replies: what was answered once is not asked again, also by a later process."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any, BinaryIO

from dcore_jax.files import named_errors
from dcore_jax.rollout.backends import Reply

# What parsing a line raises that is no JSON, no object, or an object with other fields.
_NO_REPLY = (ValueError, TypeError, KeyError, AttributeError)


class ReplyJournal:
  """Replies by what was asked, one JSON object a line.

  Only the place of each line is kept in memory: 100,000 replies of a reasoning model are half a
  gigabyte of text.

  Replies that other hosts of a run have written, in an earlier call, are known as well. Their files
  stand beside (`distributed.own_file`).

  Args:
    path: the file, made where it is not there. A line that was cut short by a kill is removed.

  Raises:
    ValueError: a line that is no reply.
  """

  def __init__(self, path: pathlib.Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    self._path = path
    # (File, bytes from its start) of each line.
    self._places: dict[str, tuple[BinaryIO, int]] = {}
    for other in _beside(path):
      self._index(other.open('rb'), other)
    # Bytes and not text: places are counted in them, and a line may hold half a character.
    self._file = path.open('a+b')
    self._file.truncate(self._index(self._file, path))

  def _index(self, file: BinaryIO, path: pathlib.Path) -> int:
    """Notes the places of the file's replies; returns where its whole lines end."""
    file.seek(0)
    end = 0
    for number, line in enumerate(file, 1):
      # A kill cuts the last line short, and only that one.
      if not line.endswith(b'\n'):
        break
      try:
        key, _ = _parse(line)
      except _NO_REPLY as error:
        raise ValueError(f'{path}, line {number} is no reply: {line[:80]!r}') from error
      self._places[key] = (file, end)
      end += len(line)
    return end

  def find(self, body: dict[str, Any]) -> Reply | None:
    """Returns the reply to the same request, if there was one."""
    key = _key(body)
    if key not in self._places:
      return None
    file, place = self._places[key]
    file.seek(place)
    try:
      found, reply = _parse(file.readline())
    except _NO_REPLY:
      return None
    # Where another process writes to the file as well, another line may stand at this place.
    return reply if found == key else None

  def append(self, body: dict[str, Any], reply: Reply) -> None:
    """Keeps a reply, in the file before anything is made of it."""
    key = _key(body)
    record = {'key': key, **dataclasses.asdict(reply)}
    # 'surrogatepass': a model may write half of a surrogate pair, which is no valid UTF-8.
    line = json.dumps(record, ensure_ascii=False).encode('utf-8', 'surrogatepass') + b'\n'
    self._places[key] = (self._file, self._file.seek(0, os.SEEK_END))
    with named_errors(self._path):
      self._file.write(line)
      # Each reply reaches the file at once: it may have cost minutes, or money.
      self._file.flush()


def _beside(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of the other hosts: NAME.jsonl of the first, NAME.host1.jsonl and so on."""
  name = re.sub(r'\.host\d+$', '', path.stem)
  files = [path.with_name(name + path.suffix), *path.parent.glob(f'{name}.host*{path.suffix}')]
  return sorted(file for file in files if file != path and file.is_file())


def _parse(line: bytes) -> tuple[str, Reply]:
  record = json.loads(line)
  key = record.pop('key')
  return key, Reply(**record)


def _key(body: dict[str, Any]) -> str:
  # Sorted: a request is the same in whatever order its fields were put together.
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
