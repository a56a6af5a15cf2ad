"""Prints a packed SFT row: what is trained, what branches, what sees what.

    python -m experiments.show_rows --config=configs/nano.py --workdir=W --row=3 --sequence=5

The run must have distilled its rows, or the config must name files of rows (`sft.files`).
"""

import os
import pathlib
import sys

from absl import flags

from dcore_jax import tokentree
from dcore_jax.data.rows import section_sequences, training_rows
from dcore_jax.data.show_rows import RowView, find_query, summary_line, use_colour
from dcore_jax.rollout.policy import load_tokenizer
from dcore_jax.run import help as help_lib
from dcore_jax.run import program
from dcore_jax.run.config import define_config, read_config

_CONFIG = define_config('configs/nano.py')
_WORKDIR = flags.DEFINE_string(
  'workdir',
  'runs/nano',
  'Folder of a run with distilled rows; not read where the config names files.',
)
_ROW = flags.DEFINE_integer(
  'row', None, 'Which packed row, counted from 0; default 0, or that of --sequence.'
)
_SEQUENCE = flags.DEFINE_integer(
  'sequence', None, 'Also show what the last token of this sequence attends to.'
)
_TOKEN = flags.DEFINE_integer('token', None, 'Also show what the token in this column attends to.')
_FULL = flags.DEFINE_bool('full', False, 'Do not shorten long untrained stretches.')

help_lib.group('which row', _WORKDIR, _ROW)
help_lib.group('what is shown of it', _SEQUENCE, _TOKEN, _FULL)


def main() -> None:
  """Packs the rows as training does, and prints one of them."""
  config = read_config(_CONFIG.value)
  tokenizer, _ = load_tokenizer(config.model)
  rows, unreadable = training_rows(config.sft, pathlib.Path(_WORKDIR.value))
  kept, sequences = section_sequences(tokenizer, rows, config.sft)
  unreadable += len(rows) - len(kept)
  tree = tokentree.pack(
    sequences, config.sft.capacity, config.sft.rows, tokenizer.pad_token_id or 0
  )
  row, query = find_query(tree, _ROW.value, _SEQUENCE.value, _TOKEN.value)
  view = RowView(
    tree,
    [str(one.id) for one in kept],
    tokenizer,
    row,
    colour=use_colour(sys.stdout),
    full=_FULL.value,
  )
  left_out = f', {unreadable} unreadable records left out' if unreadable else ''
  try:
    print(view.render(query), summary_line(tree, len(sequences)) + left_out, sep='\n', flush=True)
  except BrokenPipeError:
    # The reader (`head`) has seen enough. Python flushes stdout once more at exit, so the rest
    # needs a place to go.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
  program.run(main)
