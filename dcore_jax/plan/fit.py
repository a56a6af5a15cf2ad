"""Whether a run fits its devices, and how long it takes at least, known before there is a device.

Each step is compiled for the target from shapes. Its peak, and all that the run holds beside it,
must stay below 90 % of the device's memory: communication buffers, libraries and fragmentation take
the rest. Times are the roofline's (plan/roofline.py) for several accelerators, whatever the target.
"""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax

from dcore_jax.config import ModelSection, RunConfig
from dcore_jax.files import data_path
from dcore_jax.models import presets
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.hf_checkpoint import load_config
from dcore_jax.plan import capacity, collectives, compile_times, programs, roofline, topology
from dcore_jax.plan.capacity import Choice
from dcore_jax.plan.compile_times import CompileTime
from dcore_jax.plan.programs import Program
from dcore_jax.plan.shapes import RunShapes, device_bytes, host_bytes
from dcore_jax.progress import SLOW, progress
from dcore_jax.rollout.policy import ORGANISM

HEAD_ROOM = 0.9  # share of a device's memory that a step may use
_LARGEST = 6  # buffers named where a step does not fit
_COMPARED = ('a100-80g', 'h100', 'v5p', 'v6e')  # times in the table, beside those of the target
_GIB = 2**30
# A line of HLO that makes an array: its type, its shape, and the jax operation it was made for.
_MADE = re.compile(
  r'= (\w+)\[([\d,]+)\]\S* (?!parameter|get-tuple-element)[^\n]*?op_name="([^"]*)"'
)


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """One step on one device; sizes are in bytes.

  Attributes:
    name: the step's name.
    per: the unit of work that `calls` calls of the step make.
    calls: calls in one unit.
    arguments: arguments of the compiled program.
    temporaries: temporaries of the compiled program.
    peak: the most that the compiled program uses at once, its arguments included.
    beside: what else is held meanwhile, by name.
    limit: what the step may use.
    flops: operations of a call that the mathematics needs.
    done_flops: operations of a call that are done, recomputation included.
    moved: memory traffic of a call (roofline.Work).
    collectives: kind -> {'count', 'bytes'} of a call: how many, and bytes sent.
    bounds: accelerator -> least seconds, what bounds them, highest MFU.
    largest: (what, bytes), descending, where the step does not fit.
    remedies: options that save memory, where the step does not fit.
    compile_time: what the program took to trace and compile.
    error: the compiler's message, where it refuses what does not fit.
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
  compile_time: CompileTime
  error: str = ''

  @property
  def total(self) -> int:
    """Bytes that are held at once."""
    # The program's peak covers only what it takes and makes; the rest of the run stays in memory.
    return self.peak + sum(self.beside.values())

  @property
  def fits(self) -> bool:
    """Whether a device has room for it."""
    # A compiler that refuses reports a lower bound, which may lie below the limit.
    return not self.error and self.total <= self.limit

  def to_json(self) -> dict[str, Any]:
    """Returns all fields and what follows from them."""
    # Named tuples would become lists.
    return dataclasses.asdict(self) | {
      'total': self.total,
      'fits': self.fits,
      'compile_time': self.compile_time._asdict(),
    }


def model_config(section: ModelSection) -> DecoderConfig:
  """Returns the model's configuration that a config section `model` names.

  It is that of the random initialisation, of the checkpoint where it is there, or of the preset.
  """
  # The checkpoint decides where it is there; a plan must be possible where it is not, too.
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


def run_shapes(config: RunConfig, target: str) -> RunShapes:
  """Returns what a run of the config holds on a target; arguments and errors as for `plan`."""
  return RunShapes(config, model_config(config.model), topology.target(target).devices)


def more_compile_times(config: RunConfig, target: str) -> list[CompileTime]:
  """Compiles what a run compiles beside the steps of `plan`; arguments and errors as for `plan`."""
  return compile_times.compile_all(programs.more_of_engine(run_shapes(config, target)))


def _limit(target: str) -> int:
  return int(HEAD_ROOM * topology.target(target).device_bytes)


def capacities(config: RunConfig, target: str) -> list[Choice]:
  """Compares capacities of the rows of RL on a target; arguments and errors as for `plan`."""
  return capacity.compare(
    config,
    model_config(config.model),
    topology.target(target).devices,
    _limit(target),
    roofline.of_target(target),
  )


def plan(config: RunConfig, target: str, steps: tuple[str, ...] = ()) -> list[StepPlan]:
  """Compiles the steps of a config for a target.

  Args:
    config: of the run.
    target: of `topology.target`.
    steps: names of those to compile; default: all.

  Raises:
    ValueError: a config that does not hold, an unknown target or step.
    ModuleNotFoundError: the target's compiler is not installed.
  """
  run = run_shapes(config, target)
  known = programs.of_run(run)
  if not known:
    raise ValueError(f'stages {config.stages} train nothing: there is no step to compile')
  names = [program.name for program in known]
  unknown = set(steps) - set(names)
  if unknown:
    raise ValueError(f'unknown steps {sorted(unknown)}; expected some of {names}')
  # All programs are described before any is compiled: a name that is wrong is found at once.
  limit = _limit(target)
  # In the order of the run, whatever the order on the command line.
  wanted = [program for program in known if not steps or program.name in steps]
  bar = progress(wanted, description='plan', unit='program', delay=SLOW)
  return [_step_plan(run, program, limit) for program in bar]


class _Compiled(NamedTuple):
  """What a compiler says of a program.

  Attributes:
    footprint: bytes on each device.
    program: compiled; None where the compiler refused it.
    arrays: name -> bytes of the largest arrays, where the compiler refused it and lists them.
    error: first line of the compiler's refusal.
  """

  footprint: topology.Footprint
  program: jax.stages.Compiled | None
  arrays: dict[str, int]
  error: str

  @property
  def hlo(self) -> str:
    """Text of the compiled program; '' where the compiler refused it."""
    return self.program.as_text() if self.program else ''


def _compile(program: Program) -> _Compiled:
  # Tracing comes first: its errors are faults of the config, and pass through.
  lowered = program.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as caught:
    # The compiler for TPUs refuses what does not fit; that for GPUs does not.
    refused = topology.refusal(str(caught))
    if refused is None:
      raise
    needed, arrays = refused
    # What is not compiled cannot be asked for its footprint; a lower bound follows from the error.
    arguments = device_bytes(program.arguments)
    temporary = max(0, needed - arguments)
    if not arrays:
      # Refused before it was laid out: only what is needed beside the arguments is known.
      arrays = {'temporaries, none of them listed by the compiler': temporary}
    return _Compiled(
      topology.Footprint(arguments=arguments, outputs=0, temporary=temporary, peak=needed),
      program=None,
      arrays=arrays,
      # The rest of the message lists allocations over many lines.
      error=str(caught).splitlines()[0][:300],
    )
  footprint = topology.footprint(compiled, host_bytes(program.arguments))
  return _Compiled(footprint, program=compiled, arrays={}, error='')


def _step_plan(run: RunShapes, program: Program, limit: int) -> StepPlan:
  # The time is one that the run waits for as well, and shows which step a person waits for.
  compiled, compile_time = compile_times.measured(
    program.name, functools.partial(_compile, program)
  )
  # Outside of what is timed: a run has no use for the text.
  kinds, sent = _sent_by_kind(compiled.hlo, program.loop_share)
  # What is sent is read from the program, since XLA places collectives by itself.
  work = dataclasses.replace(program.work, sent=sent)
  bounds = {}
  # Several accelerators, so that one plan tells which would be worth its price.
  for name, accelerator in roofline.ACCELERATORS.items():
    bounds[name] = roofline.bound(work, accelerator)
  result = StepPlan(
    name=program.name,
    per=program.per,
    calls=program.calls,
    arguments=compiled.footprint.arguments,
    temporaries=compiled.footprint.temporary,
    peak=compiled.footprint.peak,
    beside=program.beside,
    limit=limit,
    flops=work.model_flops,
    done_flops=work.flops,
    moved=work.bytes,
    collectives=kinds,
    bounds=bounds,
    largest=[],
    remedies=[],
    compile_time=compile_time,
    error=compiled.error,
  )
  # Naming arrays takes as long as parsing the program's text, and is left out where nothing is
  # missing.
  if result.fits:
    return result
  return dataclasses.replace(
    result, largest=_largest(program, compiled), remedies=_remedies(run, program, result)
  )


def _sent_by_kind(hlo: str, loop_share: float) -> tuple[dict[str, dict[str, float]], float]:
  """Returns kind -> {'count', 'bytes'} of the collectives of one call, and the sum of all bytes."""
  kinds: dict[str, dict[str, float]] = {}
  sent = 0.0
  for each in collectives.collectives(hlo):
    if not each.sent:
      continue
    # A collective outside of the program's own loop runs once, however many iterations the loop
    # has.
    share = loop_share if each.in_loop else 1
    kind = kinds.setdefault(each.kind, {'count': 0, 'bytes': 0.0})
    # A share of a loop's iterations need not be a whole number.
    kind['count'] += round(each.times * share)
    kind['bytes'] += each.sent * share
    sent += each.sent * share
  return kinds, sent


def _largest(program: Program, compiled: _Compiled) -> list[tuple[str, int]]:
  """Returns the largest arguments, things held beside, and arrays that the program makes.

  The last are those in the program's text, or those that a refusal names.
  """
  # Names of arrays begin with a type or an argument's name, so that they do not meet those of what
  # is held beside.
  found = program.beside | compiled.arrays
  for name, tree in program.arguments.items():
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      found[f'{name}{jax.tree_util.keystr(path)}'] = device_bytes(leaf)
  sources: dict[tuple[str, str], str] = {}
  for dtype, dimensions, source in _MADE.findall(compiled.hlo):
    # Where many arrays have one shape, the first stands for them.
    sources.setdefault((dtype, dimensions), source)
  for (dtype, dimensions), source in sources.items():
    size = collectives.shape_bytes(dtype, dimensions)
    found[f'{dtype}[{dimensions}] of {source}'] = size
  return sorted(found.items(), key=lambda item: -item[1])[:_LARGEST]


def _remedies(run: RunShapes, program: Program, result: StepPlan) -> list[str]:
  """Returns what saves memory in this step.

  Each line says how many bytes that saves at most, and whether they may be enough by themselves.
  """
  missing = result.total - result.limit
  lines = [f'{_gib(missing)} too much']
  # Training's options first: they cost time, where more devices cost money.
  options = _training_remedies(run, program, result) + _engine_remedies(run, program)
  split = sum(result.beside.values()) + result.arguments
  # Temporaries depend on the rows of a device, which may stay as many: they are not counted.
  options.append(('twice the devices along mesh.fsdp', split // 2))
  for text, saved in options:
    if saved > 0:
      enough = ', perhaps enough by itself' if saved >= missing else ''
      lines.append(f'{text}: saves up to {_gib(saved)}{enough}')
  return lines


def _training_remedies(run: RunShapes, program: Program, result: StepPlan) -> list[tuple[str, int]]:
  """Returns (what, bytes that it saves at most) of the options of training."""
  config = run.config
  offload = run.execution.offload
  options = []
  state = run.state(programs.rl_optimizer(config.rl))
  training = 'train state' in program.arguments
  if training and run.execution.remat != 'full':
    # At most the temporaries are saved: it is not known which of them are activations.
    text = f"execution.remat = 'full' instead of {run.execution.remat!r}"
    options.append((text, result.temporaries))
  if program.name.startswith('SFT'):
    rows = config.sft.rows // config.sft.accumulate // run.shards
    name = 'sft.accumulate x'
    # A loop over micro-batches holds the sum of the gradients beside the next one. Qwen3-8B's SFT
    # on v6e:2x4 with 1 and 2 of them takes 33.3 and 30.2 GiB: the head's chunks, and others, do not
    # depend on the rows.
    sum_of_gradients = device_bytes(state.params) if config.sft.accumulate == 1 else 0
  else:
    rows = config.rl.rows // run.shards
    name = 'rl.rows /'
    sum_of_gradients = 0
  if training and rows > 1:
    saved = result.temporaries * (rows - 1) // rows - sum_of_gradients
    options.append((f'{name} {rows}: one row a device at a time', saved))
  if 'optimizer' not in offload and 'moments' not in program.arguments:
    options.append(("execution.offload = ('optimizer',)", device_bytes(state.opt_state)))
  if 'reference policy' in program.beside and 'reference' not in offload:
    options.append(("execution.offload = ('reference',)", program.beside['reference policy']))
  return options


def _engine_remedies(run: RunShapes, program: Program) -> list[tuple[str, int]]:
  """Returns (what, bytes that it saves at most) of the options of the engine."""
  if 'engine caches' not in program.beside and 'engine caches' not in program.arguments:
    return []
  # Trunks and branches both grow with the number of lanes, and both are split by key heads.
  half = device_bytes(run.engine.state()) // 2
  options = [('half of engine.lanes and engine.trunks', half)]
  # Key heads cannot be split further than one for each device.
  if run.engine.model.num_key_value_heads > run.engine.mesh.shape['tensor']:
    options.append(('twice engine.tensor', half))
  return options


def table(plans: list[StepPlan], target: str) -> str:
  """Returns the plans as text for people."""
  # All steps are planned for the same devices.
  limit = plans[0].limit
  # The target's own times first; all accelerators would not fit a line.
  columns = list(dict.fromkeys([roofline.of_target(target), *_COMPARED]))[: len(_COMPARED)]
  lines = [
    f'{target}, GiB a device; at most {limit / _GIB:.1f} of {limit / HEAD_ROOM / _GIB:.1f}',
    f'{"step":28}{"arguments":>10}{"temporary":>10}{"beside":>8}{"total":>8}  fits   sent  '
    + '  '.join(f'{name:>21}' for name in columns),
  ]
  # First what decides, in columns; then what explains it; at last what to do.
  lines += [_row(step, columns) for step in plans]
  lines += [_work_line(step) for step in plans]
  lines += _unit_lines(plans)
  for step in plans:
    if not step.fits:
      lines.append(f'{step.name} DOES NOT FIT. {step.error}'.rstrip())
      lines += [f'  {size / _GIB:8.2f} GiB  {name}' for name, size in step.largest]
      lines += [f'  {remedy}' for remedy in step.remedies]
  return '\n'.join(lines)


def _row(step: StepPlan, columns: list[str]) -> str:
  bounds = [step.bounds[name] for name in columns]
  times = '  '.join(f'{bound.seconds:8.3f} s {bound.by:>7} {bound.mfu:3.0%}' for bound in bounds)
  beside = sum(step.beside.values()) / _GIB
  sent = sum(kind['bytes'] for kind in step.collectives.values()) / _GIB
  fits = 'yes' if step.fits else 'NO'
  return (
    f'{step.name:28}{step.arguments / _GIB:10.2f}{step.temporaries / _GIB:10.2f}{beside:8.2f}'
    f'{step.total / _GIB:8.2f}  {fits:4}{sent:8.2f} {times}'
  )


def _work_line(step: StepPlan) -> str:
  listed = ', '.join(
    f'{kind["count"]} {name} ({kind["bytes"] / _GIB:.2f} GiB)'
    for name, kind in step.collectives.items()
  )
  return (
    f'{step.name}: {step.flops:.3g} model operations, {step.done_flops:.3g} done, '
    f'{step.moved / _GIB:.1f} GiB moved; {step.calls} a {step.per}; {listed or "nothing sent"}'
  )


def _unit_lines(plans: list[StepPlan]) -> list[str]:
  """Returns the least seconds of each unit (an SFT step, a DA-GRPO step) on each accelerator."""
  units: dict[str, dict[str, float]] = {}
  for step in plans:
    # Units in the order of their first step.
    seconds = units.setdefault(step.per, dict.fromkeys(step.bounds, 0.0))
    for name, bound in step.bounds.items():
      seconds[name] += step.calls * bound.seconds
  lines = []
  for unit, seconds in units.items():
    listed = ', '.join(f'{name} {value:.1f} s' for name, value in seconds.items())
    lines.append(f'a {unit}, at least: {listed}')
  return lines


def _gib(size: float) -> str:
  return f'{size / _GIB:.1f} GiB'
