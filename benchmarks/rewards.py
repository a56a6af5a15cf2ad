"""Measures the seconds to score a rollout batch.

`python -m benchmarks.rewards` prints a JSON line for each reward.

256 responses of 4,096 tokens (20 kB of thoughts and eight calls each), half of them with a wrong
value. The wanted bound is 1 % of a step of the published runs: 11 h for 468 steps of the 8B model
are 85 s a step (docs/method.md, section 6), so 0.85 s.
"""

from benchmarks import measure
from dcore_jax.learn import rewards

STEP_SECONDS = 11 * 3600 / 468


def responses(count: int) -> tuple[list[str], str]:
  """(responses, the reference of all)."""
  calls = [
    f"book_room_{i % 4}(city='Karo {i}', nights={i}, guests=['a', 'b'], options={{'late': {i}}})"
    for i in range(8)
  ]
  answer = '[' + ', '.join(calls) + ']'
  thoughts = '<think>\n' + 'wait, ' * 3300 + '\n</think>\n\n'
  return [
    thoughts + (answer if i % 2 else answer.replace('nights=3', 'nights=4')) for i in range(count)
  ], answer


def main() -> None:
  """Times every reward and prints its line."""
  predictions, reference = responses(256)
  functions = {
    name: lambda name=name: rewards.batch_reward(name, predictions, [reference] * len(predictions))
    for name in rewards.REWARDS
  }
  for name, seconds in measure.interleaved(functions, rounds=9).items():
    measure.line(
      f'score 256 responses, {name}',
      '1 % of a published step',
      1e3 * seconds,
      10 * STEP_SECONDS,
      'ms',
      wanted=1.0,
    )


if __name__ == '__main__':
  main()
