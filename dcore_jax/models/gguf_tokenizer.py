"""The tokenizer inside a GGUF file, as the files that a Hugging Face directory has.

A file holds the tokens, what kind each one is, and for byte-level BPE ('gpt2') the merges and the
name of the rule that splits texts into words; llama.cpp knows the rules by these names. For a
SentencePiece vocabulary ('llama') it holds a score for each token instead.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from dcore_jax.files import write_json_atomic

# llama.cpp's kinds of tokens.
_NORMAL = 1
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5
_KINDS = range(1, 7)
# Control tokens that end an answer, whether or not a field names them: llama.cpp stops at them too.
_ENDS = frozenset(
  {'<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<|endoftext|>', '<|end_of_text|>', '<|end|>'}
)
_ID_FIELDS = {
  'bos': 'bos_token_id',
  'eos': 'eos_token_id',
  'unk': 'unknown_token_id',
  'pad': 'padding_token_id',
  'eot': 'eot_token_id',
  'eom': 'eom_token_id',
}
_SPACE = '\u2581'  # what SentencePiece writes for a space

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _words(digits: str) -> str:
  """The words of Llama 3 and Qwen2, which differ in how many digits are in one."""
  return (
    rf'{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*'
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
  )


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
  """Splits by each pattern in turn, and writes bytes as letters."""
  splits = [pre_tokenizers.Split(Regex(pattern), 'isolated') for pattern in patterns]
  return pre_tokenizers.Sequence(
    [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )


def _gpt2() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _qwen2() -> pre_tokenizers.PreTokenizer:
  return _split(_words(r'\p{N}'))


def _llama3() -> pre_tokenizers.PreTokenizer:
  return _split(_words(r'\p{N}{1,3}'))


def _deepseek_coder() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(r'[\r\n]'), 'isolated'),
      pre_tokenizers.Split(Regex(r'\s?\p{L}+'), 'isolated'),
      pre_tokenizers.Split(Regex(r'\s?\p{P}+'), 'isolated'),
      # Chinese, Japanese and Korean, as the published tokenizer has the ranges.
      pre_tokenizers.Split(Regex('[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+'), 'isolated'),
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


class _Rule(NamedTuple):
  """How texts are split before BPE, and what belongs to it.

  Attributes:
    split: makes the pre-tokenizer.
    composed: texts are brought into Unicode's composed form (NFC) first.
    whole_words: a word that is a token is one, whatever the merges make of it.
    add_bos: whether texts begin with the token for it, where no field says so.
  """

  split: Callable[[], pre_tokenizers.PreTokenizer]
  composed: bool = False
  whole_words: bool = False
  add_bos: bool = False


_LLAMA3_RULE = _Rule(_llama3, whole_words=True, add_bos=True)
_QWEN2_RULE = _Rule(_qwen2, composed=True)
_RULES = {
  'gpt-2': _Rule(_gpt2),
  'smollm': _Rule(_single_digits),
  'starcoder': _Rule(_single_digits),
  'refact': _Rule(_single_digits),
  'qwen2': _QWEN2_RULE,
  'deepseek-r1-qwen': _QWEN2_RULE,
  'llama-bpe': _LLAMA3_RULE,
  'llama-v3': _LLAMA3_RULE,
  'llama3': _LLAMA3_RULE,
  'deepseek-coder': _Rule(_deepseek_coder),
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer and what is said beside it.

  Attributes:
    backend: of the tokenizers library.
    ids: 'bos', 'eos', 'unk', 'pad' -> token, of those that the file names.
    stop_ids: every token that ends an answer.
    templates: name -> chat template; '' is the default one.
  """

  backend: tokenizers.Tokenizer
  ids: Mapping[str, int]
  stop_ids: tuple[int, ...]
  templates: Mapping[str, str]

  @property
  def size(self) -> int:
    """One more than the last token."""
    return self.backend.get_vocab_size()

  def save(self, folder: pathlib.Path, *, longest: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
      folder: where.
      longest: the tokens that the model has positions for.
    """
    special = {}
    for name in ('bos', 'eos', 'unk', 'pad'):
      if name in self.ids:
        special[f'{name}_token'] = self.backend.id_to_token(self.ids[name])
    config = {
      # The class that reads tokenizer.json alone, in version 4 of transformers and in 5.
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'model_max_length': longest,
      'clean_up_tokenization_spaces': False,
      **special,
    }
    if list(self.templates) == ['']:
      config['chat_template'] = self.templates['']
    elif self.templates:
      config['chat_template'] = [
        {'name': name or 'default', 'template': text} for name, text in self.templates.items()
      ]
    write_json_atomic(folder / 'tokenizer.json', json.loads(self.backend.to_str()))
    write_json_atomic(folder / 'tokenizer_config.json', config)
    write_json_atomic(folder / 'special_tokens_map.json', special)

  def generation_config(self) -> dict[str, Any]:
    """Returns the contents of generation_config.json: the tokens that begin, end and fill texts."""
    config: dict[str, Any] = {}
    if self.stop_ids:
      config['eos_token_id'] = list(self.stop_ids)
    for name in ('bos', 'pad'):
      if name in self.ids:
        config[f'{name}_token_id'] = self.ids[name]
    return config


def read_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
  """Returns the tokenizer that a file's fields describe.

  Raises:
    ValueError: a kind of tokenizer, or a rule for splitting texts, that is not known here, or lists
      that do not fit each other.
  """
  model = fields.get('tokenizer.ggml.model')
  if not isinstance(model, str) or model not in ('gpt2', 'llama'):
    raise ValueError(
      f"its tokenizer is of the kind {model!r}; readable are 'gpt2' (byte-level BPE) and 'llama' "
      '(SentencePiece)'
    )
  tokens, kinds = _tokens(fields)
  ids = _ids(fields, len(tokens))
  if model == 'gpt2':
    backend, add_bos = _byte_level(fields, tokens)
  else:
    ids = {'bos': 1, 'eos': 2, 'unk': 0} | ids
    backend, add_bos = _sentence_piece(fields, tokens, kinds, ids)
  added = []
  for token, kind in zip(tokens, kinds, strict=True):
    if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN):
      added.append(AddedToken(token, normalized=False, special=kind != _USER_DEFINED))
  # Where each is in the vocabulary already, it keeps its number.
  backend.add_tokens(added)
  _post_process(backend, fields, tokens, ids, add_bos)
  stops = {ids[name] for name in ('eos', 'eot', 'eom') if name in ids}
  stops |= {
    number for number, token in enumerate(tokens) if kinds[number] == _CONTROL and token in _ENDS
  }
  return Tokenizer(
    backend=backend,
    ids={name: ids[name] for name in ('bos', 'eos', 'unk', 'pad') if name in ids},
    stop_ids=tuple(sorted(stops)),
    templates=_templates(fields),
  )


def _tokens(fields: Mapping[str, Any]) -> tuple[list[str], list[int]]:
  """(tokens, their kinds), without those that only fill the embedding up."""
  tokens = _texts(fields, 'tokenizer.ggml.tokens')
  listed = fields.get('tokenizer.ggml.token_type', [_NORMAL] * len(tokens))
  kinds = np.asarray(listed).ravel().tolist()
  if len(kinds) != len(tokens) or not set(kinds) <= set(_KINDS):
    raise ValueError(
      f'tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens, '
      'expected one of 1 to 6 for each'
    )
  # Older converters called what fills up user-defined.
  while kinds and (kinds[-1] == _UNUSED or tokens[len(kinds) - 1] == f'[PAD{len(kinds) - 1}]'):
    kinds.pop()
  tokens = tokens[: len(kinds)]
  places: dict[str, int] = {}
  for number, token in enumerate(tokens):
    if not token:
      raise ValueError(f'token {number} is empty')
    if token in places:
      raise ValueError(f'tokens {places[token]} and {number} are both {token!r}')
    places[token] = number
  if not tokens:
    raise ValueError('its tokenizer has no tokens')
  return tokens, kinds


def _ids(fields: Mapping[str, Any], count: int) -> dict[str, int]:
  """The tokens with a meaning that the file names."""
  ids = {}
  for name, field in _ID_FIELDS.items():
    value = fields.get(f'tokenizer.ggml.{field}')
    if value is None:
      continue
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
      raise ValueError(f'tokenizer.ggml.{field} is {value!r}, and there are {count} tokens')
    ids[name] = value
  return ids


def _byte_level(fields: Mapping[str, Any], tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
  """(tokenizer, whether texts begin with 'bos' by default) of byte-level BPE."""
  name = fields.get('tokenizer.ggml.pre')
  # Not guessed: with the wrong rule a model reads other tokens than it was trained on, and answers
  # a little worse.
  if not isinstance(name, str) or name not in _RULES:
    raise ValueError(
      f'tokenizer.ggml.pre, which says how texts are split, is {name!r}; known are {sorted(_RULES)}'
    )
  rule = _RULES[name]
  vocabulary = {token: number for number, token in enumerate(tokens)}
  merges = []
  for row, merge in enumerate(_texts(fields, 'tokenizer.ggml.merges')):
    # A token begins with at least one letter, which may itself be a space in an odd vocabulary.
    place = merge.find(' ', 1)
    pair = (merge[:place], merge[place + 1 :])
    if place < 0 or not vocabulary.keys() >= {*pair, ''.join(pair)}:
      raise ValueError(
        f'merge {row} of tokenizer.ggml.merges, {merge!r}, is not of two tokens that make a third'
      )
    merges.append(pair)
  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words)
  )
  if rule.composed:
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = rule.split()
  backend.decoder = decoders.ByteLevel()
  return backend, rule.add_bos


def _sentence_piece(
  fields: Mapping[str, Any], tokens: list[str], kinds: list[int], ids: Mapping[str, int]
) -> tuple[tokenizers.Tokenizer, bool]:
  """(tokenizer, whether texts begin with 'bos' by default) of SentencePiece's BPE."""
  for name in ('precompiled_charsmap', 'remove_extra_whitespaces'):
    value = fields.get(f'tokenizer.ggml.{name}', False)
    if value is not False and not (isinstance(value, np.ndarray) and not value.size):
      raise ValueError(f'tokenizer.ggml.{name} is not supported')
  if max(ids.values()) >= len(tokens):
    raise ValueError(f'its tokenizer has {len(tokens)} tokens, fewer than the least that it needs')
  scores = fields.get('tokenizer.ggml.scores')
  if not isinstance(scores, np.ndarray) or scores.shape != (len(scores),):
    raise ValueError('tokenizer.ggml.scores is missing')
  if len(scores) < len(tokens) or not np.all(np.isfinite(scores)):
    raise ValueError(f'tokenizer.ggml.scores has no finite number for each of {len(tokens)} tokens')
  vocabulary = {token: number for number, token in enumerate(tokens)}
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocabulary,
      merges=_scored_merges(tokens, kinds, scores),
      unk_token=tokens[ids['unk']],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  prefix = _flag(fields, 'add_space_prefix', True)
  steps = [normalizers.Prepend(_SPACE)] if prefix else []
  backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(' ', _SPACE)])
  back = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  backend.decoder = decoders.Sequence([*back, *([decoders.Strip(' ', 1, 0)] if prefix else [])])
  return backend, True


