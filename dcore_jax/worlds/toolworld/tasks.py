"""Procedural tasks: a request in words, the calls that solve it, and the outputs those calls really have."""

import copy
import dataclasses
import json
from collections.abc import Callable

import numpy as np

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds.environment import Turn
from dcore_jax.worlds.toolworld.entities import SPLITS, Entities
from dcore_jax.worlds.toolworld.tools import TABLES, TOOLS, State, Tool, execute

KINDS = ('single', 'sequential', 'parallel', 'irrelevant', 'multi_turn')
POLICIES = (
  'policy: call listed tools only.',
  'policy: use a listed tool or say why not.',
  'policy: never guess a value.',
)
SEQUENTIAL_FORMS = (('{}', ', then '), ('first {}', ', next '))
PARALLEL_FORMS = (('{}', ', and '), ('{}', '; also '))
PREFIXES = ('', 'please ')
NO_TOOL = 'no listed tool can do this.'
ONE_RESPONSE = (
  'single',
  'parallel',
  'irrelevant',
)  # judged on their first response, as BFCL's single-turn categories are
_TABLE = {
  'order': 'orders',
  'flight': 'flights',
  'hotel': 'hotels',
  'phone': 'phones',
  'file': 'files',
}
_FIND = {
  'find_order': ('order', 'customer'),
  'find_flight': ('flight', 'city'),
  'find_hotel': ('hotel', 'city'),
  'find_phone': ('phone', 'person'),
  'find_file': ('file', 'person'),
}
# Half of the k-step requests have 2 or 3 steps: the plan of 5 is the tail, as in the released traces (98:38:14:8:1).
_STEP_SHARES = {2: 0.34, 3: 0.32, 4: 0.26, 5: 0.08}
_EXTRA_TOOLS = 3  # at most so many listed tools that the reference does not use


@dataclasses.dataclass(frozen=True)
class Task:
  """A task with its reference solution. `tools` are the names listed to the model; `initial_state` is never shown."""

  id: str
  kind: str
  policy: str
  tools: tuple[str, ...]
  initial_state: State
  turns: tuple[Turn, ...]

  @property
  def steps(self) -> int:
    """Reference calls over all turns."""
    return sum(len(turn.calls) for turn in self.turns)


def missing_answer(parameter: str) -> str:
  """The reference refusal where a required parameter is not given."""
  return f'please give the {parameter}.'


def report(response: str) -> str:
  """The reference text that ends a turn whose last tool response is `response` (a JSON object of one entry)."""
  ((key, value),) = json.loads(response).items()
  return f'done: {key} {value}.'


