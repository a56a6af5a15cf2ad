"""Suites are run on a model: prepared together, claimed, resumed, and apart from each other."""

import json
import pathlib
import subprocess
import sys

import pytest

from dcore_jax.evaluate import suites as protocol
from dcore_jax.evaluate.suites import SUITES, Served, Suite, SuiteResult, SuiteSettings, accuracy
from dcore_jax.files import write_json_atomic
from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.run import suites
from tests.evaluate.scripted_server import scripted_server

ROOT = pathlib.Path(__file__).parents[2]


class Scripted(Suite):
  """Counts what it is asked to do."""

  calls: list[str] = []

  def __init__(self, settings, trouble: str = '', shots: int = 0, parts: tuple[str, ...] = ()):
    super().__init__(settings)
    self.trouble = trouble

  def prepare(self):
    self.calls.append(f'prepare {self.name}')
    if self.trouble == 'lacks':
      raise ValueError(f'{self.name} lacks its data')

  def answer(self, served: Served, folder, told):
    self.calls.append(f'answer {self.name} at {served.model}')
    if self.trouble == 'raises':
      raise KeyError('nothing that anybody foresaw')
    told(2, 2)
    write_json_atomic(folder / 'answers.json', [True, False])

  def score(self, folder):
    if self.trouble == 'unscored':
      raise ValueError('no verdict')
    score = accuracy('overall', [True, False], floor=0.0, published=0.25)
    left_out = [{'id': '7', 'reason': 'too long'}]
    return SuiteResult(self.name, '1', [score], ['A note.'], left_out), []


@pytest.fixture
def calls(monkeypatch):
  for name in ('first', 'second', 'third'):
    monkeypatch.setitem(SUITES, name, type(name.title(), (Scripted,), {'name': name}))
  monkeypatch.setattr(Scripted, 'calls', [])
  return Scripted.calls


ENDPOINT = suites.Model('served', base_url='http://127.0.0.1:1/v1')


def run(names, out, options=None, settings=None, model=ENDPOINT):
  return suites.run_suites(names, model, settings or SuiteSettings(), options or {}, out)


def test_everything_that_is_missing_is_said_before_a_model_is_looked_for(tmp_path, calls):
  options = {name: {'trouble': 'lacks'} for name in ('first', 'third')}
  nowhere = suites.Model('no/such/model/here')
  with pytest.raises(ValueError, match='first lacks its data; third lacks its data'):
    run(['first', 'second', 'third'], tmp_path / 'out', options, model=nowhere)
  assert calls == ['prepare first', 'prepare second', 'prepare third']
  with pytest.raises(ValueError, match='no/such/model'):
    run(['second'], tmp_path / 'out', model=nowhere)
  assert not (tmp_path / 'out').exists()


def test_a_suite_that_fails_does_not_lose_the_others(tmp_path, calls, capsys):
  options = {'first': {'trouble': 'raises'}, 'third': {'trouble': 'unscored'}}
  summary = run(['first', 'second', 'third'], tmp_path, options)
  assert list(summary['suites']) == ['second']
  assert summary['failed']['first'].startswith('KeyError: ')
  assert summary['failed']['third'] == 'no verdict'
  assert 'Traceback' in capsys.readouterr().err
  assert json.loads((tmp_path / 'summary.json').read_text()) == summary
  # What has a result is not asked again, and what has none is.
  calls.clear()
  run(['first', 'second', 'third'], tmp_path, options)
  assert [call for call in calls if call.startswith('answer')] == [
    'answer first at served',
    'answer third at served',
  ]


def test_a_folder_belongs_to_a_model_its_settings_and_options(tmp_path, calls):
  run(['second'], tmp_path, {'second': {'shots': 2}}, SuiteSettings(limit=3))
  # Where and how fast may change.
  faster = SuiteSettings(limit=3, concurrency=64, timeout=5.0, data=tmp_path)
  run(['second'], tmp_path, {'second': {'shots': 2}}, faster)
  for options, settings, model, said in (
    ({'second': {'shots': 2}}, SuiteSettings(limit=4), ENDPOINT, 'limit: was 3, is 4'),
    ({}, SuiteSettings(limit=3), ENDPOINT, 'second.shots: was 2, is 0'),
    (
      {'second': {'shots': 2}},
      SuiteSettings(limit=3),
      suites.Model('other', base_url='http://h/v1'),
      "model: was 'served', is 'other'",
    ),
  ):
    with pytest.raises(ValueError, match=f'differs in {said}; name another --out'):
      run(['second'], tmp_path, options, settings, model)


def test_an_option_that_a_suite_learns_later_has_its_default(tmp_path, calls):
  run(['second'], tmp_path)
  path = tmp_path / 'second' / 'claim.json'
  record = json.loads(path.read_text())
  del record['second.shots']
  path.write_text(json.dumps(record))
  calls.clear()
  run(['second'], tmp_path)
  # The result is that of the first run: nobody was asked again.
  assert calls == ['prepare second']
  with pytest.raises(ValueError, match='second.shots: was 0, is 1'):
    run(['second'], tmp_path, {'second': {'shots': 1}})


