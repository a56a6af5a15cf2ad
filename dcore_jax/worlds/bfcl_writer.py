"""Draws clauses of a request against the live state of one of BFCL's APIs, each with the calls that carry it out.

Names, texts and states are our own. A move looks at the live API, so that what it asks for succeeds now; what an API has
answered decides what later clauses can speak of ("that ticket", "the copy").
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.worlds.bfcl import BfclSandbox

FIRST = (
  'mara',
  'oskar',
  'ilse',
  'tomas',
  'priya',
  'kofi',
  'lena',
  'bruno',
  'yuki',
  'amadou',
  'vera',
  'nils',
)
LAST = ('Brandt', 'Okoye', 'Lindqvist', 'Moreau', 'Tanaka', 'Farkas', 'Achebe', 'Novak')
PLACES = (
  'harbour',
  'orchard',
  'lighthouse',
  'quarry',
  'market',
  'observatory',
  'greenhouse',
  'foundry',
  'ferry',
  'archive',
)
LINES = (
  'north wing needs paint',
  'order twelve more crates',
  'call the mason on Monday',
  'two guests arrive late',
  'water the ferns',
  'invoice was paid in cash',
  'key hangs behind the stove',
  'train leaves at seven',
)
NOTHING = ('', None)
_DIGITS = 8  # of a number that a later call can repeat


@dataclasses.dataclass(frozen=True)
class Output:
  """A value that the last output of a clause will hold under this key."""

  key: str


@dataclasses.dataclass
class Clause:
  """A part of a request: in words, as calls, as what can be reported of it, and with a value left out."""

  text: str
  calls: list[ToolCall]
  report: str
  chained: bool = False  # it takes what an earlier clause returned or made
  partial: tuple[str, str] | None = None  # (words that lack a value, the question for it)
  makes: tuple[str, Any] | None = (
    None  # (what it made is called from now on, its number or name, or where that will stand)
  )


Move = Callable[['Writer', bool], Clause | None]


@dataclasses.dataclass(frozen=True)
class Repertoire:
  """What can be asked of an API: its scenario, the moves, and the functions without which what they do cannot be done."""

  scenario: Callable[['Writer'], dict[str, Any]]
  moves: tuple[Move, ...]
  sole: frozenset[str]


class Writer:
  """Draws clauses against a live scenario of one API; `outputs` are those of the last one."""

  def __init__(self, rng: np.random.Generator, name: str, repertoire: Repertoire):
    self.rng, self.name, self.repertoire = rng, name, repertoire
    self.briefing = ''  # what the system message says of the user, such as an access token
    self.config = {name: repertoire.scenario(self)}
    self.sandbox = BfclSandbox([name], self.config)
    self.latest: tuple[str, Any] = (
      NOTHING  # what a later clause can speak of without naming it, and what that is
    )
    self.spoken: tuple[str, Any] | None = None  # what the clause that is being drawn speaks of
    self.outputs: list[str] = []
    self.made: set[str] = set()  # calls, each of which is made once in a task
    self.fresh: set[Any] = (
      set()
    )  # made in this turn: its number is in nothing that the user has seen

  @property
  def api(self) -> Any:
    return self.sandbox.instances[self.name]

  def choice(self, options: Any) -> Any:
    options = list(options)
    return options[int(self.rng.integers(len(options)))]

  def several(self, options: Any, count: int) -> list[Any]:
    """Different ones, in the order of the options."""
    options = list(options)
    return [options[i] for i in sorted(self.rng.permutation(len(options))[:count].tolist())]

  def number(self, low: int, high: int) -> int:
    return int(self.rng.integers(low, high + 1))

  def which(
    self, chained: bool, candidates: Any, noun: str, called: str = '{}'
  ) -> tuple[str, Any] | None:
    """(how one of the candidates is spoken of, what it is): the one that was last spoken of, or one that the user can name."""
    if chained:
      self.spoken = self.latest
      return self.latest if self.latest[1] in candidates else None
    known = [one for one in candidates if one not in self.fresh]
    if not known:
      return None
    self.spoken = f'that {noun}', self.choice(known)
    return called.format(self.spoken[1]), self.spoken[1]

  def clause(self, chained: bool) -> Clause | None:
    """A clause that succeeds now, executed; None where a draw does not fit the state."""
    self.spoken = None
    clause = self.choice(self.repertoire.moves)(self, chained)
    printed = {print_calls([call]) for call in clause.calls} if clause else set()
    if clause is None or clause.chained != chained or printed & self.made:
      return None
    self.made |= printed
    outputs = [self.sandbox.run(call) for call in clause.calls]
    if any(_is_error(output) for output in outputs):
      raise RuntimeError(f'reference calls {print_calls(clause.calls)} fail: {outputs}')
    makes = clause.makes
    if makes and isinstance(makes[1], Output):
      value = json.loads(outputs[-1])[makes[1].key]
      makes = (
        NOTHING if isinstance(value, float) and len(repr(value)) > _DIGITS else (makes[0], value)
      )
    if makes:
      self.fresh.add(makes[1])
    self.latest = makes or self.spoken or self.latest
    self.outputs = outputs
    return clause


def _is_error(output: str) -> bool:
  if output.startswith('Error during execution'):
    return True
  try:
    return 'error' in json.loads(output)
  except (TypeError, ValueError):
    return False
