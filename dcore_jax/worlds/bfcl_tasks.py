"""New tasks on BFCL's APIs: states, requests and references of our own, executed for real.

None of them is one of BFCL's test tasks.
"""

import dataclasses
from typing import Any

import numpy as np

from dcore_jax.chat.messages import ToolCall
from dcore_jax.worlds import bfcl_accounts, bfcl_car, bfcl_moves, bfcl_travel
from dcore_jax.worlds.bfcl import CLASSES, BfclSandbox, function_docs
from dcore_jax.worlds.bfcl_writer import Clause, Writer
from dcore_jax.worlds.environment import UserTurn, WorldTask

# Kinds, with what names the random stream of their tasks. A kind keeps its number whichever kinds
# there are, since another number would be other tasks.
_STREAMS = {'single': 0, 'sequential': 1, 'parallel': 2, 'irrelevant': 3, 'multi_turn': 4}
KINDS = tuple(_STREAMS)
# Drawn for each task, so that a model meets more than one wording of the policy.
POLICIES = (
  'You help the user with the functions below. Use no value that you were not given or did not '
  'look up.',
  'You are an assistant with access to the functions below. If none of them fits, or a value is '
  'missing, say so.',
  'Carry out what the user asks, with the functions below and nothing else.',
)
# How clauses become a sentence. {0} is the first clause, {1} the others.
_FRAMES = {
  'single': ('{0}.', 'Please {0}.', 'Could you {0}?'),
  'sequential': ('First {0}, then {1}.', 'Please {0}, and after that {1}.'),
  'parallel': ('{0}, and also {1}.', 'I would like you to {0}, and also {1}.'),
}
_REPERTOIRES = (
  bfcl_moves.REPERTOIRES
  | bfcl_accounts.REPERTOIRES
  | bfcl_car.REPERTOIRES
  | bfcl_travel.REPERTOIRES
)
# Draws of a clause, and of a whole task. Most draws fit the state; the bound turns a scenario in
# which none does into an error.
_TRIES = 200
_CHAIN_SHARE = 0.6  # clauses of a sequential request that take what the clause before them made


@dataclasses.dataclass(frozen=True)
class BfclTask(WorldTask):
  """A task with its reference solution.

  Attributes:
    policy: the first lines of the system message.
    classes: the APIs whose functions are listed.
    config: class -> scenario, as in BFCL's `initial_config`.
    without: names of functions that are not listed.
  """

  policy: str
  classes: tuple[str, ...]
  config: dict[str, Any]
  without: tuple[str, ...] = ()

  @property
  def functions(self) -> list[dict[str, Any]]:
    """The functions that are listed to the model, as BFCL describes them."""
    listed = []
    for name in self.classes:
      for document in function_docs(name):
        if document['name'] not in self.without:
          listed.append(document)
    return listed


def _capitalised(text: str) -> str:
  # The first letter alone: `capitalize` would lower the rest, and with it names.
  return text[0].upper() + text[1:]


def _sentence(writer: Writer, kind: str, texts: list[str]) -> str:
  joiner = ', and also ' if kind == 'parallel' else ', then '
  # One clause has no order, whatever the kind.
  frame = writer.choice(_FRAMES['single' if len(texts) == 1 else kind])
  return _capitalised(frame.format(texts[0], joiner.join(texts[1:])))


def _draw(writer: Writer, chained: bool) -> Clause | None:
  for _ in range(_TRIES):
    clause = writer.clause(chained)
    if clause is not None:
      return clause
  # The caller gives the whole task up, and draws it anew.
  return None


# A turn, and the calls of each of its subtasks: one subtask may need two calls.
_Drawn = tuple[UserTurn, list[list[ToolCall]]]


def _turn(writer: Writer, kind: str, count: int, *, later: bool = False) -> _Drawn | None:
  """A turn of `count` clauses; None where the state does not give them.

  Args:
    writer: draws and executes the clauses.
    kind: 'sequential' or 'parallel'.
    count: of the clauses.
    later: whether a turn came before, which the first clause may take up.
  """
  # What was made in an earlier turn has been reported, so that the user can name it.
  writer.fresh = set()
  clauses: list[Clause] = []
  calls: list[ToolCall] = []
  outputs: list[str] = []
  for number in range(count):
    # In a parallel request no clause may depend on another.
    follows = kind == 'sequential' and (number > 0 or later)
    clause = _draw(writer, follows and writer.rng.random() < _CHAIN_SHARE)
    if clause is None:
      return None
    clauses.append(clause)
    calls += clause.calls
    outputs += writer.outputs
  # A sequential request whose clauses do not depend on each other would be a parallel one.
  if kind == 'sequential' and count > 1 and not any(clause.chained for clause in clauses[1:]):
    return None
  texts = [clause.text for clause in clauses]
  turn = UserTurn(
    query=_sentence(writer, kind, texts),
    calls=tuple(calls),
    responses=tuple(outputs),
    subtasks=tuple(_capitalised(text) for text in texts),
    answer=' '.join(clause.report for clause in clauses),
  )
  return turn, [clause.calls for clause in clauses]


