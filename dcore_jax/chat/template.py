"""From conversations to the text that a model sees, and what its chat template puts around a message.

A tokenizer brings its own chat template; `qwen3_template` is ours for tokenizers that have none, equal to Qwen3's own.
"""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import ToolCallError, parse_hermes


@functools.cache
def qwen3_template() -> str:
  """Jinja text of Qwen3's conversation format; renders what the official template does, tools and thoughts included."""
  return (
    importlib.resources.files('dcore_jax.chat').joinpath('qwen3.jinja').read_text(encoding='utf-8')
  )


def render_prompt(
  tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
) -> str:
  """Text of a conversation up to where the assistant speaks next, by the template of a transformers tokenizer.

  `tools` are specs as the template wants them, usually {'type': 'function', 'function': {...}}; None: the template shows none.
  """
  return render_records(tokenizer, [message.to_json() for message in messages], tools)


def render_records(
  tokenizer: Any,
  records: Sequence[dict[str, Any]],
  tools: Sequence[dict[str, Any]] | None = None,
  **options: Any,
) -> str:
  """`render_prompt` of messages as endpoints write them, tool calls and thoughts in fields of their own; `options` are the
  template's (enable_thinking)."""
  if not records:
    raise ValueError('a prompt needs at least one message')
  _need_template(tokenizer)
  return tokenizer.apply_chat_template(
    records, tools=tools, tokenize=False, add_generation_prompt=True, **options
  )


_PROBE_NAME, _PROBE_ARGUMENTS = 'probe_name', '{"probe_argument": 0}'


def render_begun_call(
  tokenizer: Any,
  records: Sequence[dict[str, Any]],
  tools: Sequence[dict[str, Any]],
  name: str | None = None,
) -> tuple[str, str]:
  """Text of a conversation in which the assistant has begun a call, and the part of it that begins the call.

  It is what the template writes of an answer that is a call alone, and breaks off before the arguments of the tool `name`, or
  before the name where that is None. Thoughts are empty or absent, as the template has them for an answer without.

  Raises:
    ValueError: the template writes no calls, or not in `<tool_call>` tags as `parse_hermes` reads them.
  """
  call = {'name': name or _PROBE_NAME, 'arguments': json.loads(_PROBE_ARGUMENTS)}
  turn = {
    'role': 'assistant',
    'content': '',
    'tool_calls': [{'type': 'function', 'function': call}],
  }
  _need_template(tokenizer)
  text = tokenizer.apply_chat_template([*records, turn], tools=tools, tokenize=False)
  before, tag, said = text.rpartition('<tool_call>')
  begun, found, _ = (tag + said).partition(_PROBE_NAME if name is None else _PROBE_ARGUMENTS)
  try:
    readable = parse_hermes(tag + said) == [ToolCall(**call)]
  except ToolCallError:
    readable = False
  if not readable or not found:
    raise ValueError(
      'the chat template does not write calls as <tool_call>{"name": ..., "arguments": ...}</tool_call>'
    )
  # The space before an object belongs to the token that opens it (' {"'): a prompt that ends with it has another token there.
  begun = begun.rstrip()
  return before + begun, begun


def _need_template(tokenizer: Any) -> None:
  if not tokenizer.chat_template:
    raise ValueError(
      'the tokenizer has no chat template; set tokenizer.chat_template = qwen3_template()'
    )


@dataclasses.dataclass(frozen=True)
class TurnFormat:
  """What a chat template writes around the messages, read off its own rendering.

  Attributes:
    end_of_turn, end_of_turn_id: the special token that ends what an assistant says ('<|im_end|>', '<|eot_id|>').
    before: white space between the content and that token ('' for Qwen3 and Llama, '\\n' for DeepSeek-Coder).
    after: white space behind it that still belongs to the message ('\\n' for Qwen3, '' for Llama).
    delimiters: id -> text of every special token between one message's content and the next one's.
  """

  end_of_turn: str
  end_of_turn_id: int
  before: str
  after: str
  delimiters: dict[int, str]


def turn_format(tokenizer: Any) -> TurnFormat:
  """Reads the format of a transformers tokenizer off a conversation rendered by its template.

  Raises:
    ValueError: no template, or one that does not end an assistant's message by a special token of the tokenizer.
  """
  _need_template(tokenizer)
  # Words that no template writes itself. The assistant's is not the last message: templates add thoughts to that one.
  asked, said, more = 'probe-asked', 'probe-said', 'probe-more'
  turns = [
    {'role': 'user', 'content': asked},
    {'role': 'assistant', 'content': said},
    {'role': 'user', 'content': more},
  ]
  text = tokenizer.apply_chat_template(turns, tokenize=False)
  gap = text.partition(said)[2].partition(more)[0]
  special = {
    i: str(token)
    for i, token in tokenizer.added_tokens_decoder.items()
    if token.special and str(token) in gap
  }
  if not special:
    raise ValueError(
      f'the chat template ends a turn by {gap!r}, which holds no special token of the tokenizer'
    )
  end_id = min(special, key=lambda i: gap.index(special[i]))
  before, end, _ = gap.partition(special[end_id])
  if before.strip():
    raise ValueError(
      f'the chat template writes {before!r} between what an assistant says and {end}'
    )
  last = tokenizer.apply_chat_template(turns[:2], tokenize=False).rpartition(said)[2]
  after = last.removeprefix(before + end)
  return TurnFormat(end, end_id, before, after if after.isspace() else '', special)
