"""Whether a run fits its devices, and how long it takes at least, known by compiling its steps before there is a device.

Each step is compiled for the target from shapes; its peak, plus what else the run holds at that time, must stay below the
device's memory less 10 %, which communication buffers, libraries and fragmentation take. Time is the roofline's
(run.roofline) for several accelerators, whatever the target.
"""

import collections
import dataclasses
import re
import time
from typing import Any

import jax
import ml_collections

from dcore_jax.files import data_path
from dcore_jax.models import presets
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.hf_checkpoint import load_config
from dcore_jax.plan import collectives, programs, roofline, topology
from dcore_jax.rollout.policy import ORGANISM
from dcore_jax.run.config import check_config
from dcore_jax.run.defaults import default_config

HEAD_ROOM = 0.9  # share of a device's memory that a step may use
_LARGEST = 6  # buffers named where a step does not fit
_MADE = re.compile(
  r'= (\w+)\[([\d,]+)\]\S* (?!parameter|get-tuple-element)[^\n]*?op_name="([^"]*)"'
)  # an array of a program


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """One step on one device, bytes throughout.

  Attributes:
    name, per, calls: `calls` calls of the step make a unit of `per`.
    arguments, temporaries, peak: of the compiled program; the peak includes the arguments.
    beside: what else is held meanwhile, by name.
    limit: what may be used.
    flops, done_flops, moved: of a call: what the mathematics needs, what is done, memory traffic (run.roofline.Work).
    collectives: kind -> {'count', 'bytes'} of a call: how many, and bytes sent.
    bounds: accelerator -> least seconds, what bounds them, highest MFU.
    largest: (what, bytes), descending, where the step does not fit.
    remedies: what would make it fit, where it does not.
    compile_seconds: of this plan.
    error: of a compiler that refuses what does not fit.
  """

  name: str
  per: str
  calls: int
  arguments: int
  temporaries: int
  peak: int
  beside: dict[str, int]
  limit: int
  flops: float
  done_flops: float
  moved: float
  collectives: dict[str, dict[str, float]]
  bounds: dict[str, roofline.Bound]
  largest: list[tuple[str, int]]
  remedies: list[str]
  compile_seconds: float
  error: str = ''

  @property
  def total(self) -> int:
    return self.peak + sum(self.beside.values())

  @property
  def fits(self) -> bool:
    return not self.error and self.total <= self.limit

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {'total': self.total, 'fits': self.fits}


def model_config(section: ml_collections.ConfigDict) -> DecoderConfig:
  """The model of a section `model`: its random initialisation, the checkpoint where it is there, else the preset."""
  if section.init:
    return DecoderConfig.from_hf(dict(section.init))
  if not section.path:
    return presets.config(section.preset) if section.preset else load_config(ORGANISM)
  try:
    folder = data_path(section.path)
  except ValueError:
    if not section.preset:
      raise
    return presets.config(section.preset)
  return load_config(folder)


def plan(
  config: ml_collections.ConfigDict, target: str, steps: tuple[str, ...] = ()
) -> list[StepPlan]:
  """Compiles the steps of a config for a target -> their plans.

  Args:
    config: see run.defaults.
    target: of `topology.target`.
    steps: names of those to compile; default: all.

  Raises:
    ValueError: a config that does not hold, an unknown target or step.
    ModuleNotFoundError: the target's compiler is not installed.
  """
  config = check_config(config, default_config())
  devices, memory = topology.target(target)
  made = programs.Programs(config, model_config(config.model), devices)
  wanted = made.all()
  if not wanted:
    raise ValueError(f'stages {config.stages} train nothing: there is no step to compile')
  unknown = set(steps) - {program.name for program in wanted}
  if unknown:
    raise ValueError(
      f'unknown steps {sorted(unknown)}; expected some of {[program.name for program in wanted]}'
    )
  return [
    _step_plan(made, program, int(HEAD_ROOM * memory))
    for program in wanted
    if not steps or program.name in steps
  ]


def _step_plan(made: programs.Programs, program: programs.Program, limit: int) -> StepPlan:
  began, error, hlo, arrays = time.monotonic(), '', '', {}
  lowered = program.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as caught:  # a TPU's compiler refuses what does not fit
    refused = topology.refusal(str(caught))
    if refused is None:
      raise
    error, arguments, (needed, arrays) = (
      str(caught).splitlines()[0][:300],
      programs.device_bytes(program.arguments),
      refused,
    )
    footprint = topology.Footprint(arguments, 0, max(0, needed - arguments), needed)
  else:
    footprint, hlo = (
      topology.footprint(compiled, programs.host_bytes(program.arguments)),
      compiled.as_text(),
    )
  kinds, sent = collections.defaultdict(lambda: {'count': 0, 'bytes': 0.0}), 0.0
  for each in filter(lambda each: each.sent, collectives.collectives(hlo)):
    share = program.loop_share if each.in_loop else 1
    kinds[each.kind]['count'] += round(each.times * share)
    kinds[each.kind]['bytes'] += each.sent * share
    sent += each.sent * share
  work = dataclasses.replace(program.work, sent=sent)
  bounds = {
    name: roofline.bound(work, accelerator) for name, accelerator in roofline.ACCELERATORS.items()
  }
  result = StepPlan(
    program.name,
    program.per,
    program.calls,
    footprint.arguments,
    footprint.temporary,
    footprint.peak,
    program.beside,
    limit,
    work.model_flops,
    work.flops,
    work.bytes,
    dict(kinds),
    bounds,
    [],
    [],
    time.monotonic() - began,
    error,
  )
  if result.fits:
    return result
  if (
    error and not arrays
  ):  # refused before it was laid out: nothing is known but how much lies beside the arguments
    arrays = {'temporaries, none of them listed by the compiler': footprint.temporary}
  return dataclasses.replace(
    result, largest=_largest(program, hlo, arrays), remedies=_remedies(made, program, result)
  )


