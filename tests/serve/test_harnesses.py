"""Harnesses run as their users run them: their program, a task file, and experiments.serve.

The server is a process of its own on the organism. `make clients` installs the harnesses; a test
skips where its environment is not there.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from dcore_jax.rollout.policy import ORGANISM

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CLIENTS = REPOSITORY / 'tests' / 'serve' / 'clients'
ITEMS = [
  {'question': f'find the order of {name}', 'answer': 'order'}
  for name in ('Mora', 'Lind', 'Okafor')
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def url():
  """The address of the program, '/v1' included."""
  process = subprocess.Popen(
    [sys.executable, '-m', 'experiments.serve', '--port=0', '--lanes=2', '--max_len=256'],
    cwd=REPOSITORY,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    said = []
    for line in process.stderr:
      said.append(line)
      if line.startswith('http'):
        break
    assert said and said[-1].startswith('http'), said
    yield said[-1].split()[0]
  finally:
    process.terminate()
    process.stderr.close()
    process.wait(60)


@pytest.fixture
def items(tmp_path):
  path = tmp_path / 'items.jsonl'
  path.write_text(''.join(json.dumps(item) + '\n' for item in ITEMS), encoding='utf-8')
  return path


def run(name, arguments, folder, **settings):
  """Runs the Python of an environment of `make clients`, and returns what it prints."""
  python = REPOSITORY / '.clients' / name / 'bin' / 'python'
  if not python.exists():
    pytest.skip(f'make clients installs {python.relative_to(REPOSITORY)}')
  return run_python(python, arguments, folder, **settings)


def run_python(python, arguments, folder, **settings):
  keep = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  offline = {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1', 'HF_HOME': str(folder / 'hf')}
  keys = {'OPENAI_API_KEY': 'none', 'LITELLM_LOCAL_MODEL_COST_MAP': 'True'}
  done = subprocess.run(
    [python, *map(str, arguments)],
    cwd=folder,
    env=keep | offline | keys | settings,
    capture_output=True,
    encoding='utf-8',
    timeout=900,  # a guard against hanging
  )
  assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
  return done.stdout


def test_inspect_on_chat_completions(url, items, tmp_path):
  # It takes only task files below the folder that it is started in.
  shutil.copy(CLIENTS / 'inspect_items.py', tmp_path)
  arguments = ['-m', 'inspect_ai', 'eval', 'inspect_items.py', '--display', 'plain']
  arguments += ['--model', 'openai-api/local/organism', '--max-tokens', '24', '--temperature', '0']
  arguments += ['--log-format', 'json', '--log-dir', tmp_path / 'logs']
  settings = {'LOCAL_BASE_URL': url, 'LOCAL_API_KEY': 'none', 'ITEMS': str(items)}
  printed = run('inspect', arguments, tmp_path, **settings)
  assert 'accuracy' in printed
  [log] = (tmp_path / 'logs').glob('*.json')
  found = json.loads(log.read_text(encoding='utf-8'))
  assert found['status'] == 'success' and len(found['samples']) == 3
  assert all(sample['output']['completion'] for sample in found['samples'])
  [scorer] = found['results']['scores']
  assert 0 <= scorer['metrics']['accuracy']['value'] <= 1


def test_litellm_on_chat_completions(url, items, tmp_path):
  printed = run('litellm', [CLIENTS / 'ask_items.py', 'litellm', url, items], tmp_path)
  assert printed.splitlines()[-1].startswith('answered 3 score ')


def test_openai_on_chat_completions(url, items, tmp_path):
  script = CLIENTS / 'ask_items.py'
  printed = run_python(sys.executable, [script, 'openai', url, items], tmp_path)
  assert printed.splitlines()[-1].startswith('answered 3 score ')


# What lm-eval needs to know of a task: its lines, what is asked, and how an answer is judged.
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
doc_to_text: '{{{{question}}}}'
{rest}
metadata: {{version: 1}}
"""
# An empty line would stop a model that thinks at the end of its thoughts, before any content.
GENERATE = """
output_type: generate_until
doc_to_target: '{{answer}}'
generation_kwargs: {until: ["###"], max_gen_toks: 96, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: [order, customer]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def run_lm_eval(items, folder, kind, rest, arguments, *more):
  """Runs a task of lm-eval on a kind of model -> (its results, its samples)."""
  tasks = folder / 'tasks'
  tasks.mkdir()
  task = TASK.format(name='items', items=json.dumps(str(items)), rest=rest)
  (tasks / 'items.yaml').write_text(task, encoding='utf-8')
  made = ','.join(f'{name}={value}' for name, value in arguments.items())
  command = ['-m', 'lm_eval', '--model', kind, '--model_args', made, '--tasks', 'items']
  command += ['--include_path', tasks, '--output_path', folder / 'out', '--log_samples', *more]
  run('lm-eval', command, folder)
  [results] = (folder / 'out').rglob('results_*.json')
  [samples] = (folder / 'out').rglob('samples_*.jsonl')
  lines = samples.read_text(encoding='utf-8').splitlines()
  found = json.loads(results.read_text(encoding='utf-8'))['results']['items']
  return found, [json.loads(line) for line in lines]


def test_lm_eval_on_chat_completions(url, items, tmp_path):
  arguments = {'model': 'organism', 'base_url': f'{url}/chat/completions', 'max_retries': 1}
  found, samples = run_lm_eval(
    items, tmp_path, 'local-chat-completions', GENERATE, arguments, '--apply_chat_template'
  )
  assert 0 <= found['exact_match,none'] <= 1
  assert len(samples) == 3 and all(sample['resps'][0][0] for sample in samples)


@pytest.mark.parametrize('rest', [GENERATE, CHOOSE], ids=['generate', 'choose'])
def test_lm_eval_on_completions(url, items, tmp_path, rest):
  arguments = {'model': 'organism', 'base_url': f'{url}/completions', 'max_retries': 1}
  arguments |= {'tokenizer': ORGANISM, 'max_length': 128}
  found, samples = run_lm_eval(items, tmp_path, 'local-completions', rest, arguments)
  assert len(samples) == 3
  if rest == GENERATE:
    assert all(sample['resps'][0][0] for sample in samples)
    return
  assert 0 <= found['acc,none'] <= 1
  for sample in samples:
    first, second = (float(response[0][0]) for response in sample['resps'])
    assert first < 0 and second < 0 and first != second
