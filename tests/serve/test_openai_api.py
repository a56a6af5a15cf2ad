"""The server as its clients see it: the official client against the organism on a loopback port."""

import asyncio
import json
import urllib.request

import numpy as np
import openai
import pytest

from dcore_jax.chat.messages import Message
from dcore_jax.rollout.backends import ChatRequest
from dcore_jax.rollout.endpoint import EndpointLimits, OpenAIBackend
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.worlds.toolworld.world import ToolWorld
from tests.serve.servers import SIGNATURES, engine_like, running
from tests.waiting import until

FIND = {
  'type': 'function',
  'function': {
    'name': 'find_order',
    'parameters': {'type': 'object', 'properties': {'customer': {'type': 'string'}}},
  },
}


def task_messages(number=0, kind='single'):
  [*_, task] = ToolWorld().tasks(kind, number + 1, seed=1, split='eval')
  return [message.to_json() for message in ToolWorld().episode(task).messages]


@pytest.fixture
def client(served):
  url, _ = served
  with openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0) as client:
    yield client


def joined(stream):
  """(the message's parts, finish reason, log-probabilities, usage) of a streamed chat answer."""
  parts = {'content': '', 'reasoning_content': ''}
  calls = {}
  logprobs = []
  reason = None
  usage = None
  for piece in stream:
    usage = piece.usage or usage
    for choice in piece.choices:
      assert choice.index == 0 and reason is None
      reason = choice.finish_reason
      logprobs += choice.logprobs.content if choice.logprobs else []
      for name in parts:
        parts[name] += getattr(choice.delta, name, None) or ''
      for call in choice.delta.tool_calls or ():
        calls[call.index] = call
  return parts, [calls[index] for index in sorted(calls)], reason, logprobs, usage


def test_models(client):
  [model] = client.models.list().data
  assert (
    model.id == 'organism' == client.models.retrieve('organism').id and model.max_model_len == 192
  )
  with pytest.raises(openai.NotFoundError, match='no model'):
    client.models.retrieve('other/model')


def test_a_chat_answer_whole_and_in_pieces_says_what_the_engine_says(client, organism):
  asked = dict(model='organism', messages=task_messages(), temperature=0, logprobs=True)
  answer = client.chat.completions.create(**asked)
  choice = answer.choices[0]
  message = answer.choices[0].message
  [reply] = dict(
    LocalBackend(engine_like(organism.engine), organism.tokenizer).stream(
      once([ChatRequest(tuple(map(Message.from_json, asked['messages'])), (0, 0))]),
      SamplingParams(0, max_tokens=64),
    )
  ).values()
  assert f'<think>\n{message.reasoning_content}\n</think>\n\n{message.content}' == reply.text
  assert choice.finish_reason == 'stop' and message.tool_calls is None
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
    reply.prompt_tokens,
    reply.completion_tokens,
  )
  tokens = choice.logprobs.content
  assert (
    len(tokens) == reply.completion_tokens
    and ''.join(token.token for token in tokens) == reply.text + '<|im_end|>'
  )
  assert all(token.logprob <= 0 and bytes(token.bytes).decode() == token.token for token in tokens)

  parts, calls, reason, logprobs, usage = joined(
    client.chat.completions.create(**asked, stream=True, stream_options={'include_usage': True})
  )
  assert (
    parts == {'content': message.content, 'reasoning_content': message.reasoning_content}
    and not calls
  )
  assert (reason, usage) == (choice.finish_reason, answer.usage)
  assert [token.token for token in logprobs] == [token.token for token in tokens]
  np.testing.assert_allclose(
    [token.logprob for token in logprobs], [token.logprob for token in tokens], atol=1e-5
  )


def once(requests):
  waiting = list(enumerate(requests))

  def source(free):
    given = waiting[:free]
    waiting[:] = waiting[free:]
    return given

  return source


