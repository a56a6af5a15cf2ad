"""What a model wrote as what an OpenAI client reads: thoughts, content and tool calls, told apart
while the text comes.

Calls are read by `chat.tool_calls` in either syntax, and given out when they are whole and
readable; what is not stays content. An answer that is not streamed is the sum of these pieces, so
that both kinds say the same.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence

from dcore_jax.chat.messages import ToolCall, ToolSpec
from dcore_jax.chat.tool_calls import ToolCallError, parse_hermes, parse_python

_OPEN_THOUGHTS = '<think>'
_CLOSE_THOUGHTS = '</think>'
_OPEN_CALL = '<tool_call>'
_CLOSE_CALL = '</tool_call>'
# A list of Python-style calls as far as it has come. Anything else in brackets is content at once;
# this waits for its end.
_PYTHON_START = re.compile(r'\[\s*([^\W\d][\w.]*\s*(\(.*)?)?', re.DOTALL)


@dataclasses.dataclass
class Delta:
  """A piece of a reply, or all of it. `calls` are (name, arguments as JSON text)."""

  reasoning: str = ''
  content: str = ''
  calls: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class ReplyParser:
  """Text in, deltas out.

  Args:
    tools: what may be called; without any, calls are content like all else.
    thinking: whether the prompt has opened the block of thoughts already.
    most_calls: calls beyond so many are left out; None: all are given.
  """

  def __init__(
    self, tools: Sequence[ToolSpec] = (), *, thinking: bool = False, most_calls: int | None = None
  ):
    self.answering = False  # past the thoughts, if there are any
    self.calls = 0  # given out
    self._parameters = {tool.name: list(tool.parameters.get('properties', ())) for tool in tools}
    self._most_calls = most_calls
    self._text = ''  # not decided yet
    self._state = self._thoughts if thinking else self._start
    self._blank = True  # nothing of this part was given out yet: white space before it is left out
    self._ended = False

  def push(self, text: str, last: bool = False) -> Delta:
    """What is certain with this text; everything where it is the `last`."""
    self._text += text
    self._ended = last
    delta = Delta()
    while self._state(delta):
      pass
    return delta

  # Each state gives out what is certain, and returns whether another one goes on.

  def _start(self, _: Delta) -> bool:
    """White space, then thoughts or the answer."""
    text = self._text.lstrip()
    if text.startswith(_OPEN_THOUGHTS):
      self._text = text[len(_OPEN_THOUGHTS) :]
      self._state = self._thoughts
    elif self._ended or not _OPEN_THOUGHTS.startswith(text):
      self._answer_begins(blank=False)
    return self._state != self._start

  def _thoughts(self, delta: Delta) -> bool:
    """Up to the closing tag, without the newlines at either end."""
    if self._blank:
      self._text = self._text.lstrip('\n')
    thoughts, closed, rest = self._text.partition(_CLOSE_THOUGHTS)
    if closed:
      delta.reasoning += thoughts.rstrip('\n')
      self._text = rest
      self._answer_begins(blank=True)
      return True
    certain = thoughts if self._ended else _before(thoughts, _CLOSE_THOUGHTS).rstrip('\n')
    delta.reasoning += self._give(certain)
    return False

  def _answer_begins(self, blank: bool) -> None:
    self._blank = blank
    self.answering = True
    self._state = self._bracket if self._parameters else self._plain

  def _plain(self, delta: Delta) -> bool:
    """Content, to the end."""
    if self._blank:
      self._text = self._text.lstrip('\n')
    delta.content += self._give(self._text)
    return False

  def _bracket(self, delta: Delta) -> bool:
    """An answer that is one list of calls from bracket to bracket, which only its end can tell; or
    one that is not.
    """
    text = self._text.strip()
    if not self._ended and (not text or _PYTHON_START.fullmatch(text)):
      return False
    if text[:1] == '[' and text[-1:] == ']' and self._call(delta, text, parse_python):
      self._text = ''
    self._state = self._mixed
    return True

  def _mixed(self, delta: Delta) -> bool:
    """Content with calls in tags; white space between the two is left out."""
    if self._blank:
      self._text = self._text.lstrip()
    content, opened, rest = self._text.partition(_OPEN_CALL)
    if not opened:
      certain = content if self._ended else _before(content, _OPEN_CALL).rstrip()
      delta.content += self._give(certain)
      return False
    said = self._give(content.rstrip())
    delta.content += said
    body, closed, rest = rest.partition(_CLOSE_CALL)
    block = content.removeprefix(said) + _OPEN_CALL + body + closed
    if not closed and not self._ended:
      return False
    if closed and self._call(delta, block, parse_hermes):
      self._text = rest
      self._blank = True
    else:
      delta.content += self._give(block)
    return True

  def _give(self, text: str) -> str:
    """Takes it off the undecided text."""
    self._blank = self._blank and not text
    self._text = self._text.removeprefix(text)
    return text

  def _call(self, delta: Delta, text: str, parse: Callable[[str], list[ToolCall]]) -> bool:
    """Adds the calls of a text; False where it has none that can be read."""
    try:
      calls = [(call.name, self._arguments(call)) for call in parse(text)]
    except ToolCallError:
      return False
    room = len(calls) if self._most_calls is None else self._most_calls - self.calls
    delta.calls += calls[: max(room, 0)]
    self.calls += len(calls[: max(room, 0)])
    return bool(calls)

  def _arguments(self, call: ToolCall) -> str:
    """As JSON text; what stands by its position gets the name that the tool's spec has there."""
    names = self._parameters.get(call.name, [])[: len(call.positional)]
    if len(names) < len(call.positional) or set(names) & call.arguments.keys():
      raise ToolCallError(f'{call.name}: its arguments cannot be named')
    return json.dumps(
      dict(zip(names, call.positional, strict=True)) | call.arguments, ensure_ascii=False
    )


def _before(text: str, tag: str) -> str:
  """The text without what may be the beginning of a tag at its end."""
  return next(
    (text[:-length] for length in range(len(tag) - 1, 0, -1) if text.endswith(tag[:length])), text
  )
