"""Draws clauses of a request against the live state of one of BFCL's APIs.

Each clause comes with the calls that carry it out. Names, texts and states are our own. A move
looks at the live API, so that what it asks for succeeds now. What the API has answered decides what
later clauses can speak of ("that ticket", "the copy").
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Mention(NamedTuple):
  """Something that a request speaks of.

  Attributes:
    words: how it is spoken of, such as "that ticket" or "ticket 312".
    value: its number or name, as calls need it.
  """

  words: str
  value: Any


NOTHING = Mention('', None)
# Characters of the longest float that a later call can be asked to repeat.
_DIGITS = 8


@dataclasses.dataclass(frozen=True)
class Output:
  """A value that is not known before its clause is executed: an entry of its last output."""

  key: str


@dataclasses.dataclass
class Clause:
  """A part of a request.

  Attributes:
    text: the request in words.
    calls: what carries it out.
    report: what can be said of it when it is done.
    chained: whether it takes what an earlier clause returned or made.
    partial: (words that lack a value, the question for that value); None where nothing can be left
      out.
    makes: what later clauses can speak of once it is done. NOTHING ends what could be spoken of
      before; None leaves it.
  """

  text: str
  calls: list[ToolCall]
  report: str
  chained: bool = False
  partial: tuple[str, str] | None = None
  makes: Mention | None = None


# (writer, whether the clause must be chained) -> a clause whose calls succeed in the writer's
# state. None, or a clause that is not chained as asked, says that this draw does not fit the state.
Move = Callable[['Writer', bool], Clause | None]


@dataclasses.dataclass(frozen=True)
class Repertoire:
  """What can be asked of an API.

  Attributes:
    scenario: draws the state in which a task begins.
    moves: draw what is asked.
    sole: the functions without which the effect of their moves cannot be reached.
  """

  scenario: Callable[['Writer'], dict[str, Any]]
  moves: tuple[Move, ...]
  sole: frozenset[str]


class Writer:
  """Draws clauses of a request against a live scenario of one API.

  Attributes:
    rng: the source of all draws.
    name: the API's.
    repertoire: what can be asked of it.
    briefing: what the system message says of the user, such as an access token; the scenario may
      set it.
    config: {name: scenario}, from which the task begins.
    sandbox: the API after the clauses that have been drawn.
    outputs: those of the last clause.
    fresh: values made in this turn, which the user has not seen and cannot name.
  """

  def __init__(self, rng: np.random.Generator, name: str, repertoire: Repertoire):
    self.rng = rng
    self.name = name
    self.repertoire = repertoire
    self.briefing = ''
    # The scenario is drawn with this writer, and may set `briefing`: it comes after the fields
    # above.
    self.config = {name: repertoire.scenario(self)}
    self.sandbox = BfclSandbox([name], self.config)
    self.outputs: list[str] = []
    self.fresh: set[Any] = set()
    # A clause may make something, and speaks of something; the next one can refer to either.
    self._latest = NOTHING  # what a chained clause speaks of
    self._spoken: Mention | None = None  # what the clause that is being drawn speaks of
    self._made: set[str] = set()  # printed calls, each of which is made once in a task

  @property
  def api(self) -> Any:
    """The live instance of the API's class."""
    return self.sandbox.instances[self.name]

  @property
  def latest(self) -> Mention:
    """What a chained clause speaks of: the last thing that was made or spoken of."""
    return self._latest

  def choice(self, options: Any) -> Any:
    """One of the options."""
    options = list(options)
    return options[int(self.rng.integers(len(options)))]

  def several(self, options: Any, count: int) -> list[Any]:
    """`count` different options, in the order of the options."""
    options = list(options)
    return [options[i] for i in sorted(self.rng.permutation(len(options))[:count].tolist())]

  def number(self, low: int, high: int) -> int:
    """An integer from `low` to `high`, both included."""
    # numpy excludes the upper end, and its integers do not print as Python's.
    return int(self.rng.integers(low, high + 1))

  def which(self, chained: bool, candidates: Any, noun: str, called: str = '{}') -> Mention | None:
    """Draws what a clause is about.

    Args:
      chained: whether to take what was last spoken of, instead of something the user can name.
      candidates: values of which one is taken.
      noun: what a later clause calls it: "that <noun>".
      called: how this clause calls it, with {} for the value.

    Returns:
      None where no candidate fits.
    """
    # Nothing else can be meant by "that ...", so that there is no choice.
    if chained:
      self._spoken = self._latest
      return self._latest if self._latest.value in candidates else None
    # The user cannot name what was made in this turn: its number is not known yet.
    known = [candidate for candidate in candidates if candidate not in self.fresh]
    if not known:
      return None
    # The user names it in this clause, and a later clause can refer to it.
    value = self.choice(known)
    self._spoken = Mention(f'that {noun}', value)
    return Mention(called.format(value), value)

  def clause(self, chained: bool) -> Clause | None:
    """A clause that has been executed; None where a draw does not fit the state."""
    self._spoken = None
    clause = self.choice(self.repertoire.moves)(self, chained)
    # A move that cannot be chained returns its plain form, which was not asked for.
    if clause is None or clause.chained != chained:
      return None
    # Compared as text, in which equal calls are equal.
    printed = {print_calls([call]) for call in clause.calls}
    # A repeated call would be one subtask twice.
    if printed & self._made:
      return None
    self._made |= printed
    # Executed at once: the next clause is drawn from the state that this one leaves.
    self.outputs = [self.sandbox.run(call) for call in clause.calls]
    # An error here is a fault of the move, and not of a model: it must not become data.
    if any(_is_error(output) for output in self.outputs):
      raise RuntimeError(f'reference calls {print_calls(clause.calls)} fail: {self.outputs}')
    makes = clause.makes
    # Only the executed call knows the value.
    if makes and isinstance(makes.value, Output):
      value = json.loads(self.outputs[-1])[makes.value.key]
      # A model that repeats a long float would have to copy every digit.
      if isinstance(value, float) and len(repr(value)) > _DIGITS:
        makes = NOTHING
      else:
        makes = Mention(makes.words, value)
    # The user has not seen it: within this turn it can only be called "that ...".
    if makes:
      self.fresh.add(makes.value)
    self._latest = makes or self._spoken or self._latest
    return clause


# BFCL's APIs report errors in two ways: as text, and as a field of their output.
def _is_error(output: str) -> bool:
  if output.startswith('Error during execution'):
    return True
  try:
    return 'error' in json.loads(output)
  except (TypeError, ValueError):
    return False
