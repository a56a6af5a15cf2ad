"""litellm or openai, argv[1], asks the server at argv[2] for the items of the file argv[3].

It prints how many were answered and how many answers hold the right one.
"""

import json
import sys

library, url, path = sys.argv[1:]
asked = dict(temperature=0.0, max_tokens=24, seed=1)


def by_litellm(question: str) -> str:
  import litellm

  messages = [{'role': 'user', 'content': question}]
  answer = litellm.completion(
    model='openai/organism', messages=messages, api_base=url, api_key='none', num_retries=0, **asked
  )
  return answer.choices[0].message.content


def by_openai(question: str) -> str:
  import openai

  messages = [{'role': 'user', 'content': question}]
  with openai.OpenAI(base_url=url, api_key='none', max_retries=0) as client:
    answer = client.chat.completions.create(model='organism', messages=messages, **asked)
  return answer.choices[0].message.content


ask = {'litellm': by_litellm, 'openai': by_openai}[library]
with open(path, encoding='utf-8') as file:
  items = [json.loads(line) for line in file]
answers = [ask(item['question']) for item in items]
right = 0
for item, answer in zip(items, answers, strict=True):
  assert isinstance(answer, str), answer
  right += item['answer'] in answer
print(f'answered {len(answers)} score {right / len(answers):.3f}')
