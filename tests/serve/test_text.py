"""Text in pieces: whatever the cuts, their sum is the text, no character comes in halves, and no
stop string leaks.
"""

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

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


@pytest.fixture(scope='module')
def fallback():
  """A tokenizer like Llama-2's: a few pieces of words, bytes for all else, one space cut off."""
  pieces = ['\u2581', 'a', 'b', '\u2581the', '\u00e9', '\u8a9e', '\u2581\u2581', '.']
  texts = ['<unk>', *(f'<0x{byte:02X}>' for byte in range(256)), *pieces]
  vocab = {text: number for number, text in enumerate(texts)}
  model = models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token='<unk>')
  made = tokenizers.Tokenizer(model)
  made.decoder = decoders.Sequence(
    [
      decoders.Replace('\u2581', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  made.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in ('<s>', '</s>')])
  return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@given(
  tokens=st.lists(st.integers(0, 266) | st.integers(250, 266) | st.integers(225, 230), max_size=12),
  sizes=CUTS,
)
def test_pieces_add_up_where_a_vocabulary_falls_back_to_bytes(fallback, tokens, sizes):
  detokenizer = Detokenizer(fallback)
  text = ''.join(map(detokenizer.push, cut(tokens, sizes))) + detokenizer.finish()
  assert text == fallback.decode(tokens, skip_special_tokens=True)


def test_bytes_that_stop_being_characters_together(fallback):
  """'n' alone, and no character with a stray byte behind it."""
  detokenizer = Detokenizer(fallback)
  tokens = fallback.convert_tokens_to_ids(['a', '<0x6E>', '<0x8F>', 'b'])
  assert [detokenizer.push([token]) for token in tokens] == ['a', '', '', '\ufffd\ufffdb']


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
