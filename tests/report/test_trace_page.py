"""The page over all traces: what it holds is what went in, and what models wrote stays text."""

import base64
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dcore_jax.evaluate.trajectories import read_trajectories
from dcore_jax.report import report
from dcore_jax.report.rollout_traces import read_rollouts
from dcore_jax.report.trace_page import write_trace_page
from tests.report import example_run
from tests.report.browser import browser, find_browser
from tests.report.test_report import Page

ROOT = pathlib.Path(__file__).parents[2]
ATTACK = '</script></div><img src=x onerror="window.ran=1"><script>window.ran=1</script>\u2028'


def record(place, **more):
  messages = [
    {'role': 'user', 'content': f'request {place}'},
    {'role': 'assistant', 'content': '<think>\nwait, but how\n</think>\n\n[f()]'},
  ]
  return {
    'id': f'task-{place}',
    'kind': 'single',
    'query': f'request {place}',
    'correct': place % 2 == 0,
    'lazy': place % 4 == 1,
    'reasoning_tokens': [place],
    'messages': messages,
  } | more


def blocks(text):
  """Returns the data of a page as a browser reads it: the index, and all traces."""
  found = {}
  for name, block in re.findall(r'<script type="text/plain" id="(\w+)">([^<]*)</script>', text):
    found[name] = json.loads(zlib.decompress(base64.b64decode(block, validate=True)))
  index = found.pop('index')
  traces = []
  for number in range(len(found)):
    assert index['starts'][number] == len(traces)
    traces += found[f'chunk{number}']
  return index, traces


def written(folder, records):
  write_trace_page(folder / 'page.html', {'model': records}, 'title')
  return (folder / 'page.html').read_text(encoding='utf-8')


# Any text, halves of letters and tags included.
_TEXTS = st.one_of(
  st.text(st.characters(codec=None), max_size=30),
  st.sampled_from([ATTACK, '<!--', ']]>', '\ud800']),
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.tuples(_TEXTS, _TEXTS, _TEXTS, _TEXTS), min_size=1, max_size=5))
def test_the_data_are_the_input(tmp_path_factory, rows):
  records = []
  for name, kind, role, content in rows:
    messages = [{'role': role, 'content': content}]
    records.append({'id': name, 'kind': kind, 'query': content, 'messages': messages})
  index, traces = blocks(written(tmp_path_factory.mktemp('page'), records))
  assert index['id'] == [name for name, _, _, _ in rows]
  kinds = [index['kinds'][place] for place in index['kind']]
  assert kinds == [kind or 'no kind' for _, kind, _, _ in rows]
  for (_, _, role, content), trace in zip(rows, traces, strict=True):
    assert trace['messages'] == [{'role': role, 'content': content}]
    assert trace['query'] == content
  assert index['right'] == index['lazy'] == [-1] * len(rows)


def test_the_index_has_what_filters_need(tmp_path):
  long = [{'role': 'assistant', 'content': 'x' * 400_000, 'tool_calls': [{'name': 'f'}]}]
  records = [record(0), record(1, kind='parallel'), record(2, messages=long), record(3)]
  index, traces = blocks(written(tmp_path, records))
  assert (index['right'], index['lazy']) == ([1, 0, 1, 0], [0, 1, 0, 0])
  assert (index['length'], index['unit']) == ([0, 1, 2, 3], 'tokens')
  assert (index['kinds'], index['kind']) == (['single', 'parallel'], [0, 1, 0, 0])
  assert index['starts'] == [0]
  assert json.loads(traces[2]['messages'][0]['more']) == {'tool_calls': [{'name': 'f'}]}
  # One trace without a count: all lengths are characters.
  more = [record(0, reasoning_tokens=None), record(1, messages=long), record(2, messages=long)]
  index, traces = blocks(written(tmp_path, more))
  assert (index['length'], index['unit']) == ([37, 400_000, 400_000], 'characters')
  assert index['starts'] == [0, 2] and len(traces) == 3


def test_values_of_tokens_have_one_scale(tmp_path):
  def spoken(values):
    tokens = {'text': ['a', 'b'], 'entropy': values, 'logprob': [-0.12345, float('-inf')]}
    return [{'role': 'assistant', 'content': 'ab', 'tokens': tokens}]

  records = [record(0, messages=spoken([0.0, 2.0])), record(1, messages=spoken([1.0, None]))]
  index, traces = blocks(written(tmp_path, records))
  assert index['scales'] == {'entropy': [0.0, 1.96], 'logprob': [0.0, -0.123]}
  assert traces[0]['messages'][0]['tokens']['logprob'] == [-0.123, None]
  assert index['length'] == [2, 2]
  with pytest.raises(ValueError, match='trace task-0: entropy is no list of 2 values'):
    written(tmp_path, [record(0, messages=spoken([1.0]))])
  with pytest.raises(ValueError, match='no traces'):
    written(tmp_path, [])


