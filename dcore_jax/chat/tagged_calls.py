"""Reads calls in tags, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen).

Everything that holds such calls is read here: answers of models, whole or while they come, rows of
data sets, and what chat templates write. The JSON object says where a call ends. A tag inside of
one of its strings is text, and a closing tag that never comes is not missed at the end of a turn.
"""

import collections
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from dcore_jax.chat.call_text import CLOSE_CALL, OPEN_CALL, JsonScan, Scan, skip_space
from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.python_calls import (
  ToolCallError,
  check_depth,
  check_length,
  checked_constant,
  clip,
  parse_literal,
)

_FORM = 'a tool call needs a name and arguments, expected {"name": ..., "arguments": {...}}'
_ARGUMENTS = ('arguments', 'parameters')
# What OpenAI's clients write around a call. None of it says anything about the call itself.
_HARMLESS = ('id', 'type', 'index')


# --- values ---------------------------------------------------------------------------------------


def parse_hermes(text: str) -> list[ToolCall]:
  """Reads the calls behind every `<tool_call>` of a whole text.

  Raises:
    ToolCallError: no call, one that is not at its end, or one that cannot be read.
  """
  check_length(text)
  calls = [call for block in tagged_blocks(text) for call in block.calls]
  if not calls:
    raise ToolCallError(f'there is no {OPEN_CALL} in {clip(text)}')
  return calls


def read_calls(value: Any) -> list[ToolCall]:
  """Reads one call or a list of calls, given as JSON values or as their text.

  Some rows of Hermes hold Python literals in the place of JSON, which are read too.

  Raises:
    ToolCallError: a call that cannot be read. An empty list holds no call, and is none.
  """
  if isinstance(value, str):
    value = read_text(value)
  return [read_call(record) for record in (value if isinstance(value, list) else [value])]


def read_call(record: Any) -> ToolCall:
  """Reads a call {name, arguments}; `parameters` is another name of its arguments.

  A call may stand in OpenAI's wrapper {id, type, function: call}.

  Raises:
    ToolCallError: no name, arguments of another kind, or a key that says what is not understood.
  """
  given = record
  if isinstance(record, dict) and isinstance(record.get('function'), dict):
    # A key that is not understood might change the call; to drop it would lose it without a word.
    _refuse_unknown(record, ('function',))
    record = record['function']
  if not isinstance(record, dict) or not isinstance(record.get('name'), str):
    raise ToolCallError(f'{_FORM}, got {clip(str(given))}')
  _refuse_unknown(record, ('name', *_ARGUMENTS))
  return ToolCall(record['name'], call_arguments(record))


def call_arguments(record: dict[str, Any]) -> dict[str, Any]:
  """Reads the arguments of a call {name, arguments}, or `parameters` as they are also named.

  Raises:
    ToolCallError: arguments of another kind, or two that differ.
  """
  found = [read_arguments(record.get(key)) for key in _ARGUMENTS]
  # An empty one beside the other says nothing: readers of tables fill the column that a call lacks.
  said = [arguments for arguments in found if arguments]
  if len(said) == 2 and said[0] != said[1]:
    raise ToolCallError(f'arguments and parameters differ in {clip(str(record))}')
  return said[0] if said else {}


def read_arguments(value: Any) -> dict[str, Any]:
  """Reads the arguments of a call: an object, its text, or '', [] or None where there are none.

  Raises:
    ToolCallError: anything else.
  """
  # Twice: some clients write the text of an object as JSON once more.
  for _ in range(2):
    if isinstance(value, str):
      value = read_text(value) if value.strip() else {}
  # PHP knows one kind of array, and writes an empty object as [].
  if value is None or value == []:
    return {}
  if not isinstance(value, dict):
    raise ToolCallError(f'{_FORM}, got arguments {clip(str(value))}')
  _check_value(value, 0)
  return value


def _refuse_unknown(record: dict[str, Any], known: tuple[str, ...]) -> None:
  unknown = [key for key in record if key not in known and key not in _HARMLESS]
  # OpenAI has further types of tools, which are not called by name and arguments.
  if record.get('type') not in (None, 'function'):
    unknown.append('type')
  if unknown:
    raise ToolCallError(f'a call with the unknown key {unknown[0]!r}: {clip(str(record))}')


def read_text(text: str) -> Any:
  """Returns the value of a JSON text or, where it is none, of a Python literal.

  Raises:
    ToolCallError: text that is neither, or holds a value that is too deep or no JSON value.
  """
  try:
    value = _DECODER.decode(text)
  except ToolCallError:
    raise
  except (ValueError, RecursionError) as error:
    try:
      return parse_literal(text)
    except ToolCallError:
      raise ToolCallError(
        f'neither JSON nor a literal (not JSON: {error}): {clip(text)}'
      ) from error
  _check_value(value, 0)
  return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  # Python's decoder would keep the last of two equal keys and lose the other without a word.
  record = dict(pairs)
  if len(record) < len(pairs):
    # Counted once: a count for each key would take a minute for an object of 1 MB.
    counts = collections.Counter(key for key, _ in pairs)
    twice = next(key for key, count in counts.items() if count > 1)
    raise ToolCallError(f'the key {clip(twice)} is given twice')
  return record


# Models break lines inside of strings, which JSON forbids and `strict=False` allows.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_no_key_twice)


def _check_value(value: Any, depth: int) -> None:
  check_depth(depth)
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, list):
    for item in value:
      _check_value(item, depth + 1)
  else:
    checked_constant(value)


