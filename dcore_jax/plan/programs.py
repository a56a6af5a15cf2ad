"""The steps of a run as programs to be compiled: what they read, what lies beside them, their work.

The functions are those that the loops call, lowered from shapes; nothing is allocated.
Letters: A micro-batches, R rows, T tokens in a row, M loss tokens of a micro-batch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dcore_jax import tokentree
from dcore_jax.config import RlSection
from dcore_jax.learn import advantages, grpo, lora, optimizer, psi_gradient, sft
from dcore_jax.learn.psi import PsiScale
from dcore_jax.plan import group_rows, roofline
from dcore_jax.plan.compile_times import NamedProgram
from dcore_jax.plan.engine_calls import EngineCalls
from dcore_jax.plan.roofline import Work
from dcore_jax.plan.shapes import RunShapes, abstract_batch, device_bytes
from dcore_jax.rollout.grids import PIECE
from dcore_jax.train import rl_options

_RL_STEP = 'DA-GRPO step'
# Total steps of the learning rate's schedule. They are a constant in the program, so that any
# number gives a program of the same size.
_SCHEDULE_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled step.

  Attributes:
    name: the step's name.
    lower: traces it.
    arguments: name -> tree of shapes, to tell which of them are large.
    beside: name -> bytes on each device that are held while it runs and are not its arguments.
    work: the work of one call on one device. What is sent is read from the compiled program.
    calls: calls in one unit of `per`.
    per: the unit that the calls are counted for.
    loop_share: iterations of the program's own loop that run, over those that its text shows. A
      loop over micro-batches is compiled for more than run, which makes a share below 1.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  arguments: dict[str, Any]
  beside: dict[str, int]
  work: Work
  calls: int
  per: str
  loop_share: float = 1.0


def of_run(run: RunShapes) -> list[Program]:
  """Returns the SFT step and what a DA-GRPO step consists of, where the config has these stages."""
  config = run.config
  found = []
  # A stage that the config leaves out needs no room.
  if 'sft' in config.stages:
    found.append(sft_step(run))
  if 'rl' in config.stages:
    # A DA-GRPO step scores with the policy before the update, for the importance ratios.
    found.append(old_scores(run))
    # Without a KL term there is no reference policy, and only some estimators read entropies.
    if config.rl.kl_coefficient:
      found.append(reference_scores(run))
    if advantages.uses_entropy(config.rl.estimator):
      found.append(psi_norm(run))
      if config.rl.cosine_every:
        found.append(psi_cosine(run))
    found += [grpo_update(run), prefill(run), decode(run)]
  outside_rl = any(stage == 'distill' or stage.startswith('evaluate') for stage in config.stages)
  # With a trunk for each lane, as without `engine.trunks`, the call would be the same as in RL.
  if config.engine.trunks and outside_rl:
    found.append(decode_apart(run))
  return found


def more_of_engine(run: RunShapes) -> list[NamedProgram]:
  """Returns what the engine compiles in a run beside its longest calls, which `of_run` has.

  They are compiled for their times alone.
  """
  return run.engine.others()


# --- training -------------------------------------------------------------------------------------


def sft_step(run: RunShapes) -> Program:
  """Returns a step on `sft.rows` full rows."""
  section = run.config.sft
  tx = optimizer.make_optimizer(
    section.optimizer,
    section.learning_rate,
    # The true number depends on how many rows the data gives, which a plan does not know.
    optimizer.Schedule(
      'cosine', warmup=section.warmup, floor=section.floor, total_steps=_SCHEDULE_STEPS
    ),
    weight_decay=section.weight_decay,
    clip=section.clip,
    adam_learning_rate=section.adam_learning_rate or None,
  )
  A = section.accumulate
  # Rows of one micro-batch: the others run one after the other, in the same memory.
  R = run.micro_batch_rows('sft', section.rows, A)
  T = section.capacity
  state = run.state(tx)
  # R * T loss tokens, since every token of a full row is trained.
  batch = abstract_batch(run.mesh, A, R, T, R * T)
  # Rows are taken to be full, with a loss on each token: the most that a step can cost.
  step = sft.make_sft_step(run.model, tx, run.execution)
  return Program(
    name='SFT step',
    lower=functools.partial(_lower, run, step, state, batch, run.frozen),
    arguments={'train state': state, 'batch': batch} | _base(run),
    beside={},
    work=_training_work(run, R, T, T) * A + _update_work(run),
    calls=1,
    per='SFT step',
  )


def rl_optimizer(section: RlSection) -> optax.GradientTransformation:
  """Returns the optimizer of section `rl`."""
  return rl_options.optimizer_options(section).make()


def old_scores(run: RunShapes) -> Program:
  """Returns a pass over `rl.rows` rows with the policy's parameters."""
  state = run.state(rl_optimizer(run.config.rl))
  # The moments are not read by this pass, but stay where they are.
  beside = {
    'moments': device_bytes(state.opt_state),
    'reference policy': device_bytes(run.reference),
  }
  # The policy is scored with its float32 parameters, which lie on the devices anyway.
  params = lora.attach(run.frozen, state.params)
  return _score(run, 'old log-probabilities', params, beside)


