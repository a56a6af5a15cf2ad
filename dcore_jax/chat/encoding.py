"""From rendered conversations to token ids, so that nobody's text becomes markup.

A template renders a conversation as one text, which is encoded as a whole. `<|im_end|>` in what a
user writes would then be the token that ends the turn. So every text of a conversation is marked
before a template sees it: a cut, written with two characters for private use, is put into each
place where an added token stands or where a token could come about with what the template writes
beside the text. `encode_rendered` encodes what stands before and behind a cut separately, and no
token is matched across it. Texts without such places are not changed and have the ids that they
have anyhow.

Text of systems, users and tools and the specs of tools match no added token at all. The assistant's
own text holds tags of thoughts and calls, which stay tokens; it matches no special ones.

What cannot be told apart: markup that is not an added token but words ('### Response:'), and tokens
that a tokenizer looks for only in normalized text, where they are spelled otherwise.
"""

import bisect
import dataclasses
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# A cut is both characters. The first one twice is that character, which somebody wrote.
_BREAK = '\U000fdc00'
_CUT = _BREAK + '\U000fdc01'
_MARKS = re.compile(f'{_BREAK}[{_BREAK}{_CUT[1]}]')
# What `tool_response` writes around the outputs that go back to the model as a user's message.
_OUTPUT = '<tool_response>\n'
_OUTPUT_END = '\n</tool_response>'


