"""One interface to whatever completes chats: our own engine, or any OpenAI-compatible endpoint.

    for tag, reply in backend.stream(source, sampling): ...

`source(free)` is asked for up to `free` more requests whenever there is room, and gives what can be
asked now: a request may depend on earlier replies. The stream ends when the source gives nothing
and nothing is under way. Distillation and evaluation run in this way on one machine's lanes or
against a fleet.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from dcore_jax.chat.messages import Message, ToolSpec
from dcore_jax.rollout.sampling import SamplingParams

# Compared by identity or by value, as the caller likes; a backend only hands it back.
Tag = Any  # whatever a caller of `Backend.stream` knows a request by
# `Reply.error` of a prompt that the model has no room for, which callers count apart.
TOO_LONG = 'prompt too long'


@dataclasses.dataclass(frozen=True, eq=False)
class ChatRequest:
  """What to ask.

  Attributes:
    messages: the chat so far.
    key_id: names the random stream, e.g. (seed number, attempt).
    tools: what the model may call.
    max_tokens: of the answer; None: the sampling rule's number.
  """

  messages: tuple[Message, ...]
  # Folded into the random key, so that a reply does not depend on which lane or process makes it.
  key_id: tuple[int, ...]
  tools: tuple[ToolSpec, ...] = ()
  max_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
  """What was answered: thoughts in a `<think>` block and calls as text, as a model writes them.

  Attributes:
    text: '' where there is an error.
    finished: the model ended its turn, or wrote a stop string, before which the text then ends.
      Otherwise its budget was used up.
    prompt_tokens: as the backend counts them.
    completion_tokens: as the backend counts them.
    error: why there is no answer and will be none: the request itself is refused. '' otherwise.
    seconds: from when it was asked to when the answer was there.
  """

  text: str
  finished: bool
  prompt_tokens: int
  completion_tokens: int
  error: str = ''
  # Not compared: a reply from the journal equals one that is made anew.
  seconds: float = dataclasses.field(default=0.0, compare=False)


# A pull, not a push: a backend has no queue that could grow without bound.
# A backend asks a source with its free places, and gets up to that many requests.
ChatSource = Callable[[int], Sequence[tuple[Tag, ChatRequest]]]


class Backend(Protocol):
  """Anything that answers chat requests, as the model that is called `model`."""

  model: str

  def stream(self, source: ChatSource, sampling: SamplingParams) -> Iterator[tuple[Tag, Reply]]:
    """Answers what `source` gives, in the order of finishing."""


@dataclasses.dataclass
class Usage:
  """Counts since the backend was made.

  Replies from the journal cost nothing and are counted apart.

  Attributes:
    requests: answered now.
    from_journal: answered by an earlier process.
    prompt_tokens: of the requests answered now.
    completion_tokens: of the requests answered now.
    prompt_price: of a million tokens, in any unit; 0: not known.
    completion_price: the same for completions.
  """

  requests: int = 0
  from_journal: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0
  prompt_price: float = 0.0
  completion_price: float = 0.0

  def add(self, reply: Reply) -> None:
    # Tokens are the backend's own counts, by which an endpoint bills.
    """Counts an answer that was made now."""
    self.requests += 1
    self.prompt_tokens += reply.prompt_tokens
    self.completion_tokens += reply.completion_tokens

  def record(self) -> dict[str, float]:
    """Returns the counts and, where prices are known, the cost in their unit."""
    counts = {
      'requests': self.requests,
      'from_journal': self.from_journal,
      'prompt_tokens': self.prompt_tokens,
      'completion_tokens': self.completion_tokens,
    }
    # A cost of 0 would read as free; without a price it is not known.
    if not self.prompt_price and not self.completion_price:
      return counts
    prompts = self.prompt_tokens * self.prompt_price
    completions = self.completion_tokens * self.completion_price
    # Prices are per million tokens.
    return counts | {'cost': round((prompts + completions) / 1e6, 6)}


def function_specs(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
  """Returns tool specs as endpoints and chat templates take them."""
  return [{'type': 'function', 'function': tool.to_json()} for tool in tools]
