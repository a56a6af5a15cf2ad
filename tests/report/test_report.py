import copy
import html.parser
import json
import re
import subprocess
import sys

import pytest

from dcore_jax import files
from dcore_jax.report import report, traces
from dcore_jax.report.summary import validate_summary
from tests.report import example_run

VOID = {'meta', 'br', 'img', 'link', 'input', 'hr'}


class Page(html.parser.HTMLParser):
  """Reads a page: its tags balance, its ids, what it refers to, its visible text."""

  def __init__(self, text: str):
    super().__init__()
    self.open = []
    self.tags = []
    self.ids = []
    self.references = []
    self.text = ''
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    for name, value in attributes:
      if name == 'id':
        self.ids.append(value)
      if name in ('src', 'href', 'xlink:href', 'srcset', 'action', 'data'):
        self.references.append(value)
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)
    if tag not in VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-1:]}'
    self.open.pop()

  def handle_data(self, data):
    if not self.open or self.open[-1] != 'style':
      self.text += data


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """One written report with everything in it, for the tests that only read it."""
  folder = tmp_path_factory.mktemp('run')
  path = report.write_report(
    folder, example_run.a_summary(), example_run.metric_rows(), example_run.some_traces()
  )
  assert path == folder / 'report.html'
  return folder


def test_the_page_is_whole_and_fetches_nothing(workdir):
  text = (workdir / 'report.html').read_text()
  page = Page(text)
  assert len(text) < 400_000
  assert all(reference.startswith('#') for reference in page.references)
  assert not re.search(r'https?:|@import|<script', text)
  assert all(address.startswith('#') for address in re.findall(r'url\(([^)]*)', text))
  assert len(page.ids) == len(set(page.ids))
  used = re.findall(r'url\(#([^)]*)\)', text) + [reference[1:] for reference in page.references]
  assert used and set(used) <= set(page.ids)
  assert page.tags.count('svg') == 9 and 'Not in this run' not in page.text
  assert sorted(file.name for file in workdir.iterdir()) == ['report.html', 'traces.json']


def test_the_page_holds_the_numbers(workdir):
  page = Page((workdir / 'report.html').read_text())
  text = ' '.join(page.text.split())
  for part in (
    '28 % of sequential tasks right before, 68 % after',
    'evaluate SFT',
    '11 min 1 s',
    'configs/nano.py',
    '68.0 % [59.5, 75.4] (128 tasks)',
    '60.9 %',
    'wrong call',
    '431 72 %',
    'put there by construction',
    'base → after SFT',
    'sequential+35.2 [+25.5, +44.9] (128 tasks)+4.7 (1 task: no interval)',
    'single+1.6 [-2.8, +6.0] (128 tasks)–',
    'reward3.403.46+0.06 [-0.04, +0.16] (32 tasks)',
    'On 32 prompts',
    'None of it was measured in this run',
    '63.8',
    'runs/nano/export',
  ):
    assert part in text, part


def test_colours_follow_the_page_and_no_stand_in_is_left(workdir):
  page = (workdir / 'report.html').read_text()
  charts = ''.join(re.findall(r'<svg.*?</svg>', page, re.DOTALL))
  assert 'var(--da-grpo)' in charts and 'var(--ink)' in charts
  assert not re.search(r'(fill|stroke): #', charts)


def test_what_a_model_wrote_cannot_become_markup():
  bad = '</span><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'
  trace = {
    'query': bad,
    'kind': bad,
    'columns': [
      {
        'stage': bad,
        'correct': False,
        'lazy': True,
        'messages': [
          {'role': 'assistant', 'content': f'<think>wait {bad}</think>{bad}'},
          {'role': bad, 'content': bad + ' '},
        ],
      }
    ],
  }
  summary = example_run.a_summary()
  summary['distill']['dropped'][bad] = 3
  summary['run'] = {bad: bad}
  page = Page(report.render_report(summary, [], [trace]))
  assert not {'script', 'img'} & set(page.tags)
  assert page.text.count('{{ 7 * 7 }}') >= 5


