"""A model that knows the references: it lets a run be tried without a model that can do the tasks.

It reads the reference calls out of the prompts that show them, and those of the other prompts out
of the seeds. Its thoughts say nothing, so its rows are of no use but to go through all stages.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import parse_calls, print_calls
from dcore_jax.data.seeds import Seed
from dcore_jax.distill.decompose import print_subtasks
from dcore_jax.distill.wording import Prompts
from dcore_jax.rollout.backends import ChatSource, Reply, Tag, Usage
from dcore_jax.rollout.sampling import SamplingParams

_THOUGHTS = '<think>\nThis step is clear.\n</think>\n\n'
_REFUSAL = 'No listed tool can do this.'


class ScriptedBackend:
  """A `Backend` that answers from the references of the seeds.

  Args:
    seeds: what is distilled.
    prompts: the wording of its prompts.
  """

  model = 'scripted'

  def __init__(self, seeds: Sequence[Seed], prompts: Prompts):
    self.usage = Usage()
    self._seeds = {_key(seed.conversations): seed for seed in seeds}
    # The calls of each subtask that was handed out.
    self._steps: dict[str, Sequence[ToolCall]] = {}
    # What stands before and behind the calls in the prompt that asks for a decomposition.
    before, _, after = prompts.decompose.partition('{calls}')
    self._before = before.rpartition('}')[2]
    self._after = after.partition('{')[0]

  def stream(self, source: ChatSource, sampling: SamplingParams) -> Iterator[tuple[Tag, Reply]]:
    """Answers what `source` gives, one request after the other."""
    del sampling
    while batch := source(1):
      for tag, request in batch:
        reply = Reply(self._answer(request.messages), True, 0, 0)
        self.usage.add(reply)
        yield tag, reply

  def _answer(self, messages: Sequence[Message]) -> str:
    asked = messages[-1].content
    if asked in self._steps:
      return _THOUGHTS + print_calls(self._steps[asked])
    seed = self._seeds.get(_key(messages))
    if seed is not None:
      return _THOUGHTS + (print_calls(seed.calls) if seed.calls else seed.answer or _REFUSAL)
    if asked.endswith(self._after) and self._before in asked:
      return _THOUGHTS + self._decomposition(asked)
    return _THOUGHTS + _REFUSAL

  def _decomposition(self, asked: str) -> str:
    shown = asked.rpartition(self._before)[2].removesuffix(self._after)
    # A name of the request and not its words: a subtask must not tell what an output will say.
    name = hashlib.sha256(asked.encode()).hexdigest()[:8]
    texts = []
    for number, call in enumerate(parse_calls(shown) or (), 1):
      texts.append(f'Take step {_letters(number)} of the request {_letters(int(name, 16))}')
      self._steps[texts[-1]] = [call]
    return print_subtasks(texts, [[place] for place in range(len(texts))])


def _letters(number: int) -> str:
  """Writes a number in letters: digits could be those of a value that must not be told."""
  return ''.join(chr(ord('a') + int(digit)) for digit in str(number))


def _key(messages: Sequence[Message]) -> Any:
  return tuple((message.role, message.content) for message in messages)
