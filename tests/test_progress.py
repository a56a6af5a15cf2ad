import io

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
  monkeypatch.setattr(progress, 'LOG_INTERVAL', 0.0)
  log = io.StringIO()
  with progress.progress(total=3, description='sft', stream=log) as bar:
    for _ in range(3):
      bar.set_postfix(loss=1.0)  # prints nothing by itself
      bar.update()
  assert [
    f'{n}/3' in line for n, line in zip((1, 2, 3), log.getvalue().splitlines(), strict=False)
  ] == [True] * 3


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
