"""One interface to engine and endpoint: a scripted server that fails in every way one can."""

import http.server
import json
import threading
import time

import jax
import pytest

from dcore_jax.chat.messages import Message, ToolSpec
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts
from dcore_jax.rollout import backends
from dcore_jax.rollout.backends import ChatRequest
from dcore_jax.rollout.endpoint import EndpointLimits, OpenAIBackend
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.reply_journal import ReplyJournal
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes


def ask(number, text='find'):
  return ChatRequest((Message('user', f'{text} {number}'),), key_id=(number,))


def source_of(requests):
  waiting = list(enumerate(requests))

  def source(free):
    given = waiting[:free]
    waiting[:] = waiting[free:]
    return given

  return source


def answer(content, **fields):
  message = {'role': 'assistant', 'content': content, **fields}
  return {
    'id': 'x',
    'object': 'chat.completion',
    'created': 0,
    'model': 'm',
    'choices': [{'index': 0, 'finish_reason': fields.pop('finish', 'stop'), 'message': message}],
    'usage': {'prompt_tokens': 5, 'completion_tokens': 2, 'total_tokens': 7},
  }


class Endpoint:
  """Answers each request with what `script(body, nth time)` gives: (status, JSON or raw text)."""

  def __init__(self, script):
    self.bodies = []
    self.most = 0
    self._now = 0
    self._seen = {}
    self._lock = threading.Lock()
    endpoint = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):  # pylint: disable=invalid-name
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with endpoint._lock:
          endpoint.bodies.append(body)
          endpoint._now += 1
          endpoint.most = max(endpoint.most, endpoint._now)
          text = body['messages'][-1]['content']
          endpoint._seen[text] = endpoint._seen.get(text, 0) + 1
          times = endpoint._seen[text]
        status, content = script(body, times)
        content = content if isinstance(content, str) else json.dumps(content)
        with endpoint._lock:
          endpoint._now -= 1
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('retry-after-ms', '5')
        self.send_header('Content-Length', str(len(content.encode())))
        self.end_headers()
        self.wfile.write(content.encode())

      def do_GET(self):  # pylint: disable=invalid-name
        self.send_response(script({'messages': [{'role': 'user', 'content': 'models'}]}, 1)[0])
        content = b'{"object": "list", "data": []}'
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

      def log_message(self, *_):
        pass

    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}/v1'
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()


@pytest.fixture
def serve():
  opened = []

  def start(script):
    opened.append(Endpoint(script))
    return opened[-1]

  yield start
  for endpoint in opened:
    endpoint.close()


SAMPLING = SamplingParams(
  temperature=0.6, top_p=0.9, top_k=20, max_tokens=32, seed=7, min_p=0.1, stop=('###',)
)


def test_requests_carry_the_rule_and_replies_come_back_as_text(serve):
  replies = {
    'find 0': answer('done'),
    'find 1': answer('fine', reasoning_content='hm'),
    'find 2': answer(
      None,
      tool_calls=[
        {'id': 'c', 'type': 'function', 'function': {'name': 'f', 'arguments': '{"a": 1}'}}
      ],
    ),
    'find 3': answer('cut', finish='length'),
    'find 4': answer(
      None,
      tool_calls=[
        {'id': 'c', 'type': 'function', 'function': {'name': 'f', 'arguments': '{"a": '}}
      ],
    ),
    'find 5': answer(None, reasoning_content='so ', finish='length'),
  }
  endpoint = serve(lambda body, _: (200, replies[body['messages'][-1]['content']]))
  backend = OpenAIBackend(endpoint.url, 'm', limits=EndpointLimits(concurrency=2))
  spec = ToolSpec('f', 'does', {'type': 'object', 'properties': {'a': {'type': 'integer'}}})
  requests = [ChatRequest(ask(n).messages, (n,), (spec,)) for n in range(6)]
  got = dict(backend.stream(source_of(requests), SAMPLING))
  assert (
    got[0].text == 'done'
    and got[0].finished
    and (got[0].prompt_tokens, got[0].completion_tokens) == (5, 2)
  )
  assert got[1].text == '<think>\nhm\n</think>\n\nfine'
  assert got[2].text == '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
  assert got[3].text == 'cut' and not got[3].finished
  assert got[4].text == 'f{"a": '
  assert got[5].text == '<think>\nso ' and not got[5].finished
  body = endpoint.bodies[0]
  assert (body['model'], body['temperature'], body['top_p'], body['top_k'], body['max_tokens']) == (
    'm',
    0.6,
    0.9,
    20,
    32,
  )
  assert (body['min_p'], body['stop']) == (0.1, ['###'])
  assert body['tools'][0]['function']['name'] == 'f'
  assert len({body['seed'] for body in endpoint.bodies}) == 6 and all(
    0 <= body['seed'] < 2**31 for body in endpoint.bodies
  )
  assert backend.usage == backends.Usage(6, 0, 30, 12)