def _independent(writer: Writer, turn: UserTurn, owned: list[list[ToolCall]]) -> bool:
  """Whether the subtasks in the opposite order give the same outputs and leave the same state."""
  # From the same initial state, not from the one after the turn.
  other = BfclSandbox([writer.name], writer.config)
  outputs: list[str] = []
  for calls in reversed(owned):
    # Outputs are put back into the order of the turn, to be compared one by one.
    outputs = [other.run(call) for call in calls] + outputs
  return outputs == list(turn.responses) and other.state == writer.sandbox.state


@dataclasses.dataclass(frozen=True)
class _Parts:
  """What is drawn of a task: turns, the functions they are about, and those not to be listed."""

  turns: tuple[UserTurn, ...]
  needed: frozenset[str]
  without: tuple[str, ...] = ()


def _irrelevant(writer: Writer) -> _Parts | None:
  """A request that cannot be carried out: half of them lack a value, the others a function."""
  clause = _draw(writer, False)
  # Some requests lack nothing when a value is left out, such as "show my messages".
  if clause is None or clause.partial is None:
    return None
  # A dict keeps the order of the calls, which a set does not.
  names = dict.fromkeys(call.name for call in clause.calls)
  if writer.rng.random() < 0.5:
    text, answer = clause.partial
    needed = frozenset(names)
    without = ()
  else:
    # Leaving out one of several functions that do the same would leave the request solvable.
    if not all(name in writer.repertoire.sole for name in names):
      return None
    text = clause.text
    answer = f'I have no function with which I could {text}.'
    # Nothing is needed: the functions that are listed are all distractors.
    needed = frozenset()
    without = tuple(names)
  query = _sentence(writer, 'single', [text])
  turn = UserTurn(query=query, calls=(), responses=(), subtasks=(text,), answer=answer)
  return _Parts((turn,), needed, without)


def _parts(writer: Writer, kind: str, max_subtasks: int) -> _Parts | None:
  """The parts of a task; None where the draws do not give them."""
  if kind == 'irrelevant':
    return _irrelevant(writer)
  # The sizes of all kinds are drawn, whichever is wanted: tasks are fixed by their draws, and seed
  # files have been made from these.
  parallel = writer.number(2, max_subtasks)
  sequential = writer.number(2, max_subtasks)
  multi_turn = [writer.number(1, 3) for _ in range(writer.number(2, 3))]
  sizes = {
    'single': [1],
    'parallel': [parallel],
    'sequential': [sequential],
    'multi_turn': multi_turn,
  }[kind]
  relation = 'parallel' if kind == 'parallel' else 'sequential'
  turns: list[UserTurn] = []
  needed: set[str] = set()
  for number, size in enumerate(sizes):
    drawn = _turn(writer, relation, size, later=number > 0)
    if drawn is None:
      return None
    turn, owned = drawn
    # A single task is judged on one call; some clauses need two.
    if kind == 'single' and len(turn.calls) > 1:
      return None
    # Subtasks that interfere would have to be sequential.
    if kind == 'parallel' and not _independent(writer, turn, owned):
      return None
    turns.append(turn)
    needed |= {call.name for call in turn.calls}
  return _Parts(tuple(turns), frozenset(needed))


def _unlisted(writer: Writer, parts: _Parts, extra_functions: int | None) -> tuple[str, ...]:
  """The functions of the API that a task does not list."""
  if extra_functions is None:
    return parts.without
  names = [document['name'] for document in function_docs(writer.name)]
  others = [name for name in names if name not in parts.needed and name not in parts.without]
  kept = writer.several(others, extra_functions)
  return parts.without + tuple(name for name in others if name not in kept)


def make_task(
  kind: str,
  index: int,
  *,
  seed: int,
  classes: tuple[str, ...] = tuple(CLASSES),
  max_subtasks: int = 4,
  extra_functions: int | None = None,
) -> BfclTask:
  """Makes the `index`-th task of a kind: a pure function of its arguments.

  Args:
    kind: one of KINDS.
    index: the number of the task.
    seed: chooses the whole set of tasks.
    classes: the APIs; tasks take turns with them.
    max_subtasks: the largest number of subtasks of a sequential or parallel request.
    extra_functions: how many functions are listed beside those that the task is about; None lists
      the whole API, as BFCL does.

  Raises:
    ValueError: an unknown kind, or BFCL is not installed.
  """
  if kind not in KINDS:
    raise ValueError(f'unknown task kind {kind!r}; expected one of {KINDS}')
  # Tasks go round the APIs, so that each has an equal share.
  name = classes[index % len(classes)]
  for attempt in range(_TRIES):
    # Every attempt has its own stream: a task does not depend on how often others failed.
    rng = np.random.default_rng([seed, _STREAMS[kind], index, attempt])
    writer = Writer(rng, name, _REPERTOIRES[name])
    policy = writer.choice(POLICIES)
    # The scenario may have told the writer something that the model must know.
    if writer.briefing:
      policy = f'{policy} {writer.briefing}'
    parts = _parts(writer, kind, max_subtasks)
    if parts is not None:
      return BfclTask(
        id=f'bfcl-{seed}-{name}-{kind}-{index}',
        kind=kind,
        turns=parts.turns,
        policy=policy,
        classes=(name,),
        config=writer.config,
        without=_unlisted(writer, parts, extra_functions),
      )
  raise RuntimeError(f'no {kind} task in {_TRIES} attempts')
