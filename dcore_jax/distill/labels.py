"""Pseudo-labels: a model's own calls in place of reference calls, by majority over samples.

The paper's Table 6 has them in its last row.
"""

import collections
import dataclasses
import itertools

from dcore_jax.chat.messages import Message, ToolCall, split_reasoning
from dcore_jax.chat.tool_calls import calls_equal, print_calls, tool_response
from dcore_jax.data.seeds import Seed
from dcore_jax.distill import verify
from dcore_jax.distill.asking import Ask, Dropped
from dcore_jax.rollout.backends import TOO_LONG, Reply
from dcore_jax.worlds.registry import open_sandbox

# Responses of one attempt, after which it gives no label. A model that repeats itself would
# otherwise never end.
MAX_STEPS = 12


@dataclasses.dataclass
class _Attempt:
  """One attempt at a request, step after step.

  Attributes:
    seed: the seed to label.
    steps: the calls of each response.
    outputs: the outputs of those calls.
    text: the words that ended the attempt.
    done: whether it has ended.
    failed: whether it cannot be a label, because it is unreadable or made calls for which nothing
      is recorded.
  """

  seed: Seed
  steps: list[list[ToolCall]] = dataclasses.field(default_factory=list)
  outputs: list[list[str]] = dataclasses.field(default_factory=list)
  text: str = ''
  done: bool = False
  failed: bool = False

  def __post_init__(self):
    # One sandbox an attempt: its calls add up, and other attempts do not see them.
    self._sandbox = open_sandbox(self.seed.world) if self.seed.world else None

  @property
  def messages(self) -> list[Message]:
    """The conversation as the next prompt shows it."""
    # Rebuilt from the calls, so that thoughts of earlier steps are not shown.
    messages = list(self.seed.conversations)
    for calls, outputs in zip(self.steps, self.outputs, strict=True):
      messages += [
        Message('assistant', print_calls(calls)),
        Message('user', '\n'.join(map(tool_response, outputs))),
      ]
    return messages

  @property
  def calls(self) -> list[ToolCall]:
    """All calls made so far."""
    return list(itertools.chain.from_iterable(self.steps))

  def fail(self) -> None:
    """Ends the attempt without a label."""
    self.done = True
    self.failed = True

  def take(self, reply: Reply) -> None:
    """Goes on with what the model said.

    A reply that was cut off fails, since half a list of calls would be read as plain text. So does
    a reply whose thoughts never end.
    """
    _, answer = split_reasoning(reply.text)
    calls, problem = verify.read_calls(answer)
    if problem == 'unreadable call' or not reply.finished or '<think>' in answer:
      self.fail()
    elif not calls:
      self.text = answer.strip()
      self.done = True
    else:
      outputs = self._run(calls)
      self.steps.append(calls)
      self.outputs.append(outputs or [])
      # In single-turn data the calls are all there is, and no report follows them. Then it does no
      # harm that their outputs are not known.
      last = not self.seed.answer and self.seed.kind != 'sequential'
      self.done = last or outputs is None
      self.failed = not last and outputs is None

  def _run(self, calls: list[ToolCall]) -> list[str] | None:
    """Returns the outputs of calls; None where none can be executed and none is recorded."""
    if self._sandbox:
      return [self._sandbox.run(call) for call in calls]
    # A recorded output belongs to its reference call. Any other call has none, and the attempt
    # cannot go on.
    first = len(self.calls)
    last = first + len(calls)
    recorded = self.seed.tool_response[first:last]
    if not recorded or not calls_equal(calls, self.seed.calls[first:last]):
      return None
    return list(recorded)


def pseudo_labelled(seed: Seed, samples: int, max_steps: int = MAX_STEPS) -> Ask[Seed]:
  """Labels a seed with the calls, outputs and report that most of `samples` attempts agree on.

  The seed's own calls are not looked at, except to find recorded outputs where there is no world to
  execute calls in. Of answers that are equally frequent the one that was sampled first wins. The
  kind follows from the calls: none makes an irrelevant seed whose answer is what the model said,
  several of one response are parallel.

  Raises:
    Dropped: no attempt came to an end.
  """
  attempts = [_Attempt(seed) for _ in range(samples)]
  # All attempts take a step together, so that their completions run side by side.
  for _ in range(max_steps):
    live = [attempt for attempt in attempts if not attempt.done]
    if not live:
      break
    replies = yield [attempt.messages for attempt in live]
    for attempt, reply in zip(live, replies, strict=True):
      if not reply.error:
        attempt.take(reply)
      elif reply.error == TOO_LONG:
        attempt.fail()
      else:
        raise Dropped('refused by the endpoint', 'label')
  best = _majority(attempts)
  # The winner's own calls and outputs, not a mixture of several attempts.
  calls = tuple(best.calls)
  outputs = tuple(itertools.chain.from_iterable(best.outputs))
  if not calls:
    kind = 'irrelevant'
  elif len(calls) == 1:
    kind = 'single'
  else:
    kind = 'parallel' if len(best.steps) == 1 else 'sequential'
  # An irrelevant seed is trained on its answer, so an empty one is no label.
  if kind == 'irrelevant' and not best.text:
    raise Dropped('no pseudo-label', 'label')
  return dataclasses.replace(
    seed,
    kind=kind,
    calls=calls,
    # With some outputs missing, none are kept: a row must not show a wrong one.
    tool_response=outputs if len(outputs) == len(calls) else (),
    answer=best.text,
  )


def _majority(attempts: list[_Attempt]) -> _Attempt:
  """Returns the first of the attempts whose calls are the most frequent."""
  # Calls are compared as we print them, whatever form the model wrote them in.
  votes: dict[str, list[_Attempt]] = collections.defaultdict(list)
  for attempt in attempts:
    if attempt.done and not attempt.failed:
      votes[print_calls(attempt.calls)].append(attempt)
  if not votes:
    raise Dropped('no pseudo-label', 'label')
  # `max` returns the first of equals, and the votes stand in the order of sampling.
  return max(votes.values(), key=len)[0]
