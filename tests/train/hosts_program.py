"""One of several hosts that train, as processes with fake devices; all hosts together have four.

    python -m tests.train.hosts_program FOLDER OPTIONS ADDRESS:PORT,COUNT,INDEX

OPTIONS is JSON: `loop` ('sft' or 'rl'), `steps`, and `die` for a host that kills itself: its
number, the moment ('sample', 'save' or 'step') and how often it comes to that before. The last word
is '' for a process by itself. Prints the rows of metrics and a checksum of the trained parameters.
"""

import json
import os
import pathlib
import signal
from typing import Any

import jax
import numpy as np

from dcore_jax import distributed, sharding
from dcore_jax.models import decoder
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import make_engine
from dcore_jax.run import program
from dcore_jax.run.config import default_config, read_config
from dcore_jax.tokentree import TokenSequence
from dcore_jax.train.checkpoint import Checkpoints
from dcore_jax.train.checksum import tree_sum
from dcore_jax.train.metrics import Metrics
from dcore_jax.train.rl_loop import run_rl
from dcore_jax.train.sft_loop import run_sft
from dcore_jax.train.stage_run import StageRun
from tests.train import tiny_rl


def make_config(steps: int) -> Any:
  config = default_config()
  config.mesh.fsdp = -1
  config.engine.update(dict(lanes=8, max_len=96))
  config.sft.update(dict(rows=4, capacity=64, epochs=steps, checkpoint_every=1))
  # A wave of two prompts is divided among two hosts, and each of them among four.
  config.rl.update(tiny_rl.rl_config(steps=steps, rows=4, wave=2).to_dict())
  return read_config(config)


def rows() -> list[TokenSequence]:
  """Four packed rows, which are one step."""
  rng = np.random.default_rng(0)
  weight = (np.arange(60) > 20).astype(np.float32)
  return [TokenSequence(rng.integers(0, 640, 60).astype(np.int32), weight, 60) for _ in range(4)]


def die_at(moment: str, times: int) -> None:
  """Lets this process kill itself when it comes to a moment once more than `times`."""
  owner, name = {
    'sample': (Engine, 'stream'),
    # Orbax waits for all hosts, in a barrier of its own.
    'save': (Checkpoints, 'save'),
    'step': (sharding, 'place_batch'),
  }[moment]
  before = getattr(owner, name)
  count = 0

  def deadly(*arguments, **options):
    nonlocal count
    count += 1
    if count > times:
      os.kill(os.getpid(), signal.SIGKILL)
    return before(*arguments, **options)

  setattr(owner, name, deadly)


def main(folder: str, options: str, hosts: str = '') -> None:
  asked = json.loads(options)
  distributed.join(hosts, asked.get('patience', 20.0))
  if 'die' in asked:
    host, moment, times = asked['die']
    if jax.process_index() == host:
      die_at(moment, times)
  folder = pathlib.Path(folder)
  config = make_config(asked['steps'])
  mesh = distributed.training_mesh(config)
  placed = sharding.shardings(decoder.abstract_params(tiny_rl.MODEL), mesh)
  draw = jax.jit(decoder.init_params, static_argnums=0, out_shardings=placed)
  params = draw(tiny_rl.MODEL, jax.random.key(0))
  with Metrics(folder) as metrics, jax.set_mesh(mesh):
    run = StageRun(metrics=metrics, checkpoints=folder / 'checkpoints', seed=1)
    if asked['loop'] == 'sft':
      trained, _ = run_sft(params, tiny_rl.POLICY, rows(), config.sft, run, execution=Execution())
    else:
      trained, _ = run_rl(
        params,
        tiny_rl.POLICY,
        tiny_rl.questions(config.rl),
        config.rl,
        run,
        make_engine=lambda weights: make_engine(config, tiny_rl.POLICY, weights, mesh, groups=True),
        execution=Execution(),
      )
    total = int(tree_sum(trained))
  print(json.dumps({'rows': tiny_rl.timeless(folder), 'sum': total}))


if __name__ == '__main__':
  program.run(main, arguments=('FOLDER', 'OPTIONS', 'HOSTS'))
