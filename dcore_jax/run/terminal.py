"""A conversation in a terminal: thoughts dimmed, answers as they come, a world runs the calls."""

import itertools
import queue
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import numpy as np

from dcore_jax.chat.encoding import encode_rendered
from dcore_jax.chat.messages import Message, split_reasoning
from dcore_jax.chat.template import render_prompt
from dcore_jax.chat.thoughts import opened_thoughts, with_opening
from dcore_jax.rollout.engine import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.serve.replies import ReplyParser
from dcore_jax.serve.scheduler import Overloaded, Scheduler
from dcore_jax.serve.text import TextReader
from dcore_jax.worlds.environment import World

_DIM = '\x1b[2m'
_BOLD = '\x1b[1m'
_PLAIN = '\x1b[0m'
# What a model writes must not steer the terminal: control characters, and those that turn the
# direction of text around.
_HARMLESS = {
  code: '\ufffd'
  for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
  if chr(code) not in '\n\t'
}


class Cancelled(Exception):
  """The person at the terminal has heard enough."""


class Speaker:
  """Asks the model and shows what it says while it says it."""

  def __init__(
    self, scheduler: Scheduler, tokenizer: Any, sampling: SamplingParams, out: TextIO, colour: bool
  ):
    self._scheduler = scheduler
    self._tokenizer = tokenizer
    self._sampling = sampling
    self._out = out
    self._colour = colour
    # The turn numbers the random stream: the same question asked twice may get another answer.
    self._turn = itertools.count()

  def answer(self, messages: Sequence[Message]) -> str:
    """Returns the assistant's whole text, with the tag by which the prompt opened the thoughts.

    Raises:
      Cancelled: Ctrl-C; the lane is free again.
      ValueError: the conversation has grown too long.
    """
    text = render_prompt(self._tokenizer, messages)
    prompt = np.array(encode_rendered(self._tokenizer, text), np.int32)
    # The engine's thread puts progress in, and this thread takes it out and prints.
    events: queue.SimpleQueue = queue.SimpleQueue()
    reader = TextReader(self._tokenizer, self._sampling.stop)
    opening = opened_thoughts(text)
    # Without tools calls are shown as the text that they are; the world reads them later.
    parser = ReplyParser(thinking=bool(opening))
    job = self._scheduler.submit(
      [Request(prompt, (next(self._turn),))], self._sampling, lambda _, event: events.put(event)
    )
    whole = ''
    thoughts = False
    try:
      while True:
        part = events.get()
        if isinstance(part, Exception):
          raise part
        done = part.completion
        new = reader.push(
          # The stop token that ends the turn is no text.
          part.tokens[:-1] if done and done.finished else part.tokens,
          last=done is not None,
        )
        whole += new
        delta = parser.push(new, last=done is not None)
        self.show(delta.reasoning, _DIM)
        thoughts = thoughts or bool(delta.reasoning)
        # The answer begins on a line of its own below the thoughts.
        if delta.content and thoughts:
          self.show('\n')
          thoughts = False
        self.show(delta.content)
        if done is not None:
          self.show('\n' if done.finished else '\n(the budget is used up)\n')
          return with_opening(whole, opening)
    except KeyboardInterrupt:
      self._scheduler.cancel(job)
      self.show('\n(cancelled)\n')
      # The traceback of Ctrl-C says nothing about an error.
      raise Cancelled from None

  def show(self, text: str, style: str = '') -> None:
    """Shows text in a style, without anything in it that a terminal would obey."""
    if text:
      text = text.translate(_HARMLESS)
      self._out.write(f'{style}{text}{_PLAIN}' if style and self._colour else text)
      # Output to a terminal is kept back until its line is complete, and an answer comes by the
      # word.
      self._out.flush()


