"""The stage that distils, on loopback.

What is written, what a kill or a bad endpoint costs, and what is refused.
"""

import collections
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from configs import nano
from dcore_jax.chat.messages import Message
from dcore_jax.data.rows import training_rows
from dcore_jax.data.seed_sources import config_seeds
from dcore_jax.distill import shards as distill_shards
from dcore_jax.distill import stage as distillation
from dcore_jax.files import read_json_lines
from dcore_jax.overrides import with_fields
from dcore_jax.run.config import read_config
from dcore_jax.run.pipeline import Pipeline
from tests.distill.test_algorithm import THINK, some_seeds
from tests.rollout.test_backends import Endpoint, answer

ROOT = pathlib.Path(__file__).parents[2]
TASKS = dict(single=4, sequential=5, parallel=4, irrelevant=3, multi_turn=2)


def make_config(url='http://127.0.0.1:9/v1', **fields):
  config = nano.get_config()
  config.distill.tasks.update(TASKS)
  config.distill.update(
    dict(backend='openai', base_url=url, model='m', concurrency=4, shard_seeds=6, timeout=5.0)
    | fields
  )
  return read_config(config)


def perfect(config):
  """`answer(messages as JSON) -> text` of a perfect model for the config's seeds."""
  numbers = dict(config.distill.tasks)
  _, say = some_seeds(seed=config.seed * 10 + 1001, **numbers)
  return lambda body: say([Message.from_json(m) for m in body['messages']])


def run(config, folder):
  return distillation.run_distillation(config, folder, config_seeds(config), None)


def rows_of(folder):
  rows = []
  for path in sorted(folder.glob('rows-*.jsonl')):
    rows += read_json_lines(path)
  for row in rows:
    # The time is the one thing that no two runs share.
    del row['provenance']['seconds']
  return rows


@pytest.fixture
def serve():
  endpoints = []

  def start(script):
    endpoints.append(Endpoint(script))
    return endpoints[-1]

  yield start
  for endpoint in endpoints:
    endpoint.close()


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """Rows of a run in which nothing goes wrong, and how many completions it takes."""
  say = perfect(make_config())
  endpoint = Endpoint(lambda body, _: (200, answer(say(body))))
  folder = tmp_path_factory.mktemp('uninterrupted') / 'distill'
  summary = run(make_config(endpoint.url), folder)
  endpoint.close()
  return rows_of(folder), summary, folder


