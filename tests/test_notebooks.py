"""Every notebook runs from top to bottom on fresh results."""

import json
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = ROOT / 'notebooks'
# Those with committed outputs.
EXECUTED = (
  'export_and_serve',
  'lazy_reasoning',
  'quickstart',
  'token_trees',
  'what_psi_does',
  'zero_variance',
)


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


def run(name, **parameters):
  """Runs a notebook with other values at the end of its cell of parameters.

  Returns:
    (texts it printed, joined; number of pictures).
  """
  notebook = nbformat.read(NOTEBOOKS / f'{name}.ipynb', as_version=4)
  cell = next(cell for cell in notebook.cells if cell.cell_type == 'code')
  for key, value in parameters.items():
    # A misspelt parameter would run the full size.
    assert f'{key} = ' in cell.source
    cell.source += f'\n{key} = {value!r}'
  nbclient.NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': str(NOTEBOOKS)}}
  ).execute()
  texts = []
  pictures = 0
  for cell in notebook.cells:
    for output in cell.get('outputs', []):
      pictures += 'image/png' in output.get('data', {})
      if output.get('name') == 'stdout':
        texts.append(output['text'])
  return ''.join(texts), pictures


def test_alpha_delta_notebook(quick_sweep):
  workdir, _ = quick_sweep
  _, pictures = run('alpha_delta_ablation', results=str(workdir / 'alpha_delta.json'))
  assert pictures == 3


def test_what_psi_does():
  text, pictures = run('what_psi_does', updates=4, runs=4)
  # The tables of docs/psi.md, and the reader's own estimator, which helps on the hard prompt.
  assert '-0.01393' in text and pictures == 3
  yours = text.split('mean gradient on the word')[1].split('hard')[1].split()[1]
  assert float(yours) > 0


def test_token_trees():
  text, pictures = run('token_trees', tasks=4, capacities=(512,))
  losses = re.findall(r'(?:tree|flat): ([\d.]+) nats', text)
  assert len(losses) == 2 and float(losses[0]) == pytest.approx(float(losses[1]), abs=2e-5)
  assert float(re.search(r'dedup ([\d.]+)', text)[1]) > 1 and pictures == 3


def test_export_and_serve():
  text, _ = run('export_and_serve', lanes=1, max_tokens=8)
  assert "['organism']" in text and 'model.safetensors' in text and text.endswith('closed\n')


def test_quickstart(tmp_path):
  pytest.importorskip('torch')
  text, _ = run('quickstart', seeds=4, epochs=1, steps=1, prompts=2, folder=str(tmp_path))
  assert re.search(r'[1-9]\d* rows of 4 tasks', text) and 'step 0: reward' in text
  assert '24 traces' in text and (tmp_path / 'traces.html').is_file()
  assert float(re.search(r'difference of logits: (\S+)', text)[1]) < 1e-3


def test_zero_variance():
  text, pictures = run('zero_variance', tasks=1, epochs=1, prompts=16, group=4)
  assert 'after SFT:' in text and 'mixed' in text and pictures == 2


def write_trajectories(folder):
  """Writes two tasks that a model acted out, of which one is lazy."""
  records = []
  for number, (thoughts, tokens) in enumerate((('so it is.', 5), ('wait. but. however. ', 250))):
    text = f'<think>\n{thoughts}\n</think>\n\n[f()]'
    record = {'id': str(number), 'kind': 'single', 'query': 'q', 'correct': not number}
    messages = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': text}]
    records.append(record | {'reasoning_tokens': [tokens], 'messages': messages})
  lines = [json.dumps(record) for record in records]
  (folder / 'trajectories.jsonl').write_text('\n'.join(lines) + '\n')


def test_lazy_reasoning(tmp_path):
  write_trajectories(tmp_path)
  text, pictures = run('lazy_reasoning', data='nowhere', trajectories=str(tmp_path))
  assert 'The published outputs are not here' in text and pictures == 1
  assert '1 lazy of 2; single, 250 tokens, wrong: True' in text


@pytest.mark.slow  # half a minute of counting tokens
def test_lazy_reasoning_of_published_outputs(data_dir, tmp_path):
  write_trajectories(tmp_path)
  text, pictures = run('lazy_reasoning', data=str(data_dir), trajectories=str(tmp_path))
  assert "'reasonings': 3641" in text and pictures == 2


# Committed without outputs: alpha_delta_ablation, whose sweep takes half an hour.
@pytest.mark.parametrize('name', EXECUTED)
def test_what_is_committed(name):
  """Outputs are there, small, of a run from top to bottom, and name no machine."""
  notebook = nbformat.read(NOTEBOOKS / f'{name}.ipynb', as_version=4)
  codes = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert notebook.cells[0].source.startswith('# ')
  assert [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1))
  for cell in codes:
    assert 'execution' not in cell.metadata
    for output in cell.outputs:
      assert output.output_type != 'error' and output.get('name') != 'stderr'
      assert len(output.get('data', {}).get('image/png', '')) * 3 / 4 < 60_000
      assert not re.search(r'/(?:tmp|home|root|work|Users)/', json.dumps(output))