def _scored_merges(
  tokens: list[str], kinds: list[int], scores: np.ndarray
) -> list[tuple[str, str]]:
  """The merges that a vocabulary with scores stands for: the best token is made first."""
  made = {}
  for number, token in enumerate(tokens):
    if kinds[number] in (_NORMAL, _USER_DEFINED, _UNUSED):
      made[token] = float(scores[number])
  merges = []
  for token, score in made.items():
    for place in range(1, len(token)):
      pair = (token[:place], token[place:])
      if pair[0] in made and pair[1] in made:
        merges.append((-score, len(merges), pair))
  return [pair for _, _, pair in sorted(merges)]


def _post_process(
  backend: tokenizers.Tokenizer,
  fields: Mapping[str, Any],
  tokens: list[str],
  ids: Mapping[str, int],
  add_bos: bool,
) -> None:
  """Puts the tokens around texts that the file asks for."""
  wanted = {
    'bos': _flag(fields, 'add_bos_token', add_bos),
    'eos': _flag(fields, 'add_eos_token', False),
  }
  around = {}
  for name, asked in wanted.items():
    # llama.cpp adds none either where no token is named.
    if asked and name in ids:
      around[name] = (tokens[ids[name]], ids[name])
  before = [around['bos'][0]] if 'bos' in around else []
  after = [around['eos'][0]] if 'eos' in around else []
  # Only of byte-level BPE: a SentencePiece vocabulary splits no texts before it merges.
  byte_level = backend.pre_tokenizer is not None
  steps = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
  if around:
    steps.append(
      processors.TemplateProcessing(
        single=[*before, '$A', *after],
        pair=[*before, '$A', *after, *before, '$B:1', *after],
        special_tokens=list(around.values()),
      )
    )
  if steps:
    backend.post_processor = processors.Sequence(steps) if len(steps) > 1 else steps[0]


def _templates(fields: Mapping[str, Any]) -> dict[str, str]:
  """name -> chat template; the name of the default one is ''."""
  prefix = 'tokenizer.chat_template'
  templates = {}
  for name, value in fields.items():
    if name == prefix or name.startswith(f'{prefix}.'):
      if not isinstance(value, str):
        raise ValueError(f'{name} is {value!r}, expected a text')
      templates[name[len(prefix) + 1 :]] = value
  return templates


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
  value = fields.get(f'tokenizer.ggml.{name}', default)
  if not isinstance(value, bool):
    raise ValueError(f'tokenizer.ggml.{name} is {value!r}, expected true or false')
  return value


def _texts(fields: Mapping[str, Any], name: str) -> list[str]:
  value = fields.get(name)
  if not isinstance(value, list):
    raise ValueError(f'{name} is missing or no list of texts')
  return value
