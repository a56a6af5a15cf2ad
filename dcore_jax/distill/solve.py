"""Algorithm 1 for one seed: what is asked about it, and the rows that come of the answers.

Every seed is a generator that yields the prompts it can ask now, is sent the replies, and returns
its rows. It knows nothing of models, lanes or other seeds; `algorithm.converse` serves all seeds
together.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dcore_jax.chat.call_text import split_answer
from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.thoughts import holds_tag
from dcore_jax.chat.tool_calls import calls_equal, parse_calls, print_calls, tool_response
from dcore_jax.data.seeds import Seed
from dcore_jax.distill import compose, decompose, verify
from dcore_jax.distill.asking import (
  Ask,
  Dropped,
  Unreadable,
  Wrong,
  all_accepted,
  ask_until_accepted,
)
from dcore_jax.distill.compose import Solved
from dcore_jax.distill.wording import ORGANISM_WORDING, Wording
from dcore_jax.worlds.registry import open_sandbox

# (reasoning, calls) of a solved prompt.
Solution = tuple[str, list[ToolCall]]
# Subtasks with the positions of their calls; None where nobody could know them.
Candidate = list[tuple[str, list[int] | None]]
# The published schema and the kind: {'id', 'kind', 'conversations': [{'role', 'content'}]}.
Row = dict[str, Any]
# Ways to verify calls: by comparison with the reference, or by what they do to the world.
VERIFY = ('calls', 'state')


@dataclasses.dataclass(frozen=True)
class Distiller:
  """Turns seeds into rows.

  Attributes:
    wording: prompts and templates.
    show_reference: whether the decomposer sees the reference calls. If not, nobody can tell which
      call belongs to which subtask, and the calls of all subtasks together are compared with the
      reference.
    examples: number of worked decompositions that the decomposer's prompt shows.
    strict_count: whether there must be as many subtasks as calls, one each, as in the released
      code. Otherwise a subtask may own several calls.
    candidates: number of decompositions that are sampled at once. They are solved one after the
      other until one verifies.
    retries: number of further samples of a completion that cannot be read.
    samples: number of samples of a subtask until its calls are right. With 1 the success rate is
      that of first answers (docs/method.md, section 1.5).
    verify: what verifies calls. 'calls': exactly the reference calls, in any order where subtasks
      are independent. 'state': whatever leaves the same state and gives the reference's outputs,
      where a seed has a world to execute calls in.
    max_chars: length of the longest row kept, in characters of all its messages.
    exact_refusals: whether the model's answer to an irrelevant seed must be the reference text,
      as it can be where the world's refusals are canonical sentences. Otherwise any text that
      calls nothing is right.

  Raises:
    ValueError: a value out of its range, or more examples than the wording has.
  """

  wording: Wording = ORGANISM_WORDING
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
    # Everything is checked here, before a seed has cost a completion.
    if self.verify not in VERIFY:
      raise ValueError(f'verify = {self.verify!r}; expected one of {VERIFY}')
    if min(self.candidates, self.samples, self.max_chars) < 1 or self.retries < 0:
      raise ValueError(
        f'candidates = {self.candidates}, samples = {self.samples}, retries = {self.retries} and '
        f'max_chars = {self.max_chars} cannot be'
      )
    known = len(self.wording.prompts.examples)
    if not 0 <= self.examples <= known:
      raise ValueError(f'examples = {self.examples}: the wording {self.wording.name!r} has {known}')

  def rows(self, seed: Seed) -> Ask[list[Row]]:
    """Holds the seed's conversation with the model and returns its rows.

    Raises:
      Dropped: the seed gives no rows.
    """
    # One method for each scenario of the paper.
    scenarios = {
      'single': self._single,
      'irrelevant': self._irrelevant,
      'sequential': self._sequential,
      'parallel': self._parallel,
    }
    # What a trace quotes must not close its thoughts. That of a single call quotes the request only
    # in its report.
    quotes = seed.kind != 'single' or bool(seed.answer)
    if quotes and holds_tag(seed.query + seed.answer):
      raise Dropped(verify.TAG_IN_TEXT, 'decompose')
    return (yield from scenarios[seed.kind](seed))

  # --- asking -------------------------------------------------------------------------------------

  def _solve(
    self, prompts: Sequence[list[Message]], check: Callable[[int, list[ToolCall]], bool]
  ) -> Ask[list[Solution]]:
    """Asks for the solution of each prompt.

    `check(place, calls)` says whether calls can be right. Wrong ones are noticed here rather than
    after the last step: the seed could no longer verify, and its remaining completions would be
    wasted.
    """

    def accept(place: int, text: str) -> Solution:
      reasoning, answer = _read_solution(text)
      calls, problem = verify.read_calls(answer)
      if problem or not check(place, calls):
        # Whether it can be read decides the reason; both count as a wrong sample.
        raise Wrong(problem or 'wrong call', 'verify')
      return reasoning, calls

    solutions = yield from ask_until_accepted(
      prompts, accept, retries=self.retries, samples=self.samples
    )
    return all_accepted(solutions)

  def _decompose(self, seed: Seed) -> Ask[list[Candidate]]:
    """Asks for decompositions; returns the distinct ones that hold, in the order of sampling."""
    # A decomposer that sees the calls can say which of them belongs to which subtask.
    calls = seed.calls if self.show_reference else None
    prompt = decompose.decompose_messages(
      seed.context, seed.query, calls, self.wording.prompts, self.examples
    )

    def accept(_: int, text: str) -> Candidate:
      # The thoughts may hold drafts of the list. Only what follows them is meant.
      subtasks = decompose.parse_subtasks(split_answer(text)[1])
      if not subtasks:
        raise Unreadable('decomposition unparsable', 'decompose')
      problem = verify.decomposition_problem(
        seed, subtasks, seen=self.show_reference, strict_count=self.strict_count
      )
      if problem:
        # It is not asked for again: `candidates` is the budget for other decompositions.
        raise Dropped(problem, 'decompose')
      if self.show_reference or self.strict_count:
        return decompose.own_calls(subtasks, len(seed.calls), self.strict_count)
      # A decomposer that has not seen the calls cannot know their numbers, even if it writes some.
      return [(text, None) for text, _ in subtasks]

    found = yield from ask_until_accepted(
      [prompt] * self.candidates, accept, retries=self.retries, samples=self.samples
    )
    # Equal decompositions are solved once. Another try would be one more sample of their subtasks
    # than `samples` allows.
    distinct = []
    for value in found:
      if not isinstance(value, Dropped) and value not in distinct:
        distinct.append(value)
    if not distinct:
      # Whatever the reason is, even a prompt that is too long: nothing was decomposed.
      raise Dropped(str(found[-1]), 'decompose')
    return distinct

  def _first_right(
    self, seed: Seed, solve: Callable[[Seed, Candidate], Ask[list[Row]]]
  ) -> Ask[list[Row]]:
    """Returns the rows of the first decomposition whose solutions verify."""
    candidates = yield from self._decompose(seed)
    for candidate in candidates[:-1]:
      try:
        return (yield from solve(seed, candidate))
      except Dropped:
        continue
    # The last refusal is the reason that is counted for the seed.
    return (yield from solve(seed, candidates[-1]))

  # --- scenarios ----------------------------------------------------------------------------------

  def _single(self, seed: Seed) -> Ask[list[Row]]:
    """Solves a seed of one call with the conversation as it is (form R)."""

    def check(_: int, calls: list[ToolCall]) -> bool:
      return self._by_state(seed) or calls_equal(calls, seed.calls, ordered=True)

    [(reasoning, calls)] = yield from self._solve([list(seed.conversations)], check)
    # Where the seed has a world, what the calls do is compared as well.
    self._check_end(seed, calls, ordered=True)
    answer = print_calls(calls)
    row = self._row(seed, '', seed.conversations, compose.single(reasoning, answer))
    history = [*seed.conversations, *_turn(answer, _outputs(seed, calls))]
    return [row, *self._report(seed, history)]

  def _sequential(self, seed: Seed) -> Ask[list[Row]]:
    return (yield from self._first_right(seed, self._steps))

  def _steps(self, seed: Seed, subtasks: Candidate) -> Ask[list[Row]]:
    """Solves subtask after subtask, each after the calls and outputs of those before it.

    docs/method.md, section 1.5. Calls are executed where the seed has a world. Elsewhere their
    recorded outputs are shown; they fit, since only the reference calls pass the check.
    """
    texts = [text for text, _ in subtasks]
    sandbox = open_sandbox(seed.world) if seed.world else None
    # Two conversations grow side by side: the model sees the subtasks in place of the query, while
    # the rows show the query alone.
    solving = list(seed.context)
    history = list(seed.conversations)
    made: list[ToolCall] = []
    targets = []
    for number, (text, index) in enumerate(subtasks):
      # What this step must make begins where the step before ended.
      check = self._step_check(seed, len(made), index)
      solving.append(Message('user', text))
      [(reasoning, calls)] = yield from self._solve([list(solving)], check)
      solved = Solved(text, reasoning, print_calls(calls))
      target = compose.sequential(seed.query, texts, number, solved, self.wording.templates)
      # A copy, since the conversation grows below.
      targets.append((list(history), target))
      if sandbox:
        outputs = [sandbox.run(call) for call in calls]
      else:
        outputs = seed.tool_response[len(made) : len(made) + len(calls)]
      made += calls
      turn = _turn(solved.answer, outputs)
      solving += turn
      history += turn
    # Each step was compared by itself; too few of them are noticed only here.
    self._check_end(seed, made, ordered=True)
    rows = [
      self._row(seed, f'/{number}', before, target)
      for number, (before, target) in enumerate(targets)
    ]
    return rows + self._report(seed, history)

  def _step_check(
    self, seed: Seed, start: int, index: list[int] | None
  ) -> Callable[[int, list[ToolCall]], bool]:
    """Makes the check of a step: it must make the reference calls from number `start` on.

    Where nobody knows how many of them are its own, it may make any number.
    """

    def check(_: int, calls: list[ToolCall]) -> bool:
      size = len(calls) if index is None else len(index)
      expected = seed.calls[start : start + size]
      return self._by_state(seed) or calls_equal(calls, expected, ordered=True)

    return check

  def _parallel(self, seed: Seed) -> Ask[list[Row]]:
    return (yield from self._first_right(seed, self._together))

  def _together(self, seed: Seed, subtasks: Candidate) -> Ask[list[Row]]:
    """Solves subtasks independently of each other and all at once.

    This is the paper's Algorithm 1, line 13. In the released code each subtask sees the solutions
    of those before it.
    """

    def check(place: int, calls: list[ToolCall]) -> bool:
      _, index = subtasks[place]
      if self._by_state(seed) or index is None:
        return True
      # Any order within a subtask, since its calls are independent, too.
      return calls_equal(calls, [seed.calls[i] for i in index], ordered=False)

    # Every subtask after the same context: none of them sees another's solution.
    prompts = [[*seed.context, Message('user', text)] for text, _ in subtasks]
    solutions = yield from self._solve(prompts, check)
    calls: list[ToolCall] = []
    solved = []
    for (text, _), (reasoning, made) in zip(subtasks, solutions, strict=True):
      calls += made
      solved.append(Solved(text, reasoning, print_calls(made)))
    self._check_end(seed, calls, ordered=False)
    # The order of the subtasks, whatever the order of their completions.
    target = compose.parallel(seed.query, solved, self.wording.templates)
    row = self._row(seed, '', seed.conversations, target)
    # Without a report nothing follows the calls, and their outputs may not be recorded.
    if not seed.answer:
      return [row]
    history = [*seed.conversations, *_turn(print_calls(calls), _outputs(seed, calls))]
    return [row, *self._report(seed, history)]

  def _irrelevant(self, seed: Seed) -> Ask[list[Row]]:
    """Lets the model explain what is missing (form I').

    Its answer must be a text. The reference answer is what is trained.
    """

    def accept(_: int, text: str) -> str:
      reasoning, answer = _read_solution(text)
      _check_no_call(answer)
      if self.exact_refusals and answer != seed.answer:
        raise Wrong('wrong explanation', 'verify')
      return reasoning

    prompt = decompose.explain_messages(seed.context, seed.query, self.wording.prompts)
    reasonings = yield from ask_until_accepted(
      [prompt], accept, retries=self.retries, samples=self.samples
    )
    [reasoning] = all_accepted(reasonings)
    # The reference answer is trained; the model gives only the reasoning for it.
    target = compose.irrelevant(seed.query, reasoning, seed.answer, self.wording.templates)
    return [self._row(seed, '', seed.conversations, target)]

  # --- checks and rows ----------------------------------------------------------------------------

  def _by_state(self, seed: Seed) -> bool:
    return self.verify == 'state' and seed.world is not None

  def _check_end(self, seed: Seed, calls: Sequence[ToolCall], *, ordered: bool) -> None:
    """Compares all calls with the reference, and what they do where they can be executed."""
    if not self._by_state(seed) and not calls_equal(calls, seed.calls, ordered=ordered):
      # Too few calls and wrong ones are different faults, and are counted apart.
      enough = len(calls) >= len(seed.calls)
      raise Dropped('wrong call' if enough else 'calls are missing', 'verify')
    problem = verify.state_problem(seed, calls)
    if problem:
      raise Dropped(problem, 'verify')

  def _report(self, seed: Seed, history: Sequence[Message]) -> list[Row]:
    """Makes the row that ends the turn with a text, where the reference has one (form F)."""
    if not seed.answer:
      return []
    target = compose.finished(seed.query, seed.answer, self.wording.templates)
    return [self._row(seed, '/report', history, target)]

  def _row(self, seed: Seed, suffix: str, history: Sequence[Message], target: str) -> Row:
    messages = [*history, Message('assistant', target)]
    # A row that is unfit drops the whole seed: its other rows would lack a step.
    problem = verify.row_problem(messages, self.max_chars)
    if problem:
      raise Dropped(problem, 'verify')
    return {
      'id': f'{seed.id}{suffix}',
      'kind': seed.kind,
      'conversations': [message.to_json() for message in messages],
    }


def _read_solution(text: str) -> tuple[str, str]:
  """Splits a reply into (reasoning, answer)."""
  solution = verify.read_solution(text)
  if solution is None:
    raise Unreadable('unclosed reasoning', 'generate')
  return solution


def _check_no_call(answer: str) -> None:
  """Refuses an answer that calls a tool, or seems to."""
  try:
    calls = parse_calls(answer)
  except ValueError as error:
    raise Unreadable('unreadable call', 'verify') from error
  if calls:
    raise Wrong('called a tool', 'verify')


def _turn(answer: str, outputs: Sequence[str]) -> list[Message]:
  """Writes an answer and the outputs of its calls as later prompts show them."""
  return [Message('assistant', answer), Message('user', '\n'.join(map(tool_response, outputs)))]


def _outputs(seed: Seed, calls: Sequence[ToolCall]) -> list[str]:
  """Returns the outputs of calls made at the seed's query: executed, or as recorded for them."""
  if seed.world:
    sandbox = open_sandbox(seed.world)
    return [sandbox.run(call) for call in calls]
  # Independent calls may be made in another order than the recorded one, so each output is looked
  # up by its call.
  recorded = list(zip(seed.calls, seed.tool_response, strict=False))
  outputs = []
  for call in calls:
    for place, (reference, output) in enumerate(recorded):
      if calls_equal([call], [reference]):
        # Two equal calls have a recorded output each, so an output is used only once.
        del recorded[place]
        outputs.append(output)
        break
  return outputs
