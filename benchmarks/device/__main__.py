"""A first day on accelerators: what this machine does, beside what was said of it before.

    python -m benchmarks.device                      # 20 minutes on whatever GPU or TPU is there
    python -m benchmarks.device --parts=sft,grpo     # these parts, measured again
    python -m benchmarks.device --size=qwen3_0_6b    # instead of the largest model that fits

    machine    memory, and the rates of products and of memory beside the data sheet
    kernels    tree attention, attention over pages and the fused head: errors against plain forms
               on this device, and times beside what arithmetic or memory allow
    bf16       how far engine and trainer are apart in 16 bits, on the packaged organism
    engine     prefill and decode: tokens a second, and the share of what is possible
    sft        an SFT step: time and memory beside the plan, MFU, seconds of compiling
    grpo       a DA-GRPO step from sampling to update, by phase, beside the plan
    offload    moments in host memory: what they save, what they cost, and that nothing changes
    startup    a server, cold and warm: seconds until it is ready, and that it compiles nothing late
    pipeline   the whole method with the organism

Each part is a process of its own, with its share of --minutes; one that fails or takes longer is a
row of the table, and the others go on. JSON lines go to stdout and to rows.jsonl in --workdir, the
table to stderr. The same command goes on where it was ended: it takes the parts that are missing,
or failed. The exit status is 1 where a figure disagrees with the plan or a part failed.

On a CPU the sizes are tiny: it shows that the programs run, and says nothing of the machine. Peaks
are those of the data sheet; of a device that the plan does not know they are measured, and then
nothing is said of shares of them.
"""

import json
import pathlib
import sys
import time

from absl import flags

from benchmarks.device import rows, sizes
from benchmarks.device.parts import Log, examined, limit_of, open_log, run_part, wanted
from benchmarks.device.worker import PARTS
from dcore_jax.run import program

_PARTS = flags.DEFINE_list(
  'parts',
  [],
  f'Which of {", ".join(PARTS)} to measure, again if need be; default: what is missing.',
)
_MINUTES = flags.DEFINE_float(
  'minutes', 20.0, 'Minutes for all parts; each has its share of them.', lower_bound=0.1
)
_SIZE = flags.DEFINE_enum(
  'size', '', ['', *sizes.NAMES], 'Shape of the models; the largest that fits by default.'
)
_WORKDIR = flags.DEFINE_string('workdir', 'runs/device', 'Where rows.jsonl and table.txt go.')


def main() -> None:
  """Measures the parts that are asked for, and ends the program with the verdict."""
  path = pathlib.Path(_WORKDIR.value) / 'rows.jsonl'
  # What a person has written wrong is said before a minute is spent.
  wanted(_PARTS.value, Log(path, {}, {}))
  machine = examined(60 * _MINUTES.value)
  log = open_log(path, {'machine': machine, 'size': _SIZE.value})
  # Raises where nothing fits, before any part is begun.
  chosen = sizes.choose(machine['platform'], machine['memory'], machine['count'], _SIZE.value)
  print(
    f'{machine["count"]} x {machine["kind"]}, peaks {machine["source"]}; trained: '
    f'{chosen.trained_name}, served: {chosen.served_name}',
    file=sys.stderr,
  )
  parts = wanted(_PARTS.value, log)
  for name in parts:
    limit = limit_of(name, _MINUTES.value, parts)
    print(f'{name}: {PARTS[name].about}; {limit:.0f} s at most', file=sys.stderr, flush=True)
    began = time.monotonic()
    found = []
    for row in run_part(name, log.told, limit):
      print(json.dumps(row.to_json()), flush=True)
      log.write(row.to_json())
      found.append(row)
    log.write({'part': name, 'seconds': round(time.monotonic() - began, 1)})
    log.ended[name] = found
  text = rows.table(log.rows)
  path.with_name('table.txt').write_text(text + '\n', encoding='utf-8')
  print(text, file=sys.stderr)
  sys.exit(bool(rows.wrong(log.rows)))


if __name__ == '__main__':
  program.run(main)
