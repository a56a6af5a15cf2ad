"""From conversations to the text that a model sees.

Also reads off a chat template what it puts around a message. A tokenizer brings its own chat
template; `qwen3_template` is ours for tokenizers that have none, and renders what Qwen3's does.
"""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Sequence
from typing import Any

from dcore_jax.chat.encoding import mark_records, mark_values, shown
from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.python_calls import ToolCallError
from dcore_jax.chat.tagged_calls import parse_hermes

# A tool name and arguments that no template writes itself, so that they can be found in its text.
_PROBE_NAME = 'probe_name'
_PROBE_ARGUMENTS = '{"probe_argument": 0}'


@functools.cache
def qwen3_template() -> str:
  """Returns the Jinja text of Qwen3's conversation format.

  It renders what the official template does, tools and thoughts included.
  """
  # Read as a resource, so that an installed package finds it wherever it lies.
  file = importlib.resources.files('dcore_jax.chat').joinpath('qwen3.jinja')
  return file.read_text(encoding='utf-8')


def render_prompt(
  tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
) -> str:
  """Renders a conversation up to where the assistant speaks next.

  Args:
    tokenizer: a transformers tokenizer with a chat template.
    messages: the conversation, at least one message.
    tools: specs as the template wants them, usually {'type': 'function', 'function': {...}}. With
      None the template shows no tools.

  Returns:
    A text for `encode_rendered`, which keeps the conversation's own text from becoming markup. Use
    `shown` to show it to a person.

  Raises:
    ValueError: no messages, or a tokenizer without a chat template.
  """
  return render_records(tokenizer, [message.to_json() for message in messages], tools)


def render_records(
  tokenizer: Any,
  records: Sequence[dict[str, Any]],
  tools: Sequence[dict[str, Any]] | None = None,
  **options: Any,
) -> str:
  """Does what `render_prompt` does for messages in the form that endpoints use.

  There tool calls and thoughts have fields of their own. `options` go to the template, such as
  `enable_thinking`.
  """
  if not records:
    raise ValueError('a prompt needs at least one message')
  return _rendered(tokenizer, records, tools=tools, add_generation_prompt=True, **options)


def _rendered(
  tokenizer: Any,
  records: Sequence[dict[str, Any]],
  tools: Sequence[dict[str, Any]] | None = None,
  **options: Any,
) -> str:
  template = template_text(tokenizer, tools)
  # A client may set an option to any text.
  options = mark_values(tokenizer, options)
  # transformers picks by name among several templates and needs to be told which.
  if not isinstance(tokenizer.chat_template, str):
    options['chat_template'] = template
  records = mark_records(tokenizer, records)
  tools = mark_values(tokenizer, tools)
  return tokenizer.apply_chat_template(records, tools=tools, tokenize=False, **options)


def template_text(tokenizer: Any, tools: Sequence[dict[str, Any]] | None = None) -> str:
  """Returns the Jinja text by which a tokenizer renders a conversation.

  A tokenizer may have several by name. With tools it is 'tool_use' where there is one, and else
  'default'; a template that is alone is used whatever its name.

  Raises:
    ValueError: no chat template, or none of these names among several.
  """
  templates = tokenizer.chat_template
  if not templates:
    raise ValueError(
      'the tokenizer has no chat template; set tokenizer.chat_template = qwen3_template()'
    )
  # Most tokenizers have one template, which may still branch on `tools` itself.
  if isinstance(templates, str):
    return templates
  if not isinstance(templates, dict):
    # The form in which tokenizer_config.json lists them.
    templates = {entry['name']: entry['template'] for entry in templates}
  for name in ('tool_use', 'default') if tools else ('default',):
    if name in templates:
      return templates[name]
  if len(templates) > 1:
    raise ValueError(
      f"the tokenizer has the chat templates {sorted(templates)}, and 'default' is not among them"
    )
  return next(iter(templates.values()))