def attacked(place):
  messages = [{'role': ATTACK, 'content': ATTACK, 'tool_calls': [ATTACK]}]
  messages += [{'role': 'assistant', 'content': f'<think>{ATTACK}</think>{ATTACK}'}]
  tokens = {'text': [ATTACK], 'entropy': [1.0]}
  messages += [{'role': 'tool', 'content': ATTACK, 'tokens': tokens}]
  return record(place, id=ATTACK, kind=ATTACK, query=ATTACK, reason=ATTACK, messages=messages)


def test_text_of_models_is_no_markup(tmp_path):
  path = tmp_path / 'page.html'
  write_trace_page(path, {ATTACK: [attacked(0)], 'b': [attacked(1)]}, ATTACK)
  text = path.read_text(encoding='utf-8')
  page = Page(text)
  assert page.tags.count('script') == 3 and 'img' not in page.tags and not page.references
  script = text.rsplit('<script>', 1)[1].split('</script>')[0]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in text
  # Text nodes alone: nothing in the script parses markup or code.
  assert not re.search(
    r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function', script
  )


@pytest.fixture
def rollouts(tmp_path, tokenizer):
  """Two groups of rollouts, of two and of one, in the form of `train.journal`."""
  path = tmp_path / 'run/checkpoints/da_grpo/rollouts/00000003.0000.npz'
  path.parent.mkdir(parents=True)
  tokens = np.array([5, 6, 7, 5, 6, 8, 9, 5], np.int32)
  columns = {
    'tokens': tokens,
    'logprobs': -np.arange(8, dtype=np.float32),
    'full_logprobs': -np.arange(8, dtype=np.float32),
    'entropies': np.arange(8, dtype=np.float32),
    'lengths': np.array([3, 4, 1]),
    'key_ids': np.array([[3, 0, 1], [3, 0, 0], [3, 1, 0]]),
    'finished': np.array([True, False, True]),
  }
  np.savez(path, **columns)
  return path


def test_rollouts_have_values_of_their_tokens(rollouts, tokenizer):
  traces = read_rollouts(rollouts, tokenizer, (0.5, 1.2))
  assert [trace['id'] for trace in traces] == ['3/0/0', '3/0/1', '3/1/0']
  assert [trace['reason'] for trace in traces] == ['cut off', '', '']
  (message,) = traces[0]['messages']
  tokens = message['tokens']
  assert message['content'] == ''.join(tokens['text']) == tokenizer.decode([5, 6, 8, 9])
  assert tokens['shared'] == [2, 2, 1, 1]
  assert tokens['entropy'] == [3, 4, 5, 6] and tokens['logprob'] == [-3, -4, -5, -6]
  assert traces[1]['messages'][0]['tokens']['psi'] == pytest.approx([0, 0.5, 1.0])
  assert tokens['psi'] == pytest.approx([1.2] * 4)
  rollouts.write_bytes(rollouts.read_bytes()[:-30])
  with pytest.raises(ValueError, match='00000003.0000.npz holds no rollouts'):
    read_rollouts(rollouts, tokenizer)


def test_the_report_links_to_the_page(tmp_path):
  lines = [json.dumps(record(place)) + '\n' for place in range(3)]
  (tmp_path / 'evaluate_base').mkdir()
  (tmp_path / 'evaluate_base/trajectories.jsonl').write_text(''.join(lines))
  path = report.write_report(
    tmp_path, example_run.a_summary(), example_run.metric_rows(), example_run.some_traces()
  )
  page = Page(path.read_text())
  assert 'traces.html' in page.references and 'All 3 held-out tasks' in page.text
  index, _ = blocks((tmp_path / 'traces.html').read_text())
  assert index['sources'] == ['base'] and len(index['id']) == 3


def test_records_without_verdicts_are_shown_and_not_compared(tmp_path):
  path = tmp_path / 'trajectories.jsonl'
  path.write_text(json.dumps({'id': 'a', 'kind': 'b'}) + '\n')
  assert read_trajectories(path, scored=False)[0]['messages'] == []
  with pytest.raises(ValueError, match='record 1: correct = None is no bool'):
    read_trajectories(path)