def _largest(program: programs.Program, hlo: str, arrays: dict[str, int]) -> list[tuple[str, int]]:
  """The largest arguments, things held beside and arrays that the program makes: those in its text, or that a refusal names."""
  found = program.beside | arrays
  for name, tree in program.arguments.items():
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      found[f'{name}{jax.tree_util.keystr(path)}'] = programs.device_bytes(leaf)
  made = {}
  for dtype, dimensions, source in _MADE.findall(hlo):
    made.setdefault((dtype, dimensions), source)  # of many arrays of a shape the first
  found |= {
    f'{dtype}[{dimensions}] of {source}': collectives.shape_bytes(dtype, dimensions)
    for (dtype, dimensions), source in made.items()
  }
  return sorted(found.items(), key=lambda item: -item[1])[:_LARGEST]


def _remedies(made: programs.Programs, program: programs.Program, result: StepPlan) -> list[str]:
  """What saves memory in this step, with the bytes that it saves at most and whether they would be enough by themselves."""
  config, missing, options = made.config, result.total - result.limit, []
  state = made.state(made.rl_optimizer())
  training = 'train state' in program.arguments
  if training and made.execution.remat != 'full':
    options.append(
      (f"execution.remat = 'full' instead of {made.execution.remat!r}", result.temporaries)
    )
  section = 'sft' if program.name.startswith('SFT') else 'rl'
  rows = config[section].rows // (config.sft.accumulate if section == 'sft' else 1) // made.shards
  if training and rows > 1:
    name = 'sft.accumulate x' if section == 'sft' else 'rl.rows /'
    # A loop over micro-batches holds the sum of the gradients beside the next one. Qwen3-8B's SFT on v6e:2x4 with 1 and 2 of
    # them takes 33.3 and 30.2 GiB: the head's chunks, and others, do not depend on the rows.
    total = (
      programs.device_bytes(state.params) if section == 'sft' and config.sft.accumulate == 1 else 0
    )
    options.append(
      (
        f'{name} {rows}: one row a device at a time',
        result.temporaries * (rows - 1) // rows - total,
      )
    )
  if 'optimizer' not in made.execution.offload and 'moments' not in program.arguments:
    options.append(("execution.offload = ('optimizer',)", programs.device_bytes(state.opt_state)))
  if 'reference policy' in program.beside and 'reference' not in made.execution.offload:
    options.append(("execution.offload = ('reference',)", program.beside['reference policy']))
  caches = programs.device_bytes(made.engine.state())
  if 'engine caches' in program.beside or 'engine caches' in program.arguments:
    options.append(('half of engine.lanes and engine.trunks', caches // 2))
    if made.engine.model.num_key_value_heads > made.engine.mesh.shape['tensor']:
      options.append(('twice engine.tensor', caches // 2))
  split = sum(result.beside.values()) + result.arguments
  options.append(('twice the devices along mesh.fsdp', split // 2))
  gib = lambda size: f'{size / 2**30:.1f} GiB'
  enough = lambda saved: ', perhaps enough by itself' if saved >= missing else ''
  lines = [
    f'{text}: saves up to {gib(saved)}{enough(saved)}' for text, saved in options if saved > 0
  ]
  return [f'{gib(missing)} too much', *lines]


def table(plans: list[StepPlan], target: str) -> str:
  """The plans for people."""
  gib = lambda size: f'{size / 2**30:8.2f}'
  lines = [
    f'{target}, GiB a device; at most {plans[0].limit / 2**30:.1f} of {plans[0].limit / HEAD_ROOM / 2**30:.1f}',
    f'{"step":28}{"arguments":>10}{"temporary":>10}{"beside":>8}{"total":>8}  fits   sent  '
    + '  '.join(f'{name:>21}' for name in roofline.ACCELERATORS),
  ]
  for step in plans:
    times = '  '.join(
      f'{bound.seconds:8.3f} s {bound.by:>7} {bound.mfu:3.0%}' for bound in step.bounds.values()
    )
    sent = sum(kind['bytes'] for kind in step.collectives.values())
    lines.append(
      f'{step.name:28}{gib(step.arguments):>10}{gib(step.temporaries):>10}{gib(sum(step.beside.values()))}'
      f'{gib(step.total)}  {"yes" if step.fits else "NO":4}{gib(sent)} {times}'
    )
  for step in plans:
    listed = ', '.join(
      f'{kind["count"]} {name} ({kind["bytes"] / 2**30:.2f} GiB)'
      for name, kind in step.collectives.items()
    )
    lines.append(
      f'{step.name}: {step.flops:.3g} model operations, {step.done_flops:.3g} done, {step.moved / 2**30:.1f} GiB '
      f'moved; {step.calls} a {step.per}; {listed or "nothing sent"}'
    )
  units = collections.defaultdict(lambda: collections.Counter())
  for step in plans:
    for name, bound in step.bounds.items():
      units[step.per][name] += step.calls * bound.seconds
  for unit, seconds in units.items():
    lines.append(
      f'a {unit}, at least: '
      + ', '.join(f'{name} {value:.1f} s' for name, value in seconds.items())
    )
  for step in plans:
    if not step.fits:
      lines.append(f'{step.name} DOES NOT FIT. {step.error}'.rstrip())
      lines += [f'  {size / 2**30:8.2f} GiB  {name}' for name, size in step.largest]
      lines += [f'  {remedy}' for remedy in step.remedies]
  return '\n'.join(lines)
