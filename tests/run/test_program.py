import subprocess
import sys

import pytest

PROGRAM = """
from dcore_jax.run import config, program

_CONFIG = config.define_config('configs/nano.py')


def main():
  if _CONFIG.value.seed == 7:
    raise ValueError('seven')
  print(config.read_config(_CONFIG.value).rl.alpha)


program.run(main)
"""


@pytest.mark.parametrize(
  ('argument', 'status', 'said'),
  [
    ('--config.rl.alpha=3', 0, '3.0'),
    (
      '--config.rl.alhpa=3',
      1,
      "error: config: unknown field 'rl.alhpa' (did you mean 'rl.alpha'?)",
    ),
    ('--config.rll.alpha=3', 1, "unknown field 'rll' (did you mean 'rl'?)"),
    ('--config.rl.alpha=x', 1, 'error: flag --config.rl.alpha=x: could not convert'),
    ('--confg=x', 1, "error: Unknown command line flag 'confg'. Did you mean: config ?"),
    ('--config=configs/nope.py', 1, 'error: --config: Configuration is not available'),
    ('--config=configs/nano.py:nope', 1, "unknown variant 'nope' of nano"),
    ('--config.seed=7', 1, 'error: seven'),
    ('--help', 1, 'rl.alpha = 0.1: Weight of the entropy advantage'),
  ],
)
def test_a_mistake_is_one_line(argument, status, said):
  found = subprocess.run(
    [sys.executable, '-c', f'import sys; sys.path.insert(0, "."); exec({PROGRAM!r})', argument],
    capture_output=True,
    text=True,
    check=False,
  )
  printed = found.stdout + found.stderr
  assert found.returncode == status, printed
  assert said in ' '.join(printed.split())
  assert 'Traceback' not in printed
  if argument != '--help':
    assert len(printed.splitlines()) == 1