def render_begun_call(
  tokenizer: Any,
  records: Sequence[dict[str, Any]],
  tools: Sequence[dict[str, Any]],
  name: str | None = None,
) -> tuple[str, str]:
  """Renders a conversation in which the assistant has begun a call -> (text, the begun call).

  The template writes an answer that consists of one call. The text breaks off before the arguments
  of the tool `name`, or before the name where `name` is None. Thoughts are empty or absent, as the
  template has them for an answer without thoughts.

  Raises:
    ValueError: the template writes no calls, or writes them otherwise than in the `<tool_call>`
      tags that `parse_hermes` reads.
  """
  # The arguments are an object here, because templates write them by `tojson`.
  call = {'name': name or _PROBE_NAME, 'arguments': json.loads(_PROBE_ARGUMENTS)}
  turn = {
    'role': 'assistant',
    'content': '',
    'tool_calls': [{'type': 'function', 'function': call}],
  }
  text = _rendered(tokenizer, [*records, turn], tools=tools)
  # The last tag is the probe's: templates and earlier turns write the tag as well.
  before, tag, rest = text.rpartition('<tool_call>')
  # A name that holds a special token is marked; the client reads it as it is.
  begun_turn = shown(tag + rest)
  # The text breaks off where the model has to choose: a name, or arguments.
  cut = _PROBE_NAME if name is None else _PROBE_ARGUMENTS
  begun, found, _ = begun_turn.partition(cut)
  try:
    # Reading back shows that what the model continues will be read as a call.
    readable = parse_hermes(begun_turn) == [ToolCall(**call)]
  except ToolCallError:
    readable = False
  if not readable or not found:
    raise ValueError(
      'the chat template does not write calls as '
      '<tool_call>{"name": ..., "arguments": ...}</tool_call>'
    )
  # Tokenizers join the space before an object with its opening brace (' {"'). A prompt that ended
  # with that space would be tokenized otherwise than the text that a model was trained on.
  begun = begun.rstrip()
  return before + begun, begun


def encode_raw(tokenizer: Any, text: str) -> list[int]:
  """Encodes a text that no template of ours has rendered, such as the prompt of a completion.

  Every token in it is matched: whoever sends such a prompt has rendered it, and has to keep the
  text of others from becoming markup.

  It begins with the beginning-of-text token once, where the tokenizer puts that token in front.
  """
  ids = tokenizer(text, add_special_tokens=False)['input_ids']
  # Encoded without special tokens, because a prompt may already contain this token as text.
  first = tokenizer.bos_token_id
  if first is None or ids[:1] == [first]:
    return ids
  # Some tokenizers name such a token and were never trained with it (GPT-2). A word shows whether
  # they put it in front.
  return [first, *ids] if tokenizer('a')['input_ids'][:1] == [first] else ids


@dataclasses.dataclass(frozen=True)
class TurnFormat:
  """What a chat template writes around the messages, read off its own rendering.

  Attributes:
    end_of_turn: the special token that ends an assistant message ('<|im_end|>', '<|eot_id|>').
    end_of_turn_id: its id.
    before: white space between the content and that token ('' for Qwen3 and Llama, '\\n' for
      DeepSeek-Coder).
    after: white space behind it that still belongs to the message ('\\n' for Qwen3, '' for Llama).
    delimiters: id -> text of every special token between one message's content and the next one's.
  """

  end_of_turn: str
  end_of_turn_id: int
  before: str
  after: str
  delimiters: dict[int, str]


def turn_format(tokenizer: Any) -> TurnFormat:
  """Reads the format of a transformers tokenizer off a conversation that its template renders.

  Raises:
    ValueError: the tokenizer has no template, or one that does not end an assistant's message by a
      special token of the tokenizer.
  """
  # The contents are words that no template writes itself. A user message follows the assistant's,
  # because templates add thoughts to an assistant message that stands last.
  answer = 'probe-said'
  reply = 'probe-more'
  turns = [
    {'role': 'user', 'content': 'probe-asked'},
    {'role': 'assistant', 'content': answer},
    {'role': 'user', 'content': reply},
  ]
  text = _rendered(tokenizer, turns)
  # Everything between the two contents is the template's own writing.
  gap = text.partition(answer)[2].partition(reply)[0]
  special = {
    token_id: str(token)
    for token_id, token in tokenizer.added_tokens_decoder.items()
    # Added tokens that are not special are words of the vocabulary, not markup.
    if token.special and str(token) in gap
  }
  if not special:
    raise ValueError(
      f'the chat template ends a turn by {gap!r}, which holds no special token of the tokenizer'
    )
  # The first special token behind the content ends the turn; later ones open the next message.
  end_id = min(special, key=lambda token_id: gap.index(special[token_id]))
  before, end, _ = gap.partition(special[end_id])
  # Words between content and end of turn would be trained as if the assistant had said them.
  if before.strip():
    raise ValueError(
      f'the chat template writes {before!r} between what an assistant says and {end}'
    )
  # What stands behind the last message belongs to it, and not to a message that follows.
  ending = _rendered(tokenizer, turns[:2]).rpartition(answer)[2]
  after = ending.removeprefix(before + end)
  return TurnFormat(
    end_of_turn=end,
    end_of_turn_id=end_id,
    before=before,
    after=after if after.isspace() else '',
    delimiters=special,
  )
