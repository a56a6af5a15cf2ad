"""Sharding rules on eight fake devices (a process of its own: the number of devices is fixed when jax starts)."""
import os
import subprocess
import sys
import textwrap

def test_importing_asks_for_no_device():
  """`jax.distributed` and flags must be set before the first device is asked for, and after the imports."""
  environment = os.environ | {'JAX_PLATFORMS': 'no_such_platform'}
  subprocess.run([sys.executable, '-c', 'import dcore_jax.run.pipeline, dcore_jax.run.pretrain, experiments.train'], check=True,
                 env=environment)


PROGRAM = textwrap.dedent('''
    import contextlib
    import jax, jax.numpy as jnp, numpy as np
    from dcore_jax import sharding
    from dcore_jax.models import decoder
    from dcore_jax.models.config import DecoderConfig

    config = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
                           num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
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

    # The SFT step on a mesh: rows and loss tokens split over the batch axes, heads and vocabulary over the tensor axis.
    import optax
    from dcore_jax import tokentree
    from dcore_jax.learn import optimizer, sft
    rng, sequences = np.random.default_rng(0), []
    for _ in range(12):
      trunk = rng.integers(0, 64, 9)
      for _ in range(3):
        row = np.r_[trunk, rng.integers(0, 64, 7)].astype(np.int32)
        sequences.append(tokentree.Sequence(row, (np.arange(16) >= 9).astype(np.float32), 16))
    tree, tx = tokentree.pack(sequences, 64, rows_multiple=8), optax.sgd(1.0)
    step = sft.make_sft_step(config, tx)

    def one_step(batch, params, mesh):
      with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        if mesh:
          placed = sharding.shardings(decoder.abstract_params(config), mesh)
          params = jax.tree.map(jax.device_put, params, placed)
          spread = lambda leaf: jax.sharding.NamedSharding(
              mesh, jax.P(None, *sharding.partition_spec(('batch',), leaf.shape[1:2], mesh)))
          batch = jax.tree.map(lambda leaf: jax.device_put(leaf, spread(leaf)), batch)
        state, metrics = step(optimizer.init_state(params, tx), batch)
      return float(metrics['loss']), jax.device_get(state.params)

    copy = lambda: jax.tree.map(jnp.array, jax.device_get(params))
    want = one_step(tree.batch(), copy(), None)
    for ways in ((1, 8, 1), (1, 4, 2), (2, 2, 2)):
      mesh = sharding.make_mesh(*ways)
      got = one_step(tree.batch(shards=ways[0] * ways[1]), copy(), mesh)
      np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[1], want[1])

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
    try:
      sharding.make_mesh(data=3)
    except ValueError as raised:
      assert '8 devices' in str(raised)
    else:
      raise AssertionError('a mesh of 3 out of 8 devices')
    print('done')
''')


def test_rules_on_eight_devices():
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  # The timeout is a guard against hanging; a quiet machine needs some seconds.
  result = subprocess.run([sys.executable, '-c', PROGRAM], env=environment, capture_output=True, text=True, timeout=500)
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == 'done'
