"""inspect_ai's provider of compatible endpoints asks the server at argv[1]."""

import asyncio
import sys

from inspect_ai.model import ChatMessageTool, ChatMessageUser, GenerateConfig, get_model
from inspect_ai.tool import ToolInfo, ToolParams
from inspect_ai.util import JSONSchema

TOOL = ToolInfo(
  name='get_weather',
  description='weather',
  parameters=ToolParams(properties={'city': JSONSchema(type='string')}, required=['city']),
)


async def main() -> None:
  model = get_model(
    'openai-api/local/m',
    base_url=sys.argv[1],
    api_key='none',
    config=GenerateConfig(
      max_tokens=40,
      temperature=0.5,
      seed=1,
      max_retries=0,
      top_logprobs=2,
      logprobs=True,
      stop_seqs=['###'],
      parallel_tool_calls=False,
    ),
  )
  messages = [ChatMessageUser(content='what is the weather in Paris?')]
  answer = await model.generate(messages, tools=[TOOL])
  [call] = answer.message.tool_calls
  assert call.function == 'get_weather', call
  result = ChatMessageTool(content='18 C', tool_call_id=call.id, function=call.function)
  later = await model.generate([*messages, answer.message, result], tools=[TOOL])
  assert later.usage.input_tokens > answer.usage.input_tokens, later
  print('done')


asyncio.run(main())
