"""The README's example of the library runs as it is written, at the smallest sizes."""

import pathlib
import re
import textwrap

import pytest

README = pathlib.Path(__file__).parents[1] / 'README.md'


def example() -> str:
  """The first block of code under the heading `As a library`."""
  section = README.read_text().split('## As a library')[1]
  block = re.search(r'\n\n((?:    .*\n|\n)+)', section).group(1)
  return textwrap.dedent(block)


def test_the_example_names_the_library():
  code = example()
  for name in ('load', 'distill_seeds', 'sft', 'da_grpo', 'evaluate_model', 'save'):
    assert f'.{name}(' in code


@pytest.mark.slow  # a minute and a half: every stage, at the sizes of nano:tiny
def test_the_example_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # where `DIR` is written
  code = example()
  assert "'quick'" in code
  exec(compile(code.replace("'quick'", "'tiny'"), str(README), 'exec'), {})
  assert (tmp_path / 'DIR' / 'model.safetensors').is_file()
