"""Measures Hugging Face checkpoints in and out, of Qwen3-0.6B's size, against transformers.

    python -m benchmarks.import_export
    python -m benchmarks.import_export --directory=DIR

Every case takes about 5 minutes on 2 cores. DIR is where the checkpoints go (4 GB), by default the
temporary folder. Both sides read the same files.

A checkpoint of random numbers is written (bfloat16, tied head, one file of 1.2 GB). Every reading
and writing of it runs in a process of its own, since peaks are of a process; rounds are
interleaved, medians printed, files are in the page cache. Memory is what a process has at its worst
beyond what it had before and the parameters themselves:
    anonymous   sampled every 2 ms: buffers, copies. Pages of a mapped file are the system's cache
                and not counted.
    resident    the kernel's high-water mark, mapped pages included
transformers keeps parameters in the file's dtype as views of the mapped file: their import there is
no more than reading it. Bounds are the bytes read and written at the rate of a large copy. Saving
to a disk is waited for by neither.
"""

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.measure import line, say, skipped

_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Interleaved rounds.')
_DIRECTORY = flags.DEFINE_string(
  'directory', None, 'Where checkpoints are made; removed afterwards.'
)
_WORKER = flags.DEFINE_string(
  'worker', None, 'For the program itself: what one process does, as JSON.'
)

RECORD = {
  'model_type': 'qwen3',
  'vocab_size': 151936,
  'hidden_size': 1024,
  'intermediate_size': 3072,
  'num_hidden_layers': 28,
  'num_attention_heads': 16,
  'num_key_value_heads': 8,
  'head_dim': 128,
  'rope_theta': 1e6,
  'tie_word_embeddings': True,
  'hidden_act': 'silu',
  'max_position_embeddings': 40960,
  'architectures': ['Qwen3ForCausalLM'],
  'dtype': 'bfloat16',
}


def make_checkpoint(folder: pathlib.Path, record: dict[str, Any] = RECORD, seed: int = 0) -> None:
  """Writes a checkpoint of normal numbers (norms around 1).

  It goes tensor by tensor: nothing is ever held whole.
  """
  from dcore_jax.models import hf_checkpoint, tensor_files
  from dcore_jax.models.config import DecoderConfig

  shapes = {
    name: stored.shape
    for name, stored in hf_checkpoint.stored_tensors(DecoderConfig.from_hf(record)).items()
  }
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(record))
  rng = np.random.default_rng(seed)
  writer = tensor_files.FileWriter(
    folder / 'model.safetensors', shapes, tensor_files.DTYPES['BF16']
  )
  for name in writer.names:
    tensor = rng.standard_normal(shapes[name], np.float32)
    tensor *= 0.02
    writer.write(name, tensor + 1 if 'norm' in name else tensor)
  writer.close()


# --- what one process does ---


class Memory:
  """Bytes of this process while the block runs, beyond those before it.

  `anonymous` and `resident` at their worst.
  """

  def __enter__(self) -> 'Memory':
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # resets the high-water mark
    self._before = self._read()
    self.anonymous = 0
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._sample)
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._done.set()
    self._thread.join()
    self.resident = self._read()['VmHWM'] - self._before['VmRSS']

  def _sample(self) -> None:
    while not self._done.wait(0.002):
      self.anonymous = max(self.anonymous, self._read()['RssAnon'] - self._before['RssAnon'])

  def _read(self) -> dict[str, int]:
    fields = dict(
      row.split(':', 1) for row in pathlib.Path('/proc/self/status').read_text().splitlines()
    )
    return {name: int(fields[name].split()[0]) * 1024 for name in ('RssAnon', 'VmRSS', 'VmHWM')}


def worker(what: str, source: str, target: str, dtype: str) -> dict[str, float]:
  """Reads `source` in `dtype`, and for an export writes it to `target` -> seconds, bytes of
  parameters and of memory.
  """
  read, write = {'ours': _ours, 'transformers': _transformers}[what.split()[0]](
    source, target, dtype
  )
  exporting = what.endswith('export')
  held = read() if exporting else None
  with Memory() as memory:
    began = time.perf_counter()
    if exporting:
      write(held)
    else:
      held = read()
    seconds = time.perf_counter() - began
  return {
    'seconds': seconds,
    'parameters': 0 if exporting else held[1],
    'anonymous': memory.anonymous,
    'resident': memory.resident,
  }


def _ours(source: str, target: str, dtype: str):
  import jax

  from dcore_jax import sharding
  from dcore_jax.models import decoder, hf_checkpoint

  jax.block_until_ready(jax.numpy.zeros(8) + 1)

  def read():
    placed = None
    if jax.device_count() > 1:
      specs = decoder.abstract_params(hf_checkpoint.load_config(source))
      placed = sharding.shardings(specs, sharding.make_mesh(fsdp=jax.device_count()))
    config, params = hf_checkpoint.load_params(source, dtype, shardings=placed)
    shards = [
      shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    ]
    return (config, params), sum(shards)

  return read, lambda held: hf_checkpoint.save_checkpoint(target, *held[0], overwrite=True)