class _Writer:
  """Draws clauses, the rows they need, and the outputs of really executing them."""

  def __init__(self, rng: np.random.Generator, split: str):
    self.rng = rng
    self.entities = Entities(rng, split)
    self.initial: State = {table: {} for table in TABLES}
    self.state: State = {table: {} for table in TABLES}
    self.produced: dict[str, str | int] = {}  # kind -> the value that 'that <kind>' means now

  def choice(self, options):
    return options[int(self.rng.integers(len(options)))]

  def add_row(self, table: str, key, row: dict) -> None:
    """A row that exists from the start: in the state before the task and in the one being executed."""
    for state in (self.initial, self.state):
      state[table].setdefault(key, copy.deepcopy(row))

  def row_of(self, kind: str, key: str, **fields) -> None:
    row = {'status': 'open', **fields}
    if kind == 'order':
      row.setdefault('customer', self.entities.draw('name'))
      row['price'] = self.entities.draw('amount')
    self.add_row(_TABLE[kind], key, row)

  def arguments(self, tool: Tool, given: dict) -> dict:
    """Fresh arguments for all parameters that are not given, with the rows that make the call succeed."""
    arguments = {
      p: given[p] if p in given else self.entities.draw(kind) for p, kind in tool.parameters.items()
    }
    if tool.name in _FIND:
      kind, field = _FIND[tool.name]
      self.row_of(kind, self.entities.draw(kind), **{field: arguments[field]})
    for parameter, kind in tool.parameters.items():
      if kind in _TABLE and parameter not in given:
        self.row_of(kind, arguments[parameter])
    if tool.name in ('check_balance', 'pay_amount'):
      self.add_row('accounts', arguments['person'], {'balance': self.entities.draw('amount')})
    return arguments

  def clause(self, tool: Tool, chained: str | None = None) -> tuple[str, ToolCall, str]:
    """(subtask text, call, response); `chained` names the parameter that takes an earlier result."""
    given = {} if chained is None else {chained: self.produced[tool.parameters[chained]]}
    arguments = self.arguments(tool, given)
    phrasing = self.choice(tool.phrasings)
    if chained is not None:
      kind = tool.parameters[chained]
      for written in (f'the {kind} {{{chained}}}', f'{kind} {{{chained}}}', f'{{{chained}}}'):
        if written in phrasing:
          phrasing = phrasing.replace(written, f'that {kind}')
          break
    response = execute(self.state, tool.name, arguments)
    if 'error' in response:
      raise RuntimeError(f'reference call {tool.name}({arguments}) fails: {response["error"]}')
    if tool.produces:
      self.produced[tool.produces] = response[tool.produces]
    return phrasing.format(**arguments), ToolCall(tool.name, arguments), json.dumps(response)

  def consumers(self, kind: str | None) -> list[tuple[Tool, str]]:
    """(tool, parameter) pairs that can take a fresh result of this kind."""
    pairs = [(t, p) for t in TOOLS.values() for p, k in t.parameters.items() if k == kind]
    # An amount can be paid or added up, over and over; without this most chains would end up as sums of sums.
    return (
      pairs if self.rng.random() < 0.2 else [(t, p) for t, p in pairs if t.name != 'add_numbers']
    )

  def chain(self, length: int, *, must_chain: bool) -> list[tuple[str, ToolCall, str]]:
    """`length` dependent clauses: after a producer mostly a consumer of what it returned."""
    clauses, fresh = [], None
    for i in range(length):
      consumers = self.consumers(fresh)
      last = i == length - 1
      chained = any('that ' in text for text, _, _ in clauses)
      if consumers and (self.rng.random() < 0.85 or (last and must_chain and not chained)):
        tool, parameter = self.choice(consumers)
        clauses.append(self.clause(tool, parameter))
      else:
        pool = [t for t in TOOLS.values() if t.produces] if not last else list(TOOLS.values())
        tool = self.choice(pool)
        clauses.append(self.clause(tool))
      fresh = tool.produces
    return clauses

  def listed(self, needed: list[str], extra: int, without: str | None = None) -> tuple[str, ...]:
    """The needed tools and `extra` others, shuffled; `without` is never among them."""
    others = [name for name in TOOLS if name not in needed and name != without]
    names = list(dict.fromkeys(needed)) + [str(n) for n in self.rng.permutation(others)[:extra]]
    return tuple(str(n) for n in self.rng.permutation(names))

  def distract(self) -> None:
    """Rows that no reference call touches, so that a wrong guess may find something."""
    for kind, field in _FIND.values():
      self.row_of(kind, self.entities.draw(kind), **{field: self.entities.draw('name')})

  def turn(self, clauses: list[tuple[str, ToolCall, str]], forms) -> Turn:
    subtasks, calls, responses = zip(*clauses)
    frame, joiner = self.choice(forms)
    query = self.choice(PREFIXES) + frame.format(joiner.join(subtasks)) + '.'
    return Turn(query, calls, responses, subtasks, report(responses[-1]))


def _single(w: _Writer, steps: int) -> tuple[list[Turn], tuple[str, ...]]:
  tool = w.choice(list(TOOLS.values()))
  return [w.turn([w.clause(tool)], PARALLEL_FORMS[:1])], w.listed(
    [tool.name], int(w.rng.integers(1, _EXTRA_TOOLS + 1))
  )


def _sequential(w: _Writer, steps: int) -> tuple[list[Turn], tuple[str, ...]]:
  clauses = w.chain(steps, must_chain=True)
  needed = [call.name for _, call, _ in clauses]
  return [w.turn(clauses, SEQUENTIAL_FORMS)], w.listed(needed, int(w.rng.integers(0, 3)))


