"""Both executors give the same: layer by layer on a CPU, and as programs over grids of rows."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcore_jax.models import decoder
from dcore_jax.rollout import device, engine, grids, programs, tile_programs
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.passes import Pass
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from tests.rollout.tiny_model import CONFIG

LANES = 8
MAX_LEN = 400
SLOTS = device.SLOTS


@functools.cache
def params():
  return decoder.init_params(CONFIG, jax.random.key(1))


@functools.cache
def engines(guesses):
  """(in tiles, over grids): kept, so that later examples meet texts of earlier ones."""
  sizes = EngineSizes(lanes=LANES, max_len=MAX_LEN, steps_per_call=4, guesses=guesses)
  tiled = Engine(params(), CONFIG, stop_ids=[5], sizes=sizes)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      engine,
      'make_executor',
      lambda params, config, sizes, _: device.MeshExecutor(params, config, sizes, None),
    )
    return tiled, Engine(params(), CONFIG, stop_ids=[5], sizes=sizes)


def prompt(length, seed):
  # Three kinds of token, so that texts repeat themselves and guesses are often right.
  return np.random.default_rng((length, seed)).integers(6, 9, length)


GROUPS = st.lists(
  st.tuples(
    st.sampled_from((1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 257, 300)),  # tokens of the prompt
    st.integers(0, 1),  # which one
    st.integers(1, 5),  # rollouts of it
    st.sampled_from((1, 5, 40)),  # tokens of each
  ),
  min_size=1,
  max_size=4,
)


@settings(max_examples=12)
@given(GROUPS, st.sampled_from((0, 15)), st.sampled_from((0.0, 0.5, 1.0)))
def test_both_executors_give_the_same(groups, guesses, temperature):
  requests = []
  for number, (length, seed, rollouts, limit) in enumerate(groups):
    for rollout in range(rollouts):
      requests.append(Request(prompt(length, seed), (number, rollout), limit, top=2))
  sampling = SamplingParams(temperature, top_p=0.9, seed=3)
  want, got = (each.generate(requests, sampling) for each in engines(guesses))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    np.testing.assert_allclose(a.full_logprobs, b.full_logprobs, atol=1e-5)


def test_guesses_are_among_what_is_compared():
  requests = [Request(prompt(129, 0), (0, rollout), 200) for rollout in range(6)]
  for each in engines(15):
    each.generate(requests, SamplingParams(0.0))
    assert each.stats.right_guesses


def test_prompts_are_scored_alike():
  for length in (2, 130, 300):
    scores = []
    for each in engines(15):
      each.submit(Request(prompt(length, 0), (9,), max_tokens=0, prompt_top=3), SamplingParams())
      [scored] = each.step()
      scores.append(scored.prompt)
    jax.tree.map(lambda *both: np.testing.assert_allclose(*both, atol=1e-5), *scores)


def test_a_cache_of_int8_rounds_little():
  """A scale for each slot: log-probabilities of the same tokens move a little."""
  sizes = EngineSizes(lanes=LANES, max_len=MAX_LEN, guesses=0, cache_dtype='int8')
  rounded = Engine(params(), CONFIG, stop_ids=[5], sizes=sizes)
  scores = []
  for each in (engines(0)[0], rounded):
    each.submit(Request(prompt(300, 0), (9,), max_tokens=0, prompt_top=3), SamplingParams())
    [scored] = each.step()
    scores.append(scored.prompt.logprobs)
  exact, near = scores
  difference = np.abs(near - exact)
  assert 0 < difference.max() < 0.05
  # Parts of pages and shared ones are copied with their scales.
  requests = [Request(prompt(200, 0), (0, rollout), 20) for rollout in range(5)]
  together = rounded.generate(requests, SamplingParams(1.0))
  alone = [rounded.generate([request], SamplingParams(1.0))[0] for request in requests]
  for a, b in zip(together, alone, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
  with pytest.raises(ValueError, match='cache_dtype'):
    EngineSizes(max_len=64, cache_dtype='int4').resolved(CONFIG)


def test_what_is_prepared_is_not_compiled_again():
  """Neither by the first call nor by later ones, whose arguments come from other calls."""
  sizes = EngineSizes(lanes=5, max_len=MAX_LEN)
  executor = device.MeshExecutor(params(), CONFIG, sizes.resolved(CONFIG), None)
  told = []
  executor.prepare(lambda *ready: told.append(ready))
  assert told == [(ready, 5) for ready in range(6)]
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if 'backend_compile' in event else None
  )
  jax.jit(lambda x: x + 1)(np.float32(1))
  assert len(compiled) == 1
  for _ in range(2):
    executor.copy(0, 1, 1)
    executor.run(a_pass([1, 4, 300]))
    executor.copy(1, 2, 1)
  assert len(compiled) == 1


def a_pass(counts, pages=None, begin=0):
  """A pass that draws nothing: texts with so many rows each, from position `begin` on."""
  rows = sum(counts)
  free = itertools.count()
  return Pass(
    tokens_R=np.arange(rows, dtype=np.int32) % 30,
    position_R=np.concatenate([begin + np.arange(count, dtype=np.int32) for count in counts]),
    text_R=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
    pages=pages or [[next(free) for _ in range(-(-(begin + count) // SLOTS))] for count in counts],
    left_N=np.ones(len(counts), np.int32),
    draws=programs.no_draws(0),
    lane_A=np.zeros(0, np.int32),
    step_A=np.zeros(0, np.int32),
    scores=None,
  )


@settings(max_examples=50)
@given(
  st.lists(st.one_of(st.just(1), st.integers(1, 20), st.integers(1, 300)), min_size=1, max_size=16),
  st.sampled_from((1, 3, 16)),
)
def test_every_row_has_one_place(counts, lanes):
  """Each row stands once in the grids, in order for its text, and beside its text's pages."""
  work = a_pass(counts)
  rows = 10_000
  found = []
  for shape, grid in grids.lay_out(work, grids.grid_shapes(lanes, 3), SLOTS, rows):
    assert grid.token_BM.shape == (shape.blocks, shape.width)
    there_BM = grid.position_BM >= 0
    assert (grid.row_BM[~there_BM] == rows).all()
    row_m = grid.row_BM[there_BM]
    np.testing.assert_array_equal(grid.token_BM[there_BM], work.tokens_R[row_m])
    np.testing.assert_array_equal(grid.position_BM[there_BM], work.position_R[row_m])
    for block, row in zip(np.nonzero(there_BM)[0], row_m, strict=True):
      listed = work.pages[work.text_R[row]]
      assert grid.pages_BP[block, : len(listed)].tolist() == listed
    found.append(row_m)
  found = np.concatenate(found)
  assert sorted(found) == list(range(len(work.tokens_R)))
  for text in range(len(counts)):
    mine = found[work.text_R[found] == text]
    assert (np.diff(mine) > 0).all()


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=20))
def test_only_common_pages_are_read_together(pages):
  work = a_pass([1] * len(pages), pages)
  ends = np.array([len(listed) * SLOTS - 1 for listed in pages], np.int32)
  work = work._replace(position_R=ends)
  [(_, grid)] = grids.lay_out(work, grids.grid_shapes(20, 4), SLOTS, 100)
  block_SW, count_S, place_B = grid.sharing
  for row, count in enumerate(count_S):
    blocks = block_SW[row][block_SW[row] >= 0]
    assert len(blocks) != 1 and bool(count) == bool(len(blocks))
    np.testing.assert_array_equal(place_B[blocks], row * grids.WIDTH + np.arange(len(blocks)))
    assert {tuple(grid.pages_BP[block, :count]) for block in blocks} == (
      {tuple(pages[blocks[0]][:count])} if len(blocks) else set()
    )
    assert all(len(pages[block]) >= count for block in blocks)
  alone = np.setdiff1d(np.arange(20), block_SW)
  assert (place_B[alone] == -1).all()


