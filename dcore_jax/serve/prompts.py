"""From the body of a request to the tokens of its prompts."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
import transformers

from dcore_jax.chat.encoding import encode_rendered, shown
from dcore_jax.chat.template import (
  encode_raw,
  render_begun_call,
  render_records,
  template_text,
)
from dcore_jax.chat.thoughts import opened_thoughts
from dcore_jax.serve.parts import RequestError
from dcore_jax.serve.requests import ChatCompletionRequest, CompletionRequest, read_request

# `apply_chat_template` takes these options itself (`tokenize`, `chat_template` ...). A client may
# set what the template reads, and no more.
_OWN_OPTIONS = frozenset(
  inspect.signature(transformers.PreTrainedTokenizerBase.apply_chat_template).parameters
)

# A tag of transformers alone, which reads no variable.
_GENERATION = re.compile(r'\{%-?\s*(end)?generation\s*-?%\}')


@functools.lru_cache(maxsize=8)
def _read_by(template: str) -> frozenset[str]:
  """Returns the variables that a chat template reads, without those of its loops."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=['jinja2.ext.loopcontrols'])
  parsed = environment.parse(_GENERATION.sub('', template))
  return frozenset(jinja2.meta.find_undeclared_variables(parsed))


class PromptReader:
  """Reads bodies, and renders and encodes what they ask.

  Args:
    tokenizer: a transformers tokenizer with a chat template.
    vocabulary: the number of token ids that the model knows.
    check_model: raises an error if a name is no name of the model.
    room: the most tokens of a prompt.
  """

  def __init__(
    self, tokenizer: Any, vocabulary: int, check_model: Callable[[str], None], room: int
  ):
    self._tokenizer = tokenizer
    self._vocabulary = vocabulary
    self._check_model = check_model
    self._room = room
    # A token has at most as many characters as its entry, which has one for each byte or character.
    self._longest_token = max(map(len, tokenizer.get_vocab()))

  def read_chat(self, body: bytes) -> tuple[ChatCompletionRequest, list[int], bool, str]:
    """Reads a chat request.

    Returns:
      What is asked, the tokens of its prompt, whether the prompt has opened the thoughts, and the
      beginning of the answer that stands in the prompt.
    """
    asked: ChatCompletionRequest = read_request(ChatCompletionRequest, body)
    self._check_model(asked.model)
    records = [message.record() for message in asked.messages]
    # Some templates (Llama-3.1's) ask whether tools are none, and not whether the list is empty.
    tools = [{'type': 'function', 'function': spec.to_json()} for spec in asked.specs] or None
    options = asked.template_options
    for name in options:
      # Jinja ignores a name that the template does not read, so that a misspelt option would change
      # nothing and nobody would see it.
      if name in _OWN_OPTIONS or name not in _read_by(template_text(self._tokenizer, tools)):
        raise RequestError(
          f'the chat template of {asked.model!r} knows no {name}', 'chat_template_kwargs'
        )
    begun = ''
    try:
      if asked.call_forced:
        text, begun = self._begin_call(asked, records, tools)
      else:
        text = render_records(self._tokenizer, records, tools, **options)
      # Half of a surrogate pair, which JSON's escapes can write, is no text that can be tokenized.
      text.encode()
    except (jinja2.TemplateError, UnicodeError, TypeError) as error:
      raise RequestError(
        f'the chat template cannot show this conversation: {error}', 'messages'
      ) from error
    self._check_length(shown(text), 'messages')
    return asked, encode_rendered(self._tokenizer, text), bool(opened_thoughts(text)), begun

  def _begin_call(
    self, asked: ChatCompletionRequest, records: list[dict[str, Any]], tools: list[dict[str, Any]]
  ) -> tuple[str, str]:
    try:
      return render_begun_call(self._tokenizer, records, tools, asked.forced_name)
    except ValueError as error:
      raise RequestError(
        f'no call can be forced from {asked.model!r}: {error}', 'tool_choice'
      ) from error

  def read_completion(
    self, body: bytes
  ) -> tuple[CompletionRequest, list[list[int]], list[str | None]]:
    """Reads a completion request -> (what is asked, its prompts, the texts of the prompts).

    A text is None where the answer does not begin with its prompt.
    """
    asked: CompletionRequest = read_request(CompletionRequest, body)
    self._check_model(asked.model)
    vocabulary = self._vocabulary
    if not asked.prompts:
      raise RequestError('there is no prompt', 'prompt')
    prompts = []
    texts: list[str | None] = []
    for prompt in asked.prompts:
      # An id outside the vocabulary would be looked up at another row, without an error.
      if (
        not prompt
        or not isinstance(prompt, str)
        and not all(0 <= token < vocabulary for token in prompt)
      ):
        raise RequestError(f'a prompt needs text, or token ids below {vocabulary}', 'prompt')
      text = prompt
      if isinstance(prompt, str):
        prompt = self._encode_prompt(prompt, asked.add_special_tokens)
      elif asked.echo:
        # `echo` needs text, also for a prompt of token ids.
        text = self._tokenizer.decode(prompt)
      prompts.append(prompt)
      texts.append(text if asked.echo else None)
    return asked, prompts, texts

  def _check_length(self, text: str, field: str) -> None:
    """Refuses a text that has too many tokens however it is cut into tokens.

    Encoding megabytes takes seconds, for which all other prompts would wait.
    """
    least = -(-len(text) // self._longest_token)
    if least <= self._room:
      return
    backend = getattr(self._tokenizer, 'backend_tokenizer', None)
    if backend is None:
      # What it makes of white space and accents cannot be asked.
      return
    normalizer = backend.normalizer
    if normalizer is not None:
      # Unicode's normal forms have fewer characters than the text.
      least = -(-len(normalizer.normalize_str(text)) // self._longest_token)
    if least > self._room:
      raise RequestError(
        f'the prompt has at least {least} tokens; prompt and answer together may have '
        f'{self._room} tokens',
        field,
        'context_length_exceeded',
      )

  def _encode_prompt(self, text: str, special: bool) -> list[int]:
    self._check_length(text, 'prompt')
    # Raw by design: whoever sends a prompt has rendered it, and every token in it is matched.
    if special:
      return encode_raw(self._tokenizer, text)
    return self._tokenizer(text, add_special_tokens=False)['input_ids']
