"""Requests as the clients' own code writes them: contracts with what is not ours.

`make clients` installs the harnesses, each in an environment of its own below .clients/; a test
skips where its environment is not there. The official client is in the project's environment.
"""

import json
import os
import pathlib
import subprocess

import openai
import pydantic
import pytest

from dcore_jax.chat.template import qwen3_template
from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from tests.serve.servers import ScriptedEngine, running

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CLIENTS = REPOSITORY / '.clients'
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope='module')
def url(tokenizer):
  """A server that answers everything with a call, by Qwen3's template."""
  made = type(tokenizer)(
    tokenizer_object=tokenizer.backend_tokenizer,
    eos_token='<|im_end|>',
    chat_template=qwen3_template(),
  )
  engine = ScriptedEngine([*made(CALL)['input_ids'], made.eos_token_id], 8, 8192, 4096)
  service = Service(Scheduler(engine, 8), made, 'm', Limits(4096), folder=ORGANISM)
  with running(service, 1) as (address, _):
    yield f'{address}/v1'


@pytest.fixture
def client(url):
  with openai.OpenAI(base_url=url, api_key='none', max_retries=0) as client:
    yield client


class get_weather(pydantic.BaseModel):  # noqa: N801, the tool's name
  """Tell the weather."""

  city: str


ASKED = dict(
  model='m',
  messages=[{'role': 'user', 'content': 'what is the weather in Paris?'}],
  tools=[openai.pydantic_function_tool(get_weather)],
  store=False,
  metadata={'a': 'b'},
  service_tier='auto',
  safety_identifier='s',
)


def again(client, message):
  """The conversation goes on with what the client got: nothing of it is refused or unknown."""
  result = {'role': 'tool', 'tool_call_id': message.tool_calls[0].id, 'content': '18 C'}
  for turn in (message, message.model_dump(), message.model_dump(exclude_none=True)):
    raw = client.chat.completions.with_raw_response.create(
      **ASKED | {'messages': [*ASKED['messages'], turn, result]}
    )
    assert 'x-ignored-fields' not in raw.headers


def test_the_official_client_parses_calls_and_hands_them_back(client):
  """`strict` goes out with the tools; `parsed` and `parsed_arguments` come in with the history."""
  message = client.chat.completions.parse(**ASKED).choices[0].message
  assert message.tool_calls[0].function.parsed_arguments == get_weather(city='Paris')
  again(client, message)


def test_the_official_client_joins_a_stream_and_hands_it_back(client):
  with client.chat.completions.stream(**ASKED) as stream:
    completion = stream.get_final_completion()
  message = completion.choices[0].message
  assert message.tool_calls[0].function.name == 'get_weather'
  again(client, message)


def test_the_official_client_gets_a_reason_with_what_it_cannot_have(client):
  with pytest.raises(openai.BadRequestError, match='make it the parameters of a tool') as caught:
    client.chat.completions.parse(**ASKED, response_format=get_weather)
  assert caught.value.param == 'response_format'


def run(environment, script, *arguments):
  python = CLIENTS / environment / 'bin' / 'python'
  if not python.exists():
    pytest.skip(f'make clients installs {python.relative_to(REPOSITORY)}')
  keep = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  settings = {
    'HF_HUB_OFFLINE': '1',
    'LITELLM_LOCAL_MODEL_COST_MAP': 'True',
    'OPENAI_API_KEY': 'none',
  }
  done = subprocess.run(
    [python, REPOSITORY / 'tests' / 'serve' / 'clients' / script, *arguments],
    env=keep | settings,
    capture_output=True,
    text=True,
    timeout=600,  # a guard against hanging
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
  'environment,script',
  [
    ('litellm', 'litellm_chat.py'),
    ('litellm', 'tau2_generate.py'),
    ('inspect', 'inspect_chat.py'),
  ],
)
def test_agents_ask_and_go_on(url, environment, script):
  assert run(environment, script, url) == 'done'


@pytest.mark.slow
@pytest.mark.parametrize('environment', ['bfcl-2025', 'bfcl-2026'])
def test_bfcls_handlers_ask_by_the_path_of_the_model(url, environment, tmp_path):
  assert run(environment, 'bfcl_query.py', url, str(ORGANISM)) == 'done'


@pytest.mark.slow
def test_lm_eval_takes_log_likelihoods(served):
  """Of the organism: scripted scores would say little."""
  address, service = served
  pairs = [('find the', ' order'), ('find the', ' customer'), ('the order', ' of Mora')]
  tokenizer = service.tokenizer
  with openai.OpenAI(base_url=f'{address}/v1', api_key='none', max_retries=0) as client:
    wanted = []
    for context, continuation in pairs:
      ids = tokenizer(context + continuation)['input_ids']
      begin = len(tokenizer(context)['input_ids'])
      scored = client.completions.create(
        model='organism', prompt=ids, max_tokens=0, echo=True, logprobs=1
      )
      wanted.append(sum(scored.choices[0].logprobs.token_logprobs[begin:]))
  got = json.loads(run('lm-eval', 'lm_eval_loglikelihood.py', f'{address}/v1', str(ORGANISM)))
  assert [pytest.approx(number, abs=1e-3) for number in wanted] == [number for number, _ in got]
