"""What a run holds, as shapes on the devices of a target: weights, moments, batches, caches.

Nothing is allocated. Letters: A micro-batches, R rows, T tokens in a row, M loss tokens of a
micro-batch.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dcore_jax import distributed, sharding, tokentree
from dcore_jax.config import RunConfig
from dcore_jax.learn import lora, optimizer
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.plan.engine_calls import EngineCalls
from dcore_jax.rollout.policy import engine_sizes, make_execution


class HostShape(jax.ShapeDtypeStruct):
  """An array that lies in host memory.

  The sharding alone cannot say so: GPUs that are not there name no kinds of memory.
  """


def device_bytes(tree: Any) -> int:
  """Returns the bytes of a tree of shapes on each device, less what lies in host memory."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    # Host memory is counted apart: `host_bytes`.
    if not isinstance(leaf, HostShape):
      total += _shard_bytes(leaf)
  return total


def host_bytes(tree: Any) -> int:
  """Returns the bytes of a tree of shapes that each device has in host memory."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, HostShape):
      total += _shard_bytes(leaf)
  return total


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
  # All devices hold as much: shardings divide evenly.
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def abstract_batch(
  mesh: Mesh, A: int, R: int, T: int, M: int, extras: tuple[str, ...] = ()
) -> tokentree.RowBatch:
  """Returns what `TokenTree.batch` gives and `sharding.place_batch` places, as shapes.

  Args:
    mesh: of the training.
    A: micro-batches.
    R: rows of a micro-batch.
    T: tokens of a row.
    M: loss tokens of a micro-batch.
    extras: names of values for each loss token.
  """
  # The trainer's own function places the batch, so that a plan cannot differ from the run.
  # All arrays of a batch have rows or loss tokens along their second axis, which is split.
  place = sharding.batch_sharding(mesh)
  row = jax.ShapeDtypeStruct((A, R, T), jnp.int32, sharding=place)
  index = jax.ShapeDtypeStruct((A, M), jnp.int32, sharding=place)
  number = jax.ShapeDtypeStruct((A, M), jnp.float32, sharding=place)
  return tokentree.RowBatch(
    tokens=row,
    position=row,
    end=row,
    parent=index,
    slot=index,
    target=index,
    weight=number,
    # 'sequence' numbers the response that a token belongs to; all others are values.
    extras={name: index if name == 'sequence' else number for name in extras},
  )


class RunShapes:
  """What a run holds, as shapes on the devices of a target.

  Args:
    config: of the run.
    model: the model's configuration.
    devices: of the target, real or not.

  Attributes:
    execution: how training passes run.
    mesh: of the training.
    shards: devices that the rows of a batch are divided over.
    reference: the reference policy, in host memory where `execution.offload` says so; nothing
      under LoRA, where it is the base.
    frozen: under LoRA what the adapters stand beside; otherwise None.
    engine: the engine's calls.

  Raises:
    ValueError: sizes that do not fit each other, such as heads over the mesh; or moments that shall
      lie in host memory where that is the devices' own.
  """

  def __init__(self, config: RunConfig, model: DecoderConfig, devices: list[jax.Device]):
    self.config = config
    self.model = model
    self.execution = make_execution(config.execution)
    self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    if self.execution.offload and sharding.platform(self.mesh) == 'cpu':
      raise ValueError("execution.offload: CPU devices have no memory apart from the host's")
    # Both ask the mesh in context: how many ways it splits a batch, and what it computes in.
    with jax.set_mesh(self.mesh):
      self.shards = sharding.shards()
      parameters = {'embed': jax.ShapeDtypeStruct((), jnp.float32)}
      # The dtype in which training passes compute.
      self.dtype = self.execution.dtype(parameters)
    weights = self.compute_weights()
    # Parameters and moments are float32, whatever training passes compute in.
    if config.lora.rank:
      self._specs = lora.abstract_adapters(model, config.lora)
      self.frozen = lora.Frozen(weights, lora.scale(config.lora))
      self.reference = {}
    else:
      self._specs = decoder.abstract_params(model)
      self.frozen = None
      # A reference policy is not trained, so that it is kept in the dtype of computation alone.
      everything = jax.tree.map(lambda _: True, weights)
      self.reference = self._on_host(weights, 'reference', everything)
    engine_mesh = distributed.engine_mesh(config, self.mesh)
    # The engine's own functions, so that the plan has the sizes that the run will have.
    sizes = engine_sizes(config, groups=not config.rl.episodes)
    sizes = sizes.resolved(model)
    self.engine = EngineCalls(
      model=model,
      mesh=engine_mesh,
      sizes=sizes,
      # A prompt must leave room for one token.
      prompt=min(config.rl.max_prompt_tokens, sizes.max_len - 1),
      dtype=self.dtype,
      adapted=config.lora if self._unmerged else None,
    )

  @property
  def _unmerged(self) -> bool:
    """Whether rollouts read adapters beside their base."""
    return self.frozen is not None and self.config.lora.rollouts == 'unmerged'

  def parameters(self) -> Any:
    """Returns what is trained, float32: all parameters, or the adapters."""
    return sharding.abstract(self._specs, self.mesh)

  def base_bytes(self) -> dict[str, int]:
    """Returns bytes of the base on each device, where there is one."""
    return {} if self.frozen is None else {'base': device_bytes(self.frozen)}

  @property
  def shares_base(self) -> bool:
    """Whether the engine's weights are the base's own arrays: unmerged, and split as those are."""
    return self._unmerged and dict(self.engine.mesh.shape) == dict(self.mesh.shape)

  def compute_weights(self) -> decoder.Params:
    """Returns weights of the model in the dtype of computation, on the mesh of the training."""
    return sharding.abstract(decoder.abstract_params(self.model, self.dtype), self.mesh)

  def state(self, tx: Any) -> optimizer.TrainState:
    """Returns parameters and the moments of the optimizer `tx`."""
    state = sharding.abstract(optimizer.abstract_state(self._specs, tx), self.mesh)
    # The optimizer's step counter stays on the devices; only what is as large as the parameters
    # moves.
    moments = optimizer.moments(tx, state.opt_state, state.params)
    placed = self._on_host(state.opt_state, 'optimizer', moments)
    return dataclasses.replace(state, opt_state=placed)

  def engine_bytes(self) -> dict[str, int]:
    """Returns bytes that the engine holds on each device, by name."""
    weights = self.engine.adapters() if self.shares_base else self.engine.all_weights()
    return {
      'engine weights': device_bytes(weights),
      'engine caches': device_bytes(self.engine.state()),
    }

  def reference_bytes(self) -> dict[str, int]:
    """Returns bytes of the reference policy on each device, where the run has one."""
    # Without a KL term nothing reads a reference policy, and the run holds none.
    if not self.config.rl.kl_coefficient or self.frozen is not None:
      return {}
    return {'reference policy': device_bytes(self.reference)}

  def micro_batch_rows(self, section: str, rows: int, parts: int = 1) -> int:
    """Returns the rows of one of `parts` micro-batches that `section`.rows are divided into.

    Raises:
      ValueError: they do not divide into whole rows on each device.
    """
    # A device cannot hold part of a row: attention would have to reach across.
    if rows % (parts * self.shards):
      raise ValueError(
        f'{section}.rows = {rows} do not divide into {parts} micro-batches over '
        f'{self.shards} devices'
      )
    return rows // parts

  def _on_host(self, tree: Any, what: str, moved: Any) -> Any:
    """Returns the same shapes, some of them in host memory where `execution.offload` names `what`.

    Args:
      tree: shapes.
      what: a name of `execution.offload`.
      moved: tree of bools, True for what goes to host memory.
    """
    if what not in self.execution.offload:
      return tree

    def place(leaf: jax.ShapeDtypeStruct, move: bool) -> jax.ShapeDtypeStruct:
      """One array's shape, in host memory where it is to move."""
      if not move:
        return leaf
      host = leaf.sharding.with_memory_kind(optimizer.HOST)
      return HostShape(leaf.shape, leaf.dtype, sharding=host)

    return jax.tree.map(place, tree, moved)
