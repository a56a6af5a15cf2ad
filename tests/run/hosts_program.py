"""One of several hosts, as processes with fake devices: python hosts_program.py [ADDRESS:PORT,COUNT,INDEX]

Trains two SFT steps on a mesh of all devices, each host from its own part of the rows, and prints the losses. A program of its
own, since hosts are processes.
"""
import json
import sys

import jax
import numpy as np

from dcore_jax import sharding
from dcore_jax import tokentree
from dcore_jax.learn import optimizer
from dcore_jax.learn import sft
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.run import distributed

CONFIG = DecoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
                       num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)


def main(hosts: str) -> None:
  distributed.join(hosts)
  rng = np.random.default_rng(0)
  rows = [tokentree.Sequence(rng.integers(0, 64, 40).astype(np.int32), (np.arange(40) > 20).astype(np.float32), 40)
          for _ in range(16)]
  mesh = sharding.make_mesh(fsdp=-1, tensor=2)
  placed = sharding.shardings(decoder.abstract_params(CONFIG), mesh)
  params = jax.jit(decoder.init_params, static_argnums=0, out_shardings=placed)(CONFIG, jax.random.key(0))
  tx = optimizer.make_optimizer('adamw', 1e-2)
  with jax.set_mesh(mesh):
    data = sft.batches(rows, capacity=40, rows=8, epochs=1, seed=0, shards=sharding.shards(), host=jax.process_index(),
                       hosts=jax.process_count())
    state, step, losses = optimizer.init_state(params, tx), sft.make_sft_step(CONFIG, tx), []
    for batch in data:
      state, metrics = step(state, sharding.place_batch(batch))
      losses.append(float(metrics['loss']))
  print(json.dumps({'devices': jax.device_count(), 'processes': jax.process_count(), 'losses': losses}))


if __name__ == '__main__':
  main(sys.argv[1] if len(sys.argv) > 1 else '')
