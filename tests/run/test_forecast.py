"""What a run says of its time is what its stages then take, if their paces are alike."""

import hypothesis
import hypothesis.strategies as st
import pytest

from dcore_jax.config import RunConfig
from dcore_jax.overrides import overlay
from dcore_jax.progress import COMPILE
from dcore_jax.run.forecast import Forecast, Part, describe, find_parts

NAMES = ('evaluate_base', 'distill', 'sft', 'evaluate_sft', 'rl', 'evaluate_rl', 'export', 'report')


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def said_seconds(text):
  """The seconds that a line says: '1 h 20 min' -> 4800."""
  units = {'s': 1, 'min': 60, 'h': 3600}
  words = text.partition('about ')[2].partition(',')[0].split()
  return sum(
    float(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True)
  )


def test_a_run_says_what_it_does_and_where(tmp_path):
  config = overlay(RunConfig(), {'rl': {'steps': 8, 'prompts': 32, 'group': 8}})
  parts = find_parts(config, 5, tmp_path / 'w', NAMES)
  text = describe('the organism', tmp_path / 'w', parts[1:], ['evaluate_base'])
  assert f'all results go to {tmp_path / "w"} (' in text
  assert 'done already: evaluate_base' in text
  assert 'rl             8 steps of da_grpo, 32 prompts x 8 rollouts each' in text
  assert '640 held-out tasks' in text and 'training rows for 970 tasks' in text
  assert 'is said when' in text
  # Nothing that takes time, nothing to say about it.
  assert 'is said when' not in describe(
    'm', tmp_path, find_parts(config, 5, tmp_path, ['report']), []
  )


@hypothesis.given(
  costs=st.lists(st.floats(1, 1000), min_size=2, max_size=5), pace=st.floats(0.01, 30)
)
def test_at_an_even_pace_the_forecast_holds(costs, pace):
  clock = Clock()
  said = []
  forecast = Forecast([Part(str(i), '', cost) for i, cost in enumerate(costs)], said.append, clock)
  for number, cost in enumerate(costs):
    forecast.begin(str(number))
    clock.now += 50  # loads, and compiles
    forecast.see(COMPILE, 3, 3)
    forecast.see('work', 0, 10)
    for step in range(1, 11):
      clock.now += pace * cost / 10
      before = len(said)
      forecast.see('work', step, 10)
      if len(said) > before:
        left = pace * (sum(costs[number:]) - cost * step / 10)
        assert said_seconds(said[-1]) == pytest.approx(left, rel=0.1, abs=5.1)
    forecast.end(str(number))
    if number + 1 < len(costs):
      assert said_seconds(said[-1]) == pytest.approx(
        pace * sum(costs[number + 1 :]), rel=0.1, abs=5.1
      )
  # One word from within a stage at most, and one at the end of each but the last.
  assert len(costs) - 1 <= len(said) <= len(costs)


def test_what_is_not_known_is_said_to_be_so(tmp_path):
  clock = Clock()
  said = []
  config = overlay(RunConfig(), {'sft': {'files': ('rows.jsonl',)}})
  parts = find_parts(config, 5, tmp_path, ['evaluate_base', 'sft', 'export'])
  assert [part.cost is None for part in parts] == [False, True, False]
  forecast = Forecast(parts, said.append, clock)
  forecast.begin('evaluate_base')
  forecast.see('evaluate base', 0, 640)
  clock.now += 4
  forecast.see('evaluate base', 32, 640)
  assert not said  # too early to say
  clock.now += 4
  forecast.see('evaluate base', 64, 640)
  assert said == ['time left: about 1 min 10 s, and what sft takes']
  forecast.end('evaluate_base')
  forecast.begin('sft')
  forecast.see('sft', 5, 10)
  forecast.end('sft')
  assert len(said) == 2
