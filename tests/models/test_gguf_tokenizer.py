"""Tokenizers of GGUF files give the ids of the tokenizers that they were made from."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from gguf_files import tokenizer_fields

from dcore_jax.models.gguf_tokenizer import read_tokenizer

_BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
_PLAIN_BYTES = _BYTES | {'use_regex': False}
_DIGITS = {'type': 'Digits', 'individual_digits': True}


def isolated(pattern):
  return {
    'type': 'Split',
    'pattern': {'Regex': pattern},
    'behavior': 'Isolated',
    'invert': False,
  }


# The fields `normalizer` and `pre_tokenizer` of published tokenizer.json files.
_PUBLISHED = {
  'gpt-2': (None, _BYTES),
  'smollm': (None, {'type': 'Sequence', 'pretokenizers': [_DIGITS, _BYTES]}),
  'qwen2': (
    {'type': 'NFC'},
    {
      'type': 'Sequence',
      'pretokenizers': [
        isolated(
          r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r'|\s*[\r\n]+|\s+(?!\S)|\s+'
        ),
        _PLAIN_BYTES,
      ],
    },
  ),
  'llama-bpe': (
    None,
    {
      'type': 'Sequence',
      'pretokenizers': [
        isolated(
          r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
        ),
        _PLAIN_BYTES,
      ],
    },
  ),
  'deepseek-coder': (
    None,
    {
      'type': 'Sequence',
      'pretokenizers': [
        isolated('[\r\n]'),
        isolated(r'\s?\p{L}+'),
        isolated(r'\s?\p{P}+'),
        isolated('[一-龥ࠀ-一가-퟿]+'),
        _DIGITS,
        _PLAIN_BYTES,
      ],
    },
  ),
}
_CORPUS = [
  "I'll say it's 12345 or 1,000.50; the cat doesn't care!!\r\n\r\n  def f(x):\n\treturn x  + 1\n",
  'Ünïcode: 東京タワー 한국어 العربية ３４５ naïve cafe\u0301 🙂🙂 — “quotes”…',
  'the 2024 the 2025 the 20 the 1999   spaces    and\u00a0more\u2003here',
]
_PIECES = [
  *('<|im_start|>', '<|im_end|>', '<think>', '</s>', "'LL", "'s", ' ', '   ', '\n', '\r\n', '\t'),
  *('123', '4567890', 'e\u0301', '\u00a0', 'the', ' cat', '東京', '한국', '🙂', '..', '１２'),
]
# Pieces that the rules treat in their own way, between any text that UTF-8 can hold.
_TEXTS = st.lists(
  st.one_of(st.sampled_from(_PIECES), st.text(st.characters(codec='utf-8'), max_size=6)),
  max_size=8,
).map(''.join)


def trained(pre):
  """A tokenizer of 600 tokens that splits words by a published rule."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == 'llama-bpe'))
  record = json.loads(backend.to_str())
  record['normalizer'], record['pre_tokenizer'] = _PUBLISHED[pre]
  record['decoder'] = _BYTES
  backend = tokenizers.Tokenizer.from_str(json.dumps(record))
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(_CORPUS * 2, trainer)
  backend.add_tokens([tokenizers.AddedToken('<think>', normalized=False)])
  return backend


TRAINED = {pre: trained(pre) for pre in _PUBLISHED}


@pytest.mark.parametrize('pre', _PUBLISHED)
@hypothesis.settings(max_examples=150)
@hypothesis.given(text=_TEXTS)
def test_ids_are_those_of_the_tokenizer_it_was_made_from(pre, text):
  reference = TRAINED[pre]
  ours = _read(pre)
  want = reference.encode(text)
  got = ours.encode(text)
  assert got.ids == want.ids
  for skip in (True, False):
    assert ours.decode(got.ids, skip) == reference.decode(want.ids, skip)


_CACHE = {}


def _read(pre):
  if pre not in _CACHE:
    _CACHE[pre] = read_tokenizer(tokenizer_fields(TRAINED[pre], pre, 640)).backend
  return _CACHE[pre]


def test_the_rules_differ():
  """The texts above would not tell one rule from another if these were equal."""
  words = set()
  for pre in _PUBLISHED:
    split = _read(pre).pre_tokenizer.pre_tokenize_str("we'LL 12345 cat\n\n x")
    words.add(tuple(word for word, _ in split))
  assert len(words) == len(_PUBLISHED)


@pytest.fixture(scope='module')
def qwen3(data_dir):
  reference = tokenizers.Tokenizer.from_file(str(data_dir / 'qwen3-tokenizer' / 'tokenizer.json'))
  return reference, read_tokenizer(tokenizer_fields(reference, 'qwen2', 151936))


@hypothesis.settings(max_examples=200)
@hypothesis.given(text=_TEXTS)
def test_the_published_tokenizer_of_qwen3(qwen3, text):
  reference, ours = qwen3
  assert ours.size == 151669
  want = reference.encode(text).ids
  assert ours.backend.encode(text).ids == want
  assert ours.backend.decode(want, False) == reference.decode(want, False)


