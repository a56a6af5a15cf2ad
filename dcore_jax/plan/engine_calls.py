"""The engine's calls as shapes: what it compiles for a model, its lanes and its longest prompts, with nothing allocated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dcore_jax import sharding
from dcore_jax.models import decoder
from dcore_jax.models.attention import Sharing
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import device, engine
from dcore_jax.rollout import lanes as lanes_lib
from dcore_jax.rollout.sampling import Rule, SamplingParams


@dataclasses.dataclass(frozen=True)
class EngineCalls:
  """An engine's longest prefill and decode calls on a mesh; the attributes are those of `Engine`.

  Attributes:
    prompt: tokens of the longest prompt.
    groups: whether the rollouts of a tile share prompts, eight to one; else each has a trunk of its own.
    dtype: of weights and caches.
    mesh: where the weights are.
  """

  model: DecoderConfig
  mesh: Mesh
  lanes: int
  trunks: int
  max_len: int
  max_new: int
  tile: int
  steps_per_call: int
  prompt: int
  stop_ids: int = 1
  groups: bool = True
  dtype: Any = jnp.bfloat16

  def weights(self) -> decoder.Params:
    return sharding.abstract(decoder.abstract_params(self.model, self.dtype), self.mesh)

  def decode_weights(self) -> decoder.Params:
    """As `weights`, on a CPU the copy that is taken apart layer by layer, and turned."""
    if self.mesh.devices.flat[0].platform != 'cpu':
      return self.weights()
    return sharding.abstract(decoder.abstract_turned(self.model, self.dtype), self.mesh)

  def state(self) -> device.State:
    """Trunks and branches."""
    shapes = jax.eval_shape(
      lambda: device.init_state(
        self.model, self.lanes, self.trunks, self.max_len, self.max_new, self.dtype, None
      )
    )
    placement = self._placement or self._everywhere
    cache = decoder.KVCache(placement, placement)
    placed = device.State(cache, self._everywhere, cache, self._everywhere)
    return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      shapes,
      placed,
    )

  @property
  def _placement(self) -> NamedSharding | None:
    return engine.cache_placement(self.weights(), self.model)

  @property
  def _everywhere(self) -> NamedSharding:
    return NamedSharding(self.mesh, jax.P())

  def _inputs(self, tree: Any) -> Any:
    """Numpy arrays as shapes that every device has whole."""
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._everywhere), tree
    )

  def prefill(self) -> jax.stages.Lowered:
    """The last piece of the longest prompt."""
    length = lanes_lib.bucket(lanes_lib.bucket_ladder(self.max_len), min(self.prompt, engine.PIECE))
    span = lanes_lib.bucket(lanes_lib.bucket_ladder(self.max_len), self.prompt)
    inputs = self._inputs(
      (np.zeros((self.lanes, length), np.int32), np.zeros((4, self.lanes), np.int32), np.int32(0))
    )
    with jax.set_mesh(self.mesh):
      return device.prefill.lower(
        self.weights(),
        self.state(),
        *inputs,
        config=self.model,
        span=span,
        rows=max(1, min(engine.BATCH // length, self.lanes)),
        placement=self._placement,
      )

  def decode(self) -> jax.stages.Lowered:
    """A tile of lanes at the end of their responses to the longest prompts, which `trunks_of_tile` share."""
    B, R = self.tile, self.trunks_of_tile
    sharing = Sharing(
      np.zeros(R, np.int32),
      np.zeros((R, -(-B // R) if R == B else lanes_lib.WIDTH), np.int32),
      np.zeros(B, np.int32),
    )
    rule = Rule(*(np.zeros(B, number.dtype) for number in SamplingParams().rule()))
    lanes = device.LaneInputs(
      np.zeros((B, 2), np.uint32),
      *(np.zeros(B, np.int32) for _ in range(3)),
      np.zeros(B, bool),
      rule,
    )
    arguments = self._inputs(
      (
        np.zeros(R, np.int32),
        sharing,
        np.zeros(B, np.int32),
        lanes,
        np.zeros(self.stop_ids, np.int32),
      )
    )
    with jax.set_mesh(self.mesh):
      return device.decode.lower(
        self.decode_weights(),
        self.state(),
        *arguments,
        config=self.model,
        trunk_span=self.trunk_span,
        span=self.span,
        mode=SamplingParams().mode,
        top=0,
        steps=self.steps_per_call,
        placement=self._placement,
      )

  @property
  def trunks_of_tile(self) -> int:
    """Of groups of eight that do not begin and end with the tile a quarter as many trunks as lanes (lanes.plan_tiles)."""
    return self.groups and self.tile // 4 or self.tile

  @property
  def trunk_span(self) -> int:
    return lanes_lib.bucket(lanes_lib.span_ladder(self.max_len), self.prompt)

  @property
  def span(self) -> int:
    return lanes_lib.bucket(
      lanes_lib.span_ladder(self.max_new), min(self.max_new, self.max_len - self.prompt)
    )
