"""Prints a packed SFT row: python -m experiments.show_rows --config=configs/nano.py --workdir=W [--row=N] [--sequence=K]"""

import os
import pathlib
import sys

from absl import app, flags

from dcore_jax import tokentree
from dcore_jax.data.rows import encode_rows, training_rows
from dcore_jax.data.show_rows import RowView, find_query, summary_line, use_colour
from dcore_jax.rollout.policy import load_tokenizer
from dcore_jax.run.config import check_config, define_config
from dcore_jax.run.defaults import default_config

_CONFIG = define_config('configs/nano.py')
_WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/nano', 'Of a run with distilled rows; not read where the config names files.'
)
_ROW = flags.DEFINE_integer(
  'row', None, 'Which packed row, counted from 0; default 0, or that of --sequence.'
)
_SEQUENCE = flags.DEFINE_integer(
  'sequence', None, 'Also show what the last token of this sequence attends to.'
)
_TOKEN = flags.DEFINE_integer('token', None, 'Also show what the token in this column attends to.')
_FULL = flags.DEFINE_bool('full', False, 'Do not shorten long untrained stretches.')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  try:
    config = check_config(_CONFIG.value, default_config())
    tokenizer, _ = load_tokenizer(config.model)
    rows, unreadable = training_rows(config.sft, pathlib.Path(_WORKDIR.value))
    sequences = encode_rows(
      tokenizer,
      rows,
      loss_mask=config.sft.loss_mask,
      capacity=config.sft.capacity,
      overlong=config.sft.overlong,
    )
    tree = tokentree.pack(
      sequences, config.sft.capacity, config.sft.rows, tokenizer.pad_token_id or 0
    )
    row, query = find_query(tree, _ROW.value, _SEQUENCE.value, _TOKEN.value)
    view = RowView(
      tree,
      [str(r['id']) for r in rows],
      tokenizer,
      row,
      colour=use_colour(sys.stdout),
      full=_FULL.value,
    )
    left_out = f', {unreadable} unreadable records left out' if unreadable else ''
    print(view.render(query), summary_line(tree, len(sequences)) + left_out, sep='\n', flush=True)
  except ValueError as error:
    sys.exit(f'error: {error}')
  except (
    BrokenPipeError
  ):  # `head` has seen enough; what is still buffered must go somewhere at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
  app.run(main)