def _transformers(source: str, target: str, dtype: str):
  import torch
  import transformers

  torch.ones(8).sum()

  def read():
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    for (
      parameter
    ) in model.parameters():  # what is still a mapped file is read: one number of each page
      parameter.detach().view(-1)[::1024].sum()
    return model, sum(parameter.nbytes for parameter in model.parameters())

  return read, lambda held: held[0].save_pretrained(target)


def run_worker(
  what: str, source: pathlib.Path, target: pathlib.Path, dtype: str, devices: int = 1
) -> dict[str, float]:
  """`worker` in a process of its own, with that many CPU devices."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'HF_HUB_OFFLINE': '1',
    'TRANSFORMERS_VERBOSITY': 'error',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  order = json.dumps([what, str(source), str(target), dtype])
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.import_export', f'--worker={order}'],
    env=environment,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    check=False,
  )
  if done.returncode:
    raise RuntimeError(f'{what}: {done.stderr[-2000:]}')
  return json.loads(done.stdout.splitlines()[-1])


# --- the cases ---


def copy_rate() -> float:
  """Bytes a second that a large copy reads, and as many that it writes."""
  source = np.ones(1 << 26, np.float32)
  target = np.empty_like(source)
  best = np.inf
  for _ in range(5):
    began = time.perf_counter()
    np.copyto(target, source)
    best = min(best, time.perf_counter() - began)
  return source.nbytes / best


def compare(
  folder: pathlib.Path, source: pathlib.Path, what: str, dtype: str, rate: float, peers: list[str]
) -> None:
  """One line for the seconds of a case and two for its memory."""
  runs: dict[str, list[dict[str, float]]] = {peer: [] for peer in ['ours', *peers]}
  for number in range(_ROUNDS.value + 1):  # the first warms the page cache
    for peer, results in runs.items():
      result = run_worker(f'{peer} {what}', source, folder / peer, dtype)
      say(f'{what} {dtype}, {peer}: {result["seconds"]:.2f} s')
      if number:
        results.append(result)

  def value(peer, field):
    return statistics.median(result[field] for result in runs[peer]) if peer in runs else None

  size = (source / 'model.safetensors').stat().st_size
  parameters = value('ours', 'parameters')
  name = f'{what}, bfloat16 -> {dtype}' if what == 'import' else f'{what}, {dtype} -> bfloat16'
  peer = {'import': 'transformers from_pretrained', 'export': 'transformers save_pretrained'}[what]
  line(
    name,
    peer,
    value('ours', 'seconds'),
    value('transformers', 'seconds'),
    's',
    bound=(size + parameters) / 2 / rate,
  )
  beyond = {who: (value(who, 'resident') - value(who, 'parameters')) / 2**20 for who in runs}
  line(
    f'{name}, resident memory beyond the parameters',
    peer,
    beyond['ours'],
    beyond.get('transformers'),
    'MiB',
  )


def sharded(folder: pathlib.Path, source: pathlib.Path) -> None:
  """Memory of an import split over 8 devices of one process, and of the export from there."""
  largest = (
    4 * RECORD['vocab_size'] * RECORD['hidden_size'] / 2**20
  )  # MiB; the embedding, in float32
  for what in ('import', 'export'):
    result = run_worker(f'ours {what}', source, folder / 'sharded', 'float32', devices=8)
    for kind in ('anonymous', 'resident'):
      beyond = (result[kind] - result['parameters']) / 2**20
      line(
        f'{what}, float32 on 8 devices, {kind} memory beyond the parameters',
        'the largest tensor',
        beyond,
        largest,
        'MiB',
        wanted=1 / 1.3 if what == 'import' else None,
        seconds=result['seconds'],
      )


def main(_) -> None:
  """Runs every case, or one reading or writing where it is a worker process."""
  if _WORKER.value:
    print(json.dumps(worker(*json.loads(_WORKER.value))))
    return
  with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as place:
    folder = pathlib.Path(place)
    source = folder / 'source'
    make_checkpoint(source)
    peers = ['transformers'] if importlib.util.find_spec('torch') else []
    if not peers:
      skipped('import and export', 'transformers', 'torch is not installed')
    rate = copy_rate()
    for what, dtype in (('import', 'float32'), ('import', 'bfloat16'), ('export', 'bfloat16')):
      compare(folder, source, what, dtype, rate, peers)
    sharded(folder, source)


if __name__ == '__main__':
  app.run(main)
