"""Texts of a pass in tiles: all of them, once, in tiles that there are programs for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.programs import no_draws
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.rollout.tiling import Tiling

MAX_LEN = 2048
STEPS = 16


def make_tiling(lanes):
  sizes = EngineSizes(lanes=lanes, max_len=MAX_LEN, max_new=MAX_LEN, steps_per_call=STEPS)
  return Tiling(sizes, layers=4, weight_bytes=10_000_000, slot_bytes=10_000)


def make_pass(positions, riders):
  """A pass of texts with one row each; `riders` are the draws of each text."""
  text_A = np.repeat(np.arange(len(positions)), riders)
  draws = no_draws(len(text_A))
  draws.row_A[:] = text_A
  count = len(positions)
  return Pass(
    tokens_R=np.zeros(count, np.int32),
    position_R=np.array(positions, np.int32),
    text_R=np.arange(count, dtype=np.int32),
    pages=[[text] for text in range(count)],
    left_N=np.full(count, STEPS, np.int32),
    draws=draws,
    lane_A=text_A.astype(np.int32),
    step_A=np.zeros(len(text_A), np.int32),
    scores=None,
  )


@st.composite
def passes(draw):
  """(lanes, position of each text, draws of each text): a lane holds one rollout."""
  lanes = draw(st.integers(1, 80))
  riders = []
  while sum(riders) < lanes and draw(st.booleans() if riders else st.just(True)):
    riders.append(draw(st.integers(1, min(lanes - sum(riders), make_tiling(lanes).most_draws))))
  positions = draw(
    st.lists(st.integers(0, MAX_LEN - 1), min_size=len(riders), max_size=len(riders))
  )
  return lanes, positions, riders


@given(passes())
def test_each_text_is_in_one_tile_that_is_compiled(made):
  lanes, positions, riders = made
  tiling = make_tiling(lanes)
  texts = []
  for members in tiling.divide(make_pass(positions, riders)):
    assert len(members.draws) == sum(riders[text] for text in members.texts)
    room, draws = tiling.tile_for(members)
    assert (room, draws) in tiling.tiles
    assert len(members.texts) <= room and len(members.draws) <= draws
    longest = max(positions[text] for text in members.texts)
    assert tiling.span(longest) >= min(longest + STEPS, MAX_LEN)
    texts += members.texts
  assert sorted(texts) == list(range(len(positions)))


def test_no_tile_has_more_places_than_there_are_lanes():
  assert make_tiling(1).tiles == [(1, 8)]
  assert make_tiling(4).tiles == [(1, 8), (4, 8)]
  assert make_tiling(16).tiles == [(1, 8), (8, 16), (16, 32)]
  assert make_tiling(64).tiles == [(1, 8), (8, 16), (32, 64)]