def test_tokens_cost_what_the_config_says(serve):
  endpoint = serve(lambda *_: (200, answer('done')))
  requests = [ask(n) for n in range(6)]
  backend, free = (
    OpenAIBackend(endpoint.url, 'm', prices=prices) for prices in ((1.0, 2.0), (0.0, 0.0))
  )
  for each in (backend, free):
    dict(each.stream(source_of(requests), SAMPLING))
  counts = {'requests': 6, 'from_journal': 0, 'prompt_tokens': 30, 'completion_tokens': 12}
  assert (
    backend.usage.record() == counts | {'cost': 54e-6} and free.usage.record() == counts
  )  # without prices none is known
  with pytest.raises(ValueError, match='prices'):
    OpenAIBackend(endpoint.url, 'm', prices=(-1.0, 0.0))


def test_never_more_under_way_than_allowed(serve):
  def slow(body, _):
    time.sleep(0.02)
    return 200, answer('ok')

  endpoint = serve(slow)
  got = list(
    OpenAIBackend(endpoint.url, 'm', limits=EndpointLimits(concurrency=3)).stream(
      source_of([ask(n) for n in range(12)]), SAMPLING
    )
  )
  assert len(got) == 12 and 1 < endpoint.most <= 3


def test_failures_that_pass_are_asked_again(serve):
  first = {
    'find 0': (429, {'error': {'message': 'slow down'}}),
    'find 1': (500, 'oops'),
    'find 2': (200, {'choices': []}),
    'find 3': (503, {'error': {}}),
  }
  endpoint = serve(
    lambda body, times: (
      first[body['messages'][-1]['content']] if times == 1 else (200, answer('ok'))
    )
  )
  got = dict(
    OpenAIBackend(endpoint.url, 'm', limits=EndpointLimits(retries=2)).stream(
      source_of([ask(n) for n in range(4)]), SAMPLING
    )
  )
  assert [got[n].text for n in range(4)] == ['ok'] * 4 and len(endpoint.bodies) == 8


@pytest.mark.parametrize(
  'bad', ['{"choices": [', {'choices': [{'index': 0, 'message': 'hey'}]}, [1], {'choices': None}]
)
def test_malformed_answers_are_asked_again_and_never_kept(serve, tmp_path, bad):
  endpoint = serve(lambda body, times: (200, bad if times < 3 else answer('ok')))
  path = tmp_path / 'j'
  got = dict(
    OpenAIBackend(endpoint.url, 'm', limits=EndpointLimits(retries=0), journal=path).stream(
      source_of([ask(0)]), SAMPLING
    )
  )
  assert 'without a message' in got[0].error and not path.read_text()
  got = dict(
    OpenAIBackend(endpoint.url, 'm', limits=EndpointLimits(retries=1), journal=path).stream(
      source_of([ask(0)]), SAMPLING
    )
  )
  assert got[0].text == 'ok'


@pytest.mark.parametrize(
  'arguments', ['{"a": NaN}', '[1]', '{"a":' + '[' * 100_000 + ']' * 100_000 + '}']
)
def test_arguments_that_are_no_call_stay_text(serve, arguments):
  calls = [
    {'id': 'c', 'type': 'function', 'function': {'name': 'f', 'arguments': text}}
    for text in ('{"b": 1}', arguments)
  ]
  usage = {'usage': {'prompt_tokens': None, 'completion_tokens': None}}
  endpoint = serve(lambda *_: (200, answer(None, tool_calls=calls) | usage))
  got = dict(OpenAIBackend(endpoint.url, 'm').stream(source_of([ask(0)]), SAMPLING))
  assert got[0].text == 'f{"b": 1}\nf' + arguments and got[0].prompt_tokens == 0


def test_a_request_that_is_refused_is_a_reply_with_its_reason(serve):
  def script(body, _):
    if 'find 1' in str(body):
      return 400, {'error': {'message': 'context too long'}}
    return 200, answer('ok')

  got = dict(OpenAIBackend(serve(script).url, 'm').stream(source_of([ask(0), ask(1)]), SAMPLING))
  assert (
    got[0].text == 'ok'
    and got[1].text == ''
    and 'status 400' in got[1].error
    and 'context too long' in got[1].error
  )


