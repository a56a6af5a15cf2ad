import subprocess
import sys

import pytest

PROGRAM = """
import warnings

from dcore_jax.run import config, program

_CONFIG = config.define_config('configs/nano.py')


def main():
  if _CONFIG.value.seed == 7:
    raise ValueError('seven')
  if _CONFIG.value.seed == 8:
    raise KeyboardInterrupt
  if _CONFIG.value.seed == 9:
    return warnings.warn('nine')
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
    (
      '--config=configs/nanno.py',
      1,
      'error: --config: no file configs/nanno.py; did you mean nano?',
    ),
    ('--config=elsewhere/nano.py', 1, 'error: --config: no file elsewhere/nano.py'),
    ('--config=nano:quick', 0, '0.1'),
    ('--config=configs/nano.py:nope', 1, "unknown variant 'nope' of nano"),
    ('--config.seed=7', 1, 'error: seven'),
    ('--config.seed=9', 0, 'warning: nine'),
    ('--help=rll', 1, 'error: --help=rll: the config has no such section; did you mean rl?'),
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
  assert len(printed.splitlines()) == 1


def helped(*arguments):
  found = subprocess.run(
    [sys.executable, '-m', *arguments], capture_output=True, text=True, check=False
  )
  assert found.returncode == 0 and not found.stderr, found.stderr
  assert all(len(line) <= 100 for line in found.stdout.splitlines())
  return found.stdout


def test_help_begins_with_an_example_and_fits_a_screen():
  text = helped('experiments.show_rows', '--help')
  lines = text.splitlines()
  assert lines[0].startswith('  python -m experiments.show_rows --config=')
  assert lines[2].startswith('Prints a packed SFT row') and len(lines) < 50
  assert '  --workdir       Folder of a run' in text and 'Default: runs/nano.' in text
  assert 'default: configs/nano.py' in text
  assert '  rl              Reinforcement learning.' in text and 'rl.alpha = ' not in text
  # A program without a config says nothing of sections.
  assert '--config' not in helped('experiments.compare', '-h')


def test_flags_stand_in_groups():
  text = helped('experiments.evaluate', '--help')
  measured, suites = text.split('\nwhat is measured:\n')[1].split('\nwith --suite:\n')
  assert '--out' in measured and '--limit' in suites and '--limit' not in measured
  # In the order in which the program says them, and nothing is left over.
  assert measured.index('--suite') < measured.index('--base_url') and '\noptions:' not in text


def test_a_config_that_is_no_run_has_its_own_fields():
  text = helped('experiments.pretrain', '--help')
  assert 'sets a field: held_out_every, model, seed, stages' in text and '  rl ' not in text


def test_help_with_a_section_lists_its_fields():
  text = helped('experiments.show_rows', '--help=rl')
  assert 'rl.alpha = 0.1: Weight of the entropy advantage' in text
  assert not any(line.startswith(('sft.', 'seed')) for line in text.splitlines())
  text = helped('experiments.show_rows', '--help=all')
  assert 'rl.alpha = 0.1' in text and 'distill.labels.samples' in text and 'seed = 0' in text


def test_whoever_interrupts_a_program_is_told_how_to_go_on():
  found = subprocess.run(
    [sys.executable, '-c', PROGRAM, '--config.seed=8'], capture_output=True, text=True, check=False
  )
  assert found.returncode == 130
  assert found.stderr.strip().startswith('interrupted; to go on: python -m ')
  assert found.stderr.strip().endswith(' --config.seed=8')