def program(*words):
  command = [sys.executable, '-m', 'experiments.traces', *map(str, words)]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_program(tmp_path):
  (tmp_path / 'some.jsonl').write_text(json.dumps(record(0)) + '\n')
  done = program(tmp_path / 'some.jsonl', f'--out={tmp_path}/page.html')
  assert done.stdout == f'1 traces: {tmp_path}/page.html\n', done.stderr
  done = program(tmp_path, f'--out={tmp_path}/page.html')
  assert done.returncode == 1
  assert done.stderr.startswith('error: no trajectories.jsonl in')


@pytest.fixture(scope='module')
def tab(tmp_path_factory):
  if find_browser() is None:
    pytest.skip('no Chromium is installed')
  with browser(tmp_path_factory.mktemp('profile')) as found:
    yield found


COUNT = "document.getElementById('count').textContent"


def set_filter(tab, name, value, counted):
  """Sets a filter as a person does, and waits until the page has counted so many traces."""
  event = 'input' if name == 'search' else 'change'
  tab.run(
    f"(() => {{ const e = document.getElementById('{name}'); e.value = {json.dumps(value)}; "
    f"e.dispatchEvent(new Event('{event}')); }})()"
  )
  tab.wait(f"{COUNT} === '{counted} traces'")


@pytest.mark.slow
def test_a_browser_shows_and_filters_ten_thousand(tab, tmp_path):
  records = []
  for place in range(10_000):
    thoughts = f'wait, but so many words of thought number {place} ' * 60
    said = {'role': 'assistant', 'content': f'<think>\n{thoughts}\n</think>\n\n[f(n={place})]'}
    more = {'kind': 'parallel' if place % 10 == 0 else 'single'}
    records.append(record(place, messages=[{'role': 'user', 'content': 'go'}, said], **more))
  write_trace_page(tmp_path / 'page.html', {'model': records}, 'title')
  tab.open(tmp_path / 'page.html')
  # The page itself measures when its list stood; what is asserted is that it does, see the guide.
  assert int(tab.wait('document.documentElement.dataset.shown')) > 0
  assert tab.run(COUNT) == '10,000 of 10,000 traces'
  # Only what is seen is drawn.
  assert 5 < tab.run("document.querySelectorAll('.row').length") < 60
  set_filter(tab, 'kind', '1', '9,000 of 10,000')
  set_filter(tab, 'verdict', '0', '5,000 of 10,000')
  set_filter(tab, 'lazy', '1', '2,500 of 10,000')
  set_filter(tab, 'least', '9001', '250 of 10,000')
  set_filter(tab, 'search', 'F(N=9437)', '1 of 10,000')
  tab.wait("document.querySelector('#head code').textContent === 'task-9437'")
  assert tab.run("document.querySelector('#trace .call mark.hit').textContent") == 'f(n=9437)'
  assert tab.run("document.querySelector('#trace .think mark').textContent") == 'wait'
  set_filter(tab, 'search', '', '250 of 10,000')
  for key, name in (('j', 'task-9441'), ('ArrowDown', 'task-9445'), ('k', 'task-9441')):
    tab.run(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")
    tab.wait(f"document.querySelector('#head code').textContent === '{name}'")


@pytest.mark.slow
def test_a_browser_runs_nothing_that_a_model_wrote(tab, tmp_path):
  write_trace_page(tmp_path / 'page.html', {ATTACK: [attacked(0)], 'b': [attacked(1)]}, ATTACK)
  tab.open(tmp_path / 'page.html')
  tab.wait('document.documentElement.dataset.shown')
  tab.wait("document.querySelectorAll('#trace .message').length >= 3")
  tab.run(
    "(() => { const e = document.getElementById('measure'); e.value = 'entropy'; e.onchange(); })()"
  )
  assert tab.run("document.querySelector('#trace [data-facts]').textContent") == ATTACK
  assert 'color' in tab.run("document.querySelector('#trace [data-facts]').style.backgroundColor")
  assert tab.run("document.querySelector('#scale').textContent") == '01'
  set_filter(tab, 'search', 'onerror', '2 of 2')
  assert tab.run('document.images.length') == 0
  assert tab.run("document.querySelectorAll('script').length") == 3
  assert tab.run('typeof window.ran') == 'undefined'
