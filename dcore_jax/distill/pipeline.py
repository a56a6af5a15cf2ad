"""Self-distillation, Algorithm 1: decompose with the reference in view, solve each subtask alone, compose, verify.

All seeds are in flight together: each is a small state machine that asks for one completion at a time, and the engine's
lanes serve whichever seed has something to ask. A seed never sees another's state, so the result does not depend on order.
"""
import collections
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from dcore_jax.chat.messages import Message
from dcore_jax.chat.template import render_prompt
from dcore_jax.chat.tool_calls import ToolCallError, parse_calls, print_calls, tool_response
from dcore_jax.distill import compose, prompts, verify
from dcore_jax.distill.compose import Solved
from dcore_jax.distill.seeds import Seed, reference_steps
from dcore_jax.rollout.engine import Engine, Request
from dcore_jax.rollout.sampling import SamplingParams

Row = dict[str, Any]  # {'id', 'kind', 'conversations': [{'role', 'content'}]}, the published schema and the kind
Ask = Generator[list[Message], str, list[Row]]


class Dropped(Exception):
  """A seed that gives no rows; its text is the reason that is counted."""


@dataclasses.dataclass
class DistillResult:
  """Rows for SFT, and what became of the seeds.

  `success_rate` is the paper's (section 1.8 of the method): of the decomposed seeds with several subtasks whose reasoning was
  generated to the end, the share that verifies. `decomposition_rate` is the share of decomposed ones among all seeds with
  several subtasks.
  """
  rows: list[Row]
  seeds: int
  kept: int
  dropped: dict[str, int]
  kept_by_kind: dict[str, int]
  seeds_by_kind: dict[str, int]
  decomposed: int
  success_rate: float
  decomposition_rate: float

  def to_json(self) -> dict[str, Any]:
    record = dataclasses.asdict(self)
    record['rows'] = len(self.rows)
    return record


def _row(seed: Seed, suffix: str, messages: Sequence[Message], max_chars: int) -> Row:
  _refuse(verify.row_problem(list(messages), max_chars))
  return {'id': f'{seed.id}{suffix}', 'kind': seed.kind, 'conversations': [m.to_json() for m in messages]}


def _refuse(problem: str) -> None:
  if problem:
    raise Dropped(problem)


