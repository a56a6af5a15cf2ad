"""One part of `benchmarks.device`, in a process of its own.

    python -m benchmarks.device.worker machine
    python -m benchmarks.device.worker kernels '{"machine": {...}, "size": "", "folder": "DIR"}'

So each part has the memory of the devices to itself, and an error, or a crash of a compiler, ends
one part. It prints a JSON line a row; the part `machine` prints what the others are told first.
"""

import importlib
import json
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.device import rows
from benchmarks.device.rows import Row
from benchmarks.device.setting import Setting, make_setting


class Part(NamedTuple):
  """A part of the program.

  Attributes:
    module, function: what measures; a module is imported by the part that needs it.
    minutes: that it may take, of 20 in all.
    about: what a person reads of it.
  """

  module: str
  function: str
  minutes: float
  about: str


# In this order: what others build on first, what takes long last.
PARTS: dict[str, Part] = {
  'machine': Part('machine', 'measure', 1, 'memory, rates of products and memory'),
  'kernels': Part(
    'kernels', 'measure', 2.5, 'attention and head against plain forms, and their speed'
  ),
  'bf16': Part('precision', 'measure', 1, 'gaps between engine and trainer'),
  'engine': Part('serving', 'measure', 2, 'prefill and decode'),
  'sft': Part('training', 'sft', 2, 'an SFT step: time, MFU, memory'),
  'grpo': Part('reinforcement', 'measure', 3, 'a DA-GRPO step and its phases'),
  'offload': Part('training', 'offload', 2, 'moments in host memory'),
  'startup': Part('programs', 'start', 2, 'a server, cold and warm'),
  'pipeline': Part('programs', 'pipeline', 4.5, 'the whole method, cut down'),
}


def measured(name: str, setting: Setting) -> Iterator[Row]:
  """Yields the rows of a part; an error is its last one."""
  part = PARTS[name]
  try:
    function: Callable[[Setting], Iterator[Row]] = getattr(
      importlib.import_module(f'benchmarks.device.{part.module}'), part.function
    )
    yield from function(setting)
  # Whatever it is, the other parts go on, and a person reads of it in the table.
  except Exception as error:
    traceback.print_exc()
    first = (str(error).strip().splitlines() or [''])[0][:300]
    help_ = '; --size=NAME takes a smaller model' if 'RESOURCE_EXHAUSTED' in first else ''
    yield rows.failed(name, 'error', f'{type(error).__name__}: {first}{help_}')


def main() -> None:
  """Measures what the command line says."""
  name, *rest = sys.argv[1:]
  if name == 'machine' and not rest:
    from benchmarks.device import machine

    print(json.dumps({'machine': vars(machine.examine())}), flush=True)
    return
  told = json.loads(rest[0])
  setting = make_setting(told['machine'], told['size'], pathlib.Path(told['folder']))
  for row in measured(name, setting):
    print(json.dumps(row.to_json()), flush=True)


if __name__ == '__main__':
  main()
