"""Other libraries, each in a worker process with an environment of its own."""

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

from configs import nano
from dcore_jax.models import decoder, hf_checkpoint
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout.policy import ORGANISM, load_policy

ROOT = pathlib.Path(__file__).parents[1]


class Peer:
  """A worker process; a call asks it for something and returns its answer."""

  def __init__(self, python: str, script: str, job: dict[str, Any]):
    self._process = subprocess.Popen(
      [python, str(ROOT / 'benchmarks' / script)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', 'JAX_PLATFORMS': 'cpu'},
    )
    self._send(json.dumps(job))

  def _send(self, text: str) -> None:
    self._process.stdin.write(text + '\n')
    self._process.stdin.flush()

  def __call__(self, request: str = '') -> Any:
    """The answer to a request; '' only waits for one."""
    if request:
      self._send(request)
    for text in self._process.stdout:  # trainers print, too
      if text.startswith('answer '):
        return json.loads(text.removeprefix('answer '))
    raise RuntimeError(
      f'a worker ended with status {self._process.wait()}: {" ".join(self._process.args)}'
    )

  def __enter__(self) -> 'Peer':
    return self

  def __exit__(self, *_) -> None:
    self._process.stdin.close()
    self._process.wait()


@contextlib.contextmanager
def trl_peer(
  python: str, config: DecoderConfig, params: decoder.Params, **job: Any
) -> Iterator[Peer]:
  """trl on a copy of the model.

  Its tokenizer is the organism's, which speaks for rollouts of no text as well as any.

  Args:
    python: the interpreter of its environment.
    config, params: the model.
    job: what `benchmarks/trl_worker.py` reads beside it.
  """
  organism = load_policy(nano.get_config().model, seed=0)
  ids = {'eos_token_id': organism.stop_ids, 'pad_token_id': organism.tokenizer.pad_token_id}
  with tempfile.TemporaryDirectory() as folder:
    hf_checkpoint.save_checkpoint(
      f'{folder}/model',
      config,
      params,
      hf_checkpoint.ModelFiles(generation_config=ids),
      dtype='float32',
    )
    job |= dict(model=f'{folder}/model', tokenizer=str(ORGANISM), folder=f'{folder}/trl')
    with Peer(python, 'trl_worker.py', job) as peer:
      yield peer