def test_a_group_reads_its_prompt_once():
  listed = [[7, 8, 9, 20 + rollout] for rollout in range(8)]
  work = a_pass([1] * 8, listed, begin=3 * SLOTS + 5)
  [(_, grid)] = grids.lay_out(work, grids.grid_shapes(8, 4), SLOTS, 100)
  assert grid.sharing.count_S.tolist() == [3, 0]
  assert sorted(grid.sharing.block_SW[0]) == list(range(8))


@pytest.mark.parametrize('kind', [0, 1], ids=['tiles', 'grids'])
def test_a_stream_gives_to_the_last_bit_what_it_gives_alone(kind):
  """Whatever ran before it: texts, guesses and how often they were right are forgotten."""
  requests = [Request(prompt(129, 0), (0, rollout), 40) for rollout in range(3)]
  before = [Request(prompt(length, 1), (9, length), 60) for length in (7, 130, 200)]
  sampling = SamplingParams(0.3, seed=5)
  engines.cache_clear()
  want = engines(15)[kind].generate(requests, sampling)
  engines.cache_clear()
  runner = engines(15)[kind]
  runner.generate(before, SamplingParams(0.0))
  for a, b in zip(runner.generate(requests, sampling), want, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize(('draws', 'made'), [(8, 8), (9, 16)])
def test_a_tile_draws_no_more_than_it_is_asked_for(draws, made):
  """No more than its texts may get, and as many draws at a time as it has texts."""
  tiled, _ = engines(0)
  executor = tiled._executor
  tile = tile_programs.Tile(
    row_B=np.arange(8, dtype=np.int32),
    token_B=np.full(8, 7, np.int32),
    position_B=np.zeros(8, np.int32),
    left_B=np.array([1, 3, 2, 0, 0, 0, 0, 0], np.int32),
    leader_B=np.arange(8, dtype=np.int32),
    draws=np.int32(draws),
  )
  inputs = programs.no_draws(16)._replace(row_A=np.arange(16, dtype=np.int32) % 8)
  shape = tile_programs.DecodeShape(config=CONFIG, span=MAX_LEN, steps=4)
  cache = jax.tree.map(np.copy, executor._cache)  # which is donated
  stop_ids = np.array([5])
  _, drawn = tile_programs.decode(executor._turned, cache, tile, inputs, stop_ids, shape=shape)
  # A draw that was made has an entropy.
  expected_QA = np.zeros((4, 16), bool)
  expected_QA[:3, :made] = True
  np.testing.assert_array_equal(np.asarray(drawn.entropy_A) > 0, expected_QA)


def test_more_rollouts_than_a_tile_has_draws_share_several_texts():
  sizes = EngineSizes(lanes=80, max_len=64, steps_per_call=4, trunks=8)
  runner = Engine(params(), CONFIG, stop_ids=[5], sizes=sizes)
  runner.prepare()
  compiled = runner.stats.compilations
  requests = [Request(prompt(9, 0), (0, rollout), 12) for rollout in range(80)]
  together = runner.generate(requests, SamplingParams(1.0))
  assert runner.stats.compilations == compiled
  for number in (0, 70):
    [alone] = runner.generate([requests[number]], SamplingParams(1.0))
    np.testing.assert_array_equal(alone.tokens, together[number].tokens)
