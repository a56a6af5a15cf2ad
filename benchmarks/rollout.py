"""Measures rollouts against transformers' generate and google-tunix's sampler.

    python -m benchmarks.rollout
    python -m benchmarks.rollout --cases=tail --vocabularies=4096 --tunix_python=ENV/bin/python

Every case takes about 40 minutes on 2 cores. The cases are a long tail, groups that share a prompt,
and equal lengths.

One JSON line a case and peer: useful tokens a second (tokens up to the first stop token), ratio
(> 1: ours is better). All sample at temperature 1 from random weights of the same sizes in float32;
rounds are interleaved, each with a seed of its own, and the first call of each is apart
(`first_seconds`, compilation included). google-tunix 0.1.7 needs an environment of its own (jax
0.8) and runs in a process of that interpreter. Bounds are the bytes that our passes read (weights,
keys and values) at this machine's bandwidth.
"""

import json
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

from benchmarks import measure
from benchmarks.measure import line, say
from dcore_jax.models import decoder, hf_checkpoint
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import EngineStats, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes

CASES = ('tail', 'groups', 'equal')
_CASES = flags.DEFINE_list('cases', list(CASES), f'Which of {", ".join(CASES)} to run.')
_VOCABULARIES = flags.DEFINE_list(
  'vocabularies', ['4096', '151936'], 'Vocabulary sizes to run them at.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Interleaved rounds; medians are printed.')
_TUNIX_PYTHON = flags.DEFINE_string(
  'tunix_python', '', "Python of google-tunix 0.1.7's environment; '' skips it."
)


class Case(NamedTuple):
  """What is asked of every sampler: each prompt once for each of its rollouts, `budget` tokens at
  most.
  """

  name: str
  prompts: list[np.ndarray]  # one for each rollout
  budget: int
  stop_ids: list[int]
  wanted: tuple[float, float | None]  # ratios against transformers and google-tunix

  @property
  def longest(self) -> int:
    """Tokens of the longest prompt with the whole budget."""
    return max(map(len, self.prompts)) + self.budget


def model(vocabulary: int) -> DecoderConfig:
  """The model of every case."""
  return DecoderConfig(
    vocab_size=vocabulary,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    tie_word_embeddings=True,
  )


def make_case(name: str, vocabulary: int) -> Case:
  """The case of that name.

  A random model stops at each token with the probability of its stop ids: lengths are geometric.
  """
  rng = np.random.default_rng(0)

  def prompt(length):
    return rng.integers(1, vocabulary, length).astype(np.int32)

  if name == 'tail':
    stops = rng.choice(vocabulary, round(vocabulary / 90), replace=False)
    return Case(name, [prompt(64) for _ in range(32)], 512, sorted(stops.tolist()), (3.0, 2.0))
  if name == 'groups':
    return Case(
      name,
      [one for one in (prompt(1024) for _ in range(4)) for _ in range(8)],
      128,
      [],
      (3.0, None),
    )
  return Case(name, [prompt(128) for _ in range(32)], 128, [], (1.0, 1.0))


class Ours:
  """Our engine; a call gives the useful tokens of one round."""

  def __init__(self, config: DecoderConfig, params: decoder.Params, case: Case):
    sizes = EngineSizes(lanes=32, max_len=case.longest, max_new=case.budget)
    self.engine = Engine(params, config, stop_ids=case.stop_ids, sizes=sizes)
    self._case = case

  def __call__(self, seed: int) -> int:
    """Samples the case with a seed; returns the number of useful tokens."""
    requests = [Request(prompt, (seed, index)) for index, prompt in enumerate(self._case.prompts)]
    done = self.engine.generate(requests, SamplingParams(max_tokens=self._case.budget))
    return sum(len(completion.tokens) for completion in done)


class Transformers:
  """`generate` on the whole batch; prompts of a case have one length, so that nothing is padded."""

  def __init__(self, config: DecoderConfig, params: decoder.Params, case: Case):
    import torch
    import transformers

    self._torch = torch
    self._case = case
    with tempfile.TemporaryDirectory() as folder:
      hf_checkpoint.save_checkpoint(f'{folder}/model', config, params)
      self._model = transformers.AutoModelForCausalLM.from_pretrained(
        f'{folder}/model', dtype=torch.float32
      ).eval()

  def __call__(self, seed: int) -> int:
    """Samples the case with a seed; returns the number of useful tokens."""
    torch = self._torch
    case = self._case
    torch.manual_seed(seed)
    prompts = torch.tensor(np.stack(case.prompts).astype(np.int64))
    # The default of a generation config would truncate to 50 tokens, which is another distribution.
    with torch.inference_mode():
      out = self._model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=case.budget,
        eos_token_id=case.stop_ids or None,
        pad_token_id=0,
      )
    return useful_tokens(out[:, prompts.shape[1] :].numpy(), case.stop_ids)


