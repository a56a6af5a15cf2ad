"""A packed row as text: marks, branches, what a token sees; and the program on distilled rows and
on files.
"""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import transformers

from dcore_jax import tokentree
from dcore_jax.data.rows import encode_rows, parse_rows
from dcore_jax.data.show_rows import (
  RowView,
  Run,
  find_query,
  row_runs,
  summary_line,
  token_texts,
  use_colour,
)
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts

ROOT = pathlib.Path(__file__).parents[2]


def row(name, *said):
  """A conversation of user and assistant in turn."""
  return {
    'id': name,
    'conversations': [
      {'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(said)
    ],
  }


ROWS = [
  row('long', 'find the order', 'ok', 'go on', 'done\nnow'),
  row('short', 'find the order', 'wait'),
  row('same', 'find the order', 'wait'),
  row('other', 'cancel', 'café 北京 🙂\x1b[31m'),
]


@pytest.fixture(scope='module')
def tokenizer():
  return build_tokenizer(sample_texts(), 640)


@pytest.fixture(scope='module')
def tree(tokenizer):
  return tokentree.pack(encode_rows(tokenizer, parse_rows(ROWS)), 128)


def view(tree, tokenizer, **options):
  return RowView(tree, [r['id'] for r in ROWS], tokenizer, 0, **{'colour': False} | options)


def test_token_texts_join_to_the_text_and_wait_for_whole_characters(tokenizer):
  text = 'Karo café 北京 🙂\nend'
  ids = tokenizer.encode(text)
  texts = token_texts(tokenizer, ids)
  assert ''.join(texts) == text and len(texts) == len(ids) and '' in texts and '🙂' in texts
  assert (
    token_texts(tokenizer, ids[: ids.index(tokenizer.encode('北')[0]) + 1])[-1] == '\ufffd'
  )  # cut inside a character
  broken = [tokenizer.encode('🙂')[0]] * 9 + tokenizer.encode('find')
  assert len(token_texts(tokenizer, broken)) == len(broken) and token_texts(tokenizer, broken)[
    -1
  ].endswith('find')


def test_token_texts_of_the_real_tokenizer(data_dir):
  qwen = transformers.AutoTokenizer.from_pretrained(data_dir / 'qwen3-tokenizer')
  text = 'Ünïcödé 𒀀𒀁 👩‍👩‍👧 ok\n\n<think>'
  ids = qwen.encode(text)
  assert ''.join(token_texts(qwen, ids)) == qwen.decode(ids) == text


def test_runs_are_the_branches_of_the_row(tree):
  runs = row_runs(tree, 0)
  (shared,) = [run for run in runs if run.sequences == (0, 1, 2)]
  children = [run for run in runs if run.above == runs.index(shared)]
  assert sorted(run.sequences for run in children) == [(0,), (1, 2)] and {
    run.depth for run in children
  } == {1}
  (other,) = [run for run in runs if run.sequences == (3,)]
  assert other.above == -1 and other.depth == 0
  assert sum(run.stop - run.start for run in runs) == tree.live  # every token once, padding never
  for number, path in enumerate(tree.paths):
    columns = [c for run in runs if number in run.sequences for c in range(run.start, run.stop)]
    assert sorted(columns) == sorted(path.tolist())
  assert isinstance(runs[0], Run)


def test_plain_text_marks_what_is_trained_and_with_which_weight(tree, tokenizer):
  text = view(tree, tokenizer).render()
  assert '\033' not in text and '«done⏎' in text and 'now<|im_end|>»' in text
  assert '«×2: wait<|im_end|>»' in text  # two rows, one branch: their weights add
  assert 'sequences 0 (long), 1 (short), 2 (same)' in text and 'sequence 3 (other)' in text
  assert 'find the order' in text and '«find' not in text
  assert 'café 北京 🙂\\x1b[31m' in text  # a row's own escape sequences do not reach the terminal
  assert text.count('\n● root; ') == 2 and text.count('\n│ ├ after column ') == 2


def test_colours_say_the_same(tree, tokenizer):
  text = view(tree, tokenizer, colour=True).render()
  assert (
    '\033[32mnow<|im_end|>\033[0m' in text
    and '\033[33m×2: wait<|im_end|>\033[0m' in text
    and '«' not in text
  )
  assert all(
    line.count('\033[') % 2 == 0 for line in text.split('\n')
  )  # no colour runs into the next line


def test_a_token_sees_its_ancestors(tree, tokenizer):
  shown = view(tree, tokenizer)
  for number, path in enumerate(tree.paths):
    home, query = find_query(tree, None, number, None)
    assert (home, query) == (0, path[-1])
    np.testing.assert_array_equal(np.flatnonzero(shown.visible(query)), path)
    text = shown.render(query)
    assert (
      f'of {"sequences 1 (short), 2 (same)" if number in (1, 2) else f"sequence {number}"}' in text
    )
    assert (
      f'sees {len(path)} tokens' in text
      and f'the {tree.live - tree.end[0, path[0]] + path[0]} of other trees' in text
    )
    seen = [line.split('seen: columns ')[1] for line in text.split('\n') if '│ seen: ' in line]
    assert sum(int(b) - int(a) + 1 for a, b in (part.split('-') for part in seen)) == len(path)
  middle = int(tree.paths[0][len(tree.paths[0]) // 2])
  text = shown.render(find_query(tree, 0, 0, middle)[1])
  assert f'-{middle}\n' in text and f'not seen: columns {middle + 1}-' in text
  assert '\033[2m' in view(tree, tokenizer, colour=True).render(middle)


def test_long_context_is_shortened_unless_wanted_whole(tokenizer):
  rows = [row('x', 'find ' * 300 + 'end', 'ok ' * 300)]
  tree = tokentree.pack(encode_rows(tokenizer, parse_rows(rows)), 2048)
  short, full = [
    RowView(tree, ['x'], tokenizer, 0, colour=False, full=full).render() for full in (False, True)
  ]
  assert 'characters ...]' in short and 'find ' * 300 in full and 'characters ...]' not in full
  assert 'ok ' * 299 in short  # what is trained is never shortened


def test_summary_counts(tokenizer):
  tree = tokentree.pack(encode_rows(tokenizer, parse_rows(ROWS), capacity=30), 30)
  line = summary_line(tree, len(ROWS))
  assert '4 sequences' in line and f'{len(tree.dropped)} dropped' in line and len(tree.dropped) >= 1
  assert (
    f'{np.count_nonzero(tree.weight)} loss tokens of {tree.live} (weight {tree.weight.sum():g})'
    in line
  )
  assert (
    f'dedup {tree.dedup:.2f}' in line and f'occupancy {tree.live / tree.tokens.size:.1%}' in line
  )


def test_choices_that_are_not_there(tree, tokenizer):
  for choice, message in (
    ((None, 9, None), 'no sequence 9'),
    ((1, 0, None), 'stands in packed row 0, not in 1'),
    ((None, 3, int(tree.paths[0][-1])), 'no token of sequence 3'),
  ):
    with pytest.raises(ValueError, match=message):
      find_query(tree, *choice)
  assert find_query(tree, None, None, None) == (0, None) and find_query(tree, 2, None, 5) == (2, 5)
  dropped = tokentree.pack(encode_rows(tokenizer, parse_rows(ROWS)), 24)
  with pytest.raises(ValueError, match='sequence 0 is longer than 24 tokens and was dropped'):
    find_query(dropped, None, 0, None)
  with pytest.raises(ValueError, match='no packed row 1'):
    RowView(tree, [], tokenizer, 1, colour=False)
  with pytest.raises(ValueError, match='no token in column 127'):
    view(tree, tokenizer).render(127)


def test_colours_are_for_terminals_that_want_them(monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.delenv('NO_COLOR', raising=False)
  monkeypatch.setenv('TERM', 'xterm')
  assert use_colour(terminal) and not use_colour(io.StringIO())
  monkeypatch.setenv('TERM', 'dumb')
  assert not use_colour(terminal)
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('NO_COLOR', '1')
  assert not use_colour(terminal)


def run_program(*flags, **environment):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.show_rows', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | environment,
  )


def test_the_program_shows_distilled_rows(tmp_path):
  (tmp_path / 'distill').mkdir()
  (tmp_path / 'distill' / 'rows.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
  (tmp_path / 'distill' / 'distill.json').write_text('{}')
  done = run_program(
    '--config=configs/nano.py', '--config.sft.capacity=128', f'--workdir={tmp_path}', '--sequence=1'
  )
  assert done.returncode == 0, done.stderr
  assert (
    '«×2: wait<|im_end|>»' in done.stdout
    and '4 sequences' in done.stdout
    and '\033' not in done.stdout
  )
  done = run_program('--config=configs/nano.py', f'--workdir={tmp_path / "none"}')
  assert done.returncode != 0 and 'run the stage distill first' in done.stderr


def test_the_program_shows_the_rows_of_files(data_dir):
  done = run_program('--config=configs/qwen3_smoke.py:quick', '--row=1', DCORE_DATA=str(data_dir))
  assert done.returncode == 0, done.stderr
  assert '<|im_end|>»' in done.stdout and '24 sequences, 0 dropped' in done.stdout
