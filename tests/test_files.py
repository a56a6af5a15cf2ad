"""Files for other programs: values by line, and who pays for jax."""

import json
import subprocess
import sys

import pytest

from dcore_jax.files import read_json_lines


def test_a_value_ends_with_its_line_and_with_no_other_separator(tmp_path):
  path = tmp_path / 'values.jsonl'
  values = [{'text': 'one\u2028line'}, [1], 'x']
  lines = [json.dumps(value, ensure_ascii=False) for value in values]
  path.write_text('\n\n'.join(lines) + '\n', encoding='utf-8')
  assert read_json_lines(path) == values
  path.write_text('{}\n{"a": \n', encoding='utf-8')
  with pytest.raises(ValueError, match='values.jsonl, line 2 is not JSON'):
    read_json_lines(path)


def test_seeds_are_made_and_written_without_the_heavy_libraries(tmp_path):
  program = (
    'import pathlib, sys\n'
    'import experiments.seeds\n'
    'from dcore_jax.files import replace_text\n'
    f'replace_text(pathlib.Path({str(tmp_path / "out.txt")!r}), "written")\n'
    'print([name for name in ("jax", "transformers", "datasets", "openai") if name in sys.modules])'
  )
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'
  assert (tmp_path / 'out.txt').read_text() == 'written'
