"""What a compiled program sends between devices, read from its HLO text.

XLA places collectives by itself. A missing annotation shows only here, as a gather of something
that should never be whole.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_COLLECTIVE = re.compile(rf'= (.*?) ({_KINDS})(-start)?\((?!.*-done\()')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_NAME = re.compile(r'[\w.\-]+')
_BODY = re.compile(r'body=%?([\w.\-]+)')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
# The compilers for CPUs and GPUs print the number of a loop's iterations.
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# The compiler for TPUs prints no number. Its loops have the condition `counter < constant`, and a
# body that adds another constant to the counter.
_CONSTANT = re.compile(r'%([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)')
_LESS = re.compile(r'ROOT .* compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT')
_PLACE = re.compile(r'%([\w.\-]+) = .* get-tuple-element\(.*\), index=(\d+)')
_ADD = re.compile(r'%([\w.\-]+) = .* add\(%[\w.\-]+, %([\w.\-]+)\)')
_RESULT = re.compile(r'ROOT %\S+ = .* tuple\((.*?)\)')
_OPERAND = re.compile(r'%([\w.\-]+)')
_SHAPE = re.compile(r'\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\]')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# The devices that take part, in the three forms that XLA prints them in.
_GROUP_SIZE = re.compile(r'replica_groups=\[\d+,(\d+)\]')
_FIRST_GROUP = re.compile(r'replica_groups=\{\{([\d,]+)\}')
_MESH_GROUP = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')


class Collective(NamedTuple):
  """One collective.

  Attributes:
    kind: its name in HLO.
    bytes: size of the whole array that is gathered, reduced or exchanged.
    times: how often it runs in one call of the program: the product of the iterations of the loops
      around it, where a loop of unknown length counts once.
    in_loop: whether there is a loop around it.
    group: devices that take part.
    source: the jax operation that it was made for.
  """

  kind: str
  bytes: int
  times: int
  in_loop: bool
  group: int
  source: str

  @property
  def sent(self) -> int:
    """Bytes that each device sends in one call, by ring algorithms."""
    # Each device sends its array to one other device.
    if self.kind == 'collective-permute':
      return self.times * self.bytes
    # Each device has one part in `group` already.
    share = self.bytes * (self.group - 1) // max(1, self.group)
    # A ring reduces each part to one device, and then hands the sums around.
    rounds = 2 if self.kind == 'all-reduce' else 1
    return self.times * rounds * share


def collectives(hlo_text: str) -> list[Collective]:
  """Returns the collectives of `compiled.as_text()`.

  A collective in the body of a loop appears once, with the number of the loop's iterations.
  """
  bodies, entry = _computations(hlo_text)
  found = []

  def visit(name: str, times: int, in_loop: bool) -> None:
    """Collects the collectives of a computation and of those that it calls."""
    # Names that the text does not define are skipped.
    for line in bodies.get(name, ()):
      match = _COLLECTIVE.search(line)
      if match:
        found.append(_collective(line, match, times, in_loop))
      # A computation is visited once for each call of it: its collectives are sent each time.
      is_loop = ' while(' in line
      turns = _turns(line, bodies) if is_loop else 1
      for callee in _callees(line):
        visit(callee, times * turns, in_loop or is_loop)

  # Outside of the entry, computations run only where they are called.
  visit(entry, 1, False)
  return found


def shape_bytes(dtype: str, dimensions: str) -> int:
  """Returns the bytes of an array, given its type as in 'bf16' and its shape as in '8,128'."""
  # Names of 8-bit floats hold other digits: f8e4m3fn.
  one_byte = dtype == 'pred' or dtype.startswith('f8')
  size = 1 if one_byte else int(re.sub(r'\D', '', dtype)) // 8
  for dimension in filter(None, dimensions.split(',')):
    size *= int(dimension)
  return size


def _computations(hlo_text: str) -> tuple[dict[str, list[str]], str]:
  """Returns (lines of each computation, the name of the entry)."""
  bodies: dict[str, list[str]] = {}
  entry = ''
  current: list[str] = []
  for line in hlo_text.splitlines():
    # Only the first line of a computation is not indented.
    if not line or line[0].isspace():
      current.append(line)
      continue
    match = _COMPUTATION.match(line)
    if match:
      is_entry, name = match.groups()
      current = bodies.setdefault(name, [])
      if is_entry:
        entry = name
  return bodies, entry


def _callees(line: str) -> list[str]:
  """Returns the computations that a line calls."""
  names = _CALLED.findall(line)
  for branches in _BRANCHES.findall(line):
    names += _NAME.findall(branches)
  return names


def _turns(line: str, bodies: Mapping[str, Sequence[str]]) -> int:
  """Returns the iterations of a loop that counts from 0; 1 where the number is not known."""
  trips = _TRIPS.search(line)
  if trips:
    return int(trips.group(1))
  # TPU: the loop ends when a place of its carried tuple reaches a constant. The body's result says
  # which value goes to that place, and the addition that makes the value says the step.
  condition = _lines_of(_CONDITION, line, bodies)
  body = _lines_of(_BODY, line, bodies)
  less = _first_match(_LESS, condition)
  result = _first_match(_RESULT, body)
  if less is None or result is None:
    return 1
  counter, bound = less.groups()
  limit = _pairs(_CONSTANT, condition).get(bound)
  place = _pairs(_PLACE, condition).get(counter)
  if limit is None or place is None:
    return 1
  next_counter = _OPERAND.findall(result.group(1))[int(place)]
  # Where the addition cannot be found, the counter is taken to go up by 1.
  addend = _pairs(_ADD, body).get(next_counter)
  step = _pairs(_CONSTANT, body).get(addend, '1')
  # Rounded up: the last step may pass the limit.
  return -(-int(limit) // int(step))


def _lines_of(pattern: re.Pattern, line: str, bodies: Mapping[str, Sequence[str]]) -> Sequence[str]:
  """Returns the lines of the computation that `pattern` finds the name of in a line."""
  match = pattern.search(line)
  return bodies.get(match.group(1), ()) if match else ()


def _first_match(pattern: re.Pattern, lines: Iterable[str]) -> re.Match | None:
  for line in lines:
    match = pattern.search(line)
    if match:
      return match
  return None


def _pairs(pattern: re.Pattern, lines: Iterable[str]) -> dict[str, str]:
  """Returns the two groups of each match: the name of a value, and what it comes from."""
  pairs = {}
  for line in lines:
    match = pattern.search(line)
    if match:
      name, source = match.groups()
      pairs[name] = source
  return pairs


def _collective(line: str, match: re.Match, times: int, in_loop: bool) -> Collective:
  result, kind, asynchronous = match.groups()
  group = _group_size(line)
  # The result's type says the size; an asynchronous start has a tuple of arrays as its type.
  whole = sum(shape_bytes(dtype, dimensions) for dtype, dimensions in _SHAPE.findall(result))
  if asynchronous and kind in ('all-gather', 'reduce-scatter'):
    # The type of a start names a device's part beside the whole.
    whole = whole * group // (group + 1)
  elif asynchronous and kind != 'all-reduce':
    # Here it names what goes in beside what comes out, and both are as large.
    whole //= 2
  # The type of a reduce-scatter is one device's part.
  elif kind == 'reduce-scatter':
    whole *= group
  # What XLA adds while it optimizes may have no operation of jax behind it.
  source = _OP_NAME.search(line)
  return Collective(
    kind=kind,
    bytes=whole,
    times=times,
    in_loop=in_loop,
    group=group,
    source=source.group(1) if source else '',
  )


def _group_size(line: str) -> int:
  # All groups of a collective have the same size; the first one tells it.
  match = _GROUP_SIZE.search(line)
  if match:
    return int(match.group(1))
  match = _FIRST_GROUP.search(line)
  if match:
    return match.group(1).count(',') + 1
  match = _MESH_GROUP.search(line)
  if match is None:
    return 1
  mesh, axes = match.groups()
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
  group = 1
  # Named axes of a mesh: the group is the product of the sizes of those that are named.
  for axis in re.findall(r"'(\w+)'", axes):
    group *= int(sizes[axis])
  return group
