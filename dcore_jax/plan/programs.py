"""The steps of a run as programs to be compiled from shapes: what they read, what lies beside them, how much they do.

The functions are those that the loops call; nothing is allocated. Letters: A micro-batches, R rows, T tokens in a row, M loss
tokens of a micro-batch.
"""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from dcore_jax import distributed, sharding, tokentree
from dcore_jax.learn import advantages, grpo, optimizer, sft
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.plan import roofline
from dcore_jax.plan.engine_calls import EngineCalls
from dcore_jax.plan.roofline import Work
from dcore_jax.rollout.engine import PIECE
from dcore_jax.train import grpo_loop


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled step.

  Attributes:
    name: of the step; `calls` of it make a unit of `per`.
    lower: traces it.
    arguments: name -> tree of shapes, for telling what is large.
    beside: name -> bytes per device that are held while it runs and are not its arguments.
    work: of one call on one device; what is sent is read from the compiled program.
    loop_share: a micro-batch loop is compiled for more turns than are taken: the share that is. A loop of unknown length is
      taken for one turn: the number of its turns.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  arguments: dict[str, Any]
  beside: dict[str, int]
  work: Work
  calls: int
  per: str
  loop_share: float = 1.0


def device_bytes(tree: Any) -> int:
  """Bytes of a tree of shapes on each device; what lies in host memory does not count."""
  return sum(
    _shard_bytes(leaf)
    for leaf in jax.tree.leaves(tree)
    if leaf.sharding.memory_kind != optimizer.HOST
  )


def host_bytes(tree: Any) -> int:
  """Bytes of a tree of shapes that each device has in host memory."""
  return sum(
    _shard_bytes(leaf)
    for leaf in jax.tree.leaves(tree)
    if leaf.sharding.memory_kind == optimizer.HOST
  )


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def abstract_batch(
  mesh: Mesh, A: int, R: int, T: int, M: int, extras: tuple[str, ...] = ()
) -> tokentree.RowBatch:
  """What `tokentree.TokenTree.batch` gives and `sharding.place_batch` places, as shapes."""
  rows = sharding.batch_sharding(mesh)
  array = lambda shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  return tokentree.RowBatch(
    *(array((A, R, T)) for _ in range(3)),
    *(array((A, M)) for _ in range(3)),
    array((A, M), jnp.float32),
    {name: array((A, M), jnp.int32 if name == 'sequence' else jnp.float32) for name in extras},
  )


