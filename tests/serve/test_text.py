"""Text in pieces: whatever the cuts, their sum is the text, no character comes in halves, and no
stop string leaks.
"""

from hypothesis import given
from hypothesis import strategies as st

from dcore_jax.serve.text import Detokenizer, StopScanner, TextReader

CUTS = st.lists(st.integers(1, 4), min_size=1, max_size=8)


def cut(row, sizes):
  """The row in parts of these sizes, over and over."""
  parts = []
  place = 0
  while place < len(row):
    size = sizes[len(parts) % len(sizes)]
    parts.append(row[place : place + size])
    place += size
  return parts


@given(tokens=st.lists(st.integers(0, 639), max_size=40), sizes=CUTS)
def test_pieces_of_any_tokens_add_up_to_their_text(tokenizer, tokens, sizes):
  """Random tokens are mostly bytes that are no characters."""
  detokenizer = Detokenizer(tokenizer)
  text = ''.join(map(detokenizer.push, cut(tokens, sizes))) + detokenizer.finish()
  assert text == tokenizer.decode(tokens, skip_special_tokens=True)


@given(text=st.text(max_size=30), sizes=CUTS)
def test_characters_are_never_cut(tokenizer, text, sizes):
  """The organism's tokens for most of them are single bytes."""
  tokens = tokenizer(text)['input_ids']
  detokenizer = Detokenizer(tokenizer)
  sent = ''
  want = tokenizer.decode(tokens, skip_special_tokens=True)
  for part in cut(tokens, sizes):
    sent += detokenizer.push(part)
    assert want.startswith(sent)
  assert sent + detokenizer.finish() == want


def test_a_character_of_four_tokens_comes_with_the_last(tokenizer):
  tokens = tokenizer('\U0001f600')['input_ids']
  detokenizer = Detokenizer(tokenizer)
  assert len(tokens) == 4 and [detokenizer.push([token]) for token in tokens] == [
    '',
    '',
    '',
    '\U0001f600',
  ]
  cut_off = Detokenizer(tokenizer)
  assert cut_off.push(tokens[:3]) == '' and cut_off.finish() == '\ufffd'


def first_complete(text, stops):
  """Where the text ends when read letter by letter."""
  for end in range(len(text) + 1):
    starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
    if starts:
      return text[: min(starts)], True
  return text, False


@given(
  text=st.text('abc', max_size=30),
  stops=st.lists(st.text('abc', min_size=1, max_size=4), max_size=3),
  sizes=CUTS,
)
def test_nothing_of_a_stop_string_is_sent(text, stops, sizes):
  scanner = StopScanner(stops)
  sent = ''
  want, stopped = first_complete(text, stops)
  for part in cut(text, sizes):
    sent += scanner.push(part)
    assert want.startswith(sent)
  assert sent + scanner.finish() == want and scanner.stopped == stopped


def test_what_cannot_become_a_stop_string_is_sent_at_once():
  scanner = StopScanner(['abc'])
  assert [scanner.push(text) for text in ('xa', 'b', 'ab', 'd')] == ['x', '', 'ab', 'abd']


def test_a_stop_string_across_tokens_and_characters(tokenizer):
  reader = TextReader(tokenizer, ['\u00e9 o'])
  tokens = tokenizer('find th\u00e9 order')['input_ids']
  assert ''.join(reader.push([token]) for token in tokens) == 'find th' and reader.stopped
  assert reader.push((), last=True) == ''