class Chat:
  """The conversation itself; a line from the terminal goes to `take`.

  Args:
    speaker: the model's voice.
    system: the system message; '' for none. A world has its own.
    world: whose tools the model may call, and who runs them; None: there are none.
    kind: the kind of the world's tasks to begin with.
  """

  def __init__(
    self, speaker: Speaker, *, system: str = '', world: World | None = None, kind: str = ''
  ):
    self._speaker = speaker
    self._system = system
    self._world = world
    self._kind = kind
    self._messages: list[Message] = []
    self._task = None
    self._session = None
    self.help = (
      'Ctrl-C cancels an answer, Ctrl-D ends the program; /new forgets the conversation.'
      if world is None
      else 'An empty line acts the task out, any other text is a request of your own on its tools '
      'and state; /new [KIND] [N] takes another task, /state shows the state. Ctrl-C cancels an '
      'answer, Ctrl-D ends the program.'
    )

  def start(self) -> None:
    """Shows the help and the first task before the first line is read."""
    self._speaker.show(self.help + '\n', _DIM)
    self._take_new([])

  def take(self, line: str) -> None:
    """Takes one line: a command, or something to be answered."""
    words = line.split()
    commands: dict[str, Callable[[list[str]], None]] = {'/new': self._take_new}
    # Without a world there is no state to be shown.
    if self._world is not None:
      commands['/state'] = self._take_state
    try:
      if words and words[0].startswith('/'):
        if words[0] not in commands:
          raise ValueError(f'there is no {words[0]}; there are {", ".join(commands)}')
        commands[words[0]](words[1:])
      elif self._world is None:
        self._converse(line)
      elif words:
        self._request(line)
      else:
        # An empty line in a world means: act the task itself out.
        self._act()
    # A cancelled answer still holds the engine's one lane while a step runs on, so that the next
    # line may meet an Overloaded.
    except (ValueError, Overloaded) as error:
      self._speaker.show(f'{error}\n')
    except Cancelled:
      pass

  def _converse(self, line: str) -> None:
    if not line.strip():
      return
    asked = [*self._messages, Message('user', line)]
    # Chat templates show earlier answers without their thoughts.
    _, answer = split_reasoning(self._speaker.answer(asked))
    # Only now: an answer that is cancelled leaves nothing behind.
    self._messages = [*asked, Message('assistant', answer)]

  def _take_new(self, words: list[str]) -> None:
    self._messages = [Message('system', self._system)] if self._system else []
    if self._world is None:
      return
    # What the line leaves out is filled in: the present kind, then task 0.
    kind, number = (words + [self._kind, '0'][len(words) :])[:2]
    if not number.isdigit():
      raise ValueError(f'{number!r} is no number of a task')
    # Tasks are drawn in order from one seed, so that the last of N + 1 is always the same task N.
    tasks = self._world.tasks(kind, int(number) + 1, seed=0, split='eval')
    if not tasks:
      raise ValueError(f'the world has no task of kind {kind!r}')
    self._task = tasks[-1]
    self._kind = kind
    self._session = self._world.session(self._task)
    for message in self._world.episode(self._task).messages:
      self._speaker.show(f'{message.role}: ', _BOLD)
      self._speaker.show(message.content + '\n')

  def _take_state(self, _: list[str]) -> None:
    state = self._session.state
    if isinstance(state, list):
      # A world that sees no state shows what has been done.
      self._speaker.show('\n'.join(map(str, state)) + '\n')
      return
    if not isinstance(state, dict):
      raise ValueError('the state is too large to be shown')
    for table, rows in state.items():
      for key, row in rows.items():
        self._speaker.show(f'{table} {key}: {row}\n')

  def _act(self) -> None:
    """The task's own requests, to the end and the verdict."""
    episode = self._world.episode(self._task)
    while not episode.done:
      self._step(episode)
    outcome = episode.outcome()
    self._speaker.show(
      f'right after {outcome.steps} answers\n' if outcome.correct else f'wrong: {outcome.reason}\n',
      _BOLD,
    )

  def _request(self, line: str) -> None:
    self._session.ask(line)
    while self._session.asked:
      self._step(self._session)

  def _step(self, episode: Any) -> None:
    """An answer, and what the world says to it."""
    text = self._speaker.answer(episode.messages)
    said = len(episode.messages)
    episode.step(text)
    # The message after those that were there is the answer, which has been shown already.
    for message in episode.messages[said + 1 :]:
      self._speaker.show(f'{message.role}: ', _BOLD)
      self._speaker.show(message.content + '\n')
