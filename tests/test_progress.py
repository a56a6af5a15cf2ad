import io
import os
import subprocess
import sys

import pytest

from dcore_jax import progress


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def test_a_log_gets_whole_lines_and_few_of_them():
  log = io.StringIO()
  for _ in progress.progress(range(5000), description='rollout', stream=log):
    pass
  assert '\r' not in log.getvalue()
  lines = log.getvalue().splitlines()
  assert len(lines) == 1 and 'rollout' in lines[0] and '5000/5000' in lines[0]


def test_a_log_gets_lines_while_the_work_goes_on(monkeypatch):
  monkeypatch.setattr(progress, 'FIRST_LINE', 0.0)
  monkeypatch.setattr(progress, 'LOG_INTERVAL', 0.0)
  log = io.StringIO()
  with progress.progress(total=3, description='sft', stream=log) as bar:
    for _ in range(3):
      bar.set_postfix(loss=1.0)  # prints nothing by itself
      bar.update()
  assert [
    f'{n}/3' in line for n, line in zip((1, 2, 3), log.getvalue().splitlines(), strict=False)
  ] == [True] * 3


def test_a_log_gets_its_first_line_soon_and_the_others_now_and_then(monkeypatch):
  monkeypatch.setattr(progress, 'FIRST_LINE', 0.0)
  log = io.StringIO()
  with progress.progress(total=5, description='sft', stream=log) as bar:
    for _ in range(4):
      bar.update()
  assert ['1/5' in line for line in log.getvalue().splitlines()] == [True, False]
  assert '4/5' in log.getvalue().splitlines()[1]


def test_what_is_quick_is_not_shown_where_only_slow_work_is(monkeypatch):
  told = []
  log = io.StringIO()
  with progress.watching(lambda *what: told.append(what)):
    with progress.progress(total=2, description='rows', stream=log, delay=60) as bar:
      bar.update(2)
  assert not log.getvalue() and not told
  monkeypatch.setattr(progress, 'FIRST_LINE', 0.0)
  with progress.progress(total=2, description='rows', stream=log, delay=1e-9) as bar:
    bar.update(2)
  assert '2/2' in log.getvalue()


def test_whoever_watches_is_told_of_every_step():
  told = []
  with progress.watching(lambda *what: told.append(what)):
    with progress.progress(total=4, description='sft', stream=io.StringIO()) as bar:
      bar.initial = bar.n = 2
      bar.update()
      bar.update()
  progress.tell('nobody', 1, 1)
  assert told == [('sft', 0, 4), ('sft', 1, 2), ('sft', 2, 2)]


def test_bars_can_be_turned_off(monkeypatch):
  """By the variable that tqdm reads, where a program has many users' logs."""
  script = """
from dcore_jax import progress
told = []
with progress.watching(lambda *what: told.append(what)):
  with progress.progress(total=4, description='work') as bar:
    bar.initial = bar.n = 1
    bar.set_postfix(loss=1.0)
    bar.update(2)
  with progress.progress(total=2, description='slow', delay=9.0) as bar:
    bar.update(2)
  progress.show_compiling(lambda show: (show(1, 2), show(2, 2)))
  assert list(progress.progress([5, 6])) == [5, 6]
assert ('work', 2, 3) in told and ('compile', 2, 2) in told and ('slow', 2, 2) not in told, told
"""
  done = subprocess.run(
    [sys.executable, '-c', script],
    env=os.environ | {'TQDM_DISABLE': '1'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_a_terminal_gets_a_bar():
  terminal = Terminal()
  with progress.progress(total=2, description='rollout', unit='tok', stream=terminal) as bar:
    bar.update(2)
  assert '\r' in terminal.getvalue() and '2.00/2.00' in terminal.getvalue()


def test_a_stage_is_timed_and_announced_also_when_it_fails():
  log = io.StringIO()
  with progress.stage('distill', log) as timer:
    assert timer.seconds >= 0
  assert timer.ended is not None and log.getvalue().startswith('==> distill\n<== distill: done in ')
  with pytest.raises(KeyError), progress.stage('sft', log):
    raise KeyError('x')
  assert '<== sft: failed after' in log.getvalue()


@pytest.mark.parametrize(
  'seconds, text',
  [
    (0.04, '0.0 s'),
    (59.94, '59.9 s'),
    (60, '1 min'),
    (61.4, '1 min 1 s'),
    (3599.7, '1 h'),
    (7500, '2 h 5 min'),
  ],
)
def test_durations_read_well(seconds, text):
  assert progress.format_seconds(seconds) == text


def test_compiling_is_shown_as_programs_of_all(capsys):
  def prepare(show):
    for ready in range(4):
      show(ready, 3)

  progress.show_compiling(prepare)
  last = capsys.readouterr().err.splitlines()[-1]
  assert 'compile' in last and '3/3' in last
