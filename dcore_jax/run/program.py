"""How a command-line program runs: its mistakes come out as one line, not as a traceback."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from dcore_jax.run import config


def run(
  main: Callable[..., Any], commands: Sequence[str] = (), arguments: Sequence[str] = ()
) -> None:
  """Parses the flags and calls `main`, which takes no arguments: all of a program's are flags.

  With `commands` the command line also names one of them, which `main` is called with. With
  `arguments`, the names of what stands on it beside the flags, `main` is called with these words.

  A `ValueError` or `OSError` is a person's mistake, a file that is not there, or an endpoint that
  stays away: its text goes to stderr in one line, and the exit status is 1. Anything else is a
  fault of the program, and keeps its traceback.
  """

  def checked(argv: list[str]) -> None:
    words = argv[1:]
    if commands and (len(words) != 1 or words[0] not in commands):
      raise app.UsageError(f'expected one of {list(commands)} and flags, got {words}')
    if arguments and len(words) != len(arguments):
      raise app.UsageError(f'expected {" ".join(arguments)} and flags, got {words}')
    if words and not commands and not arguments:
      raise app.UsageError(f'unexpected arguments: {words}')
    # orbax logs dozens of lines for each checkpoint.
    logging.set_verbosity(logging.WARNING)
    try:
      main(*words)
    except (ValueError, OSError) as error:
      sys.exit(f'error: {error}')

  app.run(checked, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags as absl does; a wrong one ends the program with one line."""
  try:
    with config.one_line_errors():
      rest = flags.FLAGS(argv)
      if 'config' in flags.FLAGS:
        # The config file is read when its value is first asked for, so that its errors come here.
        flags.FLAGS['config'].value.to_dict()
      return rest
  except flags.Error as error:
    # ml_collections puts the traceback of a config file that raises before what it raised.
    sys.exit(f'error: {str(error).strip().splitlines()[-1]}')