@pytest.mark.parametrize(
  'rule', [SamplingParams(0, max_tokens=60), SamplingParams(0.7, max_tokens=40, seed=3)]
)
def test_our_backend_on_our_server_gives_what_it_gives_on_the_engine(served, organism, rule):
  """Greedy texts are the same, also those that the budget cuts off within the thoughts."""
  url, _ = served
  requests = [
    ChatRequest(tuple(map(Message.from_json, task_messages(number, kind))), (number, 1))
    for kind in ('single', 'sequential')
    for number in range(4)
  ]
  eight = OpenAIBackend(f'{url}/v1', 'organism', limits=EndpointLimits(concurrency=8))
  remote = dict(eight.stream(once(requests), rule))
  single = OpenAIBackend(f'{url}/v1', 'organism', limits=EndpointLimits(concurrency=1))
  again = dict(single.stream(once(requests), rule))
  assert remote == again  # the seed fixes the text, whatever else runs
  local = dict(
    LocalBackend(engine_like(organism.engine), organism.tokenizer).stream(once(requests), rule)
  )
  if rule.temperature == 0:
    assert remote == local
    assert {reply.finished for reply in remote.values()} == {True, False}


def test_seeds_choices_and_neighbours(client, organism):
  asked = dict(
    model='organism',
    messages=task_messages(2, 'sequential'),
    temperature=1.0,
    max_tokens=40,
    seed=5,
    n=3,
  )

  def texts(answer):
    return [
      choice.message.reasoning_content
      for choice in sorted(answer.choices, key=lambda one: one.index)
    ]

  first = texts(client.chat.completions.create(**asked))
  assert len(set(first)) == 3

  async def among_others():
    async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key='none') as many:
      noise = [
        many.chat.completions.create(**{**asked, 'messages': task_messages(n), 'seed': n, 'n': 1})
        for n in range(8)
      ]
      return (await asyncio.gather(many.chat.completions.create(**asked), *noise))[0]

  assert texts(asyncio.run(among_others())) == first
  assert texts(client.chat.completions.create(**{**asked, 'seed': 6})) != first
  unseeded = {key: value for key, value in asked.items() if key != 'seed'}
  assert texts(client.chat.completions.create(**unseeded)) != texts(
    client.chat.completions.create(**unseeded)
  )


@pytest.fixture(scope='module')
def with_tools(organism):
  """A server whose template shows tools to the organism as it knows them."""
  tokenizer = type(organism.tokenizer)(
    tokenizer_object=organism.tokenizer.backend_tokenizer,
    eos_token='<|im_end|>',
    chat_template=SIGNATURES,
  )
  service = Service(Scheduler(engine_like(organism.engine), 8), tokenizer, 'organism', Limits(64))
  with running(service) as (url, _):
    yield openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0)


def test_tools_are_shown_and_calls_come_back_as_calls(with_tools):
  asked = dict(
    model='organism',
    messages=[{'role': 'user', 'content': 'find the order of Mora.'}],
    temperature=0,
    tools=[FIND],
  )
  choice = with_tools.chat.completions.create(**asked).choices[0]
  [call] = choice.message.tool_calls
  assert choice.finish_reason == 'tool_calls' and choice.message.content is None
  assert 'find_order' in choice.message.reasoning_content
  assert call.function.name == 'find_order' and json.loads(call.function.arguments) == {
    'customer': 'Mora'
  }
  assert call.id.startswith('call_') and call.type == 'function'

  parts, [streamed], reason, _, _ = joined(with_tools.chat.completions.create(**asked, stream=True))
  assert streamed.function.model_dump() == call.function.model_dump() and streamed.id
  assert reason == 'tool_calls' and not parts['content']

  tool = {'role': 'tool', 'tool_call_id': call.id, 'content': '{"order": "R123"}'}
  later = with_tools.chat.completions.create(
    **{**asked, 'messages': [*asked['messages'], choice.message, tool]}
  )
  assert later.usage.prompt_tokens > 30  # what the client got goes back as it is

  none = with_tools.chat.completions.create(**asked, tool_choice='none', max_tokens=8)
  plain = with_tools.chat.completions.create(
    model='organism', messages=asked['messages'], max_tokens=8
  )
  assert none.usage.prompt_tokens == plain.usage.prompt_tokens < choice_tokens(with_tools, asked)


def choice_tokens(client, asked):
  return client.chat.completions.create(**asked, max_tokens=1).usage.prompt_tokens