def test_segments_tell_reasoning_marks_and_answer_apart():
  assert traces.segments('<think>\nA, wait. B\n</think>\n\n[f(x=1)]') == [
    ('think', 'A, '),
    ('hesitation', 'wait'),
    ('think', '. B'),
    ('text', '[f(x=1)]'),
  ]
  assert traces.segments('<think>\nBut attribute') == [
    ('hesitation', 'But'),
    ('think', ' attribute'),
  ]
  assert traces.segments('no reasoning, but text') == [('text', 'no reasoning, but text')]


def test_a_missing_piece_leaves_its_section_with_a_note(workdir):
  whole = Page((workdir / 'report.html').read_text()).text
  for fields, notes in (
    (('distill', 'rl'), ('nothing was distilled', 'no reinforcement learning steps')),
    (('stages', 'seconds'), ('no stage was evaluated', 'no stage was timed', 'no traces')),
  ):
    summary = example_run.a_summary(steps=1)
    for field in fields:
      del summary[field]
    partial = Page(report.render_report(summary, [], [])).text
    for note in notes:
      assert f'Not in this run: {note}' in partial and f'Not in this run: {note}' not in whole


def test_holes_everywhere_never_raise():
  Page(report.render_report({}, [], []))
  nothing = {
    'stages': {
      'base': None,
      'sft': {'accuracy': None, 'n': {'single': 0}, 'lazy_ratio': {'single': None}},
      'later': {'accuracy': {'single': float('nan'), 'sequential': 0.5}},
    },
    'changes': [{}, {'accuracy': {'single': None}}],
    'distill': {'seeds': 0},
    'seconds': {'sft': None},
    'rl': {
      'reward': [1.0, None],
      'entropy': [],
      'validation': {'before': None, 'after': None, 'difference': None},
    },
  }
  rows = [
    {
      'stage': 'rl',
      'step': 0,
      'reward': None,
      'grad_norm': 0.0,
      'psi_grad_norm': 0.0,
      'all_right_fraction': 0.5,
    },
    {'stage': 'sft', 'step': 0, 'loss': 1.0},
  ]
  page = Page(report.render_report(nothing, rows, [{'query': 'q', 'columns': []}, {}]))
  assert '50.0 %' in page.text and 'later' in page.text


def test_behaviours_and_a_single_step_are_drawn():
  summary = example_run.a_summary()
  summary['stages']['base']['behaviours'] = {'reflection': 6.4, 'verification': 0.2}
  summary['stages']['sft']['behaviours'] = {'reflection': 0.3}
  text = Page(report.render_report(summary, example_run.metric_rows(steps=1), [])).text
  assert 'Thought types' in text and 'verification' in text and 'all wrong' in text


def test_psi_and_time_are_divided():
  summary = example_run.a_summary()
  summary['compile_seconds'] = {'evaluate_base': 30.0, 'sft': 0.2}
  validate_summary(summary)
  rows = [
    {'stage': 'rl', 'step': step, 'psi_grad_share': 0.25, 'seconds_reference': 0.0}
    | {'seconds_rollout': 6.0, 'seconds_update': 2.0, 'seconds': 9.0}
    for step in range(3)
  ]
  text = ' '.join(Page(report.render_report(summary, rows, [])).text.split())
  assert 'Share of ψ' in text
  assert '41.2 s 30.0 s of compiling' in text and text.count('of compiling') == 1
  assert (
    'rollouts 18.0 s, 75 % updates 6.0 s, 25 %' in text
    and 'reference' not in text.split('by phase')[1].split('Every figure')[0]
  )
  # Runs of earlier versions know neither.
  text = Page(report.render_report(example_run.a_summary(), [], [])).text
  assert 'compiling' not in text and 'by phase' not in text