class Distiller:
  """Turns seeds into rows with completions of one model.

  Args:
    retries: further samples of a completion that cannot be read. One that is read and wrong is not asked again: the
      success rate is that of first answers (method: section 1.5).
    max_chars: longest row kept, in characters of all its messages.
    exact_refusals: whether the model's answer to an irrelevant seed must be the reference text, as it can be where the
      world's refusals are canonical sentences. Else any text that calls nothing will do.
  """

  def __init__(self, *, retries: int = 1, max_chars: int = 200_000, exact_refusals: bool = False):
    self.retries, self.max_chars, self.exact_refusals = retries, max_chars, exact_refusals

  def rows(self, seed: Seed) -> Ask:
    """A generator that yields prompts, is sent completions, and returns the seed's rows; raises Dropped."""
    return {'single': self._single, 'irrelevant': self._irrelevant, 'sequential': self._sequential,
            'parallel': self._parallel}[seed.kind](seed)

  def _ask(self, messages: list[Message], accept: Callable[[str], tuple[Any, str]]) -> Generator[list[Message], str, Any]:
    """Asks until `accept(text) -> (value, problem)` has no problem, or the retries are used up. `accept` raises Dropped
    for what is readable and wrong."""
    problem = ''
    for _ in range(1 + self.retries):
      value, problem = accept((yield messages))
      if not problem:
        return value
    raise Dropped(problem)

  def _decompose(self, seed: Seed) -> Generator[list[Message], str, list[tuple[str, list[int]]]]:
    def accept(text):
      subtasks = prompts.parse_subtasks(text.rsplit('</think>', 1)[-1])
      if not subtasks:
        return None, 'decomposition unparsable'
      _refuse(verify.decomposition_problem(seed, subtasks))
      return subtasks, ''
    return (yield from self._ask(prompts.decompose_messages(seed.context, seed.query, list(seed.calls)), accept))

  def _solve(self, messages: list[Message], expected: list) -> Generator[list[Message], str, tuple[str, str]]:
    """Reasoning of one subtask, and its calls in the form that is trained, whatever the form they were written in. A wrong
    call is noticed here rather than after the last step: the seed could no longer verify, and its remaining completions
    would be wasted."""
    def accept(text):
      solution = verify.read_solution(text)
      if solution is None:
        return None, 'unclosed reasoning'
      _refuse(verify.calls_problem(solution[1], expected))
      return (solution[0], print_calls(parse_calls(solution[1]))), ''
    return (yield from self._ask(messages, accept))

  def _single(self, seed: Seed) -> Ask:
    reasoning, answer = yield from self._solve(list(seed.conversations), list(seed.calls))
    target = Message('assistant', compose.single(reasoning, answer))
    return [_row(seed, '', [*seed.conversations, target], self.max_chars), *self._report(seed)]

  def _report(self, seed: Seed) -> list[Row]:
    """The row that ends the turn with a text, where the reference has one (form F)."""
    if not seed.answer:
      return []
    history = [*seed.conversations, *reference_steps(seed, len(seed.calls))]
    target = Message('assistant', compose.finished(seed.query, seed.answer))
    return [_row(seed, '/report', [*history, target], self.max_chars)]

  def _irrelevant(self, seed: Seed) -> Ask:
    """Form I': the model explains what is missing. Its answer must be a text; the reference answer is what is trained."""
    def accept(text):
      solution = verify.read_solution(text)
      if solution is None:
        return None, 'unclosed reasoning'
      reasoning, answer = solution
      try:
        _refuse('called a tool' if parse_calls(answer) else '')
      except ToolCallError:
        return None, 'unreadable call'
      _refuse('wrong explanation' if self.exact_refusals and answer != seed.answer else '')
      return reasoning, ''
    reasoning = yield from self._ask(prompts.explain_messages(seed.context, seed.query), accept)
    target = Message('assistant', compose.irrelevant(seed.query, reasoning, seed.answer))
    return [_row(seed, '', [*seed.conversations, target], self.max_chars)]

  def _sequential(self, seed: Seed) -> Ask:
    subtasks = yield from self._decompose(seed)
    texts = [text for text, _ in subtasks]
    rows, solving, history = [], seed.context, list(seed.conversations)
    for number, (text, index) in enumerate(subtasks):
      solving = [*solving, Message('user', text)]
      reasoning, answer = yield from self._solve(solving, [seed.calls[i] for i in index])
      target = compose.sequential(seed.query, texts, number, Solved(text, reasoning, answer))
      rows.append(_row(seed, f'/{number}', [*history, Message('assistant', target)], self.max_chars))
      output = Message('user', '\n'.join(tool_response(seed.tool_response[i]) for i in index))
      solving = [*solving, Message('assistant', answer), output]
      history = [*history, Message('assistant', answer), output]
    return rows + self._report(seed)

  def _parallel(self, seed: Seed) -> Ask:
    """Subtasks are solved independently of each other (paper, Algorithm 1 line 13; the released code accumulates)."""
    subtasks = yield from self._decompose(seed)
    solved = []
    for text, index in subtasks:
      reasoning, answer = yield from self._solve([*seed.context, Message('user', text)], [seed.calls[i] for i in index])
      solved.append(Solved(text, reasoning, answer))
    target = Message('assistant', compose.parallel(seed.query, solved))
    return [_row(seed, '', [*seed.conversations, target], self.max_chars)]


@dataclasses.dataclass
class _InFlight:
  seed: Seed
  number: int
  ask: Ask
  asked: int = 0


