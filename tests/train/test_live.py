"""The view of a run under way: what it shows is what the rows say."""

import io
import math

from rich.console import Console

from dcore_jax import progress
from dcore_jax.train import live

ROW = {
  'reward': 1.25,
  'right_fraction': 0.5,
  'zero_variance_fraction': 0.25,
  'entropy': 0.0312,
  'psi_grad_share': 0.02,
  'kl': None,
  'tokens_per_second': 1234.0,
  'seconds': 10.0,
}


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def drawn(view):
  console = Console(file=io.StringIO(), width=120)
  console.print(view.drawing())
  return console.file.getvalue()


def test_a_terminal_gets_a_table():
  console = Console(file=Terminal(), force_terminal=True, width=120)
  view = live.LiveView(5, 'da_grpo', console)
  with view:
    assert 'step 0 of 5, time left after the first step' in drawn(view)
    view.see(0, ROW | {'seconds': 60.0})
    view.see(1, ROW | {'reward': 1.75})
    shown = drawn(view)
  assert 'da_grpo: step 2 of 5, ' in shown and 'left, this step' in shown
  [reward] = [line for line in shown.splitlines() if ' reward ' in line]
  assert '1.750' in reward and '1.500' in reward and '▁█' in reward
  assert '25%' in shown and '0.0312' in shown and '1,234' in shown
  # A figure that no step has is no row.
  assert 'KL' not in shown
  # What was drawn on the terminal itself.
  assert 'groups without variance' in console.file.getvalue()


def test_work_between_two_steps_is_counted():
  view = live.LiveView(2, 'grpo', Console(file=io.StringIO()))
  view.see(0, ROW)
  with view.beside('held-out prompts', 48) as told:
    told(5)
    told(7)
    assert 'held-out prompts: 12 of 48' in drawn(view)
  assert 'held-out' not in drawn(view) and 'this step' in drawn(view)
  # Nobody knows how many answers episodes will have.
  with view.beside('held-out prompts', None) as told:
    told(5)
    assert 'held-out prompts: 5' in drawn(view) and '5 of' not in drawn(view)


def test_work_between_two_steps_is_a_line_of_a_log_where_it_takes_long(monkeypatch):
  for slow, lines in ((0.0, 1), (60.0, 0)):
    monkeypatch.setattr(live, 'SLOW', slow)
    log = io.StringIO()
    view = live.BarView(2, 'grpo', log)
    with view.beside('held-out prompts', 12) as told:
      told(12)
    assert log.getvalue().count('held-out prompts: 100%') == lines


def test_a_run_that_goes_on_begins_where_it_was():
  view = live.LiveView(8, 'grpo', Console(file=io.StringIO()))
  told = []
  with progress.watching(lambda *what: told.append(what)):
    view.resume(6)
    view.see(6, ROW)
    view.see(7, ROW)
  assert told == [('grpo', 1, 2), ('grpo', 2, 2)]
  assert 'step 8 of 8, done' in drawn(view)


def test_a_log_and_a_dumb_terminal_get_lines(monkeypatch):
  log = io.StringIO()
  with live.step_view(2, 'grpo', log) as view:
    view.see(0, ROW)
    view.see(1, ROW | {'entropy': None})
  [line] = log.getvalue().splitlines()
  assert 'grpo' in line and '2/2' in line and 'reward=1.2' in line and 'zero=0.25' in line
  monkeypatch.setenv('TERM', 'dumb')
  assert isinstance(live.step_view(2, 'grpo', Terminal()), live.BarView)
  monkeypatch.setenv('TERM', 'xterm')
  assert isinstance(live.step_view(2, 'grpo', Terminal()), live.LiveView)


def test_time_left_leaves_out_the_step_that_compiled():
  assert live.seconds_left([], 3, 1.0) is None
  assert live.seconds_left([60.0], 3, 10.0) == 170
  assert live.seconds_left([60.0, 10.0, 20.0], 3, 5.0) == 40
  # A step that is late is about to end.
  assert live.seconds_left([60.0, 10.0], 2, 99.0) == 10
  assert live.seconds_left([60.0, None], 0, 5.0) == 0


def test_a_course_is_drawn_between_its_ends():
  assert live.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == '▁▂▃▄▅▆▇█'
  assert live.sparkline([5.0, None, 5.0]) == '▁ ▁'
  assert live.sparkline([None]) == ''


def test_numbers_that_are_none_are_left_out():
  view = live.LiveView(2, 'grpo', Console(file=io.StringIO()))
  view.see(0, ROW)
  view.see(1, ROW | {'reward': math.nan})
  [line] = [line for line in drawn(view).splitlines() if ' reward ' in line]
  assert '–' in line and '1.250' in line