class Programs:
  """The programs of a config on the devices of a target.

  Args:
    config: a whole config (run.defaults).
    model: its model.
    devices: of the target, real or not.

  Raises:
    ValueError: sizes that do not fit each other: rows over the devices, a rollout in a row, heads over the mesh.
  """

  def __init__(
    self, config: ml_collections.ConfigDict, model: DecoderConfig, devices: list[jax.Device]
  ):
    self.config, self.model = config, model
    self.execution = Execution(**config.execution)
    self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    if self.execution.offload and devices[0].platform == 'cpu':
      raise ValueError("execution.offload: CPU devices have no memory apart from the host's")
    with jax.set_mesh(self.mesh):
      self.shards, self.dtype = (
        sharding.shards(),
        self.execution.dtype({'embed': jax.ShapeDtypeStruct((), jnp.float32)}),
      )
    self.specs = decoder.abstract_params(model)
    reference = sharding.abstract(decoder.abstract_params(model, self.dtype), self.mesh)
    self.reference = self._on_host(reference, 'reference', jax.tree.map(lambda _: True, reference))
    c = config.engine
    self.engine = EngineCalls(
      model,
      distributed.engine_mesh(config, self.mesh),
      lanes=c.lanes,
      trunks=c.lanes if config.rl.episodes else c.trunks or c.lanes,
      max_len=c.max_len,
      max_new=min(c.max_new or c.max_len, c.max_len),
      tile=c.tile or c.lanes,
      steps_per_call=c.steps_per_call,
      prompt=min(config.rl.max_prompt_tokens, c.max_len - 1),
      dtype=self.dtype,
    )

  def _on_host(self, tree: Any, what: str, moved: Any) -> Any:
    """The same shapes, in host memory those for which the tree `moved` has True, where `execution.offload` says so."""
    if what not in self.execution.offload:
      return tree
    move = lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(optimizer.HOST)
    )
    return jax.tree.map(lambda leaf, here: move(leaf) if here else leaf, tree, moved)

  def state(self, tx: Any) -> optimizer.TrainState:
    """Parameters and moments."""
    state = sharding.abstract(optimizer.abstract_state(self.specs, tx), self.mesh)
    return dataclasses.replace(
      state,
      opt_state=self._on_host(
        state.opt_state, 'optimizer', optimizer.moments(state.opt_state, state.params)
      ),
    )

  def all(self) -> list[Program]:
    """SFT, then what a DA-GRPO step consists of, where the config has these stages."""
    found = [self.sft()] if 'sft' in self.config.stages else []
    if 'rl' in self.config.stages:
      found += [self.score('old log-probabilities')]
      found += [self.score('reference log-probabilities')] if self.config.rl.kl_coefficient else []
      found += [self.psi()] if advantages.uses_entropy(self.config.rl.estimator) else []
      found += [self.grpo(), self.prefill(), self.decode()]
    if self.config.engine.trunks and any(
      stage == 'distill' or stage.startswith('evaluate') for stage in self.config.stages
    ):
      found += [self.decode_apart()]
    return found

  # --- training -----------------------------------------------------------------------------------------------------------

  def _rows(self, section: str, parts: int = 1) -> int:
    """Rows of a micro-batch."""
    rows = self.config[section].rows
    if rows % (parts * self.shards):
      raise ValueError(
        f'{section}.rows = {rows} do not divide into {parts} micro-batches over {self.shards} devices'
      )
    return rows // parts

  def _per_device(self, work: Work) -> Work:
    """Of a part of the batch, whose heads, ffn and vocabulary the tensor axis splits."""
    return work * (1 / self.mesh.shape['tensor'])

  def _lower(self, function: Any, *arguments: Any) -> jax.stages.Lowered:
    with jax.set_mesh(self.mesh):
      return function.lower(*arguments)

  def sft(self) -> Program:
    """A step on `sft.rows` full rows."""
    c = self.config.sft
    tx = optimizer.make_optimizer(
      c.optimizer,
      c.learning_rate,
      'cosine',
      warmup=c.warmup,
      floor=c.floor,
      total_steps=1000,
      weight_decay=c.weight_decay,
      clip=c.clip,
      adam_learning_rate=c.adam_learning_rate or None,
    )
    R = self._rows('sft', c.accumulate)
    state, batch = (
      self.state(tx),
      abstract_batch(self.mesh, c.accumulate, R, c.capacity, R * c.capacity),
    )
    rows = R / self.shards
    part = roofline.training(self.model, rows, c.capacity, rows * c.capacity, self.execution.remat)
    step = sft.make_sft_step(self.model, tx, self.execution)
    return Program(
      'SFT step',
      lambda: self._lower(step, state, batch),
      {'train state': state, 'batch': batch},
      {},
      self._per_device(part) * c.accumulate + self._update(),
      1,
      'SFT step',
    )

  def _update(self) -> Work:
    return roofline.update(device_bytes(sharding.abstract(self.specs, self.mesh)) / 4)

  @property
  def rows_per_group(self) -> int:
    """Rows that the rollouts of one longest prompt take at their longest; each row repeats the prompt."""
    c = self.config.rl
    fit = (c.capacity - c.max_prompt_tokens) // c.max_tokens
    if fit < 1:
      raise ValueError(
        f'rl.capacity = {c.capacity} does not hold a prompt of {c.max_prompt_tokens} and a response of '
        f'{c.max_tokens} tokens'
      )
    return -(-c.group // fit)

  def rl_optimizer(self) -> Any:
    c = self.config.rl
    return optimizer.make_optimizer(
      'adamw', c.learning_rate, weight_decay=c.weight_decay, clip=c.clip
    )

  def _engine_bytes(self) -> dict[str, int]:
    weights = device_bytes(self.engine.weights())
    if self.engine.mesh.devices.flat[0].platform == 'cpu':
      weights += device_bytes(self.engine.decode_weights())
    return {'engine weights': weights, 'engine caches': device_bytes(self.engine.state())}

  def score(self, name: str) -> Program:
    """A pass over `rl.rows` rows with the policy's parameters, or with the reference policy's."""
    c, R, state = self.config.rl, self._rows('rl'), self.state(self.rl_optimizer())
    batch = abstract_batch(self.mesh, 1, R, c.capacity, R * c.capacity)
    on_device = sharding.abstract(decoder.abstract_params(self.model, self.dtype), self.mesh)
    old = name.startswith('old')
    params = state.params if old else on_device
    rest = {'moments': device_bytes(state.opt_state)}
    rest |= (
      {'reference policy': device_bytes(self.reference)}
      if old
      else {'parameters': device_bytes(state.params)}
    )
    rows = c.rows / self.shards
    work = self._per_device(roofline.forward(self.model, rows, c.capacity, rows * c.capacity))
    score = grpo.make_score_pass(self.model, temperature=c.temperature, execution=self.execution)
    return Program(
      name,
      lambda: self._lower(score, params, batch),
      {'parameters': params, 'batch': batch},
      rest | self._engine_bytes(),
      work,
      -(-c.prompts * self.rows_per_group // c.rows),
      'DA-GRPO step',
    )

  def _mini_batch(self, extras: AbstractSet[str]) -> tuple[tokentree.RowBatch, int, Work]:
    """(A mini-batch, whose rows come in multiples of `grpo_loop.rows_multiple`; its micro-batches that are used; a gradient of
    one of them)."""
    c, R = self.config.rl, self._rows('rl')
    used = -(-c.prompts // c.updates * self.rows_per_group // R)
    multiple = grpo_loop.rows_multiple(c, c.max_prompt_tokens, c.max_tokens) // R
    A, rows = -(-used // multiple) * multiple, R / self.shards
    part = roofline.training(self.model, rows, c.capacity, rows * c.capacity, self.execution.remat)
    return (
      abstract_batch(self.mesh, A, R, c.capacity, R * c.capacity, tuple(sorted(extras))),
      used,
      self._per_device(part),
    )

  def _beside_update(self) -> dict[str, int]:
    return self._engine_bytes() | (
      {'reference policy': device_bytes(self.reference)} if self.config.rl.kl_coefficient else {}
    )

  def psi(self) -> Program:
    """The gradient of psi alone on one mini-batch, which a step takes for its norm."""
    c, loss, state = (
      self.config.rl,
      grpo_loop.policy_loss(self.config.rl),
      self.state(self.rl_optimizer()),
    )
    batch, used, part = self._mini_batch(loss.extras | {'psi'})
    norm = grpo.make_psi_norm(
      self.model,
      temperature=c.temperature,
      execution=self.execution,
      aggregation=loss.aggregation,
      max_tokens=loss.max_tokens,
    )
    arguments, beside = (
      {'parameters': state.params, 'batch': batch},
      {'moments': device_bytes(state.opt_state)},
    )
    return Program(
      'gradient of psi',
      lambda: self._lower(norm, state.params, batch),
      arguments,
      beside | self._beside_update(),
      part * used,
      1,
      'DA-GRPO step',
      used / batch.tokens.shape[0],
    )

  def grpo(self) -> Program:
    """An update on one mini-batch."""
    c, tx, loss = self.config.rl, self.rl_optimizer(), grpo_loop.policy_loss(self.config.rl)
    state, (batch, used, part) = self.state(tx), self._mini_batch(loss.extras)
    step = grpo.make_grpo_step(
      self.model,
      tx,
      temperature=c.temperature,
      execution=self.execution,
      **dataclasses.asdict(loss),
    )
    return Program(
      'DA-GRPO update',
      lambda: self._lower(step, state, batch),
      {'train state': state, 'batch': batch},
      self._beside_update(),
      part * used + self._update(),
      c.updates,
      'DA-GRPO step',
      used / batch.tokens.shape[0],
    )

  # --- rollouts -----------------------------------------------------------------------------------------------------------

  def _beside_engine(self) -> dict[str, int]:
    state = self.state(self.rl_optimizer())
    reference = (
      {'reference policy': device_bytes(self.reference)} if self.config.rl.kl_coefficient else {}
    )
    return {'train state': device_bytes(state)} | reference

  def prefill(self) -> Program:
    """A piece of a longest prompt."""
    e, c = self.engine, self.config.rl
    pieces = -(-e.prompt // PIECE)
    work = roofline.forward(self.model, 1 / pieces, e.prompt, 0) * (1 / e.mesh.shape['tensor'])
    return Program(
      'prefill',
      e.prefill,
      {'engine weights': e.weights(), 'engine caches': e.state()},
      self._beside_engine(),
      work,
      c.prompts * pieces,
      'DA-GRPO step',
    )

  def decode(self) -> Program:
    """`engine.steps_per_call` tokens of a tile at the end of longest responses."""
    e, c = self.engine, self.config.rl
    slots = e.trunks_of_tile * e.trunk_span + e.tile * e.span
    work = roofline.decoding(
      self.model, e.mesh.shape['tensor'], e.tile, slots, e.trunk_span + e.span, e.steps_per_call
    )
    calls = -(-c.prompts * c.group // e.tile) * -(-c.max_tokens // e.steps_per_call)
    return Program(
      'decode',
      e.decode,
      {'engine weights': e.decode_weights(), 'engine caches': e.state()},
      self._beside_engine(),
      work,
      calls,
      'DA-GRPO step',
      e.steps_per_call,
    )

  def decode_apart(self) -> Program:
    """The same where every rollout has a prompt, and a trunk, of its own: distillation and evaluation, with no training beside."""
    e = dataclasses.replace(self.engine, trunks=self.engine.lanes, groups=False)
    slots = e.tile * (e.trunk_span + e.span)
    work = roofline.decoding(
      self.model, e.mesh.shape['tensor'], e.tile, slots, e.trunk_span + e.span, e.steps_per_call
    )
    return Program(
      'decode without groups',
      e.decode,
      {'engine weights': e.decode_weights(), 'engine caches': e.state()},
      {},
      work,
      1,
      'call of the engine outside RL',
      e.steps_per_call,
    )