def test_what_a_run_leaves(uninterrupted):
  rows, summary, folder = uninterrupted
  seeds = config_seeds(make_config())
  assert (
    summary['seeds'] == summary['kept'] == len(seeds)
    and summary['rows'] == len(rows)
    and summary['success_rate'] == 1
  )
  order = [row['provenance']['seed'] for row in rows]
  # Rows stand in the order of the seeds, whichever finished first.
  assert list(dict.fromkeys(order)) == [seed.id for seed in seeds]
  assert (
    len(list(folder.glob('rows-*.jsonl')))
    == len(list(folder.glob('outcomes-*.jsonl')))
    == -(-len(seeds) // 6)
  )
  assert json.loads((folder / 'distill.json').read_text()) == summary
  trained, unreadable = training_rows(make_config().sft, folder.parent)
  assert [row.id for row in trained] == [row['id'] for row in rows] and not unreadable
  assert not list(folder.glob('.*'))  # nothing half written


def test_a_finished_run_asks_nothing(uninterrupted, tmp_path):
  rows, _, folder = uninterrupted
  written = json.loads((folder / 'distill.json').read_text())
  again = run(make_config(), folder)  # the endpoint of this config is dead
  assert (
    rows_of(folder) == rows and again == written and again['usage']['requests'] == again['calls']
  )
  # As if killed before the shard was written. The journal knows all of its completions.
  (folder / 'rows-00001.jsonl').unlink()
  calls = sum(outcome['calls'] for outcome in read_json_lines(folder / 'outcomes-00001.jsonl'))
  assert run(make_config(), folder)['usage'] == {
    'requests': 0,
    'from_journal': calls,
    'prompt_tokens': 0,
    'completion_tokens': 0,
  }
  assert rows_of(folder) == rows


def test_rows_are_those_of_one_config(uninterrupted, tmp_path):
  """Rows of another config are refused; where the answers come from may differ."""
  folder = uninterrupted[2]
  for fields in ({}, dict(backend='local', base_url='', model='', concurrency=2)):
    distillation.check_rows(make_config(**fields), folder)
  other = with_fields(
    make_config(temperature=0.9), seed=5, world__max_subtasks=3, stages=('distill',)
  )
  changed = (
    'seed: was 0, is 5; world.max_subtasks: was 4, is 3; distill.temperature: was 0.6, is 0.9'
  )
  with pytest.raises(ValueError, match=f'with other {changed}; name another'):
    distillation.check_rows(other, folder)
  shutil.copytree(folder, tmp_path / 'distill')
  (tmp_path / 'distill' / 'result.json').write_text('{}')
  with pytest.raises(ValueError, match='name another'):
    Pipeline(other, tmp_path).run()
  distillation.check_rows(other, tmp_path)  # rows from elsewhere


def test_rows_of_an_older_program_are_accepted(uninterrupted, tmp_path):
  """Fields that its record lacks had their defaults; a mapping that it holds is all of one."""
  claim = json.loads((uninterrupted[2] / 'claim.json').read_text())
  del claim['settings']['world']['name']
  del claim['settings']['world']['options']
  del claim['settings']['distill']['max_chars']
  (tmp_path / 'claim.json').write_text(json.dumps(claim))
  distillation.check_rows(make_config(), tmp_path)
  other = with_fields(make_config(max_chars=100), world__options={'size': 2})
  changed = "world.options: was {}, is {'size': 2}; distill.max_chars: was 200000, is 100"
  with pytest.raises(ValueError, match=f'with other {changed}; name another'):
    distillation.check_rows(other, tmp_path)
  claim['settings']['distill']['tasks'] = {'single': 5}
  (tmp_path / 'claim.json').write_text(json.dumps(claim))
  distillation.check_rows(with_fields(make_config(), distill__tasks={'single': 5}), tmp_path)
  with pytest.raises(ValueError, match='with other distill.tasks: was .*; name another'):
    distillation.check_rows(make_config(), tmp_path)


def test_the_seconds_are_those_of_all_calls(uninterrupted, tmp_path, monkeypatch):
  """A killed call's time counts up to what it wrote down last; a call without work adds none."""
  now = [100.0]
  monkeypatch.setattr(distill_shards.time, 'perf_counter', lambda: now[0])
  killed = distill_shards.Clock(tmp_path / 'seconds.json')
  for now[0] in (104.0, 111.0, 115.0):  # written at 111: what came after is lost
    killed.tick()
  now[0] = 500.0
  last = distill_shards.Clock(tmp_path / 'seconds.json')
  now[0] = 503.0
  assert last.write() == 14.0
  folder = uninterrupted[2]
  before, summary = (
    json.loads((folder / name).read_text()) for name in ('seconds.json', 'distill.json')
  )
  assert round(before['seconds'], 1) == summary['seconds']
  now[0] = 900.0
  assert (
    run(make_config(), folder) == summary
    and json.loads((folder / 'seconds.json').read_text()) == before
  )


def test_an_endpoint_that_fails_in_every_way_costs_no_row(serve, uninterrupted, tmp_path):
  """Each question fails first, with an error, a malformed or missing answer, or none in time."""
  say = perfect(make_config())
  failures = {}
  ways = [
    (429, {'error': {'message': 'slow down'}}),
    (500, 'oops'),
    (200, '{"choices": ['),
    (200, {'choices': []}),
    'slow',
    (503, {'error': {}}),
    (200, answer(None)),
  ]

  def script(body, _):
    key = json.dumps(body, sort_keys=True)
    if key not in failures:
      failures[key] = ways[len(failures) % len(ways)]
      if failures[key] == 'slow':
        time.sleep(1.5)
      elif failures[key] != ways[-1]:
        return failures[key]
      else:
        return 200, {'object': 'chat.completion', 'choices': [{'index': 0, 'message': None}]}
    return 200, answer(say(body))

  endpoint = serve(script)
  summary = run(make_config(endpoint.url, timeout=1.0, concurrency=16), tmp_path / 'distill')
  assert rows_of(tmp_path / 'distill') == uninterrupted[0] and summary['kept'] == summary['seeds']
  assert len(endpoint.bodies) >= 2 * summary['calls'] - 5


def test_an_endpoint_that_dies_is_one_error_and_nothing_is_asked_twice(
  serve, uninterrupted, tmp_path
):
  say = perfect(make_config())
  alive = threading.Event()

  def script(body, _):
    if alive.is_set() or len(endpoint.bodies) <= 20:
      return 200, answer(say(body))
    return 500, 'dead'

  endpoint = serve(script)
  folder = tmp_path / 'distill'
  with pytest.raises(ConnectionError, match=endpoint.url):
    run(make_config(endpoint.url, request_retries=0), folder)
  assert not (folder / 'distill.json').exists()
  alive.set()
  summary = run(make_config(endpoint.url, request_retries=0, concurrency=2), folder)
  # The other 20 stand in the journal or in a shard that was finished before.
  assert (
    summary['usage']['requests'] == summary['calls'] - 20 and summary['usage']['from_journal'] > 0
  )
  assert rows_of(folder) == uninterrupted[0]


def test_a_killed_process_goes_on_without_repeating_what_was_answered(
  serve, uninterrupted, tmp_path
):
  say = perfect(make_config())
  reached = threading.Event()

  def script(body, _):
    time.sleep(0.02)
    if len(endpoint.bodies) >= 30:
      reached.set()
    return 200, answer(say(body))

  endpoint = serve(script)
  tasks = [f'--config.distill.tasks.{kind}={count}' for kind, count in TASKS.items()]
  command = [
    sys.executable,
    '-m',
    'experiments.distill',
    '--config=configs/nano.py',
    f'--workdir={tmp_path}',
    '--backend=openai',
    f'--base_url={endpoint.url}',
    '--model=m',
    '--config.distill.concurrency=4',
    '--config.distill.shard_seeds=6',
    *tasks,
  ]
  first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
  assert reached.wait(120), first.stderr.read()
  os.kill(first.pid, signal.SIGKILL)
  first.communicate()
  asked = len(endpoint.bodies)
  assert not (tmp_path / 'distill' / 'distill.json').exists()
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  summary = json.loads(done.stdout)
  assert (
    rows_of(tmp_path / 'distill') == uninterrupted[0]
    and summary['calls'] == uninterrupted[1]['calls']
  )
  repeated = collections.Counter(json.dumps(body, sort_keys=True) for body in endpoint.bodies)
  twice = sum(count - 1 for count in repeated.values())
  # Only what was under way when it was killed is asked again.
  assert twice <= 4 and len(endpoint.bodies) == summary['calls'] + twice
  assert 30 <= asked <= 40 and summary['usage']['requests'] <= summary['calls'] - 20
  assert json.loads((tmp_path / 'distill' / 'result.json').read_text())['seconds'] > 0


def test_a_folder_belongs_to_one_way_of_making_rows(uninterrupted):
  folder = uninterrupted[2]
  for fields, named in (
    (dict(temperature=0.7), 'sampling'),
    (dict(wording='english'), 'distiller'),
    (dict(samples=2), 'distiller'),
    (dict(reference='pseudo'), 'labels'),
    (dict(shard_seeds=7), 'shard_seeds'),
  ):
    with pytest.raises(ValueError, match=f'begun with other {named}'):
      run(make_config(**fields), folder)


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    (dict(reference='seen'), 'reference'),
    (dict(verify='x'), 'verify'),
    (dict(wording='x'), 'wording'),
    (dict(base_url=''), 'URL'),
    (dict(backend='local'), 'base_url'),
    (dict(backend='local', base_url='', prompt_price=1.0), 'prices'),
    (dict(completion_price=-1.0), 'distill.completion_price = -1.0'),
    (dict(backend='x'), 'backend'),
    (dict(examples=9), 'examples'),
    (dict(files=('nowhere.jsonl',)), 'nowhere.jsonl'),
  ],
)
def test_configs_that_do_not_hold_are_named_before_anything_is_written(tmp_path, fields, named):
  with pytest.raises(ValueError, match=named):
    run(make_config(**fields), tmp_path / 'distill')
  assert not (tmp_path / 'distill').exists() or not list((tmp_path / 'distill').glob('*.jsonl'))