def test_every_trace_that_is_shown_leads_to_the_page_of_all(tmp_path):
  message = {'role': 'assistant', 'content': 'so'}
  for name, ids in (('base', 'ab'), ('da_grpo', 'ab')):
    folder = tmp_path / f'evaluate_{name}'
    folder.mkdir()
    records = [
      {'id': one, 'kind': 'single', 'query': 'q', 'correct': True, 'messages': [message]}
      for one in ids
    ]
    lines = [json.dumps(record) + '\n' for record in records]
    (folder / 'trajectories.jsonl').write_text(''.join(lines))
  columns = [
    {'stage': stage, 'id': one, 'messages': [message], 'correct': True, 'lazy': False}
    for stage, one in (('base', 'b'), ('da_grpo', 'b'), ('sft', 'b'))
  ]
  traces_shown = [{'query': 'q', 'kind': 'single', 'columns': columns}]
  report.write_report(tmp_path, example_run.a_summary(), [], traces_shown)
  page = Page((tmp_path / 'report.html').read_text())
  linked = [name for name in page.references if name.startswith('traces.html')]
  # The sources lie one after the other there: base a, base b, da_grpo a, da_grpo b.
  assert linked == ['traces.html', 'traces.html#1', 'traces.html#3', 'traces.html']


def test_another_estimator_and_other_kinds_are_shown():
  summary = example_run.a_summary()
  stage = summary['stages'].pop('da_grpo')
  for field in ('accuracy', 'lazy_ratio', 'n'):
    stage[field]['river_crossing'] = stage[field].pop('multi_turn')
  summary['stages']['my_estimator'] = stage
  summary['changes'][1]['to'] = 'my_estimator'
  page = Page(report.render_report(summary, example_run.metric_rows(), [])).text
  assert 'after my_estimator' in page and 'river-crossing' in page and 'multi-turn' in page


def test_the_program_checks_and_renders_again(tmp_path):
  def run(*arguments):
    command = [sys.executable, '-m', 'experiments.report', *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)

  summary = example_run.a_summary()
  files.write_json_atomic(tmp_path / report.TRACES_FILE, example_run.some_traces())
  files.write_json_atomic(tmp_path / 'summary.json', summary)
  checked = run('--check', f'--workdir={tmp_path}')
  assert checked.returncode == 0, checked.stderr
  assert not (tmp_path / 'report.html').exists()
  assert run(f'--workdir={tmp_path}').returncode == 0
  assert 'Find order R54' in (tmp_path / 'report.html').read_text()
  broken = copy.deepcopy(summary)
  del broken['stages']['sft']['n']
  files.write_json_atomic(tmp_path / 'summary.json', broken)
  checked = run('--check', f'--workdir={tmp_path}')
  assert checked.returncode == 1 and 'stages.sft.n is missing' in checked.stderr
  nowhere = run('--check', f'--workdir={tmp_path / "nowhere"}')
  assert nowhere.returncode == 1 and 'Traceback' not in nowhere.stderr


def test_suites_are_shown_with_interval_floor_and_published_figure():
  summary = example_run.a_summary()
  assert 'Evaluation suites' not in Page(report.render_report(summary, [], [])).text
  estimate = {'mean': 0.68, 'interval': [0.59, 0.75], 'n': 128, 'unit': 'tasks'}
  score = {'category': 'overall', 'metric': 'accuracy', 'estimate': estimate}
  for stage, published in (('base', 0.705), ('da_grpo', 0.705)):
    summary['stages'][stage]['suites'] = {
      'gsm8k': {
        'suite': 'gsm8k',
        'version': '1',
        'scores': [score | {'floor': 0.0, 'published': published}],
        'notes': ['<b>The first 128 tasks.</b>'],
        'left_out': [{'id': '7', 'reason': 'too long'}],
      }
    }
  validate_summary(summary)
  text = Page(report.render_report(summary, [], [])).text
  row = ' '.join(text.partition('gsm8k: overall, accuracy')[2].split())
  # The stage between them has no suites.
  shown = '0.680 [0.590, 0.750] (128 tasks)'
  assert row.startswith(f'{shown}–{shown}0.0000.705')
  assert 'gsm8k, base: <b>The first 128 tasks.</b>' in text
  assert 'gsm8k, da_grpo: 1 tasks without a verdict' in text
  summary['stages']['base']['suites']['gsm8k']['scores'][0]['floor'] = 'none'
  with pytest.raises(ValueError, match='gsm8k.scores'):
    validate_summary(summary)