def reference_scores(run: RunShapes) -> Program:
  """Returns the same pass with the parameters of the reference policy."""
  state = run.state(rl_optimizer(run.config.rl))
  beside = {
    'moments': device_bytes(state.opt_state),
    'parameters': device_bytes(state.params),
  }
  # Wherever the reference policy waits, its pass has it on the devices.
  return _score(run, 'reference log-probabilities', run.compute_weights(), beside)


def _score(run: RunShapes, name: str, params: Any, beside: dict[str, int]) -> Program:
  section = run.config.rl
  R = run.micro_batch_rows('rl', section.rows)
  T = section.capacity
  # One micro-batch a call: there is no gradient to be accumulated.
  batch = abstract_batch(run.mesh, 1, R, T, R * T)
  packed = group_rows.longest(section)
  # Rows are divided over the devices of the batch; heads over the others, see `_tensor_share`.
  rows = R / run.shards
  work = roofline.forward(run.model, rows, T, rows * packed.loss_tokens, packed.seen)
  score = grpo.make_score_pass(run.model, temperature=section.temperature, execution=run.execution)
  return Program(
    name=name,
    lower=functools.partial(_lower, run, score, params, batch),
    arguments={'parameters': params, 'batch': batch},
    beside=beside | run.engine_bytes(),
    work=_tensor_share(run, work),
    # Every group at its longest, so that no step of the run makes more calls.
    calls=section.updates * math.ceil(packed.rows / section.rows),
    per=_RL_STEP,
  )


class _MiniBatch(NamedTuple):
  """A mini-batch of RL.

  Attributes:
    batch: shapes; its rows come in multiples of `rl_options.rows_multiple`.
    used: micro-batches that hold anything.
    gradient: work of the gradient of one micro-batch.
  """

  batch: tokentree.RowBatch
  used: int
  gradient: Work

  @property
  def used_share(self) -> float:
    """The share of the micro-batches that hold anything."""
    return self.used / self.batch.tokens.shape[0]


def _mini_batch(run: RunShapes, extras: AbstractSet[str]) -> _MiniBatch:
  section = run.config.rl
  R = run.micro_batch_rows('rl', section.rows)
  T = section.capacity
  packed = group_rows.longest(section)
  used = math.ceil(packed.rows / R)
  # Mini-batches are compiled for so many micro-batches; the empty ones are skipped at run time.
  multiple = rl_options.rows_multiple(section, section.max_prompt_tokens, section.max_tokens) // R
  A = math.ceil(used / multiple) * multiple
  return _MiniBatch(
    # Sorted, as the order of a set is not the same in every process.
    batch=abstract_batch(run.mesh, A, R, T, R * T, tuple(sorted(extras))),
    used=used,
    gradient=_training_work(run, R, T, packed.loss_tokens, packed.seen),
  )


def psi_norm(run: RunShapes) -> Program:
  """Returns the gradient of psi alone on one mini-batch, which a step takes for its norm."""
  return _psi_gradient(run, 'gradient of psi', psi_gradient.make_psi_norm, {'psi'})


def psi_cosine(run: RunShapes) -> Program:
  """Returns the two gradients whose angle is measured every `rl.cosine_every` steps."""
  name = 'angle of psi to GRPO'
  return _psi_gradient(run, name, psi_gradient.make_psi_cosine, {'psi', 'without_psi'})


def _psi_gradient(
  run: RunShapes, name: str, make: Callable[..., Any], parts: AbstractSet[str]
) -> Program:
  section = run.config.rl
  loss = rl_options.policy_loss(section)
  state = run.state(rl_optimizer(section))
  mini = _mini_batch(run, loss.extras | parts)
  measured = make(
    run.model,
    temperature=section.temperature,
    execution=run.execution,
    aggregation=loss.aggregation,
    max_tokens=loss.max_tokens,
  )
  # The moments wait for the update that follows; this call does not read them.
  moments = {'moments': device_bytes(state.opt_state)}
  return Program(
    name=name,
    lower=functools.partial(_lower, run, measured, state.params, mini.batch, run.frozen),
    arguments={'parameters': state.params, 'batch': mini.batch} | _base(run),
    beside=moments | run.engine_bytes() | run.reference_bytes(),
    # A gradient for each part.
    work=mini.gradient * (mini.used * len(parts)),
    calls=1,
    per=_RL_STEP,
    loop_share=mini.used_share,
  )


