"""Fields that clients send and that no type of `requests.py` has.

There are three kinds. A hint has no effect on an answer and passes. A field that would change the
answer passes at the value that changes nothing, and is refused at any other with what to do
instead. What is left is unknown here: it is ignored, and named to the client.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Hints say who asks, what is kept, how soon the answer is wanted, and how it is computed. The text
# of an answer is the same without them.
HINTS = frozenset(
  {
    'cache_salt',
    'guided_decoding_backend',
    'metadata',
    'prediction',
    'priority',
    'prompt_cache_key',
    'prompt_cache_retention',
    'request_id',
    'safety_identifier',
    'service_tier',
    'spaces_between_special_tokens',
    'store',
    'user',
  }
)
_MOST_NAMED = 16  # ignored fields in one header
_LONGEST_NAME = 64  # characters


class Unsupported(NamedTuple):
  """A field that is not implemented.

  Attributes:
    neutral: its values that change no answer.
    advice: what a client can do instead.
  """

  neutral: tuple[Any, ...]
  advice: str

  def problem(self, name: str, value: Any) -> str:
    """Returns what to do about a value of the field `name`; '' where it changes no answer."""
    if value in self.neutral:
      return ''
    text = json.dumps(value)
    shown = text if len(text) <= 80 else text[:77] + '...'
    return f'{name} = {shown} is not supported: {self.advice}'


# Each advice names a way to the same end that works with this server.
_FORM = (
  'the form of an answer would need constrained sampling, which this server does not have; '
  'ask for the form in the messages, or make it the parameters of a tool and force that tool '
  'with tool_choice'
)
_RULE = 'leave it out; tokens are drawn by temperature, top_p, top_k and min_p alone'
_TOOLS = 'use tools, tool_choice and messages with tool_calls'
_THINKING = (
  'leave it out, or set chat_template_kwargs to {"enable_thinking": false} for no thoughts'
)
_TEXT_ONLY = 'leave it out; answers are text'
_ENDS = 'leave it out; an answer ends at the end of the turn, a stop string or max_tokens'
_PROMPT = 'leave it out; for a prompt of your own, send its token ids to /v1/completions'
_BUDGET = 'it is called max_tokens here'
_CHAT = 'send messages and tools to /v1/chat/completions'
_BESIDE = 'put its fields beside model, by the names that OpenAI and vLLM have for them'

# Fields of both kinds of request. Clients send default values without meaning anything by them, so
# that neutral ones pass. null is never seen here, because `Body` drops it.
UNSUPPORTED: Mapping[str, Unsupported] = {
  'allowed_token_ids': Unsupported(([],), _RULE),
  'audio': Unsupported((), _TEXT_ONLY),
  'bad_words': Unsupported(([],), _RULE),
  'chat_template': Unsupported((), _PROMPT),
  'documents': Unsupported(([],), 'put them into the messages'),
  'early_stopping': Unsupported((False,), _RULE),
  'ebnf': Unsupported((), _FORM),
  'frequency_penalty': Unsupported((0,), _RULE),
  'function_call': Unsupported(('auto', 'none'), _TOOLS),
  'functions': Unsupported(([],), _TOOLS),
  'grammar': Unsupported(('',), _FORM),
  'guided_choice': Unsupported(([],), _FORM),
  'guided_grammar': Unsupported(('',), _FORM),
  'guided_json': Unsupported((), _FORM),
  'guided_regex': Unsupported(('',), _FORM),
  'ignore_eos': Unsupported((False,), _ENDS),
  'include_reasoning': Unsupported((True,), _THINKING),
  'include_stop_str_in_output': Unsupported((False,), 'leave it out and add the string yourself'),
  'json_schema': Unsupported((), _FORM),
  'length_penalty': Unsupported((1,), _RULE),
  'logit_bias': Unsupported(({},), _RULE),
  'logits_processors': Unsupported(([],), _RULE),
  'min_tokens': Unsupported((0,), _ENDS),
  'modalities': Unsupported((['text'], []), _TEXT_ONLY),
  'presence_penalty': Unsupported((0,), _RULE),
  'prompt_embeds': Unsupported((), 'send the prompt as text or token ids'),
  'reasoning': Unsupported(({}, {'effort': 'medium'}, {'enabled': True}), _THINKING),
  # OpenAI's default, which clients send to every model.
  'reasoning_effort': Unsupported(('medium',), _THINKING),
  'regex': Unsupported(('',), _FORM),
  'repetition_penalty': Unsupported((1,), _RULE),
  'response_format': Unsupported(({'type': 'text'},), _FORM),
  'separate_reasoning': Unsupported((True,), _THINKING),
  'skip_special_tokens': Unsupported(
    (True,), 'leave it out, or ask for the tokens with return_token_ids'
  ),
  'structured_outputs': Unsupported(({},), _FORM),
  'suffix': Unsupported(('',), 'put it into the prompt'),
  'thinking': Unsupported(({'type': 'enabled'},), _THINKING),
  'thinking_budget': Unsupported((), _THINKING),
  'truncate_prompt_tokens': Unsupported((), 'shorten the prompt yourself'),
  'typical_p': Unsupported((1,), _RULE),
  'use_beam_search': Unsupported((False,), _RULE),
  'verbosity': Unsupported(('medium',), 'leave it out and ask for it in the messages'),
  'web_search_options': Unsupported((), 'give the search as a tool'),
  # What other servers call something that is here (TGI, Ollama, Mistral, Anthropic).
  'do_sample': Unsupported((True,), 'set temperature to 0 for the likeliest tokens'),
  'extra_body': Unsupported(({},), _BESIDE),
  'format': Unsupported(('',), _FORM),
  'max_length': Unsupported((), _BUDGET),
  'max_new_tokens': Unsupported((), _BUDGET),
  'max_output_tokens': Unsupported((), _BUDGET),
  'min_length': Unsupported((0,), _ENDS),
  'min_new_tokens': Unsupported((0,), _ENDS),
  'n_predict': Unsupported((), _BUDGET),
  'num_predict': Unsupported((), _BUDGET),
  'options': Unsupported(({},), _BESIDE),
  'random_seed': Unsupported((), 'it is called seed here'),
  'sampling_params': Unsupported(({},), _BESIDE),
  'stop_regex': Unsupported(('', []), 'use stop, with texts'),
  'stop_sequences': Unsupported(([],), 'it is called stop here'),
  'think': Unsupported((True,), _THINKING),
  # Other rules to draw tokens by (llama.cpp, transformers, SGLang).
  'diversity_penalty': Unsupported((0,), _RULE),
  'dry_multiplier': Unsupported((0,), _RULE),
  'dynatemp_range': Unsupported((0,), _RULE),
  'encoder_repetition_penalty': Unsupported((1,), _RULE),
  'epsilon_cutoff': Unsupported((0,), _RULE),
  'eta_cutoff': Unsupported((0,), _RULE),
  'mirostat': Unsupported((0,), _RULE),
  'mirostat_mode': Unsupported((0,), _RULE),
  'no_repeat_ngram_size': Unsupported((0,), _RULE),
  'num_beams': Unsupported((1,), _RULE),
  'penalty_alpha': Unsupported((0,), _RULE),
  'repeat_penalty': Unsupported((1,), _RULE),
  'smoothing_factor': Unsupported((0,), _RULE),
  'tfs_z': Unsupported((1,), _RULE),
  'top_a': Unsupported((0,), _RULE),
  'top_n_sigma': Unsupported((0, -1), _RULE),
  'typical': Unsupported((1,), _RULE),
  'xtc_probability': Unsupported((0,), _RULE),
}
# Fields of chat requests alone, which would change how the template renders the messages. The
# prompt of a completion is taken as it is.
UNSUPPORTED_IN_CHAT: Mapping[str, Unsupported] = {
  'add_generation_prompt': Unsupported((True,), _PROMPT),
  'add_special_tokens': Unsupported((False,), _PROMPT),
  'continue_final_message': Unsupported((False,), _PROMPT),
  'echo': Unsupported((False,), _PROMPT),
  'input': Unsupported((), 'send the conversation as messages'),
  'instructions': Unsupported(('',), 'send them as a message of role system'),
  'prompt': Unsupported(('', []), 'send it as a message, or to /v1/completions'),
  'system': Unsupported(('', []), 'send it as a message of role system'),
}
# Of completions alone, which have neither turns nor tools.
UNSUPPORTED_IN_TEXT: Mapping[str, Unsupported] = {
  'chat_template_kwargs': Unsupported(({},), _CHAT),
  'enable_thinking': Unsupported((), _CHAT),
  'input': Unsupported((), 'it is called prompt here'),
  'messages': Unsupported(([],), _CHAT),
  'tool_choice': Unsupported(('none', 'auto'), _CHAT),
  'tools': Unsupported(([],), _CHAT),
  'top_logprobs': Unsupported((0,), 'set logprobs to their number'),
}
# Of a message: sound instead of text, or its text as the beginning of the answer.
UNSUPPORTED_IN_MESSAGE: Mapping[str, Unsupported] = {
  'audio': Unsupported((), _TEXT_ONLY),
  'partial': Unsupported((False,), _PROMPT),
  'prefix': Unsupported((False,), _PROMPT),
}


def header_value(names: Iterable[str]) -> str:
  """Returns ignored fields as the value of an HTTP header: printable ASCII, and not too long."""
  shown = []
  for name in list(names)[:_MOST_NAMED]:
    # A name is a client's text: as JSON it holds no line break, which would begin another header.
    shown.append(json.dumps(name)[1:-1][:_LONGEST_NAME])
  return ', '.join(shown)
