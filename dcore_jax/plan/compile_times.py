"""How long a run waits for its programs to be compiled, on a host like this one.

A run traces and compiles each program when it first calls it, one after the other; from then on
they come from the compiler's cache (docs/large_models.md).
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax

from dcore_jax.progress import COMPILE, SLOW, progress

_Result = TypeVar('_Result')


class NamedProgram(NamedTuple):
  """A program that a run compiles.

  Attributes:
    name: of the program, and of what tells it apart from others of its kind.
    lower: traces it.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]


class CompileTime(NamedTuple):
  """Seconds of tracing and compiling one program.

  Attributes:
    name: of the program.
    seconds: that passed.
    cpu_seconds: of all threads, and of the programs that the compiler starts. They are the more
      telling ones on a host that does other work, and are more than those that passed where the
      compiler uses several cores.
  """

  name: str
  seconds: float
  cpu_seconds: float


def measured(name: str, compiled: Callable[[], _Result]) -> tuple[_Result, CompileTime]:
  """Returns what `compiled()` returns, and the time that it took."""
  began = time.monotonic()
  cpu_began = _cpu_seconds()
  result = compiled()
  return result, CompileTime(
    name=name,
    seconds=time.monotonic() - began,
    cpu_seconds=_cpu_seconds() - cpu_began,
  )


def _cpu_seconds() -> float:
  times = os.times()
  # `time.process_time` leaves out other programs, such as an assembler.
  return times.user + times.system + times.children_user + times.children_system


def compile_all(programs: Sequence[NamedProgram]) -> list[CompileTime]:
  """Compiles programs for their times alone."""
  times = []
  for program in progress(programs, description=COMPILE, unit='program', delay=SLOW):
    # Not kept: what a compiled program of 8B takes on the host would add up.
    _, needed = measured(program.name, lambda lower=program.lower: lower().compile())
    times.append(needed)
  return times


def table(times: Sequence[CompileTime]) -> str:
  """Returns the times, and their sum, as text for people."""
  lines = [f'{"programs, traced and compiled here":48}{"seconds":>9}{"CPU":>9}']
  lines += [_row(each) for each in times]
  total = CompileTime(
    name=f'all {len(times)}, one after the other',
    seconds=sum(each.seconds for each in times),
    cpu_seconds=sum(each.cpu_seconds for each in times),
  )
  lines.append(_row(total))
  return '\n'.join(lines)


def _row(each: CompileTime) -> str:
  return f'{each.name:48}{each.seconds:9.1f}{each.cpu_seconds:9.1f}'
