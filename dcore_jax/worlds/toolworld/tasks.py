"""Procedural tasks: a request in words, the calls that solve it, and the outputs of those calls."""

import copy
import dataclasses
import json
from collections.abc import Callable

import numpy as np

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.environment import UserTurn, WorldTask
from dcore_jax.worlds.toolworld.entities import SPLITS, Entities
from dcore_jax.worlds.toolworld.tools import TABLES, TOOLS, Tables, ToolDefinition, execute

# Kinds, with what names the random stream of their tasks. A kind keeps its number whichever kinds
# there are, since another number would be other tasks.
_STREAMS = {'single': 0, 'sequential': 1, 'parallel': 2, 'irrelevant': 3, 'multi_turn': 4}
KINDS = tuple(_STREAMS)
POLICIES = (
  'policy: call listed tools only.',
  'policy: use a listed tool or say why not.',
  'policy: never guess a value.',
)
# (frame, joiner): the words around the clauses of a request, and between them.
SEQUENTIAL_FORMS = (('{}', ', then '), ('first {}', ', next '))
PARALLEL_FORMS = (('{}', ', and '), ('{}', '; also '))
PREFIXES = ('', 'please ')
NO_TOOL = 'no listed tool can do this.'
# Judged on their first response, as BFCL's single-turn categories are.
ONE_RESPONSE = ('single', 'parallel', 'irrelevant')
# Kinds of ids with the table that holds their rows.
_TABLE = {
  'order': 'orders',
  'flight': 'flights',
  'hotel': 'hotels',
  'phone': 'phones',
  'file': 'files',
}
# What each of these tools finds, and by which of its fields.
_FIND = {
  'find_order': ('order', 'customer'),
  'find_flight': ('flight', 'city'),
  'find_hotel': ('hotel', 'city'),
  'find_phone': ('phone', 'person'),
  'find_file': ('file', 'person'),
}
# How often a sequential or parallel request has so many subtasks. Two thirds have 2 or 3, and a
# plan of 5 is rare, as in the paper's released traces (98 : 38 : 14 : 8 : 1 by length).
_STEP_SHARES = {2: 0.34, 3: 0.32, 4: 0.26, 5: 0.08}
_EXTRA_TOOLS = 3  # listed tools, at most, that the reference does not use
# A clause takes the fresh result of the clause before it this often. The others begin afresh, so
# that a reference ("that order") and a spelled-out id both occur after any clause.
_CHAIN_SHARE = 0.85
_TURN_CHAIN_SHARE = 0.7  # the same where the next clause is a later turn of a dialogue
_REPEAT_SHARE = 0.4  # parallel requests that use one tool several times, as BFCL's `parallel` do
_LONG_TURN_SHARE = 0.25  # turns of a dialogue that ask for two dependent subtasks
# An amount can be added up over and over. If sums were not held back to this share, most chains
# would end as sums of sums.
_SUM_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Task(WorldTask):
  """A task with its reference solution.

  Attributes:
    policy: the first line of the system message.
    tools: the names listed to the model.
    initial_state: the tables before the first call; the model never sees them.
  """

  policy: str
  tools: tuple[str, ...]
  initial_state: Tables


def missing_answer(parameter: str) -> str:
  """The reference refusal where a required parameter is not given."""
  return f'please give the {parameter}.'


def report(response: str) -> str:
  """The reference text that ends a turn.

  Args:
    response: the last tool response, a JSON object with one entry.
  """
  # The only entry is unpacked: a response with several would be an error here.
  ((key, value),) = json.loads(response).items()
  return f'done: {key} {value}.'


@dataclasses.dataclass(frozen=True)
class _Clause:
  """A subtask in words, the call that carries it out, and the output that the call has."""

  text: str
  call: ToolCall
  response: str