def test_a_run_that_keeps_nothing_says_why(serve, tmp_path):
  endpoint = serve(lambda *_: (200, answer('no')))
  with pytest.raises(ValueError, match='kept none.*unclosed reasoning'):
    run(make_config(endpoint.url), tmp_path)


def test_seeds_from_a_file(serve, tmp_path):
  seeds, say = some_seeds(single=3, sequential=2)
  (tmp_path / 'seeds.jsonl').write_text(
    ''.join(json.dumps(seed.to_json()) + '\n' for seed in seeds)
  )
  endpoint = serve(
    lambda body, _: (200, answer(say([Message.from_json(m) for m in body['messages']])))
  )
  summary = run(
    make_config(endpoint.url, files=(str(tmp_path / 'seeds.jsonl'),)), tmp_path / 'distill'
  )
  assert summary['seeds'] == summary['kept'] == 5


def test_pseudo_labels_are_made_once_and_counted(serve, tmp_path):
  """The labelling endpoint is right for single calls, and refuses every other request."""
  config = make_config()
  say = perfect(config)
  seeds = {seed.query: seed for seed in config_seeds(config)}

  def label(body, _):
    seed = seeds.get(body['messages'][-1]['content'])
    text = THINK + 'I cannot.'
    if seed and len(seed.calls) < 2:
      text = say({'messages': [{'role': 'user', 'content': seed.query}]})
    return 200, answer(text)

  labeller = serve(label)
  endpoint = serve(lambda body, _: (200, answer(say(body))))
  config = make_config(
    endpoint.url,
    reference='pseudo',
    completion_price=3.0,
    labels=dict(samples=3, base_url=labeller.url, model='other', prompt_price=1.0),
  )
  summary = run(config, tmp_path)
  for usage, price, tokens in (
    (summary['usage'], 3.0, 'completion_tokens'),
    (summary['labels']['usage'], 1.0, 'prompt_tokens'),
  ):
    assert (
      usage['cost'] == pytest.approx(usage[tokens] * price / 1e6, abs=1e-6) and usage[tokens] > 0
    )
  assert json.loads((tmp_path / 'distill.json').read_text()) == summary
  assert summary['labels']['labelled'] == summary['labels']['seeds'] == len(seeds)
  agreeing = sum(len(seed.calls) < 2 for seed in seeds.values())
  assert summary['labels']['agree'] == agreeing and len(labeller.bodies) >= 3 * len(seeds)
  # Seeds of several subtasks count as such, whatever became of them: all were labelled as what no
  # tool can do.
  several = sum(seed.kind in ('sequential', 'parallel') for seed in seeds.values())
  assert (
    summary['several'] == several > 0
    and summary['success_rate_all'] == summary['decomposition_rate'] == 0
  )
  asked = len(labeller.bodies)
  (tmp_path / 'rows-00000.jsonl').unlink()
  run(config, tmp_path)
  assert len(labeller.bodies) == asked


