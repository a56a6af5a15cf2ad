"""Names of accelerators that are not there; compiling for them is tested with the kernels."""

# ruff: noqa: E501 (errors are quoted as compilers print them)

import importlib.util
import types

import jax
import pytest

from dcore_jax.plan import roofline, topology


@pytest.mark.parametrize(
  'name', ['h800:8', 'a100', 'a100:2x4', 'a100:12', 'a100:0', 'v5p', 'cpu', '']
)
def test_unknown_accelerators_are_named(name):
  with pytest.raises(ValueError, match=f"unknown accelerators '{name}'"):
    topology.target(name)


@pytest.mark.parametrize('name,package', [('a100:8', 'jax-cuda12-plugin'), ('v5p:2x2x2', 'libtpu')])
def test_a_missing_compiler_is_named(name, package, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=f'needs the package {package}: pip install'):
    topology.target(name)


def test_the_processor_as_a_target_has_as_many_devices_as_jax_began_with():
  count = jax.device_count()
  devices, memory = topology.target(f'cpu:{count}')
  assert devices == jax.devices() and 1 << 20 < memory
  with pytest.raises(ValueError, match=f'cpu:{count + 1}: jax has begun with {count} CPU devices'):
    topology.target(f'cpu:{count + 1}')


@pytest.mark.parametrize(
  'kind,name',
  [
    ('NVIDIA A100-SXM4-80GB', 'a100'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA H200', 'h200'),
    ('NVIDIA B200', 'b200'),
    ('NVIDIA GeForce RTX 4090', 'rtx4090'),
  ],
)
def test_a_gpu_that_is_here_is_known_by_name_and_has_a_roofline(kind, name):
  gpu = types.SimpleNamespace(device_kind=kind, platform='gpu')
  assert topology.name_of([gpu] * 4) == f'{name}:4'
  # The two tables are of the same device.
  accelerator = roofline.ACCELERATORS[roofline.of_target(f'{name}:4')]
  rate = topology._GPUS[name][1]['memory_bandwidth']
  assert accelerator.memory_rate == pytest.approx(rate, rel=0.01)
  assert 20 << 30 < topology.known_bytes(f'{name}:4') < 200 << 30


@pytest.mark.parametrize('kind,name', [('TPU v5 lite', 'v5e:2x4'), ('TPU v6 lite', 'v6e:2x4')])
def test_a_slice_that_is_here_is_known_by_its_shape(kind, name):
  chips = [
    types.SimpleNamespace(device_kind=kind, platform='tpu', coords=(x, y, 0))
    for x in range(2)
    for y in range(4)
  ]
  assert topology.name_of(chips) == name
  assert roofline.of_target(name) == name.partition(':')[0]
  assert topology.known_bytes(name) in (16 << 30, 32 << 30)


def test_devices_that_no_plan_knows_are_named():
  gpu = types.SimpleNamespace(device_kind='NVIDIA T4', platform='gpu')
  with pytest.raises(ValueError, match='no plan for 1 x NVIDIA T4'):
    topology.name_of([gpu])


LAID_OUT = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of memory in memory space \
hbm. Used 21.50G of 15.75G hbm. Exceeded hbm capacity by 5.75G.

Total hbm usage >= 21.75G:
    reserved        258.00M
    program           9.50G
    arguments        12.00G

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(step)/while/dot_general" source_file="step.py" source_line=5
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     ==========================

  2. Size: 512.00M
     Shape: bf16[65536,4096]{1,0:T(8,128)(2,1)}
"""


def test_a_refusal_says_how_much_a_program_would_need():
  gib = 2**30
  arrays = {
    'f32[32,4096,4096] of jit(step)/while/dot_general': 2 * gib,
    'bf16[65536,4096] of no operation': gib // 2,
  }
  assert topology.refusal(LAID_OUT) == (int(21.5 * gib), arrays)
  assert topology.refusal('RESOURCE_EXHAUSTED: Requires 1.50T, has 15.75G available.') == (
    int(1.5 * 2**40),
    {},
  )
  early = (
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
    'temporaries (30.75G) exceeds '
    'available HBM (15.75G).'
  )
  assert topology.refusal(early) == (int(30.75 * gib), {})
  assert (
    topology.refusal(
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem.'
    )
    is None
  )
