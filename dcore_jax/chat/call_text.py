"""Where the strings and objects of a call begin and end in its text, before anything is read.

A tag inside a string is what somebody wrote, and no markup. Readers therefore ask here where a
string or a JSON object ends, and not where the next tag stands.
"""

import enum
import re

OPEN_CALL = '<tool_call>'
CLOSE_CALL = '</tool_call>'
OPEN_THOUGHTS = '<think>'
CLOSE_THOUGHTS = '</think>'

# A Python string with its prefix. A line break inside of single quotes is allowed here: models that
# write code or mails into an argument break its lines. A string that never ends is taken to the end
# of the text, and its `end` is no quote: else each quote in it would be looked at as a beginning.
PYTHON_STRING = re.compile(
  r"""(?P<prefix>\b[rbuf]{1,2})?(?P<quote>'{3}|"{3}|'|")(?P<body>(?:\\.|(?!(?P=quote))[^\\])*+)"""
  r"""(?P<end>(?P=quote)|\\?\Z)""",
  re.DOTALL | re.IGNORECASE,
)
# What may stand between the strings and brackets of JSON: white space, numbers and words like null.
_BETWEEN = re.compile(r'[\s\w:,.+-]*')
# Inside of a string, a backslash and the character that it escapes are taken together.
_INSIDE = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_SPACE = re.compile(r'\s*')
# Answers that are looked at as lists of calls. A text of nothing but closing tags and brackets must
# not take minutes.
_MOST_LISTS = 16


class Scan(enum.Enum):
  """What is known of a JSON value whose text may still be coming."""

  OPEN = 'not at its end yet'
  WHOLE = 'its last bracket was found'
  BROKEN = 'something stands in it that JSON does not have'


class JsonScan:
  """Finds the end of a JSON object or list by its brackets, going on where the text ended before.

  Attributes:
    start: where the value begins.
    place: how far it was read; behind its last bracket once it is whole.
    state: what is known by now.
  """

  def __init__(self, start: int):
    self.start = start
    self.place = start
    self.state = Scan.OPEN
    self._depth = 0
    self._in_string = False

  def read(self, text: str) -> Scan:
    """Reads on in a text that begins as it did before."""
    while self.state is Scan.OPEN:
      self.place = (_INSIDE if self._in_string else _BETWEEN).match(text, self.place).end()
      # A backslash may end the text that is there: what it escapes is still to come.
      if self.place == len(text) or (self._in_string and text[self.place] == '\\'):
        break
      self._take(text[self.place])
      # A broken value ends in front of the character that JSON does not have.
      self.place += self.state is not Scan.BROKEN
    return self.state

  def _take(self, mark: str) -> None:
    if mark == '"':
      # Brackets inside of a string are text and do not count.
      self._in_string = not self._in_string
    elif mark in '[{':
      self._depth += 1
    elif mark in ']}':
      self._depth -= 1
    else:
      self.state = Scan.BROKEN
    if self._depth == 0 and not self._in_string and self.state is Scan.OPEN:
      self.state = Scan.WHOLE


def skip_space(text: str, place: int) -> int:
  """Returns the place of the first character from `place` on that is no white space."""
  return _SPACE.match(text, place).end()


def split_answer(text: str) -> tuple[str, str]:
  """Splits an assistant's text behind its last closing tag -> (thoughts with their tags, answer).

  The thoughts are '' where no tag closes any.
  """
  closings = closing_tags(text)
  # Without a closing tag the text is an answer, also if it opens thoughts that the budget cut off.
  begin = closings[-1] + len(CLOSE_THOUGHTS) if closings else 0
  return text[:begin], text[begin:]


def closing_tags(text: str) -> list[int]:
  """Returns the places of the `</think>` that close thoughts.

  A tag that stands in a string of a call behind the thoughts is a part of that string.
  """
  places = []
  place = text.find(CLOSE_THOUGHTS)
  while place >= 0:
    places.append(place)
    begin = place + len(CLOSE_THOUGHTS)
    # Nearly all texts have one closing tag, and end here.
    if text.find(CLOSE_THOUGHTS, begin) < 0:
      break
    if len(places) <= _MOST_LISTS and _is_python_list(text[begin:]):
      break
    place = _next_closing(text, begin)
  return places


def _is_python_list(answer: str) -> bool:
  """Tells whether an answer is a list in brackets all of whose `</think>` stand in strings."""
  answer = answer.strip()
  if answer[:1] != '[' or answer[-1:] != ']':
    return False
  outside = PYTHON_STRING.sub(
    lambda match: '' if match['end'] == match['quote'] else match[0], answer
  )
  return CLOSE_THOUGHTS not in outside


def _next_closing(text: str, place: int) -> int:
  """Finds the next `</think>` that is not inside of a tagged call; -1 where there is none."""
  closing = text.find(CLOSE_THOUGHTS, place)
  while True:
    # Looked for anew only where it was passed: a far one would be found again for each call.
    if 0 <= closing < place:
      closing = text.find(CLOSE_THOUGHTS, place)
    call = text.find(OPEN_CALL, place)
    if call < 0 or closing < call:
      return closing
    place = skip_space(text, call + len(OPEN_CALL))
    if text[place : place + 1] in ('{', '['):
      scan = JsonScan(place)
      if scan.read(text) is Scan.WHOLE:
        place = scan.place