def distill(seeds: Sequence[Seed], engine: Engine, tokenizer: Any, sampling: SamplingParams, *,
            distiller: Distiller | None = None, progress: Callable[[int], None] | None = None) -> DistillResult:
  """Distils all seeds with the engine's model.

  Args:
    seeds: any mix of kinds; ids must be unique.
    engine: the model M, for decomposition and solutions alike (the "self" of self-distillation).
    tokenizer: its tokenizer, whose chat template renders the prompts.
    sampling: how completions are drawn; the random stream of a completion depends on its seed's place and count alone.
    progress: told 1 for every seed that is finished or dropped.
  """
  if not seeds:
    raise ValueError('no seeds to distil')
  duplicate = [i for i, n in collections.Counter(s.id for s in seeds).items() if n > 1]
  if duplicate:
    raise ValueError(f'seed ids occur twice: {duplicate[:3]}')
  distiller = distiller or Distiller()
  waiting: collections.deque[tuple[_InFlight, list[Message]]] = collections.deque()
  rows_of: dict[int, list[Row]] = {}
  reasons: dict[int, str] = {}

  def drop(item: _InFlight, reason: str) -> None:
    reasons[item.number] = reason
    if progress:
      progress(1)

  def advance(item: _InFlight, text: str | None) -> None:
    try:
      asked = item, item.ask.send(text)
      # A seed that goes on comes before new ones: the engine still holds what its next prompt begins with.
      (waiting.append if text is None else waiting.appendleft)(asked)
    except Dropped as dropped:
      drop(item, str(dropped))
    except StopIteration as stop:
      rows_of[item.number] = stop.value
      if progress:
        progress(1)

  for number, seed in enumerate(seeds):
    advance(_InFlight(seed, number, distiller.rows(seed)), None)

  def source(free: int) -> list[tuple[_InFlight, Request]]:
    requests = []
    while waiting and len(requests) < free:
      item, messages = waiting.popleft()
      ids = tokenizer(render_prompt(tokenizer, messages), add_special_tokens=False)['input_ids']
      if len(ids) >= engine.max_len:
        drop(item, 'prompt too long')
        continue
      requests.append((item, Request(np.array(ids, np.int32), (item.number, item.asked))))
      item.asked += 1
    return requests

  for item, completion in engine.stream(source, sampling):
    text = tokenizer.decode(completion.tokens[:-1] if completion.finished else completion.tokens, skip_special_tokens=False)
    advance(item, text)
  return _summarise(seeds, rows_of, reasons)


_DECOMPOSITION_REASONS = ('decomposition unparsable', 'decomposition does not partition the calls', 'empty subtask',
                          'leaks a fact')
_CUT_REASONS = ('unclosed reasoning', 'prompt too long')  # of decomposed seeds without a reasoning for every subtask


def _summarise(seeds: Sequence[Seed], rows_of: dict[int, list[Row]], reasons: dict[int, str]) -> DistillResult:
  several = [i for i, seed in enumerate(seeds) if seed.kind in ('sequential', 'parallel')]
  decomposed = [i for i in several if reasons.get(i) not in _DECOMPOSITION_REASONS]
  reasoned = [i for i in decomposed if reasons.get(i) not in _CUT_REASONS]
  verified = sum(i in rows_of for i in reasoned)
  return DistillResult(
      rows=[row for i in sorted(rows_of) for row in rows_of[i]], seeds=len(seeds), kept=len(rows_of),
      dropped=dict(collections.Counter(reasons.values()).most_common()),
      kept_by_kind=dict(collections.Counter(seeds[i].kind for i in sorted(rows_of))),
      seeds_by_kind=dict(collections.Counter(seed.kind for seed in seeds)), decomposed=len(decomposed),
      success_rate=verified / len(reasoned) if reasoned else 0.0,
      decomposition_rate=len(decomposed) / len(several) if several else 0.0)
