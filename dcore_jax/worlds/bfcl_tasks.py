"""New tasks on BFCL's APIs: states, requests and references of our own, executed for real. Never one of the test tasks."""

import dataclasses
from typing import Any

import numpy as np

from dcore_jax.worlds import bfcl_accounts, bfcl_moves, bfcl_trips
from dcore_jax.worlds.bfcl import CLASSES, BfclSandbox, function_docs
from dcore_jax.worlds.bfcl_writer import Clause, Writer
from dcore_jax.worlds.environment import Turn

KINDS = ('single', 'sequential', 'parallel', 'irrelevant', 'multi_turn')
POLICIES = (
  'You help the user with the functions below. Use no value that you were not given or did not look up.',
  'You are an assistant with access to the functions below. If none of them fits, or a value is missing, say so.',
  'Carry out what the user asks, with the functions below and nothing else.',
)
_FRAMES = {
  'single': ('{0}.', 'Please {0}.', 'Could you {0}?'),
  'sequential': ('First {0}, then {1}.', 'Please {0}, and after that {1}.'),
  'parallel': ('{0}, and also {1}.', 'I would like you to {0}, and also {1}.'),
}
_REPERTOIRES = bfcl_moves.REPERTOIRES | bfcl_accounts.REPERTOIRES | bfcl_trips.REPERTOIRES
_TRIES = 200  # draws of a clause, or of a set of independent ones


@dataclasses.dataclass(frozen=True)
class BfclTask:
  """A task with its reference solution. `without` names the functions that are not listed."""

  id: str
  kind: str
  policy: str
  classes: tuple[str, ...]
  config: dict[str, Any]
  turns: tuple[Turn, ...]
  turn_calls: tuple[
    tuple[tuple[int, ...], ...], ...
  ]  # of each turn, the calls that its subtasks own: one may own two
  without: tuple[str, ...] = ()

  @property
  def functions(self) -> list[dict[str, Any]]:
    """What is listed to the model."""
    return [
      doc for name in self.classes for doc in function_docs(name) if doc['name'] not in self.without
    ]


def _sentence(w: Writer, kind: str, texts: list[str]) -> str:
  joiner = ', and also ' if kind == 'parallel' else ', then '
  frame = w.choice(_FRAMES['single' if len(texts) == 1 else kind])
  text = frame.format(texts[0], joiner.join(texts[1:]))
  return text[0].upper() + text[1:]


def _draw(w: Writer, chained: bool) -> Clause | None:
  return next((clause for clause in (w.clause(chained) for _ in range(_TRIES)) if clause), None)


def _turn(
  w: Writer, kind: str, count: int, later: bool = False
) -> tuple[Turn, tuple[tuple[int, ...], ...]] | None:
  """A turn of `count` clauses and which calls they own; None where the state does not give them. A `later` one may begin with
  what the one before ended with."""
  clauses, outputs, w.fresh = [], [], set()
  for number in range(count):
    clause = _draw(w, kind == 'sequential' and (number > 0 or later) and w.rng.random() < 0.6)
    if clause is None:
      return None
    clauses.append(clause)
    outputs += w.outputs
  if kind == 'sequential' and count > 1 and not any(clause.chained for clause in clauses[1:]):
    return None
  calls = [call for clause in clauses for call in clause.calls]
  ends = np.cumsum([len(clause.calls) for clause in clauses])
  owned = tuple(
    tuple(range(end - len(clause.calls), end)) for clause, end in zip(clauses, ends.tolist())
  )
  texts = [clause.text for clause in clauses]
  turn = Turn(
    _sentence(w, kind, texts),
    tuple(calls),
    tuple(outputs),
    tuple(text[0].upper() + text[1:] for text in texts),
    ' '.join(clause.report for clause in clauses),
  )
  return turn, owned


def _independent(w: Writer, turn: Turn, owned: tuple[tuple[int, ...], ...]) -> bool:
  """Whether the subtasks in the opposite order give the same outputs and leave the same state."""
  other = BfclSandbox([w.name], w.config)
  outputs = {i: other.run(turn.calls[i]) for indices in reversed(owned) for i in indices}
  return [outputs[i] for i in range(len(turn.calls))] == list(
    turn.responses
  ) and other.state == w.sandbox.state


def _irrelevant(w: Writer) -> tuple[Turn, tuple[str, ...]] | None:
  """(a request that cannot be carried out, the functions that are not listed): it lacks a value, or its function is missing."""
  clause = _draw(w, False)
  if clause is None or clause.partial is None:
    return None
  if w.rng.random() < 0.5:
    text, question = clause.partial
    return Turn(_sentence(w, 'single', [text]), (), (), (text,), question), ()
  if not all(call.name in w.repertoire.sole for call in clause.calls):
    return None
  answer = f'I have no function with which I could {clause.text}.'
  return Turn(_sentence(w, 'single', [clause.text]), (), (), (clause.text,), answer), tuple(
    {c.name for c in clause.calls}
  )


def make_task(
  kind: str, index: int, *, seed: int, classes: tuple[str, ...] = tuple(CLASSES)
) -> BfclTask:
  """The `index`-th task of a kind: a pure function of its arguments.

  Raises:
    ValueError: an unknown kind, or BFCL is not installed.
  """
  if kind not in KINDS:
    raise ValueError(f'unknown task kind {kind!r}; expected one of {KINDS}')
  for attempt in range(_TRIES):
    rng = np.random.default_rng([seed, KINDS.index(kind), index, attempt])
    name = classes[index % len(classes)]
    w = Writer(rng, name, _REPERTOIRES[name])
    identity = f'bfcl-{seed}-{w.name}-{kind}-{index}'
    policy = w.choice(POLICIES) + (f' {w.briefing}' if w.briefing else '')
    if kind == 'irrelevant':
      if found := _irrelevant(w):
        return BfclTask(identity, kind, policy, (w.name,), w.config, (found[0],), ((),), found[1])
      continue
    sizes = {
      'single': [1],
      'parallel': [w.number(2, 4)],
      'sequential': [w.number(2, 4)],
      'multi_turn': [w.number(1, 3) for _ in range(w.number(2, 3))],
    }[kind]
    how = 'parallel' if kind == 'parallel' else 'sequential'
    turns = [_turn(w, how, size, number > 0) for number, size in enumerate(sizes)]
    if None in turns or (kind == 'single' and len(turns[0][0].calls) > 1):
      continue
    if kind == 'parallel' and not _independent(w, *turns[0]):
      continue
    return BfclTask(
      identity,
      kind,
      policy,
      (w.name,),
      w.config,
      tuple(turn for turn, _ in turns),
      tuple(owned for _, owned in turns),
    )
  raise RuntimeError(f'no {kind} task in {_TRIES} attempts')
