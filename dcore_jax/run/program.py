"""How a command-line program runs: its mistakes come out as one line, not as a traceback."""

import os
import pathlib
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from dcore_jax import gpu_memory, host_watch
from dcore_jax.run import config
from dcore_jax.run import help as help_lib
from dcore_jax.train import stopping

# By custom the exit status is 128 and the number of the signal: 130 for Ctrl-C, 143 for SIGTERM.
_SIGNALLED = 128
_format_warning = warnings.formatwarning


def run(
  main: Callable[..., Any], commands: Sequence[str] = (), arguments: Sequence[str] = ()
) -> None:
  """Parses the flags and calls `main`, which takes no arguments: all of a program's are flags.

  With `commands` the command line also names one of them, which `main` is called with. With
  `arguments`, the names of what stands on it beside the flags, `main` is called with these words.

  A `ValueError` or `OSError` is a person's mistake, a file that is not there, or an endpoint that
  stays away: its text goes to stderr in one line, and the exit status is 1. Anything else is a
  fault of the program, and keeps its traceback. One of several hosts tells the others that it ends
  (`host_watch`). After Ctrl-C or SIGTERM it says how to go on, and
  the exit status is 130 or 143; training ends at the end of its step (`train.stopping`).
  """

  def checked(argv: list[str]) -> None:
    words = argv[1:]
    if commands and (len(words) != 1 or words[0] not in commands):
      raise app.UsageError(f'expected one of {list(commands)} and flags, got {words}')
    if arguments and len(words) != len(arguments):
      raise app.UsageError(f'expected {" ".join(arguments)} and flags, got {words}')
    if words and not commands and not arguments:
      raise app.UsageError(f'unexpected arguments: {words}')
    # orbax logs dozens of lines for each checkpoint, and a traceback for each thread that sees an
    # error. The error itself is raised as well.
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(lambda record: '/orbax/' not in record.pathname)
    warnings.formatwarning = _warning_text
    stopping.handle_signals()
    # Before jax is asked for a device.
    gpu_memory.take_memory()
    try:
      main(*words)
    except (ValueError, OSError) as error:
      host_watch.end(f'error: {error}', status=1)
      sys.exit(f'error: {error}')
    except KeyboardInterrupt as error:
      number = error.number if isinstance(error, stopping.Stopped) else signal.SIGINT
      told = f'\ninterrupted; to go on: {_command()}'
      # Between two steps all hosts stop together; elsewhere the others would wait for this one.
      if not isinstance(error, stopping.StoppedTogether):
        host_watch.end(told, status=_SIGNALLED + number)
      print(told, file=sys.stderr)
      sys.exit(_SIGNALLED + number)
    except Exception:
      host_watch.end(traceback.format_exc(), status=1)
      raise

  app.run(checked, flags_parser=parse)


def _warning_text(message: Warning | str, category: type[Warning], *place: Any) -> str:
  """Returns a warning as a program prints it; where it stands in the code says nothing to a person.

  `UserWarning` is what this package warns of; others are for developers.
  """
  if issubclass(category, UserWarning):
    return f'warning: {message}\n'
  return _format_warning(message, category, *place)


def _command() -> str:
  """Returns the command that was given, as a person can give it again."""
  # Python was told a module, and has its file here.
  path = pathlib.Path(sys.argv[0])
  words = ['python', '-m', f'{path.parent.name}.{path.stem}', *sys.argv[1:]]
  return shlex.join(words)


def parse(argv: list[str]) -> list[str]:
  """Parses flags as absl does; a wrong one ends the program with one line, and --help with help."""
  about = help_lib.asked(argv[1:])
  if about is not None:
    try:
      print(help_lib.text(about))
    except ValueError as error:
      sys.exit(f'error: {error}')
    except BrokenPipeError:
      # The reader (`head`) has seen enough; Python would flush once more at the exit.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
  try:
    with config.one_line_errors():
      rest = flags.FLAGS(argv)
      # A program may do without a config, and has none then.
      if 'config' in flags.FLAGS and flags.FLAGS['config'].value is not None:
        # The config file is read when its value is first asked for, so that its errors come here.
        flags.FLAGS['config'].value.to_dict()
      return rest
  except flags.Error as error:
    # ml_collections puts the traceback of a config file that raises before what it raised.
    sys.exit(f'error: {str(error).strip().splitlines()[-1]}')