@pytest.mark.parametrize('stream', [False, True])
def test_stop_strings(client, stream):
  asked = dict(model='organism', messages=task_messages(), temperature=0)
  whole = client.chat.completions.create(**asked).choices[0].message
  stop = whole.reasoning_content[9:14]
  if stream:
    parts, _, reason, _, usage = joined(
      client.chat.completions.create(
        **asked, stop=['zzz', stop], stream=True, stream_options={'include_usage': True}
      )
    )
    text = parts['reasoning_content']
  else:
    answer = client.chat.completions.create(**asked, stop=['zzz', stop])
    text = answer.choices[0].message.reasoning_content
    reason = answer.choices[0].finish_reason
    usage = answer.usage
  assert (
    text == whole.reasoning_content[: whole.reasoning_content.index(stop)].rstrip('\n')
    and reason == 'stop'
  )
  assert usage.completion_tokens < 20


def test_budgets(client):
  asked = dict(model='organism', messages=task_messages(1, 'sequential'), temperature=0)
  answer = client.chat.completions.create(**asked, max_tokens=9, max_completion_tokens=7)
  assert answer.choices[0].finish_reason == 'length' and answer.usage.completion_tokens == 7
  assert answer.choices[0].message.content is None  # it is still thinking
  with pytest.raises(
    openai.BadRequestError, match='max_completion_tokens = 65; an answer may have 64'
  ):
    client.chat.completions.create(**asked, max_completion_tokens=65)
  filled = client.completions.create(model='organism', prompt=[7] * 190, temperature=0)
  assert (
    filled.choices[0].finish_reason == 'length' and filled.usage.completion_tokens == 2
  )  # all that fits
  with pytest.raises(
    openai.BadRequestError, match='tokens; prompt and answer together may have 192'
  ) as caught:
    client.chat.completions.create(
      model='organism', messages=[{'role': 'user', 'content': 'find ' * 300}]
    )
  assert caught.value.code == 'context_length_exceeded'


def test_completions(client, organism):
  prompt = 'the task is to find the order of'
  ids = organism.tokenizer(prompt)['input_ids']
  asked = dict(model='organism', temperature=0, max_tokens=12)
  answer = client.completions.create(prompt=prompt, **asked, logprobs=0)
  [choice] = answer.choices
  [want] = engine_like(organism.engine).generate(
    [Request(np.array(ids), (0, 0))], SamplingParams(0, max_tokens=12)
  )
  assert choice.text == organism.tokenizer.decode(want.tokens) and choice.finish_reason == 'length'
  assert ''.join(choice.logprobs.tokens) == choice.text
  assert [choice.text[start : start + 3] for start in choice.logprobs.text_offset] == [
    choice.text[start:][:3] for start in np.cumsum([0, *map(len, choice.logprobs.tokens)])[:-1]
  ]
  np.testing.assert_allclose(choice.logprobs.token_logprobs, want.logprobs, atol=1e-5)
  pieces = list(client.completions.create(prompt=ids, **asked, logprobs=0, stream=True))
  assert ''.join(piece.choices[0].text for piece in pieces) == choice.text
  offsets = [
    offset
    for piece in pieces
    if piece.choices[0].logprobs
    for offset in piece.choices[0].logprobs.text_offset
  ]
  assert offsets == choice.logprobs.text_offset
  both = client.completions.create(prompt=[prompt, 'find'], n=2, **asked)
  assert [one.index for one in both.choices] == [0, 1, 2, 3] and both.choices[
    0
  ].text == both.choices[1].text == choice.text
  assert both.usage.prompt_tokens == len(ids) + 1 and both.usage.completion_tokens == 48


