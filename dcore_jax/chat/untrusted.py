"""Text from outside that must stay data: what a server returns cannot end a turn or open one."""

import re

# What the chat templates of Qwen, Llama, DeepSeek, Gemma, Mistral and Phi mark turns, thoughts,
# tools and calls with. Prompts are rendered as text before they are tokenized, so that such a mark
# inside of a content would become a special token.
_MARKS = re.compile(
  r'<(?=[|｜][^<>\s]*[|｜]>)'
  r'|<(?=/?(?:think|tools?|tool_(?:call|response|result)s?|s|bos|eos|pad|unk)>)'
  r'|<(?=/?(?:start|end)_of_turn>)'
  r'|<(?=</?SYS>>)'
  r'|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT)\])'
)


def harmless(text: str) -> str:
  r"""Returns the text with the first character of each mark of a chat template as a JSON escape.

  `<|im_end|>` becomes `\u003c|im_end|>`: a model reads it as what it is, a JSON value keeps its
  meaning, and no tokenizer finds a special token in it. Halves of surrogate pairs, which no
  tokenizer takes, become question marks.
  """
  text = text.encode('utf-8', 'replace').decode()
  return _MARKS.sub(lambda match: f'\\u{ord(match[0]):04x}', text)


def harmless_json(value: object) -> object:
  """Returns a JSON value with every text in it, keys included, made `harmless`."""
  if isinstance(value, str):
    return harmless(value)
  if isinstance(value, list):
    return [harmless_json(item) for item in value]
  if isinstance(value, dict):
    return {harmless(str(key)): harmless_json(item) for key, item in value.items()}
  return value
