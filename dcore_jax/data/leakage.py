"""Finds facts in a subtask that its author can know only from the reference calls.

docs/method.md, section 1.2, requirement 3, forbids them. A decomposer that sees the calls may copy
from them what nobody can know yet, such as the id that a lookup is to find. Its subtasks are solved
by a model that does not see the calls, so such a fact would make a guess look like a deduction.
A fact that the conversation contains in another form is no leak: 60% is 0.6, 5cm is 5, May 3rd
2022 is 2022-05-03.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from dcore_jax.chat.messages import ToolCall
from dcore_jax.chat.tool_calls import leaf_values
from dcore_jax.data.seeds import Seed

_RUN = 3  # words in a row of a longer text that count as copied; fewer are common speech
_LETTERS = 3  # the least letters of a lower-case word that is a fact: 'on' and 'm' stand everywhere
_NO_FACTS = {('0',), ('1',)}  # "starts from rest" and "a coffee" say them without a number
_CJK = '\u3040-\u30ff\u3400-\u9fff'  # Japanese and Chinese have no spaces: a character is a word
_TOKEN = re.compile(
  rf'\d{{4}}-\d\d-\d\d(?!\d)|\d[\d,]*\.\d+|\d{{1,3}}(?:,\d{{3}})+(?!\w)|[{_CJK}]|[^\W{_CJK}]+'
)
_NUMBER = re.compile(r'[\d,]+(?:\.\d+)?')
_HUMP = re.compile(r'(?<=[a-z])(?=[A-Z])')
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|(?<!\w)\'([^\']+)\'(?!\w)')
_NUMBER_WORDS = 'zero one two three four five six seven eight nine ten eleven twelve'
_NUMERALS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
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
  month: number
  for number, month in enumerate('jan feb mar apr may jun jul aug sep oct nov dec'.split(), 1)
}
_MONTH = rf'({"|".join(_MONTHS)})[a-z]*\.?'
_DAY = r'(\d{1,2})(?:st|nd|rd|th)?'
_MONTH_FIRST = re.compile(rf'\b{_MONTH} {_DAY},? (\d{{4}})', re.IGNORECASE)
_DAY_FIRST = re.compile(rf'\b{_DAY}(?: of)? {_MONTH},? (\d{{4}})', re.IGNORECASE)


Phrase = tuple[str, ...]


def words_of(text: str) -> Phrase:
  """Splits a text into the words by which texts are compared.

  Words are in lower case, numbers are written by their value, identifiers made of words are split,
  and ids and dates stay whole.
  """
  words = []
  for token in _TOKEN.findall(text):
    words += _words(token)
  return tuple(words)


def _words(token: str) -> Iterator[str]:
  if _NUMBER.fullmatch(token):
    # 1,000, 1000 and 1000.0 are one number, and must be one word.
    number = token.replace(',', '')
    yield number.rstrip('0').rstrip('.') if '.' in number else number
  # Ids have digits. Split at underscores their parts would match other ids.
  elif any(character.isdigit() for character in token):
    yield token.lower()
  else:
    # orderId, order_id and 'order id' name one thing, and calls and subtasks spell it differently.
    for word in _HUMP.sub('_', token).lower().split('_'):
      if word:
        yield _NUMERALS.get(word, word)


class Said:
  """Texts in which phrases are looked up; a phrase is what `words_of` returns.

  With `readings` numbers, dates and names that the texts hold in another form are found too.
  """

  def __init__(self, texts: Iterable[str], *, readings: bool = False):
    texts = list(texts)
    if readings:
      for text in tuple(texts):
        texts += _readings(text)
    # A bar between texts keeps a phrase from matching the end of one text and the start of the
    # next.
    self._text = '|'.join(f' {" ".join(words_of(text))} ' for text in texts)

  def __contains__(self, phrase: Sequence[str]) -> bool:
    return f' {" ".join(phrase)} ' in self._text


def _readings(text: str) -> Iterator[str]:
  yield from _WITH_UNIT.findall(text)
  yield from _NAME_IN_ID.findall(text)
  for number, scale in _SCALED.findall(text):
    # 12 digits print 60 % as 0.6, without the rounding error of 60 * 0.01.
    yield f'{float(number.replace(",", "")) * _SCALES[scale.lower()]:.12g}'
  for month, day, year in _MONTH_FIRST.findall(text):
    yield _iso_date(year, month, day)
  for day, month, year in _DAY_FIRST.findall(text):
    yield _iso_date(year, month, day)


def _iso_date(year: str, month: str, day: str) -> str:
  return f'{year}-{_MONTHS[month.lower()]:02}-{int(day):02}'


def call_values(calls: Iterable[ToolCall]) -> list[str]:
  """Returns every text and number among the arguments, as text."""
  values = []
  for call in calls:
    for leaf in leaf_values([call.arguments, list(call.positional)]):
      # True, False and null are not written in a request in that form, so they prove no leak.
      if leaf is not None and not isinstance(leaf, bool):
        values.append(str(leaf))
  return values


def leaked_facts(seed: Seed, subtasks: Sequence[str]) -> set[str]:
  """Finds facts of the subtasks that stand in a reference call, and in neither history nor query.

  A fact is the whole value of an argument, or three consecutive words of a longer value. Names,
  numbers and ids in a value are facts too, and so is what a subtask quotes from it. A name is a
  word that is capitalised in both texts.
  """
  # The history counts as known with all its readings, because a solver can convert a value that it
  # sees. Subtasks and calls are compared as they are written.
  known = Said((message.content for message in seed.conversations), readings=True)
  values = call_values(seed.calls)
  facts = _repeated_values(values, subtasks)
  # Both texts must have the capital: an argument 'Order' alone does not make every 'order' a name.
  facts |= _names(subtasks) & _names(values)
  facts |= _quotations(subtasks, values)
  return {' '.join(phrase) for phrase in facts - _NO_FACTS if phrase not in known}


def _repeated_values(values: Sequence[str], subtasks: Sequence[str]) -> set[Phrase]:
  told = Said(subtasks)
  facts = set()
  for value in values:
    facts.update(phrase for phrase in _phrases(words_of(value)) if phrase in told)
  return facts


def _quotations(subtasks: Sequence[str], values: Sequence[str]) -> set[Phrase]:
  given = Said(values)
  facts = set()
  for text in subtasks:
    # A match has one group for each kind of quotation marks; the groups of the other kinds are ''.
    for groups in _QUOTED.findall(text):
      phrases = [words_of(group) for group in groups]
      facts.update(phrase for phrase in phrases if phrase and phrase in given)
  return facts


def _names(texts: Iterable[str]) -> set[Phrase]:
  """Returns capitalised words, numbers, and ids, which have a digit in them."""
  names = set()
  for text in texts:
    for token in _TOKEN.findall(text):
      if token[0].isupper() or any(character.isdigit() for character in token):
        names.add(words_of(token))
  return names


def _phrases(words: Phrase) -> Iterator[Phrase]:
  """Yields the facts in a value: all of a short one, each run of words in a long one."""
  # A long value is seldom copied whole: a note of 20 words leaks by a part of it.
  if len(words) > _RUN:
    for start in range(len(words) - _RUN + 1):
      yield words[start : start + _RUN]
  elif len(words) > 1:
    yield words
  elif words and (len(words[0]) >= _LETTERS or words[0][0].isdigit()):
    yield words