class _Writer:
  """Draws clauses, the rows they need, and the outputs of executing them."""

  def __init__(self, rng: np.random.Generator, split: str):
    self.rng = rng
    self.entities = Entities(rng, split)
    self.initial: Tables = {table: {} for table in TABLES}
    # Two states: a task begins with the first one, and the calls of the writer change the second.
    self.state: Tables = {table: {} for table in TABLES}
    # Kind of entity -> the value that the words 'that <kind>' mean now.
    self.produced: dict[str, str | int] = {}

  def choice(self, options):
    # By place and not by numpy's `choice`, which would turn options into numpy scalars.
    return options[int(self.rng.integers(len(options)))]

  def add_row(self, table: str, key, row: dict) -> None:
    """Adds a row that exists from the start, so also to the state that is being executed."""
    for state in (self.initial, self.state):
      # `setdefault`: a row that a clause before has changed must stay as it is.
      state[table].setdefault(key, copy.deepcopy(row))

  def add_entity(self, kind: str, key: str, **fields) -> None:
    """Adds the row of an id; `fields` are those that a request speaks of."""
    row = {'status': 'open', **fields}
    if kind == 'order':
      row.setdefault('customer', self.entities.draw('name'))
      row['price'] = self.entities.draw('amount')
    self.add_row(_TABLE[kind], key, row)

  def arguments(self, tool: ToolDefinition, given: dict) -> dict:
    """Fresh values of all parameters that are not given, and the rows that let the call succeed."""
    arguments = {}
    for parameter, kind in tool.parameters.items():
      if parameter in given:
        arguments[parameter] = given[parameter]
      else:
        arguments[parameter] = self.entities.draw(kind)
    # Something must be there to be found: a row that has the given field.
    if tool.name in _FIND:
      kind, field = _FIND[tool.name]
      self.add_entity(kind, self.entities.draw(kind), **{field: arguments[field]})
    # Ids that the request spells out must exist; those that were given do already.
    for parameter, kind in tool.parameters.items():
      if kind in _TABLE and parameter not in given:
        self.add_entity(kind, arguments[parameter])
    if tool.name in ('check_balance', 'pay_amount'):
      self.add_row('accounts', arguments['person'], {'balance': self.entities.draw('amount')})
    return arguments

  def clause(self, tool: ToolDefinition, chained: str | None = None) -> _Clause:
    """A clause that asks for one call; the parameter `chained` takes an earlier result."""
    given = {} if chained is None else {chained: self.produced[tool.parameters[chained]]}
    arguments = self.arguments(tool, given)
    phrasing = self.choice(tool.phrasings)
    if chained is not None:
      kind = tool.parameters[chained]
      # The longest wording first, so that 'the amount 5' becomes 'that amount' and not 'the that
      # amount'.
      for written in (f'the {kind} {{{chained}}}', f'{kind} {{{chained}}}', f'{{{chained}}}'):
        if written in phrasing:
          phrasing = phrasing.replace(written, f'that {kind}')
          break
    # Executed, not predicted: the reference outputs are those of the world itself.
    response = execute(self.state, tool.name, arguments)
    if 'error' in response:
      raise RuntimeError(f'reference call {tool.name}({arguments}) fails: {response["error"]}')
    # The latest result of a kind is the one that "that <kind>" means.
    if tool.produces:
      self.produced[tool.produces] = response[tool.produces]
    call = ToolCall(tool.name, arguments)
    return _Clause(phrasing.format(**arguments), call, json.dumps(response))

  def consumers(self, kind: str | None) -> list[tuple[ToolDefinition, str]]:
    """The (tool, parameter) pairs that can take a fresh result of this kind."""
    pairs = []
    for tool in TOOLS.values():
      for parameter, taken in tool.parameters.items():
        if taken == kind:
          pairs.append((tool, parameter))
    # Drawn also where no pair is a sum: tasks are fixed by their draws.
    if self.rng.random() < _SUM_SHARE:
      return pairs
    return [(tool, parameter) for tool, parameter in pairs if tool.name != 'add_numbers']

  def chain(self, length: int, *, must_chain: bool) -> list[_Clause]:
    """`length` clauses, most of which take what the clause before them has returned."""
    clauses: list[_Clause] = []
    fresh = None
    for number in range(length):
      consumers = self.consumers(fresh)
      last = number == length - 1
      chained = any('that ' in clause.text for clause in clauses)
      # The order matters: without consumers nothing is drawn, and tasks are fixed by their draws.
      if consumers and (self.rng.random() < _CHAIN_SHARE or (last and must_chain and not chained)):
        tool, parameter = self.choice(consumers)
        clauses.append(self.clause(tool, parameter))
      else:
        # A clause that is not the last one must produce something for the next.
        pool = [tool for tool in TOOLS.values() if tool.produces or last]
        tool = self.choice(pool)
        clauses.append(self.clause(tool))
      fresh = tool.produces
    return clauses

  def listed(self, needed: list[str], extra: int, without: str | None = None) -> tuple[str, ...]:
    """The needed tools and `extra` others, shuffled; `without` is never among them."""
    others = [name for name in TOOLS if name not in needed and name != without]
    # Once each, however often the reference calls them.
    names = list(dict.fromkeys(needed))
    names += [str(name) for name in self.rng.permutation(others)[:extra]]
    # Shuffled, so that a tool's place in the list says nothing.
    return tuple(str(name) for name in self.rng.permutation(names))

  def distract(self) -> None:
    """Adds rows that no reference call touches, so that a wrong guess may find something."""
    for kind, field in _FIND.values():
      self.add_entity(kind, self.entities.draw(kind), **{field: self.entities.draw('name')})

  def turn(self, clauses: list[_Clause], forms) -> UserTurn:
    subtasks = tuple(clause.text for clause in clauses)
    responses = tuple(clause.response for clause in clauses)
    # Only wording is drawn here; the clauses are fixed.
    frame, joiner = self.choice(forms)
    query = self.choice(PREFIXES) + frame.format(joiner.join(subtasks)) + '.'
    return UserTurn(
      query=query,
      calls=tuple(clause.call for clause in clauses),
      responses=responses,
      subtasks=subtasks,
      answer=report(responses[-1]),
    )


# What a maker gives: the turns of a task, and the names of the listed tools.
_Made = tuple[list[UserTurn], tuple[str, ...]]


