"""A user of tau2-bench without a model, for runs that need no second endpoint."""

from collections.abc import Callable, Mapping
from typing import Any

STOP = '###STOP###'
TRANSFER = '###TRANSFER###'
YES = 'Yes, please go ahead.'
MAX_CONSENTS = 8  # the longest reference needs five confirmations
# What the policies make an agent say that hands the user over.
_HANDED_OVER = 'transferred to a human agent'


def scripted_reply(instructions: Mapping[str, Any] | str, said: int, text: str) -> str:
  """Returns what the scripted user says to a text of the agent.

  Args:
    instructions: of the task; one text is told whole.
    said: how often the user has spoken.
    text: the agent's.
  """
  if isinstance(instructions, str):
    instructions = {'reason_for_call': instructions}
  if _HANDED_OVER in text.lower():
    return TRANSFER
  if said == 0:
    return _told(instructions, ('reason_for_call', 'known_info'))
  if said == 1:
    more = _told(instructions, ('task_instructions', 'unknown_info'))
    if more:
      return more
  # A question asks for consent more often than not; the policies want it before each change.
  asked = '?' in text and 'anything else' not in text.lower()
  return YES if asked and said < 2 + MAX_CONSENTS else STOP


def _told(instructions: Mapping[str, Any], fields: tuple[str, ...]) -> str:
  return '\n'.join(instructions[name].strip() for name in fields if instructions.get(name))


class ScriptedUser:
  """A user without a model, in the form that the orchestrator asks for."""

  def __init__(self, instructions: Any, message: Callable[..., Any]):
    self._instructions = instructions
    self._message = message

  def get_init_state(self, message_history: Any = None) -> int:
    """Returns the state: how often the user has spoken."""
    del message_history
    return 0

  def generate_next_message(self, message: Any, state: int) -> tuple[Any, int]:
    """Answers a message of the agent."""
    text = scripted_reply(self._instructions, state, message.content or '')
    return self._message(role='user', content=text, cost=0.0), state + 1

  def set_seed(self, seed: int) -> None:
    """Does nothing: nothing is drawn."""

  def stop(self, message: Any = None, state: Any = None) -> None:
    """Does nothing at the end."""
