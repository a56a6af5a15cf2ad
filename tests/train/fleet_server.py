"""A server of tiny_rl's model, for tests that kill it.

    python -m tests.train.fleet_server MODEL PORT WEIGHTS STEP_SECONDS

It asks for the key in FLEET_KEY, and each step of its engine takes STEP_SECONDS more.
"""

import os
import pathlib
import sys
import time

from dcore_jax.serve.openai_api import Limits, Service
from dcore_jax.serve.scheduler import Scheduler
from dcore_jax.serve.server import Server, load_model


def main(model: str, port: str, weights: str, seconds: str) -> None:
  made = load_model(model, dtype='float32', lanes=8, max_len=96)
  engine = made.engine
  step = engine.step

  def slow():
    time.sleep(float(seconds))
    return step()

  engine.step = slow
  limits = Limits(96, weights=pathlib.Path(weights))
  service = Service(Scheduler(engine, 64), made.tokenizer, 'tiny', limits, os.environ['FLEET_KEY'])
  Server(service, '127.0.0.1', int(port), 1.0, lambda url: print(url, flush=True)).run()


if __name__ == '__main__':
  main(*sys.argv[1:])