def fields(**changes):
  record = tokenizer_fields(TRAINED['gpt-2'], 'gpt-2', 640)
  return record | {f'tokenizer.ggml.{name}': value for name, value in changes.items()}


@pytest.mark.parametrize(
  'changes, before, after',
  [
    ({}, [], []),
    ({'add_bos_token': True}, [1], []),
    ({'add_bos_token': True, 'add_eos_token': True}, [1], [2]),
    ({'pre': 'llama-bpe'}, [1], []),
    ({'pre': 'llama-bpe', 'add_bos_token': False, 'add_eos_token': True}, [], [2]),
    ({'pre': 'llama-bpe', 'bos_token_id': None}, [], []),
  ],
)
def test_tokens_around_a_text(changes, before, after):
  ids = {'bos_token_id': 1, 'eos_token_id': 2}
  backend = read_tokenizer(fields(**ids | changes)).backend
  inside = backend.encode('the cat', add_special_tokens=False).ids
  assert backend.encode('the cat').ids == [*before, *inside, *after]


def test_templates_by_name(tmp_path):
  record = fields(eot_token_id=5) | {
    'tokenizer.chat_template': 'a',
    'tokenizer.chat_template.tool_use': 'b',
  }
  tokenizer = read_tokenizer(record)
  # The field's token, and the control tokens that end an answer by their names.
  assert tokenizer.generation_config() == {'eos_token_id': [0, 2, 5]}
  tokenizer.save(tmp_path, longest=7)
  import transformers

  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert loaded.chat_template == {'default': 'a', 'tool_use': 'b'}
  assert loaded.model_max_length == 7


# --- SentencePiece ---

_WORDS = ['▁the', '▁cat', '▁c', 'at', 'th', 'he', '▁t', 'in', 'ing', 'ng', '▁', '▁▁', 'th▁', 'o▁']
_LETTERS = sorted(set('theca inog12') - {' '})


def sentence_piece():
  """(tokens, kinds, scores) of a vocabulary as Llama 2 has it: better scores come first."""
  tokens = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
  kinds = [2, 3, 3, *[6] * 256]
  merged = [word for word in _WORDS if len(word) > 1]
  tokens += [*merged, '▁', *_LETTERS, '<pad>']
  kinds += [1] * (len(merged) + 1 + len(_LETTERS)) + [4]
  scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
  return tokens, kinds, scores


def merged_by_score(text, tokens, scores):
  """The algorithm itself: the adjacent pair that makes the best token, leftmost first."""
  number = {token: place for place, token in enumerate(tokens)}
  pieces = list('▁' + text.replace(' ', '▁'))
  while True:
    found = []
    for place in range(len(pieces) - 1):
      joined = pieces[place] + pieces[place + 1]
      if joined in number:
        found.append((-scores[number[joined]], place, joined))
    if not found:
      break
    _, place, joined = min(found)
    pieces[place : place + 2] = [joined]
  ids = []
  for piece in pieces:
    ids += [number[piece]] if piece in number else [3 + byte for byte in piece.encode()]
  return ids


def sentence_piece_fields(**changes):
  tokens, kinds, scores = sentence_piece()
  record = {
    'model': 'llama',
    'tokens': tokens,
    'token_type': kinds,
    'scores': np.array(scores, np.float32),
    **changes,
  }
  return {f'tokenizer.ggml.{name}': value for name, value in record.items()}


@hypothesis.settings(max_examples=300)
@hypothesis.given(
  text=st.text(st.one_of(st.sampled_from('theca inog12'), st.characters(codec='utf-8')), min_size=1)
)
def test_scores_decide_what_sentence_piece_merges(text):
  tokens, _, scores = sentence_piece()
  hypothesis.assume('▁' not in text and not any(name in text for name in ('<s>', '</s>', '<unk>')))
  backend = read_tokenizer(sentence_piece_fields()).backend
  ids = backend.encode(text).ids
  assert ids == [1, *merged_by_score(text, tokens, scores)]
  assert backend.decode(ids) == text


def test_sentence_piece_with_tokens_of_its_own():
  backend = read_tokenizer(sentence_piece_fields(add_bos_token=False)).backend
  pad = len(sentence_piece()[0]) - 1
  ids = backend.encode('the<pad>cat</s>').ids
  assert ids.count(pad) == 1 and ids[-1] == 2


@pytest.mark.parametrize(
  'changes, match',
  [
    ({'scores': None}, 'scores is missing'),
    ({'scores': np.zeros(3, np.float32)}, 'no finite number for each'),
    ({'precompiled_charsmap': np.ones(4, np.uint8)}, 'precompiled_charsmap is not supported'),
    ({'remove_extra_whitespaces': True}, 'remove_extra_whitespaces is not supported'),
    ({'tokens': ['a'], 'token_type': [1]}, 'fewer than'),
  ],
)
def test_what_sentence_piece_needs(changes, match):
  with pytest.raises(ValueError, match=match):
    read_tokenizer(sentence_piece_fields(**changes))