@dataclasses.dataclass(frozen=True)
class _Markup:
  """Tokens that a text must not match.

  Attributes:
    tokens: matches a token; longer ones first, as a tokenizer does.
    places: matches the empty text in front of each token, overlapping ones included.
    heads: beginnings of tokens. A text that ends with one may become a token with what follows it.
    tails: ends of tokens.
    joined: all tokens, with a character between them that no text of a token has.
    longest: characters of the longest token.
  """

  tokens: re.Pattern
  places: re.Pattern
  heads: frozenset[str]
  tails: frozenset[str]
  joined: str
  longest: int

  @classmethod
  def of(cls, tokens: Iterable[str]) -> '_Markup':
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    # Without tokens nothing matches.
    pattern = '|'.join(map(re.escape, longest_first)) or r'(?!)'
    heads = {token[:size] for token in longest_first for size in range(1, len(token))}
    tails = {token[size:] for token in longest_first for size in range(1, len(token))}
    return cls(
      tokens=re.compile(pattern),
      places=re.compile(f'(?=({pattern}))'),
      # A word alone is no sign of a token: no template writes the other half of `<think`.
      heads=frozenset(filter(_is_markup, heads)),
      tails=frozenset(filter(_is_markup, tails)),
      joined='\0'.join(longest_first),
      longest=max(map(len, longest_first), default=0),
    )

  def cut(self, text: str) -> str:
    """Returns the text with cuts wherever a token stands or could come about."""
    text = text.replace(_BREAK, _BREAK * 2)
    if self.tokens.search(text):
      parts = []
      done = 0
      for found in self.places.finditer(text):
        # Behind the first character, where the cut is inside of every token that begins here.
        parts.append(text[done : found.start() + 1])
        done = found.start() + 1
      text = _CUT.join([*parts, text[done:]])
    # Templates strip texts, so that white space at the ends does not keep the halves apart.
    core = text.strip()
    if not core:
      return text
    begin = text.index(core)
    end = begin + len(core)
    inner = len(core) < self.longest and core in self.joined and _is_markup(core)
    sizes = range(1, min(self.longest, len(core) + 1))
    before = _CUT if inner or any(core[:size] in self.tails for size in sizes) else ''
    after = _CUT if inner or any(core[-size:] in self.heads for size in sizes) else ''
    return text[:begin] + before + core + after + text[end:]

  def cut_values(self, value: Any) -> Any:
    """Returns a JSON value with every text in it cut, keys included."""
    if isinstance(value, str):
      return self.cut(value)
    if isinstance(value, Mapping):
      return {self.cut_values(key): self.cut_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
      return [self.cut_values(item) for item in value]
    return value


def _is_markup(text: str) -> bool:
  return re.search(r'[^\w\s]', text) is not None


# tokenizer -> (its size when it was read, all its tokens, its special ones)
_known: weakref.WeakKeyDictionary[Any, tuple[int, _Markup, _Markup]] = weakref.WeakKeyDictionary()


def _markup(tokenizer: Any) -> tuple[_Markup, _Markup]:
  """Returns (all added tokens, the special ones) of a tokenizer.

  Runs of spaces and words that were added to a vocabulary are no markup, and neither is a single
  character.
  """
  # Tokens are added to a tokenizer after it is loaded.
  size = len(tokenizer)
  known = _known.get(tokenizer)
  if known and known[0] == size:
    return known[1:]
  special = set(tokenizer.all_special_tokens)
  added = set()
  for token in tokenizer.added_tokens_decoder.values():
    added.add(str(token))
    if token.special:
      special.add(str(token))
  special = {token for token in special if len(token) > 1 and token.strip()}
  tags = {token for token in added if len(token) > 1 and _is_markup(token)}
  result = _Markup.of(special | tags), _Markup.of(special)
  _known[tokenizer] = (size, *result)
  return result


def mark_records(tokenizer: Any, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns messages with cuts in their texts, for a template to render.

  A user's message that consists of tools' outputs, as `tool_response` writes them, keeps the tags
  around each output.
  """
  everything, special = _markup(tokenizer)
  marked = []
  for record in records:
    own = record.get('role') == 'assistant'
    fields = (special if own else everything).cut_values(record)
    content = record.get('content')
    if record.get('role') == 'user' and isinstance(content, str):
      fields['content'] = _cut_outputs(everything, content)
    marked.append(fields)
  return marked


def _cut_outputs(markup: _Markup, content: str) -> str:
  if not (content.startswith(_OUTPUT) and content.endswith(_OUTPUT_END)):
    return markup.cut(content)
  inside = content[len(_OUTPUT) : -len(_OUTPUT_END)]
  outputs = inside.split(f'{_OUTPUT_END}\n{_OUTPUT}')
  return '\n'.join(f'{_OUTPUT}{markup.cut(output)}{_OUTPUT_END}' for output in outputs)


def mark_values(tokenizer: Any, value: Any) -> Any:
  """Returns a JSON value from outside (specs of tools, options) with cuts in its texts."""
  return _markup(tokenizer)[0].cut_values(value)


def mark_answer(tokenizer: Any, text: str) -> str:
  """Returns an assistant's text that no template renders with cuts in its special tokens."""
  return _markup(tokenizer)[1].cut(text)


def _unmarked(text: str) -> tuple[str, list[int]]:
  """Returns (the text without marks, the places of its cuts)."""
  parts = []
  cuts = []
  done = 0
  length = 0
  for found in _MARKS.finditer(text):
    parts.append(text[done : found.start()])
    length += found.start() - done
    if found[0] == _CUT:
      cuts.append(length)
    else:
      parts.append(_BREAK)
      length += 1
    done = found.end()
  return ''.join([*parts, text[done:]]), cuts


def shown(rendered: str) -> str:
  """Returns a rendered text as a person sees it: without marks."""
  return _unmarked(rendered)[0]


def _pieces(markup: _Markup, rendered: str) -> list[str]:
  """Splits a rendered text where a token would else be matched."""
  text, cuts = _unmarked(rendered)
  pieces = []
  done = 0
  for found in markup.places.finditer(text):
    begin, end = found.span(1)
    # The first cut inside of the token is enough. Cuts elsewhere are left out: they would change
    # the ids of a text that matches nothing.
    place = bisect.bisect_right(cuts, begin)
    if place < len(cuts) and done < cuts[place] < end:
      pieces.append(text[done : cuts[place]])
      done = cuts[place]
  return [*pieces, text[done:]]


def encode_rendered(tokenizer: Any, rendered: str) -> list[int]:
  """Encodes a text that `render_prompt` or `render_records` returned.

  Its decoded ids are what `shown` returns.
  """
  return encode_all(tokenizer, [rendered])[0]


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
  """Does what `encode_rendered` does for many texts, in one call of the tokenizer."""
  pieces = []
  counts = []
  for text in texts:
    # Nearly all texts have no marks, and are one piece.
    parts = _pieces(_markup(tokenizer)[0], text) if _BREAK in text else [text]
    pieces += parts
    counts.append(len(parts))
  encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False)['input_ids']
  result = []
  rest = iter(encoded)
  for count in counts:
    ids = list(next(rest))
    for _ in range(count - 1):
      ids += next(rest)
    result.append(ids)
  return result