# --- texts ----------------------------------------------------------------------------------------


class Block(NamedTuple):
  """What stands behind an opening tag.

  Attributes:
    end: the place behind it, its closing tag included where it has one.
    calls: what it calls; none where it cannot be read.
    problem: why it cannot; '' where it can.
  """

  end: int
  calls: list[ToolCall]
  problem: str


def tagged_blocks(text: str) -> Iterator[Block]:
  """Yields what stands behind each opening tag of a whole text.

  Raises:
    ToolCallError: a block that cannot be read.
  """
  start = text.find(OPEN_CALL)
  while start >= 0:
    # Each search begins behind the block, so that a tag inside of one of its strings opens no
    # other.
    block = BlockReader(start).read(text, ended=True)
    if block.problem:
      raise ToolCallError(block.problem)
    yield block
    start = text.find(OPEN_CALL, block.end)


class BlockReader:
  """Reads the block behind one opening tag while its text comes.

  A block holds objects and lists of objects, one behind the other (ToolRL's rows have a call a
  line). Only what can no longer change is decided, so that the cuts of the text do not matter.

  Args:
    start: where the opening tag begins.
  """

  def __init__(self, start: int):
    self._start = start
    self._place = start + len(OPEN_CALL)  # read up to here
    self._scan: JsonScan | None = None
    self._values: list[str] = []
    self._broken = False

  def read(self, text: str, *, ended: bool, cut: bool = False) -> Block | None:
    """Reads on in a text that begins as it did before; None where more of it must come.

    Args:
      text: all that has come, the opening tag at its place.
      ended: whether nothing more will come.
      cut: whether it ended in the midst of the turn, so that the closing tag was not left out.
    """
    # One turn for each value: a block may hold several, with white space between them.
    while not self._broken:
      if self._scan is None:
        self._place = skip_space(text, self._place)
        if text[self._place : self._place + 1] not in ('{', '['):
          return self._behind_values(text, ended, cut)
        self._scan = JsonScan(self._place)
      state = self._scan.read(text)
      # The scan keeps its place, so that a long answer is looked through once and not at every
      # token.
      if state is Scan.OPEN and not ended:
        return None
      self._broken = state is not Scan.WHOLE
      self._place = self._scan.place
      if not self._broken:
        self._values.append(text[self._scan.start : self._place])
        # Matching brackets do not make JSON: Python literals have them too, and are read further
        # below.
        self._broken = not _is_json(self._values[-1])
        self._scan = self._scan if self._broken else None
    return self._behind_broken(text, ended)

  def _behind_values(self, text: str, ended: bool, cut: bool) -> Block | None:
    """The place where a closing tag belongs."""
    rest = text[self._place : self._place + len(CLOSE_CALL)]
    if not self._values:
      if not rest and not ended:
        return None
      # Somebody speaks of the tag. What follows is no part of it.
      return self._bad(text, self._start + len(OPEN_CALL), 'holds no call')
    # The tag has come whole, and decides that the block is complete.
    if rest == CLOSE_CALL:
      return self._whole(self._place + len(CLOSE_CALL))
    # Models forget closing tags; the next opening tag then ends the block.
    if rest.startswith(OPEN_CALL):
      return self._whole(self._place)
    # The text ends within what may become one of the tags.
    if CLOSE_CALL.startswith(rest) or OPEN_CALL.startswith(rest):
      if not ended:
        return None
      # The model ended its turn behind a whole object: only the tag is missing. If the budget cut
      # the turn, more of the call might have followed.
      if not cut and CLOSE_CALL.startswith(rest):
        return self._whole(len(text))
      return self._bad(text, len(text), 'is never closed')
    self._broken = True
    return self._behind_broken(text, ended)

  def _behind_broken(self, text: str, ended: bool) -> Block | None:
    """The next tag ends what is no JSON; Python literals are read up to there."""
    begin = self._start + len(OPEN_CALL)
    # Behind values that were whole, tags in their strings have been passed.
    behind = begin if self._scan else self._place
    closing = text.find(CLOSE_CALL, behind)
    opening = text.find(OPEN_CALL, behind)
    if closing < 0 and opening < 0:
      return self._bad(text, len(text), 'is never closed') if ended else None
    # Another block begins first, so that this one has no closing tag of its own.
    if closing < 0 or 0 <= opening < closing:
      return self._bad(text, opening, 'is never closed')
    end = closing + len(CLOSE_CALL)
    try:
      # From the opening tag on: the values that were read before are a part of the text that is
      # read anew.
      return Block(end, read_calls(text[begin:closing]), '')
    except ToolCallError as error:
      return Block(end, [], str(error))

  def _whole(self, end: int) -> Block:
    try:
      calls = [call for value in self._values for call in read_calls(value)]
    except ToolCallError as error:
      return Block(end, [], str(error))
    return Block(end, calls, '' if calls else f'{_FORM}, got {clip("".join(self._values))}')

  def _bad(self, text: str, end: int, what: str) -> Block:
    return Block(end, [], f'a {OPEN_CALL} {what}: {clip(text[self._start :])}')


def _is_json(text: str) -> bool:
  try:
    _DECODER.decode(text)
  except ToolCallError:
    # A key that is given twice. It is JSON, and reading it says what is wrong with it.
    return True
  except (ValueError, RecursionError):
    return False
  return True
