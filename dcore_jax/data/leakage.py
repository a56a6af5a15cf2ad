"""What a subtask says that only the reference calls can have told its author (method: section 1.2, requirement 3).

A decomposer that sees the calls may copy from them what nobody can know yet: the id that a lookup is to find. Its subtasks are
solved by a model that does not see the calls, so such a fact would make a guess look like a deduction. What can be read out of
the conversation is no leak, though it is written otherwise there: 60% is 0.6, 5cm is 5, May 3rd 2022 is 2022-05-03.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import leaf_values
from dcore_jax.data.seeds import Seed

_RUN = 3  # words of a longer text that are copied from it; fewer are common speech
_LETTERS = 3  # of a word in lower case that is a fact: 'on' and 'm' stand everywhere
_NO_FACTS = {('0',), ('1',)}  # "starts from rest", "a coffee"
_CJK = '\u3040-\u30ff\u3400-\u9fff'  # written without spaces: each character is a word
_TOKEN = re.compile(
  rf'\d{{4}}-\d\d-\d\d(?!\d)|\d[\d,]*\.\d+|\d{{1,3}}(?:,\d{{3}})+(?!\w)|[{_CJK}]|[^\W{_CJK}]+'
)
_NUMBER = re.compile(r'[\d,]+(?:\.\d+)?')
_HUMP = re.compile(r'(?<=[a-z])(?=[A-Z])')
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|(?<!\w)\'([^\']+)\'(?!\w)')
_NUMERALS = {
  word: str(n)
  for n, word in enumerate(
    'zero one two three four five six seven eight nine ten eleven twelve'.split()
  )
}
_SCALES = {
  '%': 0.01,
  'percent': 0.01,
  'hundred': 1e2,
  'thousand': 1e3,
  'million': 1e6,
  'billion': 1e9,
}
_SCALED = re.compile(rf'(\d[\d,]*(?:\.\d+)?)\s?({"|".join(_SCALES)})', re.IGNORECASE)
_WITH_UNIT = re.compile(r'(?<![\w.])(\d+)(?=[^\W\d_]{1,3}\b)')  # 5m, 18th, 3x
_NAME_IN_ID = re.compile(r'\b[^\W\d_]+(?:_[^\W\d_]+)+(?=_\d)')  # mei_kovacs_8020
_MONTHS = {
  month: n for n, month in enumerate('jan feb mar apr may jun jul aug sep oct nov dec'.split(), 1)
}
_MONTH = rf'({"|".join(_MONTHS)})[a-z]*\.?'
_DAY = r'(\d{1,2})(?:st|nd|rd|th)?'
_MONTH_FIRST = re.compile(rf'\b{_MONTH} {_DAY},? (\d{{4}})', re.IGNORECASE)
_DAY_FIRST = re.compile(rf'\b{_DAY}(?: of)? {_MONTH},? (\d{{4}})', re.IGNORECASE)


def words_of(text: str) -> tuple[str, ...]:
  """A text as it is compared: in lower case, numbers by their value, names made of words taken apart, ids and dates whole."""
  return tuple(word for token in _TOKEN.findall(text) for word in _words(token))


def _words(token: str) -> Iterator[str]:
  if _NUMBER.fullmatch(token):
    number = token.replace(',', '')
    yield number.rstrip('0').rstrip('.') if '.' in number else number
  elif any(character.isdigit() for character in token):
    yield token.lower()
  else:
    for word in _HUMP.sub('_', token).lower().split('_'):
      if word:
        yield _NUMERALS.get(word, word)


class Said:
  """Texts in which phrases, as `words_of` gives them, are looked up, and with `readings` what can be read out of them: numbers,
  dates, and the names in ids."""

  def __init__(self, texts: Iterable[str], *, readings: bool = False):
    texts = list(texts)
    texts += [reading for text in texts for reading in _readings(text)] if readings else []
    self._text = '|'.join(f' {" ".join(words_of(text))} ' for text in texts)

  def __contains__(self, phrase: Sequence[str]) -> bool:
    return f' {" ".join(phrase)} ' in self._text


def _readings(text: str) -> Iterator[str]:
  yield from _WITH_UNIT.findall(text)
  yield from _NAME_IN_ID.findall(text)
  for number, scale in _SCALED.findall(text):
    yield f'{float(number.replace(",", "")) * _SCALES[scale.lower()]:.12g}'
  dates = [(year, month, day) for month, day, year in _MONTH_FIRST.findall(text)]
  for year, month, day in dates + [
    (year, month, day) for day, month, year in _DAY_FIRST.findall(text)
  ]:
    yield f'{year}-{_MONTHS[month.lower()]:02}-{int(day):02}'


def call_values(calls: Iterable[ToolCall]) -> list[str]:
  """Every text and number among the arguments, as text."""
  leaves = (leaf for call in calls for leaf in leaf_values([call.arguments, list(call.positional)]))
  return [str(leaf) for leaf in leaves if leaf is not None and not isinstance(leaf, bool)]


def leaked_facts(seed: Seed, subtasks: Sequence[str]) -> set[str]:
  """Facts of the subtasks that stand in an argument of the reference calls and in neither history nor query.

  Facts are an argument's whole value, or three words in a row of a longer one; names, numbers and ids in it; and what a subtask
  quotes from it. A name is a capitalised word in both: that a sentence begins with a word of a value says nothing.
  """
  known = Said((message.content for message in seed.conversations), readings=True)
  values = call_values(seed.calls)
  told, given = Said(subtasks), Said(values)
  facts = {phrase for value in values for phrase in _phrases(words_of(value)) if phrase in told}
  facts |= _names(subtasks) & _names(values)
  quoted = (
    words_of(part) for text in subtasks for parts in _QUOTED.findall(text) for part in parts
  )
  facts |= {phrase for phrase in quoted if phrase and phrase in given}
  return {' '.join(phrase) for phrase in facts - _NO_FACTS if phrase not in known}


def _names(texts: Iterable[str]) -> set[tuple[str, ...]]:
  """Capitalised words, numbers, and ids, in which there is a digit."""
  tokens = {token for text in texts for token in _TOKEN.findall(text)}
  return {
    words_of(token)
    for token in tokens
    if token[0].isupper() or any(character.isdigit() for character in token)
  }


def _phrases(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
  """The facts in a value: all of it where it is short, each run of words where it is long."""
  if (
    len(words) == 1
    and (len(words[0]) >= _LETTERS or words[0][0].isdigit())
    or 1 < len(words) <= _RUN
  ):
    yield words
  for start in range(len(words) - _RUN + 1 if len(words) > _RUN else 0):
    yield words[start : start + _RUN]
