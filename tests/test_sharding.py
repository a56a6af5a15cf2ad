"""Sharding rules and sharded steps on eight fake devices (processes of their own: their number is
fixed when jax starts).
"""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_importing_asks_for_no_device():
  """`jax.distributed` and flags must be set before the first device is asked for, and after the
  imports.
  """
  environment = os.environ | {'JAX_PLATFORMS': 'no_such_platform'}
  subprocess.run(
    [
      sys.executable,
      '-c',
      'import dcore_jax.run.pipeline, dcore_jax.organism.pretrain, experiments.train',
    ],
    check=True,
    env=environment,
  )


PROGRAM = textwrap.dedent("""
    import jax, jax.numpy as jnp, numpy as np
    from dcore_jax import sharding
    from dcore_jax.models import decoder
    from dcore_jax.models.config import DecoderConfig

    config = DecoderConfig(
      vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
      num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )
    mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=2)
    assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
    placed = sharding.shardings(decoder.abstract_params(config), mesh)
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    split = jax.device_put(params, placed)
    assert split['layers']['gate'].sharding.shard_shape((1, 32, 48)) == (1, 16, 24)
    assert split['embed'].sharding.shard_shape((64, 32)) == (32, 16)
    assert split['layers']['attn_norm'].sharding.is_fully_replicated

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 6)))
    position, end = jnp.broadcast_to(jnp.arange(6)[None], (4, 6)), jnp.full((4, 6), 6)
    run = jax.jit(decoder.hidden_states, static_argnums=1)
    batch = jax.sharding.NamedSharding(mesh, sharding.partition_spec(('batch',), (4,), mesh))
    got = run(split, config, *jax.device_put((tokens, position, end), batch))
    np.testing.assert_allclose(got, run(params, config, tokens, position, end), atol=1e-5)

    def error(*args):
      try:
        sharding.partition_spec(*args)
      except ValueError as raised:
        return str(raised)
      raise AssertionError(f'no error for {args}')

    collision = error(('heads', 'mlp'), (4, 48), mesh)
    assert "'heads'" in collision and "'mlp'" in collision and "'tensor'" in collision, collision
    indivisible = error(('vocab', 'embed'), (63, 32), mesh)
    assert "'vocab'" in indivisible and '63' in indivisible and 'tensor' in indivisible, indivisible
    assert "'batch'" in error(('batch',), (6,), mesh)
    assert "'colour'" in error(('colour',), (6,), mesh)
    # Unconstrained without a mesh; with one, an activation is annotated by the same names.
    assert sharding.constrain(tokens, 'batch', 'length') is tokens
    assert sharding.shards() == 1 and sharding.platform() == 'cpu'
    with jax.set_mesh(mesh):
      assert sharding.shards() == 4 and sharding.shards('vocab') == 2
      constrained = jax.jit(lambda x: sharding.constrain(x, 'batch', 'length'))(tokens)
      assert constrained.sharding.is_equivalent_to(batch, 2)

    for wrong in (
      dict(data=3),
      dict(data=3, fsdp=-1),
      dict(data=-1, fsdp=-1),
      dict(data=16, fsdp=-1),
      dict(fsdp=0),
    ):
      try:
        sharding.make_mesh(**wrong)
      except ValueError as raised:
        assert '8 devices' in str(raised)
      else:
        raise AssertionError(f'a mesh of {wrong} of 8 devices')
    print('done')
""")


def on_eight_devices(*command: str) -> str:
  """What a Python program prints there."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'PYTHONPATH': str(ROOT),
  }
  # The timeout is a guard against hanging; a quiet machine needs half a minute.
  result = subprocess.run(
    [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=800
  )
  assert result.returncode == 0, result.stderr[-3000:]
  return result.stdout


def test_rules_on_eight_devices():
  assert on_eight_devices('-c', PROGRAM).strip() == 'done'


@pytest.fixture(scope='module')
def steps() -> dict:
  """(step, mesh) -> the collectives of the compiled step, as `sharded_steps.py` prints them."""
  lines = map(json.loads, on_eight_devices(str(ROOT / 'tests' / 'sharded_steps.py')).splitlines())
  return {(line['step'], tuple(line['mesh'])): line['collectives'] for line in lines}


def test_steps_on_eight_devices_equal_those_on_one(steps):
  """The program has compared losses, gradients and placements itself."""
  meshes = ((1, 8, 1), (1, 4, 2), (2, 2, 2))
  assert set(steps) == {(step, mesh) for step in ('sft', 'da_grpo') for mesh in meshes} | {
    ('sft_tied', meshes[-1]),
    *(('sft_lora', mesh) for mesh in meshes[1:]),
  }


@pytest.mark.parametrize('mesh', [(1, 4, 2), (2, 2, 2)])
def test_a_base_is_gathered_and_has_no_gradient(steps, mesh):
  """The head's gradient, which a full step scatters over the devices, is not there."""
  kinds = [each['kind'] for each in steps['sft_lora', mesh]]
  assert 'all-gather' in kinds and 'reduce-scatter' not in kinds


@pytest.mark.parametrize('step', ['sft', 'da_grpo'])
@pytest.mark.parametrize('mesh', [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_parameters_are_gathered_a_layer_at_a_time(steps, step, mesh):
  """Each layer once forward and once to be computed again, in the loop over layers; outside of it
  the head, nothing else.
  """
  gathers = [each for each in steps[step, mesh] if each['kind'] == 'all-gather']
  # bytes of the matrices
  layer = 4 * (2 * 32 * 4 * 8 + 2 * 32 * 2 * 8 + 3 * 32 * 48)
  head = 4 * 64 * 32
  assert (
    sum(each['bytes'] * each['times'] for each in gathers if each['in_loop'])
    == 3 * 2 * layer // mesh[2]
  )
  # A lookup exchanges token ids and embedded rows: activations.
  outside = [
    each['bytes']
    for each in gathers
    if not each['in_loop'] and not each['source'].endswith('/gather')
  ]
  assert outside == [head // mesh[2]]
  scattered = [
    each['bytes']
    for each in steps[step, mesh]
    if each['kind'] == 'reduce-scatter' and not each['in_loop']
  ]
  assert scattered == [head // mesh[2]]  # and the gradient of the head is never whole in one place


def test_a_gather_of_all_parameters_would_be_seen():
  program = """if True:
    import jax
    from dcore_jax import sharding
    from dcore_jax.models import decoder
    from dcore_jax.models.config import DecoderConfig
    from dcore_jax.plan.collectives import collectives
    config = DecoderConfig(
      vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
      num_attention_heads=4, num_key_value_heads=2,
    )
    mesh = sharding.make_mesh(fsdp=8)
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    careless = jax.jit(lambda tree: jax.lax.with_sharding_constraint(tree, whole))
    compiled = careless.lower(sharding.abstract(decoder.abstract_params(config), mesh)).compile()
    sent = collectives(compiled.as_text())
    print(sum(each.bytes for each in sent if each.kind == 'all-gather' and not each.in_loop))
  """
  matrices = 64 * 32 + 2 * 32 * 4 * 8 + 2 * 32 * 2 * 8 + 3 * 32 * 48
  assert int(on_eight_devices('-c', program)) == 4 * matrices
