"""Capacities of RL rows: what rows hold, the comparison, and those that the configs have."""

import dataclasses
import importlib
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import pytest

from dcore_jax.models import presets
from dcore_jax.plan import capacity, fit, group_rows, programs, roofline, shapes
from dcore_jax.run.config import default_config, read_config


def paper(name):
  return read_config(importlib.import_module(f'configs.{name}').get_config())


@dataclasses.dataclass(frozen=True)
class Device:
  """Enough of a device for shapes: the quick tests have no compiler for it."""

  id: int
  platform: str
  device_kind: str = 'none'
  process_index: int = 0

  @property
  def client(self):
    return self


def devices_of(name):
  """The GPUs that a config's docstring names."""
  module = importlib.import_module(f'configs.{name}')
  [count] = re.findall(r'--topology=a100:(\d+)', module.__doc__)
  return [Device(number, 'gpu') for number in range(int(count))]


def without_kinds_of_memory(monkeypatch):
  """A100s that are not there name none, and take any name for none; `Device` would refuse it."""
  monkeypatch.setattr(jax.NamedSharding, 'with_memory_kind', lambda sharding, _: sharding)


def section(prompts, group, prompt, response, tokens):
  c = default_config()
  c.rl.update(
    dict(prompts=prompts, updates=1, group=group, max_prompt_tokens=prompt, max_tokens=response)
  )
  c.rl.capacity = tokens
  return read_config(c).rl


@hypothesis.given(
  prompts=st.integers(1, 4),
  held=st.integers(1, 4),
  rows_of_group=st.integers(1, 3),
  prompt=st.integers(64, 96),
  response=st.integers(1, 64),
)
def test_rows_that_are_full_hold_what_the_formula_says(
  prompts, held, rows_of_group, prompt, response
):
  """Rows of one prompt and `held` responses: each token sees its own path alone."""
  tokens = prompt + held * response
  # Two prompts do not fit a row: it holds a part of one group.
  hypothesis.assume(2 * prompt > tokens - 2 * response)
  group = held * rows_of_group
  rows = group_rows.longest(section(prompts, group, prompt, response, tokens))
  assert rows.rows == prompts * rows_of_group and rows.loss_tokens == held * response
  assert rows.dedup == pytest.approx(held * (prompt + response) / tokens)
  pairs = math.comb(prompt + 1, 2) + held * (prompt * response + math.comb(response + 1, 2))
  assert rows.seen == pytest.approx(pairs / tokens)


def test_the_papers_shape():
  rl = paper('qwen3_8b').rl
  assert capacity.candidates(rl) == [8192 + k * 4096 for k in range(1, 9)]
  dedup = {}
  for tokens in capacity.candidates(rl):
    dedup[tokens] = group_rows.longest(dataclasses.replace(rl, capacity=tokens)).dedup
  assert (dedup[16384], dedup[24576], dedup[40960]) == pytest.approx((1.5, 2.0, 2.4))
  # Whole blocks of the kernels; responses that share their last block are one candidate.
  assert capacity.candidates(section(1, 8, 1000, 100, 2048)) == [1536, 2048]
  with pytest.raises(ValueError, match='does not hold a prompt of 8192 and a response of 4096'):
    group_rows.longest(dataclasses.replace(rl, capacity=12287))


def choice(tokens, seconds, fits=True):
  return capacity.Choice(
    capacity=tokens,
    responses=1,
    dedup=1.0,
    rows=1,
    micro_batches=1,
    bound=roofline.Bound(seconds=seconds, by='compute', mfu=1.0),
    total=0,
    fits=fits,
  )


def test_the_best_fits_and_takes_least():
  choices = [choice(512, 3.0), choice(1024, 2.0), choice(1536, 2.0), choice(2048, 1.0, fits=False)]
  assert capacity.best(choices).capacity == 1024
  config = paper('qwen3_8b')
  assert capacity.with_best(config, choices).rl.capacity == 1024
  assert 'best: 1,024; the config has' in capacity.table(choices, config, 'a100:8')
  assert capacity.best(choices[-1:]) is None
  assert 'none of them fits' in capacity.table(choices[-1:], config, 'a100:8')
  with pytest.raises(ValueError, match=r'no rl.capacity of \[2048\] fits'):
    capacity.with_best(config, choices[-1:])


A100_BYTES = 85_100_068_864


@pytest.mark.parametrize('name', sorted(presets.RECORDS))
def test_configs_have_the_best_capacity_for_the_devices_that_they_name(name, monkeypatch):
  without_kinds_of_memory(monkeypatch)
  config = paper(name)
  choices = capacity.compare(
    config,
    fit.model_config(config.model),
    devices_of(name),
    int(fit.HEAD_ROOM * A100_BYTES),
    'a100-80g',
  )
  assert capacity.best(choices).capacity == config.rl.capacity


# Temporaries of the update that jax 0.10.2 compiled for A100, in GiB: config -> capacity -> GiB.
COMPILED = {
  'qwen3_0_6b': {16384: 7.58, 40960: 9.09},
  'qwen3_1_7b': {24576: 9.41, 40960: 10.53},
  'qwen3_4b': {40960: 17.22},
  'qwen3_8b': {16384: 18.57, 24576: 22.44, 40960: 26.02},
  'qwen3_14b': {16384: 29.00, 24576: 33.76, 32768: 39.09, 40960: 37.34},
  'qwen2_5_14b': {40960: 39.10},
  'llama3_1_8b': {40960: 24.26},
  'deepseek_coder_6_7b': {40960: 22.41},
}


@pytest.mark.parametrize('name', sorted(COMPILED))
def test_temporaries_are_estimated_near_what_the_compiler_says(name):
  for tokens, compiled in COMPILED[name].items():
    config = capacity.with_capacity(paper(name), tokens)
    run = shapes.RunShapes(config, fit.model_config(config.model), devices_of(name))
    batch = programs.grpo_update(run).arguments['batch']
    estimate = capacity.update_temporaries(run, batch.tokens.shape[0])
    assert estimate / 2**30 == pytest.approx(compiled, abs=1.6)


def test_what_lies_in_host_memory_is_not_counted_on_devices(monkeypatch):
  without_kinds_of_memory(monkeypatch)
  config = paper('qwen3_32b')
  offloading = dataclasses.replace(config.execution, offload=('optimizer',))
  config = dataclasses.replace(config, execution=offloading)
  run = shapes.RunShapes(config, fit.model_config(config.model), devices_of('qwen3_32b'))
  state = run.state(programs.rl_optimizer(config.rl))
  parameters = shapes.device_bytes(state.params)
  assert shapes.device_bytes(state) == pytest.approx(parameters, abs=64)
  assert shapes.host_bytes(state) == 2 * parameters
