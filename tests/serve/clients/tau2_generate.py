"""tau2-bench's own messages, written and sent by its own code to the server at argv[1]."""

import sys

from tau2.data_model.message import (
  AssistantMessage,
  SystemMessage,
  ToolCall,
  ToolMessage,
  UserMessage,
)
from tau2.environment.tool import as_tool
from tau2.utils.llm_utils import generate


def get_weather(city: str) -> str:
  """Tell the weather.

  Args:
    city: where.
  """
  return city


call = ToolCall(id='c', name='get_weather', arguments={'city': 'Paris'})
messages = [
  SystemMessage(role='system', content='policy'),
  UserMessage(role='user', content='what is the weather in Paris?'),
  AssistantMessage(role='assistant', content=None, tool_calls=[call]),
  ToolMessage(id='c', role='tool', content='18 C', requestor='assistant'),
]
options = dict(api_base=sys.argv[1], api_key='none', temperature=0.0, seed=1, num_retries=0)
for length in (2, 4):
  answer = generate('openai/m', messages[:length], tools=[as_tool(get_weather)], **options)
  assert [one.name for one in answer.tool_calls] == ['get_weather'], answer
print('done')
