"""What is asked about a seed, and the rows that come of the answers: Algorithm 1, one scenario a method.

Each seed is a generator that yields the prompts it can ask now, is sent the replies, and returns its rows. It knows nothing of
models and lanes, nor of other seeds; `pipeline.converse` serves them all together.
"""

import collections
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import calls_equal, parse_calls, print_calls, tool_response
from dcore_jax.data.seeds import Seed
from dcore_jax.distill import compose, decompose, verify
from dcore_jax.distill.compose import Solved
from dcore_jax.distill.wording import ORGANISM, Wording
from dcore_jax.rollout.backends import TOO_LONG, Reply
from dcore_jax.worlds.sandbox import open_sandbox

T = TypeVar('T')
Row = dict[
  str, Any
]  # {'id', 'kind', 'conversations': [{'role', 'content'}]}, the published schema and the kind
Ask = Generator[list[list[Message]], list[Reply], T]
Candidate = list[
  tuple[str, list[int] | None]
]  # subtasks with the positions of their calls; None where nobody could know them
VERIFY = ('calls', 'state')


class Dropped(Exception):
  """A seed that gives no rows. Its text is the reason, which is counted.

  `stage` says how far it came: 'decompose', 'generate' (a reasoning is missing) or 'verify' (all of it was generated, or as
  much as it took to see that it is wrong).
  """

  def __init__(self, reason: str, stage: str):
    super().__init__(reason)
    self.stage = stage


class Unreadable(Dropped):
  """A reply that cannot be used at all: it is asked again, with another random stream, as often as `retries` says."""


class Wrong(Dropped):
  """A reply that was read and is not right: it is asked again as often as `samples` says."""


