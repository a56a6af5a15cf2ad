"""One of several hosts, as processes with fake devices.

    python hosts_program.py FOLDER [ADDRESS:PORT,COUNT,INDEX]

Trains two SFT steps on a mesh of all devices, each host from its own part of the rows, and saves a
checkpoint in FOLDER after each. The second one is damaged then, for the last host alone: all must
go back to the first. Prints the losses, and the step and checksum of what was restored. A program
of its own, since hosts are processes.
"""

import json
import pathlib
import sys
import warnings

import jax
import numpy as np

from dcore_jax import distributed, sharding, tokentree
from dcore_jax.learn import optimizer, sft
from dcore_jax.learn.batches import BatchShape, batches
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.train import checkpoint, checksum

CONFIG = DecoderConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=1,
  head_dim=8,
  num_attention_heads=4,
  num_key_value_heads=2,
  initializer_range=0.2,
)


def main(folder: pathlib.Path, hosts: str) -> None:
  distributed.join(hosts)
  rng = np.random.default_rng(0)
  rows = [
    tokentree.TokenSequence(
      rng.integers(0, 64, 40).astype(np.int32), (np.arange(40) > 20).astype(np.float32), 40
    )
    for _ in range(16)
  ]
  mesh = sharding.make_mesh(fsdp=-1, tensor=2)
  placed = sharding.shardings(decoder.abstract_params(CONFIG), mesh)
  params = jax.jit(decoder.init_params, static_argnums=0, out_shardings=placed)(
    CONFIG, jax.random.key(0)
  )
  tx = optimizer.make_optimizer('adamw', 1e-2)
  with jax.set_mesh(mesh), checkpoint.Checkpoints(folder) as saved:
    shape = BatchShape(
      rows=8,
      shards=sharding.shards(),
      host=jax.process_index(),
      hosts=jax.process_count(),
    )
    data = batches(rows, shape, capacity=40, epochs=1, seed=0)
    state = optimizer.init_state(params, tx)
    step = sft.make_sft_step(CONFIG, tx)
    losses = []
    sums = []
    for number, batch in enumerate(data, 1):
      state, metrics = step(state, sharding.place_batch(batch))
      losses.append(float(metrics['loss']))
      sums.append(int(checksum.tree_sum(state)))
      saved.save(number, state)
    restored, step = restore_damaged(saved, state)
  print(
    json.dumps(
      {
        'devices': jax.device_count(),
        'processes': jax.process_count(),
        'losses': losses,
        'restored': step,
        'same': int(checksum.tree_sum(restored)) == sums[step - 1],
        'files': sorted(p.name for p in folder.iterdir()),
      }
    )
  )


def restore_damaged(
  saved: checkpoint.Checkpoints, state: optimizer.TrainState
) -> tuple[optimizer.TrainState, int]:
  """(state, its step), where the last host cannot use what it has read of the newest step."""
  read = saved._read_tree

  def damaged(step, described, example):
    tree = read(step, described, example)
    if step == 2 and jax.process_index() == jax.process_count() - 1:
      raise OSError('a fault that only this host has')
    return tree

  saved._read_tree = damaged
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    restored, _, step = saved.restore(state)
  assert any('going back to step 1' in str(warning.message) for warning in told)
  return restored, step


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else '')
