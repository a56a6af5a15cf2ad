"""Runs passes on accelerators and meshes: a program for each grid of rows, and one for draws.

Letters as in passes.py and grids.py.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from dcore_jax import sharding
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout import mesh_programs, programs
from dcore_jax.rollout.grids import PIECE, blank, grid_shapes, lay_out
from dcore_jax.rollout.mesh_programs import MeshShape, State, pack
from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.programs import DrawInputs, Drawn, no_draws, some_draws
from dcore_jax.rollout.sizes import EngineSizes

# A TPU keeps an axis of 128 where it lies; with fewer slots most caches would be padded.
SLOTS = 128
# Draws of the small call, and the most of the large one: logits of 256 rows and 152,000 tokens take
# 156 MB.
_FEW_DRAWS = 32
_MOST_DRAWS = 256
# Rollouts of one text. There is no reason for a limit; each takes a draw.
_MOST_RIDERS = 1 << 20


def pass_rows(sizes: EngineSizes) -> int:
  """Returns the rows of a pass: one for every lane, and no fewer than a piece of a prompt has."""
  return max(sizes.lanes, PIECE)


def draw_counts(sizes: EngineSizes) -> tuple[int, ...]:
  """Returns the numbers of draws for which there are programs, ascending."""
  most = min(max(sizes.lanes, _FEW_DRAWS), _MOST_DRAWS)
  return (_FEW_DRAWS, most) if most > _FEW_DRAWS else (most,)


def cache_dtype(sizes: EngineSizes, dtype: Any) -> Any:
  """Returns the dtype of keys and values, where the parameters have `dtype`."""
  return jnp.dtype(sizes.cache_dtype or dtype)


class MeshExecutor:
  """Holds the weights and the cache of an engine on one or many devices, and runs its passes.

  It has at most six programs (mesh_programs.py): `forward` for three grids, `draw` for two numbers
  of draws, and `copy_page`. No length is compiled in. A pass takes a call for each grid that its
  rows need and one for each 256 draws, and the host waits once, for what was drawn.

  Args:
    params: the parameter tree, on the devices.
    config: the model's configuration.
    sizes: resolved sizes.
    placement: how keys and values are split (`cache_placement`); None: one device.

  Attributes:
    rows: rows of a pass at most.
    slots: positions of a page.
    pages: number of pages.
    guess_cost: 1.0, since a pass waits for the weights with guesses and without.
    riders: rollouts that may ride on a text.
    steps: 1, since the host looks at every token.
    overhead: what a pass costs beside its rows, in rows: so many take as long as to read the
      weights. An A100 does 312 Tflop/s and reads 2.0 TB/s, by which 156 rows of 16-bit weights are
      as long as their reading, and 250 at the share of the peak that products reach.
  """

  slots = SLOTS
  steps = 1
  guess_cost = 1.0
  riders = _MOST_RIDERS

  def __init__(
    self,
    params: decoder.Params,
    config: DecoderConfig,
    sizes: EngineSizes,
    placement: NamedSharding | None,
  ):
    self.rows = pass_rows(sizes)
    self.pages = sizes.pages(SLOTS)
    self._mesh = placement.mesh if placement else None
    self.overhead = 7.0 if sharding.platform(self._mesh) == 'cpu' else 250.0
    self._shape = MeshShape(config=config, placement=placement, rows=self.rows)
    self._grids = grid_shapes(sizes.lanes, -(-sizes.max_len // SLOTS))
    self._counts = draw_counts(sizes)
    self.load(params)
    self._state = self._new_state(params['embed'], cache_dtype(sizes, params['embed'].dtype))

  def unload(self) -> None:
    """Lets the weights go."""
    del self._params

  def load(self, params: decoder.Params) -> None:
    """Takes other weights of the same shapes."""
    self._params = params

  def run(self, work: Pass) -> tuple[Drawn | None, Drawn | None]:
    """Runs a pass: what was drawn and what was scored, on the host."""
    with self._context():
      for grid_shape, grid in lay_out(work, self._grids, SLOTS, self.rows):
        self._state = mesh_programs.forward(
          self._params, self._state, pack(grid), shape=self._shape, grid_shape=grid_shape
        )
      calls = [self._draw(inputs) for inputs in (work.draws, work.scores)]
    # Only here the host waits.
    drawn, scored = (programs.joined(parts) for parts in jax.device_get(calls))
    return drawn, scored

  def copy(self, source: int, target: int, positions: int) -> None:
    """Copies a page into another, all of it: that costs as much as its first positions."""
    del positions
    with self._context():
      self._state = mesh_programs.copy_page(
        self._state, np.array([source, target], np.int32), shape=self._shape
      )

  def prepare(self, progress: Callable[[int, int], None]) -> None:
    """Compiles all programs; `progress` gets (those that are ready, all)."""

    def lowered(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Lowered:
      with self._context():
        return lower()

    programs.compile_all([functools.partial(lowered, lower) for lower in self._lowered()], progress)

  # --- what calls are made of ---------------------------------------------------------------------

  def _context(self) -> contextlib.AbstractContextManager:
    """Sets the mesh of the weights, or none, whatever the mesh of the trainer is."""
    return jax.set_mesh(self._mesh)

  def _new_state(self, embed_VD: jax.Array, dtype: Any) -> State:
    """Returns an empty cache, each part of it made on its device: the whole may not fit on one."""
    make = functools.partial(
      mesh_programs.empty_state, self._shape, self.pages, SLOTS, embed_VD.dtype, dtype
    )
    # Tied to its devices as what calls return is: a program is compiled for the one or the other.
    whole = NamedSharding(embed_VD.sharding.mesh, jax.P()) if self._mesh else embed_VD.sharding
    cache = self._shape.placement or whole
    placed = mesh_programs.state_placement(jax.eval_shape(make), cache, whole)
    with self._context():
      return jax.jit(make, out_shardings=placed)()

  @property
  def _head(self) -> decoder.Params:
    # The draws' program reads no layer: it has fewer arguments without them.
    return {**self._params, 'layers': {}}

  def _lowered(self) -> list[Callable[[], jax.stages.Lowered]]:
    """Returns what traces each program, those first that take longest to compile."""
    shape = self._shape
    found = []
    for grid_shape in self._grids:
      packed = pack(blank(grid_shape, self.rows))
      found.append(
        lambda packed=packed, grid_shape=grid_shape: mesh_programs.forward.lower(
          self._params, self._state, packed, shape=shape, grid_shape=grid_shape
        )
      )
    for count in self._counts:
      packed = pack(no_draws(count))
      found.append(
        lambda packed=packed, count=count: mesh_programs.draw.lower(
          self._head, self._state.hidden_RD, packed, count=count, shape=shape
        )
      )
    pages_2 = np.zeros(2, np.int32)
    found.append(lambda: mesh_programs.copy_page.lower(self._state, pages_2, shape=shape))
    return found

  def _draw(self, inputs: DrawInputs | None) -> list[tuple[int, Drawn]]:
    """Draws or scores, as many at a time as there is a program for: (how many, what) of each."""
    calls = []
    for places in programs.pieces(inputs, self._counts[-1]):
      used = places.stop - places.start
      count = next(count for count in self._counts if count >= used)
      drawn = mesh_programs.draw(
        self._head,
        self._state.hidden_RD,
        pack(some_draws(inputs, places, count)),
        count=count,
        shape=self._shape,
      )
      calls.append((used, drawn))
    return calls
