"""ACEBench's own layout of results, and its own program that scores them.

FOLDER/data_all/data_en/            the tasks that were answered, and possible_answer/ beside them
FOLDER/result_all/result_en/model/  data_CATEGORY_result.json: {'id', 'result'} a line
FOLDER/score_all/score_en/model/    data_CATEGORY_score.json, which the program writes

`eval_main.py` of a checkout reads and writes below the folder that it is started in, and puts
spreadsheets into ../result_excel, so that nothing is written into the checkout. It wants as many
results as tasks, which is why the tasks are written again. It lets Python compute what stands
between a plus and its sides, in whatever a model wrote: a prediction that is no call list for
`score` is handed over as an empty text, which gets the same verdict.
"""

import json
import os
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from dcore_jax.evaluate.acebench.score import UNREADABLE, read_calls
from dcore_jax.evaluate.acebench.tasks import AGENT, MULTI_TURN, SINGLE_TURN, Task
from dcore_jax.files import read_json_lines, replace_text

# What the model is called there. A name with FC in it would be read in another form.
_MODEL = 'model'
_SECONDS = 1800.0  # a guard against hanging: all categories take some seconds


def write_results(
  folder: pathlib.Path, answers: Mapping[str, Sequence[tuple[Task, Mapping[str, Any]]]]
) -> None:
  """Writes the layout.

  Args:
    folder: where it goes.
    answers: by category, each task with {'result'} and, of agents, {'process'}.
  """
  data = folder / 'data_all' / 'data_en'
  for category, pairs in answers.items():
    name = f'data_{category}'
    results = []
    for task, answer in pairs:
      results.append({'id': task.id} | answer | {'result': _safe(category, answer['result'])})
    _write_lines(data / f'{name}.json', [task.record for task, _ in pairs])
    references = [task.reference for task, _ in pairs]
    _write_lines(data / 'possible_answer' / f'{name}.json', references)
    _write_lines(folder / 'result_all' / 'result_en' / _MODEL / f'{name}_result.json', results)


def _safe(category: str, result: Any) -> Any:
  if category not in (*SINGLE_TURN, *MULTI_TURN):
    return result
  try:
    read_calls(result)
  except UNREADABLE:
    return ''
  return result


def _write_lines(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
  replace_text(path, ''.join(lines))


def check_checkout(checkout: pathlib.Path, python: str) -> None:
  """Starts the program of a checkout for its help text.

  Raises:
    ValueError: it is not there, or lacks what it imports.
  """
  if not (checkout / 'eval_main.py').is_file():
    raise ValueError(f'acebench={str(checkout)!r} is no checkout of ACEBench: no eval_main.py')
  code, error = _run(checkout, python, ['--help'], checkout)
  if code:
    raise ValueError(
      f'eval_main.py of {str(checkout)!r} does not start: {error}; name a Python that has what its '
      'requirements.txt asks for with python=PATH'
    )


def score_results(
  folder: pathlib.Path, checkout: pathlib.Path, python: str, categories: Sequence[str]
) -> dict[str, tuple[float, set[str]]]:
  """Lets the checkout's program score a layout.

  Args:
    folder: see `write_results`.
    checkout: of ACEBench.
    python: the interpreter with what it imports.
    categories: those to be scored.

  Returns:
    By category, its accuracy and the ids that failed; of agents the ids are places in the file.

  Raises:
    ValueError: the program gives no score for a category.
  """
  scores = folder / 'score_all' / 'score_en' / _MODEL
  scores.mkdir(parents=True, exist_ok=True)
  for path in scores.glob('*.json'):
    path.unlink()
  arguments = ['--language', 'en', '--model', _MODEL, '--category', *categories]
  _, error = _run(checkout, python, arguments, folder)
  found = {}
  for category in categories:
    path = scores / f'data_{category}_score.json'
    # The exit status says little: some checkouts end with an error behind the last score.
    rows = read_json_lines(path) if path.is_file() else []
    key = 'end_to_end_accuracy' if category in AGENT else 'accuracy'
    if not rows or key not in rows[0]:
      raise ValueError(f'eval_main.py of {str(checkout)!r} gave no score of {category}: {error}')
    failed = {str(row['id']) for row in rows[1:] if row.get('valid') is False}
    found[category] = float(rows[0][key]), failed
  return found


def _run(
  checkout: pathlib.Path, python: str, arguments: Sequence[str], folder: pathlib.Path
) -> tuple[int, str]:
  """Runs eval_main.py; returns its exit status and the last line of its errors."""
  environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
  # It prints signs that an ASCII terminal does not have, and must not write into the checkout.
  environment |= {'PYTHONIOENCODING': 'utf-8', 'PYTHONDONTWRITEBYTECODE': '1'}
  try:
    done = subprocess.run(
      [python, str(checkout.resolve() / 'eval_main.py'), *arguments],
      cwd=folder,
      env=environment,
      capture_output=True,
      encoding='utf-8',
      errors='replace',
      timeout=_SECONDS,
    )
  except subprocess.TimeoutExpired:
    return 1, f'it takes more than {_SECONDS:.0f} s'
  except OSError as error:
    return 1, str(error)
  lines = done.stderr.strip().splitlines()
  return done.returncode, lines[-1] if lines else 'no reason given'
