"""The engine's longest calls as shapes: what it compiles for a model, with nothing allocated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dcore_jax import sharding
from dcore_jax.models import decoder
from dcore_jax.models.attention.reference import Sharing
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import device
from dcore_jax.rollout.device import DecodeShape, LaneInputs, PrefillShape, State
from dcore_jax.rollout.prefill import PIECE, prefill_rows
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes, bucket, bucket_ladder, span_ladder
from dcore_jax.rollout.tiles import WIDTH, Tile


@dataclasses.dataclass(frozen=True)
class EngineCalls:
  """An engine's longest prefill and decode calls on a mesh.

  model: the model's configuration.
  mesh: the mesh that holds the weights.
  sizes: the engine's sizes, resolved.
  prompt: tokens of the longest prompt.
  stop_ids: number of tokens that end a rollout.
  groups: whether rollouts share prompts, eight to one; otherwise each has its own trunk.
  dtype: dtype of weights and caches.
  """

  model: DecoderConfig
  mesh: Mesh
  sizes: EngineSizes
  prompt: int
  stop_ids: int = 1
  groups: bool = True
  dtype: Any = jnp.bfloat16

  def weights(self) -> decoder.Params:
    """Returns the weights as shapes."""
    return sharding.abstract(decoder.abstract_params(self.model, self.dtype), self.mesh)

  def decode_weights(self) -> decoder.Params:
    """Returns as shapes the weights that decode calls read.

    On a CPU they are a second copy, layer by layer and transposed; elsewhere they are the weights.
    """
    # The same question as `Engine` asks, so that the plan counts the copy that the engine makes.
    if sharding.platform(self.mesh) != 'cpu':
      return self.weights()
    return sharding.abstract(decoder.abstract_turned(self.model, self.dtype), self.mesh)

  def all_weights(self) -> Any:
    """Returns all weights that the engine holds, as trees of shapes."""
    if sharding.platform(self.mesh) != 'cpu':
      return self.weights()
    # Both copies stay in memory: prefill reads the stacked one.
    return self.weights(), self.decode_weights()

  def state(self) -> State:
    """Returns trunks and branches as shapes."""

    def make() -> State:
      """The engine's empty state; `eval_shape` reads its shapes and allocates nothing."""
      return device.init_state(self.model, self.sizes, self.dtype, None)

    def place(leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
      """The same shape, placed on the mesh."""
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    # On one device the engine has no placement; shapes need one, to say which devices they are for.
    placed = device.state_placement(self._placement or self._everywhere, self._everywhere)
    return jax.tree.map(place, jax.eval_shape(make), placed)

  def prefill(self) -> jax.stages.Lowered:
    """Returns the call for the last piece of the longest prompt."""
    lanes = self.sizes.lanes
    ladder = bucket_ladder(self.sizes.max_len)
    # A piece is the longest that one call takes; the rest of a prompt is other calls.
    length = bucket(ladder, min(self.prompt, PIECE))
    tokens_XT = np.zeros((lanes, length), np.int32)
    place_4X = np.zeros((4, lanes), np.int32)
    # Values do not matter: these arrays only have the shapes of a call's arguments.
    inputs = self._inputs((tokens_XT, place_4X, np.int32(0)))
    shape = PrefillShape(
      config=self.model,
      span=bucket(ladder, self.prompt),
      # The engine asks the same functions, so that this is a program that it compiles.
      rows=prefill_rows(length, lanes),
      placement=self._placement,
    )
    # The engine's programs are traced under its own mesh.
    with jax.set_mesh(self.mesh):
      return device.prefill.lower(self.weights(), self.state(), *inputs, shape=shape)

  def decode(self) -> jax.stages.Lowered:
    """Returns the call for a tile of lanes at the end of their responses to the longest prompts."""
    # The full tile: smaller ones cost less.
    lanes = self.sizes.tile
    rows = self.trunks_of_tile
    # A row that holds one lane has one place, and not `WIDTH` of them.
    sharing = Sharing(
      length_R=np.zeros(rows, np.int32),
      lane_RW=np.zeros((rows, 1 if rows == lanes else WIDTH), np.int32),
      place_B=np.zeros(lanes, np.int32),
    )
    tile = Tile(np.zeros(lanes, np.int32), np.zeros(rows, np.int32), sharing)
    rule = SamplingParams().rule()
    lane_inputs = LaneInputs(
      key_B2=np.zeros((lanes, 2), np.uint32),
      slot_B=np.zeros(lanes, np.int32),
      limit_B=np.zeros(lanes, np.int32),
      live_B=np.zeros(lanes, bool),
      rule=jax.tree.map(lambda number: np.zeros(lanes, number.dtype), rule),
    )
    inputs = self._inputs((tile, lane_inputs, np.zeros(self.stop_ids, np.int32)))
    shape = DecodeShape(
      config=self.model,
      trunk_span=self.trunk_span,
      span=self.span,
      # Rollouts of RL are drawn at a temperature without truncation, and without alternatives.
      mode=SamplingParams().mode,
      top=0,
      steps=self.sizes.steps_per_call,
      placement=self._placement,
    )
    with jax.set_mesh(self.mesh):
      return device.decode.lower(self.decode_weights(), self.state(), *inputs, shape=shape)

  @property
  def trunks_of_tile(self) -> int:
    """Rows of trunks in a tile.

    Groups of eight that do not begin and end with the tile take a quarter as many rows as lanes
    (`tiles.plan_tiles`).
    """
    # A tile of fewer than four lanes has no quarter.
    quarter = self.sizes.tile // 4
    return quarter if self.groups and quarter else self.sizes.tile

  @property
  def trunk_span(self) -> int:
    """Slots of a trunk that a decode call reads."""
    # The engine reads slots in steps of this ladder; between two steps it reads the longer one.
    return bucket(span_ladder(self.sizes.max_len), self.prompt)

  @property
  def span(self) -> int:
    """Slots of a branch that a decode call reads."""
    # Behind the longest prompt, a response may have less room than `max_new`.
    longest = min(self.sizes.max_new, self.sizes.max_len - self.prompt)
    return bucket(span_ladder(self.sizes.max_new), longest)

  @property
  def _placement(self) -> NamedSharding | None:
    return device.cache_placement(self.weights(), self.model)

  @property
  def _everywhere(self) -> NamedSharding:
    # Small arrays are whole on every device.
    return NamedSharding(self.mesh, jax.P())

  def _inputs(self, tree: Any) -> Any:
    """Returns numpy arrays as shapes that every device has whole."""
    place = self._everywhere
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
    )
