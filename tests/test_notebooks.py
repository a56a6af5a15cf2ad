"""Every notebook runs from top to bottom on fresh results."""

import json
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def quick_sweep(tmp_path_factory):
  """The alpha-delta sweep in its smallest form, by the README's command."""
  workdir = tmp_path_factory.mktemp('ablation')
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'experiments.ablate',
      '--suite=alpha_delta',
      '--config=configs/nano.py:tiny',
      f'--workdir={workdir}',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return workdir, json.loads(done.stdout)


def test_sweep_covers_the_settings(quick_sweep):
  workdir, content = quick_sweep
  assert [(r['estimator'], r['alpha'], r['delta']) for r in content['table']] == [
    ('grpo', None, None),
    ('da_grpo', 0.01, 0.5),
    ('da_grpo', 0.1, 0.5),
    ('da_grpo', 0.4, 0.5),
    ('da_grpo', 1.0, 1.0),
  ]
  # All settings start from the same weights and sample the same first rollouts: only the update
  # differs.
  assert len({run['curves']['reward'][0] for run in content['runs']}) == 1
  psi = [run['curves']['psi_grad_norm'][0] for run in content['runs'] if run['alpha'] is not None]
  assert psi == sorted(psi) and (psi[0] > 0) == (
    content['runs'][0]['curves']['zero_variance_fraction'][0] > 0
  )
  assert json.loads((workdir / 'alpha_delta.json').read_text()) == content


def test_alpha_delta_notebook(quick_sweep):
  workdir, _ = quick_sweep
  notebook = nbformat.read(ROOT / 'notebooks' / 'alpha_delta_ablation.ipynb', as_version=4)
  parameters = next(cell for cell in notebook.cells if cell.cell_type == 'code')
  parameters.source = f'results = {str(workdir / "alpha_delta.json")!r}'
  nbclient.NotebookClient(
    notebook, timeout=120, resources={'metadata': {'path': str(ROOT / 'notebooks')}}
  ).execute()
  pictures = [
    output
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
    if 'image/png' in output.get('data', {})
  ]
  assert len(pictures) == 3
