"""The engine on eight fake devices, in its own process: jax fixes their number as it starts."""

import os
import subprocess
import sys
import textwrap

PROGRAM = textwrap.dedent("""
    import jax, numpy as np
    from dcore_jax import sharding
    from dcore_jax.models import decoder
    from dcore_jax.models.config import DecoderConfig
    from dcore_jax.rollout.device import MeshExecutor
    from dcore_jax.rollout.engine import Engine
    from dcore_jax.rollout.requests import Request
    from dcore_jax.rollout.sampling import SamplingParams
    from dcore_jax.rollout.sizes import EngineSizes

    config = DecoderConfig(
      vocab_size=64,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      head_dim=8,
      num_attention_heads=4,
      num_key_value_heads=2,
      initializer_range=0.3,
    )
    params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, length) for length in (9, 30, 141)]
    requests = [Request(prompt, (p, g), 12) for p, prompt in enumerate(prompts) for g in range(4)]
    requests += [Request(np.r_[prompts[2], 3, 4], (9, 0), 12)]
    sampling = SamplingParams(top_p=0.9, seed=2)

    def run(params):
      sizes = EngineSizes(lanes=16, max_len=200, steps_per_call=4)
      engine = Engine(params, config, stop_ids=[5], sizes=sizes)
      done = engine.generate(requests, sampling)
      compiled = engine.stats.compilations
      engine.generate(requests, sampling)
      assert engine.stats.compilations == compiled
      engine.submit(Request(prompts[2], (9,), max_tokens=0, prompt_top=3), sampling)
      [scored] = engine.step()
      return engine, done, scored.prompt

    _, want, scores = run(params)
    for ways in ((1, 8, 1), (1, 4, 2), (2, 2, 2)):
      mesh = sharding.make_mesh(*ways)
      placed = sharding.shardings(decoder.abstract_params(config), mesh)
      engine, got, sharded = run(jax.device_put(params, placed))
      assert isinstance(engine._executor, MeshExecutor)
      held = engine._executor._state.cache.k
      assert held.sharding.shard_shape(held.shape)[2] == 2 // ways[2]
      jax.tree.map(lambda *both: np.testing.assert_allclose(*both, atol=1e-5), sharded, scores)
      for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.full_logprobs, b.full_logprobs, atol=1e-5)
    print('done')
""")


def test_eight_devices_give_what_one_gives():
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
  }
  # The timeout is a guard against hanging; a quiet machine needs half a minute.
  result = subprocess.run(
    [sys.executable, '-c', PROGRAM], env=environment, capture_output=True, text=True, timeout=500
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == 'done'
