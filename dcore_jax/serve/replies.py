"""What a model wrote as what an OpenAI client reads: thoughts, content and tool calls, told apart
while the text comes.

Calls are read by `chat` in either syntax, and given out when they are whole and readable; what is
not stays content. An answer that is not streamed is the sum of these pieces, so that both kinds say
the same.
"""

import dataclasses
import re
from collections.abc import Sequence

from dcore_jax.chat.call_text import CLOSE_THOUGHTS, OPEN_CALL, OPEN_THOUGHTS
from dcore_jax.chat.messages import ToolCall, ToolSpec
from dcore_jax.chat.python_calls import ToolCallError, parse_python
from dcore_jax.chat.tagged_calls import BlockReader
from dcore_jax.chat.tool_calls import json_text

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
    # The order of a tool's parameters in its schema names arguments that stand by their position.
    self._parameters = {tool.name: list(tool.parameters.get('properties', ())) for tool in tools}
    self._most_calls = most_calls
    self._text = ''  # not decided yet
    self._opened = thinking
    self._state = self._start
    # White space at the beginning of a part is left out; nothing of this part was given out yet.
    self._blank = True
    self._ended = False
    self._cut = False
    self._block: BlockReader | None = None  # a call in tags whose end has not come yet

  def push(self, text: str, last: bool = False, *, cut: bool = False) -> Delta:
    """Returns what is certain with this text; everything if it is the `last`.

    `cut` says that the turn was not at its end there: a call without its closing tag is then none.
    """
    self._text += text
    self._ended = last
    self._cut = cut
    delta = Delta()
    # A state may set another one as `self._state`; the loop ends where more text must come.
    while self._state(delta):
      pass
    return delta

  # Each state gives out what is certain, and returns whether another one goes on.

  def _start(self, _: Delta) -> bool:
    """White space, then thoughts or the answer."""
    # Text that may still become the tag waits: '<th' is given out neither as thoughts nor as
    # content.
    text = self._text.lstrip()
    if text.startswith(OPEN_THOUGHTS):
      self._text = text[len(OPEN_THOUGHTS) :]
      self._state = self._thoughts
    elif self._ended or not OPEN_THOUGHTS.startswith(text):
      # Models rarely repeat the tag behind a prompt that ends with it.
      if self._opened:
        self._state = self._thoughts
      else:
        self._answer_begins(blank=False)
    return self._state != self._start

  def _thoughts(self, delta: Delta) -> bool:
    """Up to the closing tag, without the newlines at either end."""
    if self._blank:
      self._text = self._text.lstrip('\n')
    thoughts, closed, rest = self._text.partition(CLOSE_THOUGHTS)
    if closed:
      delta.reasoning += thoughts.rstrip('\n')
      self._text = rest
      self._answer_begins(blank=True)
      return True
    # Newlines at the end wait too, because they are left out if the closing tag follows.
    certain = thoughts if self._ended else _before(thoughts, CLOSE_THOUGHTS).rstrip('\n')
    delta.reasoning += self._give(certain)
    return False

  def _answer_begins(self, blank: bool) -> None:
    self._blank = blank
    self.answering = True
    # Without tools nothing can be called, so that brackets and tags are content.
    self._state = self._bracket if self._parameters else self._plain

  def _plain(self, delta: Delta) -> bool:
    """Content, to the end."""
    if self._blank:
      self._text = self._text.lstrip('\n')
    delta.content += self._give(self._text)
    return False

  def _bracket(self, delta: Delta) -> bool:
    """An answer that is one list of calls from bracket to bracket, or one that is not.

    Only the end of the answer tells which.
    """
    text = self._text.strip()
    if not self._ended and (not text or _PYTHON_START.fullmatch(text)):
      return False
    if text[:1] == '[' and text[-1:] == ']' and self._python_calls(delta, text):
      self._text = ''
    self._state = self._mixed
    return True

  def _python_calls(self, delta: Delta, text: str) -> bool:
    try:
      return self._call(delta, parse_python(text))
    except ToolCallError:
      return False

  def _mixed(self, delta: Delta) -> bool:
    """Content with calls in tags; white space between the two is left out."""
    if self._block is not None:
      return self._tagged(delta)
    if self._blank:
      self._text = self._text.lstrip()
    content, opened, _ = self._text.partition(OPEN_CALL)
    if not opened:
      # The white space before a possible tag waits: if a call follows, it is no content.
      certain = content if self._ended else _before(content, OPEN_CALL).rstrip()
      delta.content += self._give(certain)
      return False
    said = self._give(content.rstrip())
    delta.content += said
    # The white space before the tag is content again where the tag begins no call.
    self._block = BlockReader(len(content) - len(said))
    return True

  def _tagged(self, delta: Delta) -> bool:
    """A call in tags, which its JSON ends."""
    block = self._block.read(self._text, ended=self._ended, cut=self._cut)
    if block is None:
      return False
    self._block = None
    if self._call(delta, block.calls):
      self._text = self._text[block.end :]
      self._blank = True
    else:
      # A client can act on a whole call alone. What is none is shown as the text that it is.
      delta.content += self._give(self._text[: block.end])
    return True

  def _give(self, text: str) -> str:
    """Takes it off the undecided text."""
    self._blank = self._blank and not text
    self._text = self._text.removeprefix(text)
    return text

  def _call(self, delta: Delta, calls: Sequence[ToolCall]) -> bool:
    """Adds calls; False where there are none that can be made."""
    try:
      # All arguments are named before any call is added: a block counts as a whole or not at all.
      named = [(call.name, self._arguments(call)) for call in calls]
    except ToolCallError:
      return False
    room = len(named) if self._most_calls is None else self._most_calls - self.calls
    delta.calls += named[: max(room, 0)]
    self.calls += len(named[: max(room, 0)])
    return bool(named)

  def _arguments(self, call: ToolCall) -> str:
    """Returns the arguments as JSON text.

    An argument that stands by its position gets the name that the tool's spec has there.
    """
    names = self._parameters.get(call.name, [])[: len(call.positional)]
    if len(names) < len(call.positional) or set(names) & call.arguments.keys():
      raise ToolCallError(f'{call.name}: its arguments cannot be named')
    return json_text(dict(zip(names, call.positional, strict=True)) | call.arguments)


def _before(text: str, tag: str) -> str:
  """The text without what may be the beginning of a tag at its end."""
  return next(
    (text[:-length] for length in range(len(tag) - 1, 0, -1) if text.endswith(tag[:length])), text
  )