def grpo_update(run: RunShapes) -> Program:
  """Returns an update on one mini-batch."""
  section = run.config.rl
  tx = rl_optimizer(section)
  loss = rl_options.policy_loss(section)
  state = run.state(tx)
  mini = _mini_batch(run, loss.extras)
  scale = None
  if loss.entropy_of:
    number = jax.ShapeDtypeStruct((), np.float32)
    scale = PsiScale(alpha=number, delta=number)
  step = grpo.make_grpo_step(
    run.model,
    tx,
    loss,
    temperature=section.temperature,
    execution=run.execution,
  )
  return Program(
    name='DA-GRPO update',
    lower=functools.partial(_lower, run, step, state, mini.batch, scale, run.frozen),
    arguments={'train state': state, 'batch': mini.batch} | _base(run),
    beside=run.engine_bytes() | run.reference_bytes(),
    work=mini.gradient * mini.used + _update_work(run),
    calls=section.updates,
    per=_RL_STEP,
    loop_share=mini.used_share,
  )


def _base(run: RunShapes) -> dict[str, Any]:
  """Returns the base among the arguments of a step, where there is one."""
  return {} if run.frozen is None else {'base': run.frozen}


def _lower(run: RunShapes, function: Any, *arguments: Any) -> jax.stages.Lowered:
  with jax.set_mesh(run.mesh):
    # Kernels and constraints ask the mesh in context what they are compiled for.
    return function.lower(*arguments)


def _training_work(
  run: RunShapes, R: int, T: int, loss_tokens: int, seen: float | None = None
) -> Work:
  """Returns the work of a device for the gradient of R rows with so many loss tokens each.

  `seen` is as for `roofline.forward`.
  """
  rows = R / run.shards
  remat = run.execution.remat
  work = roofline.training(run.model, rows, T, rows * loss_tokens, remat, seen)
  if run.frozen is not None:
    # One product less for each matrix, that of its gradient; attention, here of a single key, has
    # all of its own. Products of adapters are not counted.
    work = work + roofline.forward(run.model, rows, T, rows * loss_tokens, 1) * -1
  return _tensor_share(run, work)


def _tensor_share(run: RunShapes, work: Work) -> Work:
  """Returns one device's share of the work, of which the tensor axis gives each an equal part."""
  # The tensor axis splits heads, feed-forward layer and vocabulary, which are nearly all the work.
  return work * (1 / run.mesh.shape['tensor'])


def _update_work(run: RunShapes) -> Work:
  # Moments and parameters are split alike, and each device updates its own part.
  return roofline.update(device_bytes(run.parameters()) / 4)  # 4 bytes each


# --- rollouts -------------------------------------------------------------------------------------


def prefill(run: RunShapes) -> Program:
  """Returns the call for a piece of a longest prompt."""
  calls = run.engine
  # The average piece: the first ones see fewer tokens before them, the last one more.
  pieces = math.ceil(calls.prompt / PIECE)
  work = roofline.forward(run.model, 1 / pieces, calls.prompt, 0)
  return Program(
    name='prefill',
    lower=calls.prefill,
    arguments={'engine weights': calls.weights(), 'engine caches': calls.state()},
    beside=_beside_engine(run),
    work=work * (1 / calls.mesh.shape['tensor']),
    calls=run.config.rl.prompts * pieces,
    per=_RL_STEP,
  )


def decode(run: RunShapes) -> Program:
  """Returns a token for every lane at the end of longest responses."""
  calls = run.engine
  section = run.config.rl
  # Every rollout as long as it may be, and all lanes in use: the most calls that a step can take.
  rounds = math.ceil(section.prompts * section.group / calls.sizes.lanes)
  return Program(
    name='decode',
    lower=calls.decode,
    arguments={'engine weights': calls.weights(), 'engine caches': calls.state()},
    beside=_beside_engine(run),
    work=_decode_work(run, calls),
    calls=rounds * section.max_tokens,
    per=_RL_STEP,
  )


def decode_apart(run: RunShapes) -> Program:
  """Returns the same where every rollout has a prompt of its own.

  So it is in distillation and evaluation, which have no training beside them.
  """
  # A pipeline makes another engine for these stages (`policy.engine_sizes`).
  sizes = dataclasses.replace(run.engine.sizes, trunks=run.engine.sizes.lanes)
  calls = dataclasses.replace(run.engine, sizes=sizes, groups=False)
  return Program(
    name='decode without groups',
    lower=calls.decode,
    arguments={'engine weights': calls.weights(), 'engine caches': calls.state()},
    beside={},
    work=_decode_work(run, calls),
    calls=1,
    per='call of the engine outside RL',
  )


def _beside_engine(run: RunShapes) -> dict[str, int]:
  # The engine and the trainer share the devices: training state stays while rollouts are made.
  state = run.state(rl_optimizer(run.config.rl))
  base = {} if run.shares_base else run.base_bytes()
  return {'train state': device_bytes(state)} | base | run.reference_bytes()


def _decode_work(run: RunShapes, calls: EngineCalls) -> Work:
  # The head is counted here, although the draws are a program of their own.
  return roofline.decoding(
    run.model,
    ways=calls.mesh.shape['tensor'],
    lanes=calls.sizes.lanes,
    slots=calls.slots_read,
    cached=calls.prompt + calls.response,
    steps=1,
  )
