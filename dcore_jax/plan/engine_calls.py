"""The engine's programs as shapes: what it compiles for a model, with nothing allocated."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dcore_jax import sharding
from dcore_jax.config import LoraSection
from dcore_jax.learn import lora
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.plan.compile_times import NamedProgram
from dcore_jax.rollout import device, grids, mesh_programs, programs
from dcore_jax.rollout.device import SLOTS
from dcore_jax.rollout.grids import GridShape
from dcore_jax.rollout.mesh_programs import MeshShape, State
from dcore_jax.rollout.sizes import EngineSizes


@dataclasses.dataclass(frozen=True)
class EngineCalls:
  """An engine's calls on a mesh, at the end of longest responses to longest prompts.

  On one CPU an engine runs layer by layer instead, by programs of no size; there these calls stand
  in for them.

  model: the model's configuration.
  mesh: the mesh that holds the weights.
  sizes: the engine's sizes, resolved.
  prompt: tokens of the longest prompt.
  groups: whether rollouts share prompts, eight to one; otherwise each has its own.
  dtype: dtype of weights, and of the cache where `sizes` name no other.
  adapted: section `lora` where rollouts read unmerged adapters; otherwise None.
  """

  model: DecoderConfig
  mesh: Mesh
  sizes: EngineSizes
  prompt: int
  groups: bool = True
  dtype: Any = jnp.bfloat16
  adapted: LoraSection | None = None

  def weights(self) -> decoder.Params:
    """Returns the weights as shapes."""
    base = sharding.abstract(decoder.abstract_params(self.model, self.dtype), self.mesh)
    if self.adapted is None:
      return base
    return lora.attach(lora.Frozen(base, lora.scale(self.adapted)), self.adapters())

  def adapters(self) -> lora.Adapters:
    """Returns the adapters of `adapted` as shapes, in the dtype of the weights."""
    specs = lora.abstract_adapters(self.model, self.adapted)
    cast = jax.tree.map(lambda spec: dataclasses.replace(spec, dtype=self.dtype), specs)
    return sharding.abstract(cast, self.mesh)

  def all_weights(self) -> Any:
    """Returns all weights that the engine holds, as trees of shapes."""
    if sharding.platform(self.mesh) != 'cpu' or self.mesh.size > 1:
      return self.weights()
    # One CPU has a second copy, layer by layer and transposed.
    weights = self.weights()
    turned = jax.eval_shape(decoder.turn, weights)
    return weights, jax.tree.map(lambda leaf: _placed(leaf, self._everywhere), turned)

  def state(self) -> State:
    """Returns cache and hidden states as shapes."""
    make = functools.partial(
      mesh_programs.empty_state,
      self._shape,
      self.sizes.pages(SLOTS),
      SLOTS,
      self.dtype,
      device.cache_dtype(self.sizes, self.dtype),
    )

    # On one device the engine has no placement; shapes need one, to say which devices they are for.
    state = jax.eval_shape(make)
    cache = self._shape.placement or self._everywhere
    return jax.tree.map(
      _placed, state, mesh_programs.state_placement(state, cache, self._everywhere)
    )

  def prefill(self) -> jax.stages.Lowered:
    """Returns the call for pieces of prompts."""
    return self._forward(self._grids.piece)

  def decode(self) -> jax.stages.Lowered:
    """Returns the call for a token of every lane."""
    return self._forward(self._grids.one)

  def others(self) -> list[NamedProgram]:
    """Returns the engine's other programs, which are small beside these two."""
    found = [NamedProgram('decode with guesses', lambda: self._forward(self._grids.few))]
    for count in device.draw_counts(self.sizes):
      found.append(NamedProgram(f'draw, {count} at a time', functools.partial(self._draw, count)))
    found.append(NamedProgram('copy of a page', self._copy))
    return found

  @property
  def response(self) -> int:
    """Tokens of the longest response."""
    # Behind the longest prompt there may be less room than `max_new`.
    return min(self.sizes.max_new, self.sizes.max_len - self.prompt)

  @property
  def slots_read(self) -> int:
    """Slots that a decode call reads of each layer, those that blocks read together once."""
    lanes = self.sizes.lanes
    prompts = -(-lanes // grids.WIDTH) if self.groups else lanes
    return prompts * self.prompt + lanes * self.response

  @property
  def _grids(self) -> grids.GridShapes:
    return grids.grid_shapes(self.sizes.lanes, -(-self.sizes.max_len // SLOTS))

  @property
  def _shape(self) -> MeshShape:
    return MeshShape(
      config=self.model,
      placement=mesh_programs.cache_placement(self.weights(), self.model),
      rows=device.pass_rows(self.sizes),
    )

  @property
  def _everywhere(self) -> NamedSharding:
    # Small arrays are whole on every device.
    return NamedSharding(self.mesh, jax.P())

  def _forward(self, grid_shape: GridShape) -> jax.stages.Lowered:
    shape = self._shape
    packed = mesh_programs.pack(grids.blank(grid_shape, shape.rows))
    return self._lower(
      mesh_programs.forward,
      self.weights(),
      self.state(),
      packed,
      shape=shape,
      grid_shape=grid_shape,
    )

  def _draw(self, count: int) -> jax.stages.Lowered:
    head = {**self.weights(), 'layers': {}}
    packed = mesh_programs.pack(programs.no_draws(count))
    hidden_RD = self.state().hidden_RD
    return self._lower(mesh_programs.draw, head, hidden_RD, packed, count=count, shape=self._shape)

  def _copy(self) -> jax.stages.Lowered:
    pages_2 = np.zeros(2, np.int32)
    return self._lower(mesh_programs.copy_page, self.state(), pages_2, shape=self._shape)

  def _lower(self, program: Callable[..., Any], *arguments: Any, **static: Any) -> Any:
    """Lowers a program; what is a numpy array is whole on every device."""
    # Values do not matter: these arrays only have the shapes of a call's arguments.
    placed = [
      jax.ShapeDtypeStruct(given.shape, given.dtype, sharding=self._everywhere)
      if isinstance(given, np.ndarray)
      else given
      for given in arguments
    ]
    # The engine's programs are traced under its own mesh.
    with jax.set_mesh(self.mesh):
      return program.lower(*placed, **static)


def _placed(leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
  """Returns the same shape, placed on the mesh."""
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