def test_options_are_read_as_the_suite_declares_them(calls):
  text = 'first.trouble=a, b=c,first.shots=3, second.parts=x, y'
  assert suites.read_options(text) == {
    'first': {'trouble': 'a, b=c', 'shots': 3},
    'second': {'parts': ('x', 'y')},
  }
  assert suites.read_options('') == {}
  for text, said in (
    ('first', 'expected SUITE.OPTION=VALUE'),
    ('first.shots=many', 'expected a number'),
    ('first.shot=1', "unknown option; 'first' takes .*'shots'"),
    ('fist.shots=1', 'unknown suite'),
  ):
    with pytest.raises(ValueError, match=said):
      suites.read_options(text)
  with pytest.raises(ValueError, match="unknown suites \\['fist'\\].*gsm8k"):
    suites.read_names('first,fist')
  with pytest.raises(ValueError, match='named twice'):
    suites.read_names('first,first')
  with pytest.raises(ValueError, match="not run: \\['second'\\]"):
    suites.make_suites(['first'], SuiteSettings(), {'second': {}})


def test_results_are_shown_with_their_doubts(tmp_path, calls):
  text = suites.format_results(run(['second'], tmp_path)['suites'])
  head, row, *notes = text.splitlines()
  assert head.split() == ['suite', 'category', 'metric', 'measured', 'floor', 'published']
  assert row.split() == (
    'second overall accuracy 0.500 [0.095, 0.905] (2 tasks) 0.000 0.250'.split()
  )
  assert notes == ['second: A note.', 'second: 1 without a verdict, the first: too long']


def a_data_folder(folder: pathlib.Path) -> pathlib.Path:
  (folder / 'transfer').mkdir(parents=True)
  rows = [{'question': f'What is {n}?', 'answer': f'#### {n}'} for n in range(3)]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'transfer' / 'gsm8k_test.jsonl').write_text(text)
  return folder


def command(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.evaluate', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command_prints_figures_and_says_what_failed(tmp_path):
  data = a_data_folder(tmp_path / 'data')
  flags = ['--model=scripted', f'--out={tmp_path / "out"}', f'--data={data}', '--temperature=0']
  with scripted_server(lambda body: 'So \\boxed{1}.') as url:
    done = command('--suite=gsm8k', f'--base_url={url}', *flags)
  assert done.returncode == 0, done.stderr
  summary = json.loads(done.stdout)
  assert summary['suites']['gsm8k']['scores'][0]['estimate']['n'] == 3
  assert 'gsm8k  overall   accuracy  0.333 [' in done.stderr
  assert json.loads((tmp_path / 'out' / 'summary.json').read_text()) == summary
  # The result is there, so that nobody is asked.
  again = command('--suite=gsm8k', '--base_url=http://127.0.0.1:1/v1', *flags)
  assert json.loads(again.stdout) == summary
  wrong = command('--suite=gsm8k', '--limit=1', '--base_url=http://127.0.0.1:1/v1', *flags)
  assert wrong.returncode == 1 and 'limit: was 0, is 1' in wrong.stderr
  # Behind the line that says where results go.
  assert len(wrong.stderr.strip().splitlines()) == 2


def test_flags_that_nothing_reads_are_refused(tmp_path):
  done = command('--limit=3', f'--out={tmp_path}')
  assert done.returncode == 1 and '--limit: for suites alone' in done.stderr
  done = command('--suite=gsm8k', '--config=configs/nano.py', f'--out={tmp_path}')
  assert done.returncode == 1 and 'do not read it' in done.stderr


def test_answers_that_leave_no_room_for_a_prompt_are_refused(tmp_path):
  settings = SuiteSettings(data=a_data_folder(tmp_path / 'data'))
  with pytest.raises(ValueError, match='max_tokens = 4096 leaves no room .* 1024 tokens'):
    run(['gsm8k'], tmp_path / 'out', settings=settings, model=suites.Model())


@pytest.mark.slow
def test_our_own_model_is_served_and_let_go(tmp_path):
  settings = SuiteSettings(
    data=a_data_folder(tmp_path / 'data'), limit=2, max_tokens=4, concurrency=2
  )
  summary = run(['gsm8k'], tmp_path / 'out', settings=settings, model=suites.Model(max_len=256))
  assert summary['model'].startswith(f'{ORGANISM.name}-')
  result = summary['suites']['gsm8k']
  assert result['scores'][0]['estimate']['n'] == 2 and not result['left_out']
  served = protocol.SUITES['gsm8k'](settings)
  assert served.score(tmp_path / 'out' / 'gsm8k')[0].to_json() == result
