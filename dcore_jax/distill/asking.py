"""How a seed's conversation asks the model: prompts out, replies in, and why it ends early."""

import collections
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from dcore_jax.chat.messages import Message
from dcore_jax.rollout.backends import TOO_LONG, Reply

T = TypeVar('T')

# A conversation yields the prompts that it can ask now, is sent their replies, and returns a value.
Ask = Generator[list[list[Message]], list[Reply], T]


class Dropped(Exception):
  """Ends a seed that gives no rows. Its text is the reason, which is counted.

  `stage` says how far the seed came: 'decompose', 'generate' (a reasoning is missing) or 'verify'
  (all of it was generated, or as much as it took to see that it is wrong).
  """

  def __init__(self, reason: str, stage: str):
    super().__init__(reason)
    self.stage = stage


class Unreadable(Dropped):
  """A reply that cannot be used at all, and is worth another try with other random numbers."""


class Wrong(Dropped):
  """A reply that was read and is not right."""


def ask_until_accepted(
  prompts: Sequence[list[Message]],
  accept: Callable[[int, str], T],
  *,
  retries: int,
  samples: int,
) -> Ask[list[T | Dropped]]:
  """Asks all prompts together, and again those whose reply is refused -> a value for each prompt.

  Args:
    prompts: conversations for the model.
    accept: `accept(place, text)` returns the value of a reply, or raises Dropped. Every time a
      prompt is asked it has another random stream.
    retries: how often a prompt is asked again after an Unreadable reply.
    samples: how many Wrong replies end a prompt. Any other refusal ends it at once.

  Returns:
    The value of each prompt, or the last refusal where its budget is spent.
  """
  # The two budgets are separate, since they measure different things: retries make up for a broken
  # reply, and more samples than one change what the success rate means.
  allowed = {Unreadable: retries, Wrong: samples - 1}
  refusals = [collections.Counter() for _ in prompts]
  # Overwritten by the first reply; a prompt always has one.
  values: list[T | Dropped] = [Dropped('', '')] * len(prompts)
  waiting = list(range(len(prompts)))
  while waiting:
    replies = yield [prompts[place] for place in waiting]
    again = []
    for place, reply in zip(waiting, replies, strict=True):
      try:
        values[place] = accept(place, _finished_text(reply))
      except Dropped as dropped:
        kind = type(dropped)
        values[place] = dropped
        refusals[place][kind] += 1
        # Refusals of other kinds have no budget and end the prompt at once.
        if refusals[place][kind] <= allowed.get(kind, 0):
          again.append(place)
    waiting = again
  return values


def _finished_text(reply: Reply) -> str:
  # The endpoint's own words differ from request to request, and reasons are counted. A prompt that
  # is too long keeps a reason of its own, since a longer context would cure it.
  if reply.error:
    reason = TOO_LONG if reply.error == TOO_LONG else 'refused by the endpoint'
    raise Dropped(reason, 'generate')
  # Half a list of calls would be read as plain text.
  if not reply.finished:
    raise Unreadable('cut off', 'generate')
  return reply.text


def all_accepted(values: Sequence[T | Dropped]) -> list[T]:
  """Returns the values; raises the first refusal among them."""
  for value in values:
    if isinstance(value, Dropped):
      raise value
  return list(values)
