"""litellm asks the server at argv[1], and hands back what it got, as agents do."""

import sys

import litellm

TOOL = {
  'type': 'function',
  'function': {
    'name': 'get_weather',
    'description': 'weather',
    'parameters': {'type': 'object', 'properties': {'city': {'type': 'string'}}},
    'strict': True,
  },
}
asked = dict(
  model='openai/m',
  api_base=sys.argv[1],
  api_key='none',
  tools=[TOOL],
  tool_choice='auto',
  parallel_tool_calls=False,
  seed=1,
  max_completion_tokens=40,
  user='u',
  metadata={'trace': 'x'},
  num_retries=0,
)
messages = [
  {'role': 'system', 'content': [{'type': 'text', 'text': 'be brief', 'cache_control': {}}]},
  {'role': 'user', 'content': 'what is the weather in Paris?'},
]
for stream in (False, True):
  answer = litellm.completion(messages=messages, **asked, stream=stream)
  if stream:
    answer = litellm.stream_chunk_builder(list(answer), messages=messages)
  message = answer.choices[0].message
  [call] = message.tool_calls
  assert call.function.name == 'get_weather', call
  result = {'role': 'tool', 'tool_call_id': call.id, 'name': 'get_weather', 'content': '18 C'}
  # The object itself, and what it is as a record: litellm's own fields are in both.
  for turn in (message, message.model_dump(), message.to_dict()):
    later = litellm.completion(messages=[*messages, turn, result], **asked)
    assert later.usage.prompt_tokens > answer.usage.prompt_tokens, later
print('done')
