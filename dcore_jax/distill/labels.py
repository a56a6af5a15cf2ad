"""Pseudo-labels: a model's own calls in place of reference calls, by majority over samples (paper, Table 6, last row)."""

import collections
import dataclasses

from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.chat.tool_calls import calls_equal, print_calls, tool_response
from dcore_jax.data.seeds import Seed
from dcore_jax.distill import verify
from dcore_jax.distill.solve import Ask, Dropped
from dcore_jax.rollout.backends import TOO_LONG, Reply
from dcore_jax.worlds.sandbox import open_sandbox

MAX_STEPS = 12  # responses of one sample


@dataclasses.dataclass
class _Sample:
  """One attempt at a request, step after step; `done` when it has ended, `text` the words that ended it."""

  seed: Seed
  steps: list[list[ToolCall]] = dataclasses.field(default_factory=list)
  outputs: list[list[str]] = dataclasses.field(default_factory=list)
  text: str = ''
  done: bool = False
  failed: bool = False  # it cannot be a label: unreadable, or it went where nothing is recorded

  def __post_init__(self):
    self._sandbox = open_sandbox(self.seed.world) if self.seed.world else None

  @property
  def messages(self) -> list[Message]:
    """The conversation as the next prompt shows it."""
    messages = list(self.seed.conversations)
    for calls, outputs in zip(self.steps, self.outputs):
      messages += [
        Message('assistant', print_calls(calls)),
        Message('user', '\n'.join(map(tool_response, outputs))),
      ]
    return messages

  @property
  def calls(self) -> list[ToolCall]:
    return [call for step in self.steps for call in step]

  def take(self, reply: Reply) -> None:
    """Goes on with what the model said; a cut reply is none, since half a list of calls would read as a text."""
    _, answer = split_reasoning(reply.text)
    calls, problem = verify.read_calls(answer)
    if (
      problem == 'unreadable call' or not reply.finished or '<think>' in answer
    ):  # thoughts that never end
      self.done = self.failed = True
    elif not calls:
      self.text, self.done = answer.strip(), True
    else:
      outputs = self._run(calls)
      self.steps.append(calls)
      self.outputs.append(outputs or [])
      # In single-turn data the calls are all there is: nothing follows them.
      last = not self.seed.answer and self.seed.kind != 'sequential'
      self.done = last or outputs is None
      self.failed = not last and outputs is None

  def _run(self, calls: list[ToolCall]) -> list[str] | None:
    """Outputs of calls; None where nothing can be executed and nothing is recorded for them."""
    if self._sandbox:
      return [self._sandbox.run(call) for call in calls]
    first = len(self.calls)
    recorded = self.seed.tool_response[first : first + len(calls)]
    return (
      list(recorded)
      if recorded and calls_equal(calls, self.seed.calls[first : first + len(calls)])
      else None
    )


def pseudo_labelled(seed: Seed, samples: int, max_steps: int = MAX_STEPS) -> Ask[Seed]:
  """The seed with the calls, outputs and report that most of `samples` attempts agree on; its own are not looked at, but for
  outputs where there is no world to execute calls in.

  Of answers that are equally frequent the one that was sampled first wins. The kind follows from the calls: none makes
  an irrelevant seed whose answer is what the model said, several of one response are parallel.

  Raises:
    Dropped: no attempt came to an end.
  """
  attempts = [_Sample(seed) for _ in range(samples)]
  for _ in range(max_steps):
    live = [attempt for attempt in attempts if not attempt.done]
    if not live:
      break
    for attempt, reply in zip(live, (yield [attempt.messages for attempt in live]), strict=True):
      if reply.error:
        attempt.done = attempt.failed = True
        if reply.error != TOO_LONG:
          raise Dropped('refused by the endpoint', 'label')
      else:
        attempt.take(reply)
  votes: dict[str, list[_Sample]] = collections.defaultdict(list)
  for attempt in attempts:
    if attempt.done and not attempt.failed:
      votes[print_calls(attempt.calls)].append(attempt)
  if not votes:
    raise Dropped('no pseudo-label', 'label')
  best = max(votes.values(), key=len)[0]  # the first of the largest
  calls = tuple(best.calls)
  outputs = tuple(output for step in best.outputs for output in step)
  if not calls:
    kind = 'irrelevant'
  elif len(calls) == 1:
    kind = 'single'
  else:
    kind = 'parallel' if len(best.steps) == 1 else 'sequential'
  if kind == 'irrelevant' and not best.text:
    raise Dropped('no pseudo-label', 'label')
  return dataclasses.replace(
    seed,
    kind=kind,
    calls=calls,
    tool_response=outputs if len(outputs) == len(calls) else (),
    answer=best.text,
  )
