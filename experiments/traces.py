"""Writes one HTML page over all traces of a file, an evaluation or a run:

    python -m experiments.traces TRAJECTORIES --out=FILE.html
    python -m experiments.traces runs/nano --rollouts --out=FILE.html

TRAJECTORIES is a trajectories.jsonl, a folder that holds one, or a run's work directory with those
of its models. With --rollouts it is a work directory, or one .npz file, and the page shows what
reinforcement learning kept of its rollouts, with entropy, log-probability, psi and sharing of each
token. The page filters, searches, and needs no server.
"""

import pathlib

from absl import flags

from dcore_jax.config import ModelSection
from dcore_jax.evaluate.trajectories import find_trajectories, read_trajectories
from dcore_jax.files import read_json
from dcore_jax.report.rollout_traces import find_rollouts, read_rollouts
from dcore_jax.report.trace_page import write_trace_page
from dcore_jax.run import program
from dcore_jax.run.pins import recorded_model

_OUT = flags.DEFINE_string('out', None, 'The HTML file.', required=True)
_ROLLOUTS = flags.DEFINE_bool('rollouts', False, "Show a run's RL rollouts, not its evaluations.")
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, "With --rollouts: the policy's tokenizer; by default that of the run's config."
)


def main(trajectories: str) -> None:
  """Writes the page and says where it is."""
  path = pathlib.Path(trajectories)
  if _ROLLOUTS.value:
    sources = _rollouts(path)
  elif _TOKENIZER.value:
    raise ValueError('--tokenizer is read with --rollouts alone')
  elif path.is_dir():
    sources = {}
    for name, file in find_trajectories(path).items():
      sources[name] = read_trajectories(file, scored=False)
  else:
    sources = {path.stem: read_trajectories(path, scored=False)}
  count = write_trace_page(_OUT.value, sources, str(path))
  print(f'{count} traces: {_OUT.value}')


def _rollouts(path: pathlib.Path) -> dict[str, list]:
  files = [path] if path.is_file() else find_rollouts(path)
  if not files:
    raise ValueError(f'no checkpoints/*/rollouts/*.npz in {path}')
  psi = None
  model = ModelSection(tokenizer=_TOKENIZER.value or '')
  if (path / 'config.json').is_file():
    config = read_json(path / 'config.json')
    # What DA-GRPO gives a token of a silent group; other estimators have no such value.
    if config['rl']['estimator'] == 'da_grpo':
      psi = (config['rl']['alpha'], config['rl']['delta'])
    if not _TOKENIZER.value:
      model = recorded_model(config)
  elif not _TOKENIZER.value:
    raise ValueError(f'{path} is no work directory: name the --tokenizer')
  # Its imports take seconds, which a wrong path should not cost.
  from dcore_jax.rollout.policy import load_tokenizer

  tokenizer, _ = load_tokenizer(model)
  sources: dict[str, list] = {}
  for file in files:
    sources.setdefault(file.parent.parent.name, []).extend(read_rollouts(file, tokenizer, psi))
  return sources


if __name__ == '__main__':
  program.run(main, arguments=('TRAJECTORIES',))