def _parallel(w: _Writer, steps: int) -> tuple[list[Turn], tuple[str, ...]]:
  # Often the same tool several times, as in BFCL's `parallel`; otherwise different ones (`parallel_multiple`).
  one = w.choice(list(TOOLS.values()))
  tools = [one if w.rng.random() < 0.4 else w.choice(list(TOOLS.values())) for _ in range(steps)]
  clauses = [w.clause(tool) for tool in tools]
  return [w.turn(clauses, PARALLEL_FORMS)], w.listed(
    [t.name for t in tools], int(w.rng.integers(0, 3))
  )


def _irrelevant(w: _Writer, steps: int) -> tuple[list[Turn], tuple[str, ...]]:
  tool = w.choice(list(TOOLS.values()))
  extra = int(w.rng.integers(1, _EXTRA_TOOLS + 1))
  if w.rng.random() < 0.5:
    subtask, _, _ = w.clause(tool)
    answer, tools = NO_TOOL, w.listed([], extra + 1, without=tool.name)
  else:
    partial, missing = w.choice(tool.partials)
    subtask = partial.format(**w.arguments(tool, {}))
    answer, tools = missing_answer(missing), w.listed([tool.name], extra)
  query = w.choice(PREFIXES) + subtask + '.'
  return [Turn(query, (), (), (subtask,), answer)], tools


def _multi_turn(w: _Writer, steps: int) -> tuple[list[Turn], tuple[str, ...]]:
  turns, needed, fresh = [], [], None
  for _ in range(int(w.rng.integers(2, 4))):
    if w.rng.random() < 0.25:
      clauses = w.chain(2, must_chain=True)
    else:
      consumers = w.consumers(fresh)
      if consumers and w.rng.random() < 0.7:
        tool, parameter = w.choice(consumers)
        clauses = [w.clause(tool, parameter)]
      else:
        clauses = [w.clause(w.choice(list(TOOLS.values())))]
    fresh = TOOLS[clauses[-1][1].name].produces
    needed += [call.name for _, call, _ in clauses]
    turns.append(w.turn(clauses, SEQUENTIAL_FORMS if len(clauses) > 1 else PARALLEL_FORMS[:1]))
  return turns, w.listed(needed, int(w.rng.integers(0, 2)))


_MAKERS: dict[str, Callable] = {
  'single': _single,
  'sequential': _sequential,
  'parallel': _parallel,
  'irrelevant': _irrelevant,
  'multi_turn': _multi_turn,
}


def make_task(kind: str, index: int, *, seed: int, split: str, max_subtasks: int = 4) -> Task:
  """The `index`-th task of a kind: a pure function of its arguments.

  Args:
    kind: one of KINDS.
    index: number of the task.
    seed: of the whole task set.
    split: 'train' or 'eval'; the two share no name, id or amount.
    max_subtasks: largest number of subtasks of a sequential or parallel request, 2 to 5.
  """
  if kind not in KINDS:
    raise ValueError(f'unknown task kind {kind!r}; expected one of {KINDS}')
  if max_subtasks not in _STEP_SHARES:
    raise ValueError(f'max_subtasks is {max_subtasks}; expected 2 to 5')
  if split not in SPLITS:
    raise ValueError(f'unknown split {split!r}; expected one of {SPLITS}')
  rng = np.random.default_rng([seed, KINDS.index(kind), SPLITS.index(split), index])
  shares = np.array([_STEP_SHARES[k] for k in range(2, max_subtasks + 1)])
  steps = int(rng.choice(np.arange(2, max_subtasks + 1), p=shares / shares.sum()))
  writer = _Writer(rng, split)
  turns, tools = _MAKERS[kind](writer, steps)
  writer.distract()
  return Task(
    f'toolworld-{split}-{seed}-{kind}-{index}',
    kind,
    writer.choice(POLICIES),
    tools,
    writer.initial,
    tuple(turns),
  )
