"""Endpoints that want to be asked otherwise: other names, and fields that they do not take."""

import logging

import pytest

from dcore_jax.rollout.dialect import Dialect, refused_field, without_effect
from dcore_jax.rollout.endpoint import EndpointLimits, OpenAIBackend
from dcore_jax.rollout.sampling import SamplingParams
from tests.rollout.test_backends import Endpoint, answer, ask, source_of

OTHER_NAME = {
  'message': "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
  "'max_completion_tokens' instead.",
  'type': 'invalid_request_error',
  'param': 'max_tokens',
  'code': 'unsupported_parameter',
}


@pytest.fixture
def serve():
  opened = []

  def start(script):
    opened.append(Endpoint(script))
    return opened[-1]

  yield start
  for endpoint in opened:
    endpoint.close()


def replies(endpoint, rule, count=1, **options):
  limits = EndpointLimits(concurrency=1, retries=0)
  backend = OpenAIBackend(endpoint.url, 'm', limits=limits, **options)
  return [reply for _, reply in backend.stream(source_of([ask(n) for n in range(count)]), rule)]


def refusing(*fields, error=None):
  """A script that refuses requests with any of the fields, the first one by name."""

  def script(body, _):
    for name in fields:
      if name in body:
        said = {'message': f"Unsupported parameter: '{name}'.", 'param': name}
        return 400, {'error': error or said | {'code': 'unsupported_parameter'}}
    return 200, answer('ok')

  return script


@pytest.mark.parametrize(
  'error',
  [
    OTHER_NAME,
    {'message': OTHER_NAME['message']},
    {'message': 'max_tokens is deprecated; please use max_completion_tokens.'},
    {'message': 'no', 'param': 'max_tokens', 'code': 'unsupported_parameter'},
  ],
)
def test_the_other_name_of_the_budget_is_tried_once_and_remembered(serve, tmp_path, error):
  endpoint = serve(refusing('max_tokens', error=error))
  path = tmp_path / 'journal'
  got = replies(endpoint, SamplingParams(max_tokens=16), count=3, journal=path)
  assert [reply.text for reply in got] == ['ok'] * 3 and not any(reply.error for reply in got)
  sent = [sorted(body.keys() & {'max_tokens', 'max_completion_tokens'}) for body in endpoint.bodies]
  assert sent == [['max_tokens'], *[['max_completion_tokens']] * 3]
  assert {body.get('max_completion_tokens', 16) for body in endpoint.bodies} == {16}
  # The journal knows a request by what it asks, whatever it was called.
  assert replies(endpoint, SamplingParams(max_tokens=16), count=3, journal=path) == got
  assert len(endpoint.bodies) == 4


def test_what_changes_no_answer_is_left_out_of_later_requests_too(serve, caplog):
  endpoint = serve(refusing('temperature', 'top_p', 'seed', 'max_tokens'))
  with caplog.at_level(logging.WARNING, logger='absl'):
    got = replies(endpoint, SamplingParams(temperature=1.0, top_p=1.0), count=3)
  assert [reply.text for reply in got] == ['ok'] * 3
  assert len(endpoint.bodies) == 4 + 3
  assert set(endpoint.bodies[-1]) == {'model', 'messages', 'max_completion_tokens'}
  assert len([one for one in caplog.records if 'takes no seed' in one.getMessage()]) == 1


def test_greedily_truncation_is_left_out(serve):
  rule = SamplingParams(temperature=0, top_p=0.9, top_k=5, min_p=0.1)
  endpoint = serve(refusing('top_k', 'min_p', 'top_p'))
  assert [reply.text for reply in replies(endpoint, rule)] == ['ok']
  assert {'temperature', 'seed'} <= set(endpoint.bodies[-1])


@pytest.mark.parametrize(
  'field,value', [('temperature', 0.6), ('top_p', 0.9), ('top_k', 20), ('min_p', 0.1)]
)
def test_what_changes_the_answers_is_an_error_that_names_it(serve, field, value):
  endpoint = serve(refusing(field))
  rule = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1)
  [reply] = replies(endpoint, rule)
  assert f'{field} = {value} changes the answers' in reply.error and len(endpoint.bodies) == 1


def test_a_name_that_does_not_help_is_not_remembered(serve):
  too_large = {
    'message': "'max_tokens' or 'max_completion_tokens' is too large: 512. This model's maximum "
    'context length is 100 tokens.'
  }
  always = {'message': 'use max_completion_tokens', 'param': 'max_tokens'}
  for error, asked in ((too_large, 1), (always, 2)):

    def script(body, _, error=error):
      return (400, {'error': error}) if 'find 1' in str(body) else (200, answer('ok'))

    endpoint = serve(script)
    got = replies(endpoint, SamplingParams(), count=3)
    assert [bool(reply.error) for reply in got] == [False, True, False]
    assert len(endpoint.bodies) == 2 + asked and 'max_tokens' in endpoint.bodies[-1]


@pytest.mark.parametrize(
  'error,field',
  [
    (
      {
        'message': "Unsupported value: 'temperature' does not support 0.6 with this model. Only "
        'the default (1) value is supported.',
        'param': 'temperature',
        'code': 'unsupported_value',
      },
      'temperature',
    ),
    ({'message': 'Unrecognized request argument supplied: top_k'}, 'top_k'),
    ({'message': "Unknown parameter: 'min_p'.", 'code': 'unknown_parameter'}, 'min_p'),
    (
      {
        'message': "[{'type': 'extra_forbidden', 'loc': ['body', 'seed'], 'msg': 'Extra inputs are "
        "not permitted'}]"
      },
      'seed',
    ),
    ({'message': 'top_k: is not supported', 'param': 'top_k'}, 'top_k'),
    (
      {'message': 'max_tokens is too large: 9000. This model does not support more than 4096'},
      None,
    ),
    ({'message': 'max_tokens is too large: 9000; not supported', 'param': 'max_tokens'}, None),
    ({'message': 'this model does not support images'}, None),
    ({'message': 'temperature and top_p are not supported together'}, None),
    ({'message': 'stopped: unknown top_kind'}, None),
  ],
)
def test_refusals_as_servers_write_them(error, field):
  assert refused_field(error, error['message']) == field


@pytest.mark.parametrize('body', [None, 'text', [], {'param': [1]}, {'code': {}, 'param': {}}])
def test_a_refusal_may_be_anything(body):
  assert refused_field(body, 'no') is None


def test_a_field_with_an_effect_is_sent_although_others_were_left_out():
  dialect = Dialect(left_out=frozenset({'top_p', 'top_k'}))
  plain = {'temperature': 1.0, 'top_p': 1.0}
  assert dialect.write(plain) == {'temperature': 1.0}
  sharp = {'temperature': 1.0, 'top_p': 0.5, 'extra_body': {'top_k': 3}}
  assert dialect.write(sharp) == sharp and not without_effect('top_k', sharp)
  assert dialect.write(sharp | {'temperature': 0}) == {'temperature': 0}
