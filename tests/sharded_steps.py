"""SFT and DA-GRPO steps on eight fake devices against one, and what the compiled steps send.

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
        python tests/sharded_steps.py

prints a JSON line for each step and mesh: the collectives of the compiled step. A program of its
own, since the number of devices is fixed when jax starts. Raises where a loss or gradient differs
from that of one device.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax

from dcore_jax import sharding, tokentree
from dcore_jax.config import LoraSection
from dcore_jax.learn import grpo, lora, objectives, optimizer, sft
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.plan.collectives import collectives

CONFIG = DecoderConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  head_dim=8,
  num_attention_heads=4,
  num_key_value_heads=2,
  tie_word_embeddings=False,
  initializer_range=0.2,
)
# With biases, and one table for looking up and for the head, which a mesh splits in two ways.
TIED = dataclasses.replace(CONFIG, model_type='qwen2', tie_word_embeddings=True)
EXECUTION = decoder.Execution(
  attention='reference', remat='full', unroll=False
)  # the attention that compiles fastest
LORA = LoraSection(rank=3, alpha=6.0)
MESHES = ((1, 8, 1), (1, 4, 2), (2, 2, 2))
SGD = optax.sgd(1.0)  # what a step takes off the parameters is the gradient
make_params = jax.jit(decoder.init_params, static_argnums=0)


def forest() -> tokentree.TokenTree:
  """8 rows, in each of which three responses share a prompt, and two of them their first tokens;
  with values for every extra of the GRPO step.
  """
  rng = np.random.default_rng(0)

  def draw(size):
    return rng.normal(size=size).astype(np.float32)

  responses = []
  for _ in range(8):
    prompt = rng.integers(0, 64, 70).astype(np.int32)
    first, *others = rng.integers(0, 64, (3, 7)).astype(np.int32)
    others[0][:4] = first[:4]
    for tokens in (first, *others):
      old = -4 + 0.1 * draw(7)
      responses.append(
        grpo.Response(
          prompt,
          tokens,
          behaviour_logp=old,
          old_logp=old,
          entropy=old,
          ref_logp=-4 + 0.1 * draw(7),
          advantage=draw(7),
        )
      )
  tree = grpo.pack_responses(responses, 96, rows_multiple=8, merge=True)
  assert tree.rows == 8 and tree.dedup > 1.5 and tree.weight.max() == 2
  return grpo.lay_values(tree, responses, objectives.PolicyLoss(kl_coefficient=0.1).extras)


def gradient(step, config, tree, mesh):
  """(loss, gradient, collectives) of one step; it must leave the state where it was, or the next
  one would be compiled anew.
  """
  with jax.set_mesh(mesh):
    placed = sharding.shardings(decoder.abstract_params(config), mesh) if mesh else None
    batch = sharding.place_batch(tree.batch(shards=sharding.shards()), whole=True)
    params = jax.device_put(make_params(config, jax.random.key(0)), placed)
    before = jax.device_get(params)
    state = optimizer.init_state(params, SGD)
    compiled = step.lower(state, batch).compile()
    after, metrics = compiled(state, batch)
    taken = jax.tree.map(np.subtract, before, jax.device_get(after.params))
  if mesh:
    check_places(after.params, placed)
  return float(metrics['loss']), taken, [each._asdict() for each in collectives(compiled.as_text())]


def adapter_gradient(step, config, tree, mesh):
  """The same of adapters beside a base; neither factor is zero."""
  with jax.set_mesh(mesh):
    placed = sharding.shardings(decoder.abstract_params(config), mesh) if mesh else None
    batch = sharding.place_batch(tree.batch(shards=sharding.shards()), whole=True)
    base = jax.device_put(make_params(config, jax.random.key(0)), placed)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, lora.init_adapters(config, LORA, 0))
    before = jax.device_get(adapters)
    state = optimizer.init_state(adapters, SGD)
    frozen = lora.Frozen(base, lora.scale(LORA))
    if mesh:
      check_places(adapters, sharding.shardings(lora.abstract_adapters(config, LORA), mesh))
    compiled = step.lower(state, batch, frozen).compile()
    after, metrics = compiled(state, batch, frozen)
    taken = jax.tree.map(np.subtract, before, jax.device_get(after.params))
    merged = jax.device_get(lora.merge(lora.attach(frozen, after.params)))
  if mesh:
    check_places(after.params, sharding.shardings(lora.abstract_adapters(config, LORA), mesh))
  sent = [each._asdict() for each in collectives(compiled.as_text())]
  return float(metrics['loss']), {'gradient': taken, 'merged': merged}, sent


def check_places(tree, placed) -> None:
  for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
    assert leaf.sharding == place, (leaf.sharding, place)


def check_placement(mesh) -> None:
  """Parameters are drawn in their shards, bit for bit those of one device, and moments lie beside
  them.
  """
  specs = decoder.abstract_params(CONFIG)
  placed = sharding.shardings(specs, mesh)
  drawn = jax.jit(decoder.init_params, static_argnums=0, out_shardings=placed)(
    CONFIG, jax.random.key(0)
  )
  jax.tree.map(np.testing.assert_array_equal, drawn, make_params(CONFIG, jax.random.key(0)))
  adam = optimizer.make_optimizer('adamw', 1e-3)
  with jax.set_mesh(mesh):
    state = optimizer.init_state(drawn, adam)
  specs = optimizer.abstract_state(specs, adam)
  check_places(state, sharding.shardings(specs, mesh))
  for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
    assert (leaf.shape, leaf.dtype) == (spec.shape, spec.dtype)


def main() -> None:
  tree = forest()

  def make_sft(config):
    return sft.make_sft_step(config, SGD, EXECUTION)

  def make_grpo(config):
    return grpo.make_grpo_step(
      config, SGD, objectives.PolicyLoss(kl_coefficient=0.1), execution=EXECUTION
    )

  for name, make, config, meshes in (
    ('sft', make_sft, CONFIG, MESHES),
    ('sft_lora', make_sft, CONFIG, MESHES[1:]),
    ('da_grpo', make_grpo, CONFIG, MESHES),
    ('sft_tied', make_sft, TIED, MESHES[-1:]),
  ):
    step = make(config)
    data = tree if name == 'da_grpo' else dataclasses.replace(tree, extras={})
    measure = adapter_gradient if name == 'sft_lora' else gradient
    loss, grads, _ = measure(step, config, data, None)
    for ways in meshes:
      got_loss, got, sent = measure(step, config, data, sharding.make_mesh(*ways))
      np.testing.assert_allclose(got_loss, loss, rtol=1e-5, err_msg=f'{name} {ways}')
      close = functools.partial(np.testing.assert_allclose, atol=1e-5, err_msg=f'{name} {ways}')
      jax.tree.map(close, got, grads)
      print(json.dumps({'step': name, 'mesh': ways, 'collectives': sent}), flush=True)
  check_placement(sharding.make_mesh(2, 2, 2))


if __name__ == '__main__':
  main()