class Tunix:
  """google-tunix's sampler in a process of its own, which samples once for each seed that it is
  sent.
  """

  def __init__(self, config: DecoderConfig, case: Case, python: str):
    worker = pathlib.Path(__file__).with_name('tunix_worker.py')
    self._process = subprocess.Popen(
      [python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    prompts = [prompt.tolist() for prompt in case.prompts]
    self._send(
      json.dumps(
        {
          'config': config.to_hf(),
          'prompts': prompts,
          'budget': case.budget,
          'stop_ids': case.stop_ids,
        }
      )
    )

  def _send(self, line: str) -> None:
    self._process.stdin.write(line + '\n')
    self._process.stdin.flush()

  def __call__(self, seed: int) -> int:
    """Samples the case with a seed; returns the number of useful tokens."""
    self._send(str(seed))
    answer = self._process.stdout.readline()
    if not answer:
      raise RuntimeError(f'the worker of google-tunix ended with status {self._process.wait()}')
    return int(answer)

  def close(self) -> None:
    """Ends the worker."""
    self._process.stdin.close()
    self._process.wait(timeout=60)


def useful_tokens(tokens_BT: np.ndarray, stop_ids: list[int]) -> int:
  """Tokens up to and with the first stop token of each row."""
  stopped_BT = np.isin(tokens_BT, stop_ids)
  return int(
    np.where(stopped_BT.any(axis=1), stopped_BT.argmax(axis=1) + 1, tokens_BT.shape[1]).sum()
  )


def bandwidth() -> float:
  """Bytes a second that this machine reads: the sum of an array that is larger than its caches."""
  array = jax.numpy.ones(2**26, jax.numpy.float32)
  total = jax.jit(lambda array: array.sum())
  return array.nbytes / min(
    measure.interleaved({'sum': lambda: total(array)}, rounds=1)['sum'] for _ in range(7)
  )


def run_case(name: str, vocabulary: int) -> None:
  """Times one case on every sampler that is there."""
  case = make_case(name, vocabulary)
  config = model(vocabulary)
  title = f'{name}, vocabulary {vocabulary}'
  params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
  ours = Ours(config, params, case)
  samplers: dict[str, Callable[[int], int]] = {'ours': ours}
  try:
    samplers['transformers'] = Transformers(config, params, case)
  except ImportError:
    measure.skipped(title, 'transformers generate', 'torch is not installed')
  if _TUNIX_PYTHON.value:
    samplers['tunix'] = Tunix(config, case, _TUNIX_PYTHON.value)
  else:
    measure.skipped(title, 'google-tunix sampler', 'no --tunix_python')

  def timed(sampler: str, seed: int) -> tuple[int, float]:
    began = time.perf_counter()
    tokens = samplers[sampler](seed)
    seconds = time.perf_counter() - began
    say(f'{title}: {sampler} {tokens} useful tokens in {seconds:.2f} s')
    return tokens, seconds

  first = {sampler: timed(sampler, 0)[1] for sampler in samplers}
  rates = {sampler: [] for sampler in samplers}
  before = vars(ours.engine.stats).copy()
  compiled = ours.engine.stats.compilations
  for seed in range(_ROUNDS.value):
    for sampler in samplers:
      tokens, seconds = timed(sampler, seed)
      rates[sampler].append(tokens / seconds)
  if 'tunix' in samplers:
    samplers['tunix'].close()
  spent = {field: value - before[field] for field, value in vars(ours.engine.stats).items()}
  rate = {sampler: float(np.median(values)) for sampler, values in rates.items()}
  given = sum(map(len, case.prompts)) * _ROUNDS.value
  weights = 4 * config.param_count  # each pass reads them once: the tied embedding as the head
  read = spent['passes'] * weights + spent['slots_read'] * config.kv_bytes_per_token(np.float32)
  facts = dict(
    prefill_share=spent['prefill_tokens'] / given,
    tokens_per_row=EngineStats(**spent).tokens_per_row,
    passes=spent['passes'],
    bytes_per_pass=read / spent['passes'],
    compilations=compiled,
    bound=spent['decoded_tokens'] / (read / bandwidth()),
    first_seconds=first['ours'],
  )
  for peer, label, wanted in zip(
    ('transformers', 'tunix'),
    ('transformers generate', 'google-tunix sampler'),
    case.wanted,
    strict=True,
  ):
    if peer in rate:
      line(
        title,
        label,
        rate['ours'],
        rate[peer],
        'useful tokens/s',
        wanted=wanted,
        better='more',
        **facts,
        peer_first_seconds=first[peer],
      )
  # A prompt's last token is drawn from, and belongs to what is decoded.
  once = sum(len(prompt) - 1 for prompt in {id(one): one for one in case.prompts}.values())
  if spent['prefill_tokens'] != once * _ROUNDS.value:
    raise AssertionError(
      f'{spent["prefill_tokens"]} tokens prefilled of {given} given: not each prompt once'
    )


def main(_) -> None:
  """Runs the cases that are asked for."""
  unknown = set(_CASES.value) - set(CASES)
  if unknown:
    raise app.UsageError(f'unknown cases {sorted(unknown)}')
  for vocabulary in map(int, _VOCABULARIES.value):
    for name in _CASES.value:
      run_case(name, vocabulary)


if __name__ == '__main__':
  app.run(main)