def _single(writer: _Writer, steps: int) -> _Made:
  tool = writer.choice(list(TOOLS.values()))
  turn = writer.turn([writer.clause(tool)], PARALLEL_FORMS[:1])
  extra = int(writer.rng.integers(1, _EXTRA_TOOLS + 1))
  return [turn], writer.listed([tool.name], extra)


def _sequential(writer: _Writer, steps: int) -> _Made:
  clauses = writer.chain(steps, must_chain=True)
  turn = writer.turn(clauses, SEQUENTIAL_FORMS)
  needed = [clause.call.name for clause in clauses]
  return [turn], writer.listed(needed, int(writer.rng.integers(0, _EXTRA_TOOLS)))


def _parallel(writer: _Writer, steps: int) -> _Made:
  pool = list(TOOLS.values())
  # One tool is drawn first, which a share of the subtasks repeats.
  one = writer.choice(pool)
  tools = []
  for _ in range(steps):
    tools.append(one if writer.rng.random() < _REPEAT_SHARE else writer.choice(pool))
  clauses = [writer.clause(tool) for tool in tools]
  turn = writer.turn(clauses, PARALLEL_FORMS)
  needed = [tool.name for tool in tools]
  return [turn], writer.listed(needed, int(writer.rng.integers(0, _EXTRA_TOOLS)))


def _irrelevant(writer: _Writer, steps: int) -> _Made:
  tool = writer.choice(list(TOOLS.values()))
  extra = int(writer.rng.integers(1, _EXTRA_TOOLS + 1))
  # Half of the requests need a tool that is not listed, half lack a value.
  if writer.rng.random() < 0.5:
    subtask = writer.clause(tool).text
    answer = NO_TOOL
    # One more tool than elsewhere, so that the list is not shorter by the one that is left out.
    tools = writer.listed([], extra + 1, without=tool.name)
  else:
    partial, missing = writer.choice(tool.partials)
    subtask = partial.format(**writer.arguments(tool, {}))
    answer = missing_answer(missing)
    tools = writer.listed([tool.name], extra)
  query = writer.choice(PREFIXES) + subtask + '.'
  turn = UserTurn(query=query, calls=(), responses=(), subtasks=(subtask,), answer=answer)
  return [turn], tools


def _multi_turn(writer: _Writer, steps: int) -> _Made:
  turns: list[UserTurn] = []
  needed: list[str] = []
  fresh = None
  # Two or three turns.
  for _ in range(int(writer.rng.integers(2, 4))):
    if writer.rng.random() < _LONG_TURN_SHARE:
      clauses = writer.chain(2, must_chain=True)
    else:
      consumers = writer.consumers(fresh)
      if consumers and writer.rng.random() < _TURN_CHAIN_SHARE:
        tool, parameter = writer.choice(consumers)
        clauses = [writer.clause(tool, parameter)]
      else:
        clauses = [writer.clause(writer.choice(list(TOOLS.values())))]
    # What the last call of a turn produced can be spoken of in the next turn.
    fresh = TOOLS[clauses[-1].call.name].produces
    needed += [clause.call.name for clause in clauses]
    forms = SEQUENTIAL_FORMS if len(clauses) > 1 else PARALLEL_FORMS[:1]
    turns.append(writer.turn(clauses, forms))
  return turns, writer.listed(needed, int(writer.rng.integers(0, 2)))


_MAKERS: dict[str, Callable[[_Writer, int], _Made]] = {
  'single': _single,
  'sequential': _sequential,
  'parallel': _parallel,
  'irrelevant': _irrelevant,
  'multi_turn': _multi_turn,
}


def make_task(kind: str, index: int, *, seed: int, split: str, max_subtasks: int = 4) -> Task:
  """Makes the `index`-th task of a kind: a pure function of its arguments.

  Args:
    kind: one of KINDS.
    index: the number of the task.
    seed: chooses the whole set of tasks.
    split: 'train' or 'eval'; the two share no name, id or amount.
    max_subtasks: the largest number of subtasks of a sequential or parallel request, 2 to 5.

  Raises:
    ValueError: an argument that is not one of those.
  """
  if kind not in KINDS:
    raise ValueError(f'unknown task kind {kind!r}; expected one of {KINDS}')
  if max_subtasks not in _STEP_SHARES:
    raise ValueError(f'max_subtasks is {max_subtasks}; expected 2 to 5')
  if split not in SPLITS:
    raise ValueError(f'unknown split {split!r}; expected one of {SPLITS}')
  rng = np.random.default_rng([seed, _STREAMS[kind], SPLITS.index(split), index])
  # From 2 subtasks on; shares are scaled to those that the limit allows.
  counts = np.arange(2, max_subtasks + 1)
  shares = np.array([_STEP_SHARES[count] for count in counts.tolist()])
  steps = int(rng.choice(counts, p=shares / shares.sum()))
  writer = _Writer(rng, split)
  turns, tools = _MAKERS[kind](writer, steps)
  # Last, so that the rows of the clauses come first in every table.
  writer.distract()
  return Task(
    id=f'toolworld-{split}-{seed}-{kind}-{index}',
    kind=kind,
    turns=tuple(turns),
    policy=writer.choice(POLICIES),
    tools=tools,
    initial_state=writer.initial,
  )
