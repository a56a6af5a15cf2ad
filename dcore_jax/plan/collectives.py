"""What a compiled program sends between devices, read from its HLO text: kind, bytes, and how often it is sent.

XLA places collectives by itself; a missing annotation shows only here, as a gather of something that should never be whole.
"""

import re
from typing import NamedTuple

_KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_COLLECTIVE = re.compile(rf'= (.*?) ({_KINDS})(-start)?\((?!.*-done\()')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# The compiler for TPUs leaves it at a condition `counter < constant`, of a body that adds another constant to the counter.
_CONSTANT = re.compile(r'%([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)')
_LESS = re.compile(r'ROOT .* compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT')
_PLACE = re.compile(r'%([\w.\-]+) = .* get-tuple-element\(.*\), index=(\d+)')
_ADD = re.compile(r'%([\w.\-]+) = .* add\(%[\w.\-]+, %([\w.\-]+)\)')
_RESULT = re.compile(r'ROOT %\S+ = .* tuple\((.*?)\)')
_SHAPE = re.compile(r'\b(pred|[suf]\d+|bf16|f8\w*)\[([\d,]*)\]')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_GROUPS = (
  re.compile(r'replica_groups=\[\d+,(\d+)\]'),
  re.compile(r'replica_groups=\{\{([\d,]+)\}'),
)
_MESH_GROUP = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')


class Collective(NamedTuple):
  """One collective. `bytes` are those of the whole: what a gather makes, what a reduction reduces, what is exchanged."""

  kind: str
  bytes: int
  times: int  # in one call of the program: turns of the loops around it, a loop of unknown length counted once
  in_loop: bool
  group: int  # devices that take part
  source: str  # the jax operation it was made for

  @property
  def sent(self) -> int:
    """Bytes that each device sends in one call, by ring algorithms."""
    share = self.bytes * (self.group - 1) // max(1, self.group)
    return self.times * (
      2 * share
      if self.kind == 'all-reduce'
      else self.bytes
      if self.kind == 'collective-permute'
      else share
    )


def collectives(hlo_text: str) -> list[Collective]:
  """The collectives of `compiled.as_text()`, those of a loop's body once with the number of its turns."""
  bodies, entry = _computations(hlo_text)
  found = []

  def visit(name: str, times: int, in_loop: bool) -> None:
    for line in bodies.get(name, ()):
      if match := _COLLECTIVE.search(line):
        found.append(_collective(line, match, times, in_loop))
      turns = _turns(line, bodies) if ' while(' in line else 1
      branches = [
        name for group in _BRANCHES.findall(line) for name in re.findall(r'[\w.\-]+', group)
      ]
      for callee in _CALLED.findall(line) + branches:
        visit(callee, times * turns, in_loop or ' while(' in line)

  visit(entry, 1, False)
  return found


def _computations(hlo_text: str) -> tuple[dict[str, list[str]], str]:
  """(lines of each computation, the name of the entry)."""
  bodies, entry, current = {}, '', []
  for line in hlo_text.splitlines():
    if line and not line[0].isspace():
      if match := _COMPUTATION.match(line):
        current = bodies.setdefault(match.group(2), [])
        entry = match.group(2) if match.group(1) else entry
    else:
      current.append(line)
  return bodies, entry


def _turns(line: str, bodies: dict[str, list[str]]) -> int:
  """Of a loop, which counts from 0; 1 where it is not known."""
  if trips := _TRIPS.search(line):
    return int(trips.group(1))
  condition, body = (
    bodies.get(match.group(1), []) if (match := re.search(rf'{part}=%?([\w.\-]+)', line)) else []
    for part in ('condition', 'body')
  )
  first = lambda pattern, lines: next(filter(None, map(pattern.search, lines)), None)
  pairs = lambda pattern, lines: dict(
    match.groups() for match in map(pattern.search, lines) if match
  )
  less, result = first(_LESS, condition), first(_RESULT, body)
  limit = less and pairs(_CONSTANT, condition).get(less.group(2))
  place = less and pairs(_PLACE, condition).get(less.group(1))
  if not limit or not place or not result:
    return 1
  counter = re.findall(r'%([\w.\-]+)', result.group(1))[int(place)]
  step = pairs(_CONSTANT, body).get(pairs(_ADD, body).get(counter), '1')
  return -(-int(limit) // int(step))


def _collective(line: str, match: re.Match, times: int, in_loop: bool) -> Collective:
  result, kind, asynchronous = match.groups()
  group = _group_size(line)
  sizes = [shape_bytes(*shape) for shape in _SHAPE.findall(result)]
  whole = sum(sizes)
  if asynchronous and kind in (
    'all-gather',
    'reduce-scatter',
  ):  # the type names the parts beside the whole
    whole = whole * group // (group + 1)
  elif asynchronous and kind != 'all-reduce':  # and here what goes in beside what comes out
    whole //= 2
  elif kind == 'reduce-scatter':
    whole *= group
  source = _OP_NAME.search(line)
  return Collective(kind, whole, times, in_loop, group, source.group(1) if source else '')


def _group_size(line: str) -> int:
  if match := _GROUPS[0].search(line):
    return int(match.group(1))
  if match := _GROUPS[1].search(line):
    return match.group(1).count(',') + 1
  if match := _MESH_GROUP.search(line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
    group = 1
    for axis in re.findall(r"'(\w+)'", match.group(2)):
      group *= int(sizes[axis])
    return group
  return 1


def shape_bytes(dtype: str, dimensions: str) -> int:
  """Bytes of an array of type `bf16` and `8,128` say."""
  size = 1 if dtype == 'pred' or dtype.startswith('f8') else int(re.sub(r'\D', '', dtype)) // 8
  for dimension in filter(None, dimensions.split(',')):
    size *= int(dimension)
  return size