def test_a_refusal_is_not_remembered(serve, tmp_path):
  """The server is set up anew with a larger context."""
  fixed = threading.Event()
  endpoint = serve(
    lambda *_: (200, answer('ok')) if fixed.is_set() else (400, {'error': {'message': 'too long'}})
  )

  def ask_all():
    backend = OpenAIBackend(endpoint.url, 'm', journal=tmp_path / 'j')
    return dict(backend.stream(source_of([ask(0), ask(1)]), SAMPLING))

  assert all('too long' in reply.error for reply in ask_all().values())
  fixed.set()
  assert [reply.text for reply in ask_all().values()] == ['ok', 'ok']


def test_an_endpoint_that_takes_no_request_is_one_error(serve):
  endpoint = serve(lambda *_: (400, {'error': {'message': 'unknown field top_k'}}))
  with pytest.raises(ConnectionError, match='takes no request: .*unknown field top_k'):
    list(OpenAIBackend(endpoint.url, 'm').stream(source_of([ask(n) for n in range(40)]), SAMPLING))


def test_a_request_that_always_fails_does_not_stop_the_others(serve, tmp_path):
  def script(body, _):
    if 'find 1' in str(body['messages']):
      return 500, 'oops'
    return 200, answer('ok')

  endpoint = serve(script)
  path = tmp_path / 'j'
  backend = OpenAIBackend(
    endpoint.url, 'm', limits=EndpointLimits(concurrency=2, retries=0), journal=path
  )
  got = list(backend.stream(source_of([ask(n) for n in range(10)]), SAMPLING))
  assert (
    [tag for tag, _ in got][-1] == 1
    and 'no answer' in got[-1][1].error
    and '500' in got[-1][1].error
  )
  assert {reply.text for _, reply in got[:-1]} == {'ok'} and len(got) == 10
  assert (
    path.read_text().count('\n') == 9
    and sum('find 1' in str(body) for body in endpoint.bodies) == 2
  )


@pytest.mark.parametrize('status', [401, 402, 404, 408, 409, 500])
def test_an_endpoint_that_refuses_us_is_one_error(serve, status):
  endpoint = serve(lambda *_: (status, {'error': {'message': 'no'}}))
  with pytest.raises(ConnectionError, match=f"{endpoint.url}, model 'm'"):
    list(
      OpenAIBackend(endpoint.url, 'm', limits=EndpointLimits(retries=1)).stream(
        source_of([ask(0)]), SAMPLING
      )
    )


def test_a_dead_endpoint_is_one_error():
  with pytest.raises(ConnectionError, match='127.0.0.1:9/v1'):
    list(
      OpenAIBackend('http://127.0.0.1:9/v1', 'm', limits=EndpointLimits(retries=0)).stream(
        source_of([ask(0)]), SAMPLING
      )
    )


def test_what_was_answered_is_not_asked_again(serve, tmp_path):
  """An endpoint dies after three answers, the journal's last line is cut; a new process goes on."""
  alive = threading.Event()
  alive.set()

  def script(body, _):
    if alive.is_set() or 'find 0' in str(body):
      return 200, answer('to ' + body['messages'][-1]['content'])
    return 500, 'dead'

  endpoint = serve(script)
  path = tmp_path / 'journal.jsonl'

  def make():
    limits = EndpointLimits(concurrency=1, retries=0)
    return OpenAIBackend(endpoint.url, 'm', limits=limits, journal=path)

  stream = make().stream(source_of([ask(n) for n in range(6)]), SAMPLING)
  for _ in range(3):
    next(stream)
  alive.clear()
  with pytest.raises(ConnectionError):
    list(stream)
  kept = path.read_text().count('\n')
  assert 3 <= kept <= 4
  path.write_text(path.read_text() + '{"key": "torn')
  alive.set()
  asked = len(endpoint.bodies)
  backend = make()
  got = dict(backend.stream(source_of([ask(n) for n in range(6)]), SAMPLING))
  assert {n: reply.text for n, reply in got.items()} == {n: f'to find {n}' for n in range(6)}
  assert backend.usage.from_journal == kept and len(endpoint.bodies) - asked == 6 - kept
  other = OpenAIBackend(endpoint.url, 'm', journal=path)
  list(other.stream(source_of([ask(0)]), SamplingParams(seed=8)))
  assert other.usage.from_journal == 0  # another rule is another question