def test_the_sample_shows_what_models_wrote_as_text():
  row = {
    'id': 's',
    'kind': 'single',
    'provenance': {'calls': 1, 'completion_tokens': 2, 'seconds': 0.1},
    'conversations': [{'role': 'user', 'content': '<script>alert(1)</script>'}],
  }
  lost = {
    'reason': 'no call',
    'kind': 'single',
    'seed': 't',
    'calls': 1,
    'completion_tokens': 2,
    'last': '<img src=x onerror=y>',
  }
  summary = {
    'model': '<b>m</b>',
    'wording': 'w',
    'kept': 1,
    'seeds': 2,
    'rows': 1,
    'several': 0,
    'decomposition_rate': 0.0,
    'success_rate': 0.0,
    'success_rate_all': 0.0,
    'scenarios': {
      'single': {'seeds': 2, 'kept': 1, 'rate': 0.5, 'rows': 1, 'dropped': {'no call': 1}}
    },
  }
  page = distillation.render_sample(summary, [row], [lost])
  assert (
    '&lt;script&gt;' in page
    and '&lt;img' in page
    and '<script' not in page
    and '<img' not in page
    and '<b>' not in page
  )


def test_the_sample_of_a_run(uninterrupted):
  page = (uninterrupted[2] / 'sample.html').read_text()
  assert (
    all(kind in page for kind in ('single', 'sequential', 'parallel', 'irrelevant'))
    and 'i split it into subtasks' in page
  )


@pytest.mark.slow
def test_our_own_server_gives_what_the_engine_gives(tmp_path):
  """The same seeds, greedy, give the same rows through `experiments.serve` and our engine."""
  if importlib.util.find_spec('experiments.serve') is None:
    pytest.skip('experiments.serve is not there')
  import socket

  from dcore_jax.rollout.policy import ORGANISM

  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  tasks = [f'--config.distill.tasks.{kind}={count}' for kind, count in TASKS.items()]
  flags = ['--config=configs/nano.py', '--config.distill.temperature=0.0', *tasks]
  server = subprocess.Popen(
    [sys.executable, '-m', 'experiments.serve', f'--model={ORGANISM}', f'--port={port}'], cwd=ROOT
  )
  try:
    url = f'http://127.0.0.1:{port}'
    _wait_for(url + '/health', server)
    remote = [
      f'--workdir={tmp_path / "remote"}',
      '--backend=openai',
      f'--base_url={url}/v1',
      f'--model={_served_model(url)}',
    ]
    for where in (remote, [f'--workdir={tmp_path / "local"}']):
      done = subprocess.run(
        [sys.executable, '-m', 'experiments.distill', *flags, *where],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
      )
      assert done.returncode == 0, done.stderr
  finally:
    server.terminate()
    server.wait(30)
  remote_rows, local_rows = (rows_of(tmp_path / place / 'distill') for place in ('remote', 'local'))
  assert remote_rows
  for theirs, ours in zip(remote_rows, local_rows, strict=True):
    assert (theirs['id'], theirs['conversations']) == (ours['id'], ours['conversations'])


def _wait_for(url, server):
  import urllib.request

  for _ in range(600):
    assert server.poll() is None, 'the server has ended'
    try:
      with urllib.request.urlopen(url, timeout=1):
        return
    except OSError:
      time.sleep(0.2)
  pytest.fail(f'{url} does not answer')


def _served_model(url):
  import urllib.request

  with urllib.request.urlopen(url + '/v1/models') as reply:
    return json.load(reply)['data'][0]['id']