@dataclasses.dataclass(frozen=True)
class Distiller:
  """Turns seeds into rows.

  Attributes:
    wording: prompts and templates.
    show_reference: whether the decomposer sees the reference calls. If not, nobody can tell which call belongs to which
      subtask, and the calls of all subtasks together are compared with the reference.
    examples: worked decompositions that its prompt shows.
    strict_count: as many subtasks as calls, one each, as the released code has it; else a subtask may own several.
    candidates: decompositions that are sampled at once; they are solved one after the other until one verifies.
    retries: further samples of a completion that cannot be read.
    samples: of a subtask until its calls are right. With 1 the success rate is that of first answers (method: section 1.5).
    verify: 'calls': exactly the reference calls, of independent subtasks in any order. 'state': whatever leaves the same state
      and gives the reference's outputs, where a seed has a world to execute calls in.
    max_chars: longest row kept, in characters of all its messages.
    exact_refusals: whether the model's answer to an irrelevant seed must be the reference text, as it can be where the
      world's refusals are canonical sentences. Else any text that calls nothing will do.

  Raises:
    ValueError: a value out of its range, or more examples than the wording has.
  """

  wording: Wording = ORGANISM
  show_reference: bool = True
  examples: int = 0
  strict_count: bool = False
  candidates: int = 1
  retries: int = 1
  samples: int = 1
  verify: str = 'calls'
  max_chars: int = 200_000
  exact_refusals: bool = False

  def __post_init__(self):
    if self.verify not in VERIFY:
      raise ValueError(f'verify = {self.verify!r}; expected one of {VERIFY}')
    if min(self.candidates, self.samples, self.max_chars) < 1 or self.retries < 0:
      raise ValueError(
        f'candidates = {self.candidates}, samples = {self.samples}, retries = {self.retries} and '
        f'max_chars = {self.max_chars} cannot be'
      )
    if not 0 <= self.examples <= len(self.wording.prompts.examples):
      known = len(self.wording.prompts.examples)
      raise ValueError(f'examples = {self.examples}: the wording {self.wording.name!r} has {known}')

  def rows(self, seed: Seed) -> Ask[list[Row]]:
    """The seed's conversation with the model; raises Dropped."""
    return {
      'single': self._single,
      'irrelevant': self._irrelevant,
      'sequential': self._sequential,
      'parallel': self._parallel,
    }[seed.kind](seed)

  # --- asking ---------------------------------------------------------------------------------------------------------------

  def _ask(
    self, prompts: Sequence[list[Message]], accept: Callable[[int, str], T]
  ) -> Ask[list[T | Dropped]]:
    """Asks all prompts together, and again those whose reply `accept(place, text)` refuses, within their budgets -> a value or
    the last refusal of each."""
    allowed = {Unreadable: self.retries, Wrong: self.samples - 1}
    refusals = [collections.Counter() for _ in prompts]
    values: list[T | Dropped] = [Dropped('', '')] * len(prompts)
    waiting = list(range(len(prompts)))
    while waiting:
      again = []
      for place, reply in zip(waiting, (yield [prompts[place] for place in waiting]), strict=True):
        try:
          if reply.error:
            raise Dropped(
              TOO_LONG if reply.error == TOO_LONG else 'refused by the endpoint', 'generate'
            )
          if not reply.finished:  # half a list of calls would read as a text
            raise Unreadable('cut off', 'generate')
          values[place] = accept(place, reply.text)
        except Dropped as dropped:
          values[place] = dropped
          refusals[place][type(dropped)] += 1
          if refusals[place][type(dropped)] <= allowed.get(type(dropped), 0):
            again.append(place)
      waiting = again
    return values

  def _solve(
    self, prompts: Sequence[list[Message]], check: Callable[[int, list[ToolCall]], bool]
  ) -> Ask[list[tuple[str, list[ToolCall]]]]:
    """(reasoning, calls) of each prompt; `check(place, calls)` says whether the calls can be right. A wrong one is noticed here
    rather than after the last step: the seed could no longer verify, and its remaining completions would be wasted."""

    def accept(place, text):
      solution = verify.read_solution(text)
      if solution is None:
        raise Unreadable('unclosed reasoning', 'generate')
      calls, problem = verify.read_calls(solution[1])
      if problem or not check(place, calls):
        raise Wrong(problem or 'wrong call', 'verify')
      return solution[0], calls

    return _all_right((yield from self._ask(prompts, accept)))

  def _decompose(self, seed: Seed) -> Ask[list[Candidate]]:
    """The distinct decompositions that hold, in the order of sampling; at least one."""
    calls = seed.calls if self.show_reference else None
    prompt = decompose.decompose_messages(
      seed.context, seed.query, calls, self.wording.prompts, self.examples
    )

    def accept(_, text):
      subtasks = decompose.parse_subtasks(text.rsplit('</think>', 1)[-1])
      if not subtasks:
        raise Unreadable('decomposition unparsable', 'decompose')
      problem = verify.decomposition_problem(
        seed, subtasks, seen=self.show_reference, strict_count=self.strict_count
      )
      if problem:
        raise Dropped(problem, 'decompose')
      if self.show_reference or self.strict_count:
        return decompose.own_calls(subtasks, len(seed.calls), self.strict_count)
      return [(text, None) for text, _ in subtasks]

    found = yield from self._ask([prompt] * self.candidates, accept)
    held = [value for value in found if not isinstance(value, Dropped)]
    if not held:
      # Where the decomposer's prompt is refused or too long, nothing was decomposed either.
      raise Dropped(str(found[-1]), 'decompose')
    return [value for place, value in enumerate(held) if value not in held[:place]]

  def _first_right(
    self, seed: Seed, solve: Callable[[Seed, Candidate], Ask[list[Row]]]
  ) -> Ask[list[Row]]:
    """Rows of the first decomposition whose solutions verify."""
    candidates = yield from self._decompose(seed)
    for candidate in candidates[:-1]:
      try:
        return (yield from solve(seed, candidate))
      except Dropped:
        continue
    return (yield from solve(seed, candidates[-1]))

  # --- scenarios ------------------------------------------------------------------------------------------------------------

  def _by_state(self, seed: Seed) -> bool:
    return self.verify == 'state' and seed.world is not None

  def _check_end(self, seed: Seed, calls: Sequence[ToolCall], *, ordered: bool) -> None:
    """Compares all calls with the reference, and what they do where they can be executed."""
    if not self._by_state(seed) and not calls_equal(calls, seed.calls, ordered=ordered):
      raise Dropped(
        'wrong call' if len(calls) >= len(seed.calls) else 'calls are missing', 'verify'
      )
    if problem := verify.state_problem(seed, calls):
      raise Dropped(problem, 'verify')

  def _single(self, seed: Seed) -> Ask[list[Row]]:
    by_state, expected = self._by_state(seed), list(seed.calls)
    [(reasoning, calls)] = yield from self._solve(
      [list(seed.conversations)],
      lambda _, calls: by_state or calls_equal(calls, expected, ordered=True),
    )
    self._check_end(seed, calls, ordered=True)
    answer = print_calls(calls)
    row = self._row(seed, '', seed.conversations, compose.single(reasoning, answer))
    return [row, *self._report(seed, [*seed.conversations, *_turn(answer, _outputs(seed, calls))])]

  def _sequential(self, seed: Seed) -> Ask[list[Row]]:
    return (yield from self._first_right(seed, self._steps))

  def _steps(self, seed: Seed, subtasks: Candidate) -> Ask[list[Row]]:
    """Subtask after subtask, each after the calls and outputs of those before it (method: section 1.5). Calls are executed
    where the seed has a world; else their recorded outputs stand in, which fit since only the reference calls go on."""
    texts, by_state = [text for text, _ in subtasks], self._by_state(seed)
    sandbox = open_sandbox(seed.world) if seed.world else None
    solving, history, made, targets = seed.context, list(seed.conversations), [], []
    for number, (text, index) in enumerate(subtasks):

      def check(_, calls, index=index):
        size = len(calls) if index is None else len(index)
        return by_state or calls_equal(
          calls, seed.calls[len(made) : len(made) + size], ordered=True
        )

      [(reasoning, calls)] = yield from self._solve([[*solving, Message('user', text)]], check)
      answer = print_calls(calls)
      outputs = (
        [sandbox.run(call) for call in calls]
        if sandbox
        else seed.tool_response[len(made) : len(made) + len(calls)]
      )
      targets.append(
        (
          history,
          compose.sequential(
            seed.query, texts, number, Solved(text, reasoning, answer), self.wording.templates
          ),
        )
      )
      made += calls
      solving = [*solving, Message('user', text), *_turn(answer, outputs)]
      history = [*history, *_turn(answer, outputs)]
    self._check_end(seed, made, ordered=True)
    rows = [
      self._row(seed, f'/{number}', before, target)
      for number, (before, target) in enumerate(targets)
    ]
    return rows + self._report(seed, history)

  def _parallel(self, seed: Seed) -> Ask[list[Row]]:
    return (yield from self._first_right(seed, self._together))

  def _together(self, seed: Seed, subtasks: Candidate) -> Ask[list[Row]]:
    """Subtasks are solved independently of each other and all at once (paper, Algorithm 1 line 13; the released code
    accumulates)."""
    by_state = self._by_state(seed)

    def check(place, calls):
      index = subtasks[place][1]
      return (
        by_state
        or index is None
        or calls_equal(calls, [seed.calls[i] for i in index], ordered=False)
      )

    solutions = yield from self._solve(
      [[*seed.context, Message('user', text)] for text, _ in subtasks], check
    )
    calls = [call for _, made in solutions for call in made]
    self._check_end(seed, calls, ordered=False)
    solved = [
      Solved(text, reasoning, print_calls(made))
      for (text, _), (reasoning, made) in zip(subtasks, solutions)
    ]
    row = self._row(
      seed, '', seed.conversations, compose.parallel(seed.query, solved, self.wording.templates)
    )
    history = (
      [*seed.conversations, *_turn(print_calls(calls), _outputs(seed, calls))]
      if seed.answer
      else []
    )
    return [row, *self._report(seed, history)]

  def _irrelevant(self, seed: Seed) -> Ask[list[Row]]:
    """Form I': the model explains what is missing. Its answer must be a text; the reference answer is what is trained."""

    def accept(_, text):
      solution = verify.read_solution(text)
      if solution is None:
        raise Unreadable('unclosed reasoning', 'generate')
      reasoning, answer = solution
      try:
        if parse_calls(answer):
          raise Wrong('called a tool', 'verify')
      except ValueError as error:
        raise Unreadable('unreadable call', 'verify') from error
      if self.exact_refusals and answer != seed.answer:
        raise Wrong('wrong explanation', 'verify')
      return reasoning

    prompt = decompose.explain_messages(seed.context, seed.query, self.wording.prompts)
    [reasoning] = _all_right((yield from self._ask([prompt], accept)))
    target = compose.irrelevant(seed.query, reasoning, seed.answer, self.wording.templates)
    return [self._row(seed, '', seed.conversations, target)]

  # --- rows -----------------------------------------------------------------------------------------------------------------

  def _report(self, seed: Seed, history: Sequence[Message]) -> list[Row]:
    """The row that ends the turn with a text, where the reference has one (form F)."""
    if not seed.answer:
      return []
    return [
      self._row(
        seed, '/report', history, compose.finished(seed.query, seed.answer, self.wording.templates)
      )
    ]

  def _row(self, seed: Seed, suffix: str, history: Sequence[Message], target: str) -> Row:
    messages = [*history, Message('assistant', target)]
    if problem := verify.row_problem(messages, self.max_chars):
      raise Dropped(problem, 'verify')
    return {
      'id': f'{seed.id}{suffix}',
      'kind': seed.kind,
      'conversations': [m.to_json() for m in messages],
    }


def _all_right(values: list[T | Dropped]) -> list[T]:
  for value in values:
    if isinstance(value, Dropped):
      raise value
  return values


def _turn(answer: str, outputs: Sequence[str]) -> list[Message]:
  """An answer and the outputs of its calls, as later prompts show them."""
  return [Message('assistant', answer), Message('user', '\n'.join(map(tool_response, outputs)))]


def _outputs(seed: Seed, calls: Sequence[ToolCall]) -> list[str]:
  """What calls give that are made at the seed's query: executed, or as recorded for the same call."""
  if seed.world:
    sandbox = open_sandbox(seed.world)
    return [sandbox.run(call) for call in calls]
  recorded = list(zip(seed.calls, seed.tool_response))
  outputs = []
  for call in calls:
    place = next(
      (i for i, (reference, _) in enumerate(recorded) if calls_equal([call], [reference])), None
    )
    if place is not None:
      outputs.append(recorded.pop(place)[1])
  return outputs