def test_requests_that_depend_on_replies(serve):
  """Two conversations of three steps each: a source may give nothing now and something later."""
  endpoint = serve(lambda body, _: (200, answer('next')))
  steps = {0: 0, 1: 0}
  ready = [0, 1]

  def source(free):
    given = [(number, ask(10 * number + steps[number])) for number in ready[:free]]
    del ready[:free]
    return given

  for number, _ in OpenAIBackend(endpoint.url, 'm').stream(source, SAMPLING):
    steps[number] += 1
    if steps[number] < 3:
      ready.append(number)
  assert steps == {0: 3, 1: 3} and len(endpoint.bodies) == 6


def test_a_damaged_journal_is_named(tmp_path):
  (tmp_path / 'j').write_text('{"key": "a"}\n')
  with pytest.raises(ValueError, match='line 1 is no reply'):
    OpenAIBackend('http://127.0.0.1:9/v1', 'm', journal=tmp_path / 'j')


def small_backend(journal=None):
  tokenizer = build_tokenizer(sample_texts(), 640)
  model = DecoderConfig.from_hf(
    dict(
      model_type='qwen3',
      vocab_size=640,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=1,
      num_attention_heads=2,
      num_key_value_heads=1,
      head_dim=16,
      rope_theta=1e4,
      tie_word_embeddings=True,
      eos_token_id=tokenizer.eos_token_id,
    )
  )
  engine = Engine(
    decoder.init_params(model, jax.random.key(0)),
    model,
    stop_ids=[tokenizer.eos_token_id],
    sizes=EngineSizes(lanes=2, max_len=64),
  )
  return LocalBackend(engine, tokenizer, journal=journal, model='small')


def test_the_engine_answers_through_the_same_interface():
  backend = small_backend()
  rule = SamplingParams(max_tokens=8, seed=1)
  requests = [ask(0), ask(1, 'find ' * 80), ask(2), ask(3)]
  got = dict(backend.stream(source_of(requests), rule))
  assert sorted(got) == [0, 1, 2, 3]
  assert got[1].error == backends.TOO_LONG and got[1].prompt_tokens > 64
  assert all(0 < got[n].completion_tokens <= 8 and not got[n].error for n in (0, 2, 3))
  again = dict(backend.stream(source_of([ask(3), ask(0)]), rule))
  assert (again[0], again[1]) == (got[3], got[0])
  alone = dict(backend.stream(source_of([ask(1, 'find ' * 80)]), rule))
  assert alone[0].error == backends.TOO_LONG


def test_the_engine_does_not_decode_what_its_journal_knows(tmp_path):
  backend = small_backend(tmp_path / 'j')
  rule = SamplingParams(max_tokens=8, seed=1)
  stream = backend.stream(source_of([ask(n) for n in range(5)]), rule)
  first = [next(stream) for _ in range(3)]  # and then killed
  stream.close()
  assert (
    all(reply.seconds > 0 for _, reply in first) and (tmp_path / 'j').read_text().count('\n') == 3
  )
  again = small_backend(tmp_path / 'j')
  got = dict(again.stream(source_of([ask(n) for n in range(5)]), rule))
  assert again.usage.from_journal == 3 and again.usage.requests == 2
  whole = dict(small_backend(None).stream(source_of([ask(n) for n in range(5)]), rule))
  assert got == whole and all(got[n].seconds == reply.seconds for n, reply in first)
  known = dict(again.stream(source_of([ask(n) for n in range(5)]), rule))
  assert known == whole and again.usage.requests == 2
  dict(
    again.stream(source_of([ask(0)]), SamplingParams(max_tokens=8, seed=2))
  )  # another rule is another question
  assert again.usage.requests == 3


@pytest.mark.parametrize('text', ['\ud83d alone', '漢字 \u2028 "\\n"', ''])
def test_a_journal_gives_back_any_text(tmp_path, text):
  reply = backends.Reply(text, True, 1, 2, seconds=0.5)
  for number in range(3):
    ReplyJournal(tmp_path / 'j').append({'n': number}, reply)
  journal = ReplyJournal(tmp_path / 'j')
  assert journal.find({'n': 1}) == reply and journal.find({'n': 3}) is None
  journal.append({'n': 3}, reply)
  assert journal.find({'n': 3}) == reply and journal.find({'n': 0}).seconds == 0.5