def test_alternatives_of_tokens(client):
  asked = dict(
    model='organism', messages=task_messages(), temperature=0, max_tokens=20, logprobs=True
  )
  tokens = client.chat.completions.create(**asked, top_logprobs=20).choices[0].logprobs.content
  for token in tokens:
    shown = [one.logprob for one in token.top_logprobs]
    assert (
      len(shown) == 20
      and shown == sorted(shown, reverse=True)
      and sum(map(np.exp, shown)) <= 1 + 1e-5
    )
    assert (token.top_logprobs[0].token, shown[0]) == (
      token.token,
      pytest.approx(token.logprob, abs=1e-6),
    )
    assert all(
      one.bytes is None or bytes(one.bytes).decode() == one.token for one in token.top_logprobs
    )
  *_, streamed, _ = joined(client.chat.completions.create(**asked, top_logprobs=3, stream=True))
  assert [[one.token for one in token.top_logprobs] for token in streamed] == [
    [one.token for one in token.top_logprobs[:3]] for token in tokens
  ]
  # Two tokens are all that this rule may draw; others are not listed.
  drawn = client.chat.completions.create(
    **asked | dict(temperature=1.5, seed=1), top_logprobs=5, extra_body={'top_k': 2}
  )
  for token in drawn.choices[0].logprobs.content:
    assert len(token.top_logprobs) == 2 and sum(
      np.exp(one.logprob) for one in token.top_logprobs
    ) == pytest.approx(1, abs=1e-5)
    assert (token.token, token.logprob) in [
      (one.token, pytest.approx(one.logprob, abs=1e-6)) for one in token.top_logprobs
    ]
  assert not client.chat.completions.create(**asked).choices[0].logprobs.content[0].top_logprobs


def test_alternatives_of_completions(client):
  asked = dict(
    model='organism',
    prompt='the task is to find the order of',
    temperature=1.5,
    max_tokens=12,
    seed=3,
  )
  [choice] = client.completions.create(**asked, logprobs=2).choices
  pieces = list(client.completions.create(**asked, logprobs=2, stream=True))
  assert [
    shown
    for piece in pieces
    if piece.choices[0].logprobs
    for shown in piece.choices[0].logprobs.top_logprobs
  ] == [
    {text: pytest.approx(logprob, abs=1e-5) for text, logprob in shown.items()}
    for shown in choice.logprobs.top_logprobs
  ]
  for token, logprob, shown in zip(
    choice.logprobs.tokens,
    choice.logprobs.token_logprobs,
    choice.logprobs.top_logprobs,
    strict=True,
  ):
    assert shown[token] == pytest.approx(logprob, abs=1e-6) and len(shown) in (2, 3)
  assert {len(shown) for shown in choice.logprobs.top_logprobs} == {
    2,
    3,
  }  # the sampled token is there, likely or not
  assert client.completions.create(**asked, logprobs=0).choices[0].logprobs.top_logprobs is None


def test_a_template_may_be_told_not_to_think(client):
  asked = dict(model='organism', messages=task_messages(), max_tokens=1)
  plain = client.chat.completions.create(**asked)
  quiet = client.chat.completions.create(
    **asked, extra_body={'chat_template_kwargs': {'enable_thinking': False}}
  )
  assert quiet.usage.prompt_tokens > plain.usage.prompt_tokens
  assert getattr(quiet.choices[0].message, 'reasoning_content', None) is None


def read_url(url):
  with urllib.request.urlopen(url) as answer:
    return answer.read().decode()


def test_metrics_count_tokens(served, client):
  url, service = served

  def counts():
    lines = [
      line.rpartition(' ')
      for line in read_url(f'{url}/metrics').splitlines()
      if not line.startswith('#')
    ]
    return {name: float(value) for name, _, value in lines}

  before = counts()
  answer = client.completions.create(model='organism', prompt='find the order', max_tokens=5)
  after = counts()
  assert (
    after['dcore_prompt_tokens_total'] - before['dcore_prompt_tokens_total']
    == answer.usage.prompt_tokens
  )
  assert (
    after['dcore_completion_tokens_total'] - before['dcore_completion_tokens_total']
    == answer.usage.completion_tokens
  )
  assert after['dcore_engine_decoded_tokens_total'] > before['dcore_engine_decoded_tokens_total']
  assert (
    after['dcore_time_to_first_token_seconds_count']
    > before['dcore_time_to_first_token_seconds_count']
  )
  assert read_url(f'{url}/health') == '{"status":"ok","weights_version":0}'
  until(lambda: service.scheduler.in_flight == 0)
