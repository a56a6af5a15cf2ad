"""Calls that are forced: begun in the prompt, given back as calls where the model finishes them,
and as content where not.
"""

import json

import openai
import pytest

from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from tests.serve.servers import SIGNATURES, engine_like, running

FIND, LIST = (
  {
    'type': 'function',
    'function': {
      'name': name,
      'parameters': {'type': 'object', 'properties': {'customer': {'type': 'string'}}},
    },
  }
  for name in ('find_order', 'list_orders')
)
NAMED = {'type': 'function', 'function': {'name': 'find_order'}}
ASKED = {'model': 'm', 'messages': [{'role': 'user', 'content': 'find'}]}
ROOM = {
  'max_len': 4096,
  'max_new': 256,
}  # the organism's tokenizer knows few of the words that tools are shown in


def ask(url, stream, **asked):
  """(content, [(name, arguments)], finish reason, prompt tokens) of a chat answer."""
  with openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0) as client:
    if not stream:
      answer = client.chat.completions.create(**ASKED | asked)
      [choice] = answer.choices
      calls = [
        (call.function.name, json.loads(call.function.arguments))
        for call in choice.message.tool_calls or ()
      ]
      return choice.message.content, calls, choice.finish_reason, answer.usage.prompt_tokens
    content = ''
    calls = []
    reason = None
    usage = None
    for piece in client.chat.completions.create(
      **ASKED | asked, stream=True, stream_options={'include_usage': True}
    ):
      usage = piece.usage or usage
      for choice in piece.choices:
        reason = choice.finish_reason or reason
        content += choice.delta.content or ''
        calls += [
          (call.function.name, json.loads(call.function.arguments))
          for call in choice.delta.tool_calls or ()
        ]
    return content or None, calls, reason, usage.prompt_tokens


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize(
  'choice,tools,begun,reply',
  [
    (
      NAMED,
      [LIST, FIND],
      '<tool_call>\n{"name": "find_order", "arguments":',
      ' {"customer": "Mora"}}\n</tool_call>',
    ),
    (
      'required',
      [LIST, FIND],
      '<tool_call>\n{"name": "',
      'find_order", "arguments": {"customer": "Mora"}}\n</tool_call>',
    ),
    (
      'required',
      [FIND],
      '<tool_call>\n{"name": "find_order", "arguments":',
      ' {"customer": "Mora"}}\n</tool_call>',
    ),
  ],
)
def test_what_the_prompt_begins_and_the_model_ends_is_a_call(
  scripted, tokenizer, stream, choice, tools, begun, reply
):
  made = scripted(reply, **ROOM)
  answer = ask(made.url, stream, tools=tools, tool_choice=choice)
  [prompt] = made.engine.prompts
  assert tokenizer.decode(prompt).endswith('<|im_start|>assistant\n<think>\n\n</think>\n\n' + begun)
  assert answer == (None, [('find_order', {'customer': 'Mora'})], 'tool_calls', len(prompt))


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize(
  'reply,more,reason',
  [
    ('find the order', {}, 'stop'),
    (' {"customer": "Mora"}}\n</tool_call>', {'max_tokens': 3}, 'length'),
    (' ["Mora"]}\n</tool_call>', {}, 'stop'),
  ],
)
def test_what_is_no_call_is_content_and_says_why_it_ended(scripted, stream, reply, more, reason):
  content, calls, ended, _ = ask(
    scripted(reply, **ROOM).url, stream, tools=[FIND], tool_choice=NAMED, **more
  )
  assert (calls, ended) == ([], reason)
  assert content.startswith('<tool_call>\n{"name": "find_order", "arguments":')
  said = content.removeprefix('<tool_call>\n{"name": "find_order", "arguments":')
  assert said == reply if not more else said and reply.startswith(said)


@pytest.mark.parametrize('stream', [False, True])
def test_further_calls_are_left_out_where_they_are_not_wanted(scripted, stream):
  second = '<tool_call>\n{"name": "list_orders", "arguments": {}}\n</tool_call>'
  url = scripted(' {"customer": "Mora"}}\n</tool_call>\n' + second, **ROOM).url
  asked = dict(tools=[FIND, LIST], tool_choice=NAMED)
  assert [name for name, _ in ask(url, stream, **asked)[1]] == ['find_order', 'list_orders']
  assert [name for name, _ in ask(url, stream, **asked, parallel_tool_calls=False)[1]] == [
    'find_order'
  ]


def test_a_template_that_writes_no_such_calls_is_named(organism):
  tokenizer = type(organism.tokenizer)(
    tokenizer_object=organism.tokenizer.backend_tokenizer,
    eos_token='<|im_end|>',
    chat_template=SIGNATURES,
  )
  with running(Service(Scheduler(engine_like(organism.engine), 8), tokenizer, 'm', Limits(64))) as (
    url,
    _,
  ):
    for choice in (NAMED, 'required'):
      with pytest.raises(
        openai.BadRequestError, match="no call can be forced from 'm'.*does not write calls"
      ) as caught:
        ask(url, False, tools=[FIND], tool_choice=choice)
      assert caught.value.param == 'tool_choice'
    assert ask(url, False, tools=[FIND], tool_choice='auto', max_tokens=1)[2] == 'length'
