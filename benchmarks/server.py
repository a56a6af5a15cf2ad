"""The HTTP server against the bare engine: requests a second, time to the first token, with 1, 8
and 32 clients.

    python -m benchmarks.server

A server process (`experiments.serve`) and an engine in this process hold the same random weights
(hidden 512, 8 layers, vocabulary 4,096) in float32. Each is given the same requests, 128 tokens of
prompt and 128 to sample, by so many clients, each of which asks again as soon as it has its answer;
over HTTP as streamed chat completions on a connection each. Rounds are interleaved. One JSON line a
number of clients; ratio is the server's requests a second over the engine's, 0.9 being an overhead
of 11 %. That the tokens are as many on both sides is checked. The clients run on the same cores:
their work is in the overhead.
"""

import asyncio
import collections
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from typing import NamedTuple

import jax
import numpy as np
import tokenizers
import transformers
from absl import app, flags

from benchmarks.measure import line, say
from dcore_jax.chat.messages import Message
from dcore_jax.chat.template import qwen3_template, render_prompt
from dcore_jax.models import decoder, hf_checkpoint
from dcore_jax.models.config import DecoderConfig
from dcore_jax.rollout.engine import Engine, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.serve.server import load_model

_CLIENTS = flags.DEFINE_list('clients', ['1', '8', '32'], 'Numbers of clients.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Interleaved rounds; medians are printed.')
_STEPS = flags.DEFINE_integer(
  'steps_per_call', 8, 'Of both engines: tokens of a lane between two looks of the host.'
)

VOCABULARY = 4096
LANES = 32
PROMPT = 128
ANSWER = 128
MODEL = DecoderConfig(
  vocab_size=VOCABULARY,
  hidden_size=512,
  intermediate_size=1536,
  num_hidden_layers=8,
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=64,
  tie_word_embeddings=True,
)
WANTED = {8: 1 / 1.1}


class Measured(NamedTuple):
  """Of one round."""

  rate: float  # requests a second
  first_token: list[float]  # seconds of each request
  tokens: int


def make_tokenizer(vocabulary: int = VOCABULARY) -> transformers.PreTrainedTokenizerFast:
  """Byte-level, as those of the model families: bytes and words of letters, with the chat
  template's special tokens.
  """
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  letters = 'abcdefghijklmnopqrstuvwxyz'
  # There are 17,576 words of three letters.
  length = 3 if vocabulary < 17_000 else 4
  words = (f'\u0120{"".join(word)}' for word in itertools.product(letters, repeat=length))
  pieces = [
    *tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    *itertools.islice(words, vocabulary - 256 - len(special)),
  ]
  core = tokenizers.Tokenizer(
    tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [], ignore_merges=True)
  )
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  core.add_special_tokens(special)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=core,
    eos_token='<|im_end|>',
    pad_token='<|endoftext|>',
    chat_template=qwen3_template(),
    clean_up_tokenization_spaces=False,
  )


def questions(tokenizer: transformers.PreTrainedTokenizerFast, count: int, seed: int) -> list[str]:
  """Texts of random tokens, each a prompt."""
  rng = np.random.default_rng(seed)
  return [tokenizer.decode(rng.integers(256, 4000, PROMPT)) for _ in range(count)]


def bare(
  engine: Engine, tokenizer: transformers.PreTrainedTokenizerFast, texts: list[str], clients: int
) -> Measured:
  """The engine alone, asked as by so many clients; the prompts are rendered and encoded before the
  clock starts.
  """
  rendered = [render_prompt(tokenizer, [Message('user', text)]) for text in texts]
  waiting = collections.deque(enumerate(tokenizer(rendered, add_special_tokens=False)['input_ids']))
  began: dict[int, float] = {}
  first: dict[int, float] = {}
  tokens = 0
  started = time.perf_counter()

  def ask() -> None:
    number, prompt = waiting.popleft()
    began[
      engine.submit(Request(prompt, (0, 0)), SamplingParams(max_tokens=ANSWER, seed=number))
    ] = time.perf_counter()

  for _ in range(min(clients, len(waiting))):
    ask()
  while engine.busy:
    for part in engine.step():
      first.setdefault(part.handle, time.perf_counter() - began[part.handle])
      tokens += len(part.tokens)
      if part.completion is not None and waiting:
        ask()
  return Measured(len(texts) / (time.perf_counter() - started), list(first.values()), tokens)


async def served(port: int, texts: list[str], clients: int) -> Measured:
  """The server, asked by so many clients."""
  waiting = collections.deque(enumerate(texts))
  first = []
  tokens = 0

  async def client() -> None:
    nonlocal tokens
    while waiting:
      number, text = waiting.popleft()
      seconds, sampled = await ask(port, text, number)
      first.append(seconds)
      tokens += sampled

  started = time.perf_counter()
  await asyncio.gather(*(client() for _ in range(clients)))
  return Measured(len(texts) / (time.perf_counter() - started), first, tokens)


async def ask(port: int, text: str, seed: int) -> tuple[float, int]:
  """(seconds until text came, tokens sampled) of one request, by hand: a client library would be
  most of what is measured.
  """
  body = json.dumps(
    {
      'model': 'model',
      'messages': [{'role': 'user', 'content': text}],
      'max_tokens': ANSWER,
      'seed': seed,
      'stream': True,
      'stream_options': {'include_usage': True},
    }
  ).encode()
  began = time.perf_counter()
  seconds = 0.0
  reader, writer = await asyncio.open_connection('127.0.0.1', port)
  writer.write(
    b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
    b'Content-Type: application/json\r\nContent-Length: %d\r\n\r\n' % len(body) + body
  )
  last = b''
  async for row in reader:
    if not seconds and b'"delta":{"content":"' in row and b'"role"' not in row:
      seconds = time.perf_counter() - began
    last = row if b'"usage":{' in row else last
  writer.close()
  return seconds, json.loads(last.removeprefix(b'data: '))['usage']['completion_tokens']


def start(folder: pathlib.Path) -> tuple[subprocess.Popen, int]:
  """A server process, and the port it listens on."""
  process = subprocess.Popen(
    [
      sys.executable,
      '-m',
      'experiments.serve',
      f'--model={folder}',
      '--name=model',
      '--port=0',
      f'--lanes={LANES}',
      f'--max_len={2 * (PROMPT + ANSWER)}',
      f'--max_tokens={ANSWER}',
      f'--steps_per_call={_STEPS.value}',
    ],
    stderr=subprocess.PIPE,
    text=True,
  )
  lines = []
  for said in process.stderr:
    if said.startswith('http'):
      return process, urllib.parse.urlsplit(said.split()[0]).port
    lines.append(said)
  raise RuntimeError(f'the server does not start: {"".join(lines)}')


def run(folder: pathlib.Path) -> None:
  """Starts the server, and measures it for every number of clients."""
  tokenizer = make_tokenizer()
  tokenizer.save_pretrained(folder / 'tokenizer')
  params = jax.jit(decoder.init_params, static_argnums=0)(MODEL, jax.random.key(0))
  hf_checkpoint.save_checkpoint(
    folder / 'model',
    MODEL,
    params,
    hf_checkpoint.ModelFiles(tokenizer_dir=folder / 'tokenizer'),
    dtype='float32',
  )
  engine = load_model(
    str(folder / 'model'),
    dtype='float32',
    lanes=LANES,
    max_len=2 * (PROMPT + ANSWER),
    max_new=ANSWER,
    steps_per_call=_STEPS.value,
  ).engine
  engine.prepare()
  process, port = start(folder / 'model')
  try:
    for clients in map(int, _CLIENTS.value):
      run_case(engine, tokenizer, port, clients)
  finally:
    process.terminate()
    process.wait()


def run_case(
  engine: Engine, tokenizer: transformers.PreTrainedTokenizerFast, port: int, clients: int
) -> None:
  """Measures server and bare engine with so many clients, in turn."""
  rounds: dict[str, list[Measured]] = {'ours': [], 'bare': []}
  for number in range(-1, _ROUNDS.value):  # one unmeasured round
    texts = questions(tokenizer, max(4, 3 * clients), number + 1)
    got = {
      'bare': bare(engine, tokenizer, texts, clients),
      'ours': asyncio.run(served(port, texts, clients)),
    }
    if got['bare'].tokens != got['ours'].tokens:
      raise AssertionError(
        f'{got["ours"].tokens} tokens over HTTP, {got["bare"].tokens} from the engine'
      )
    for name, measured in got.items():
      say(
        f'{clients} clients, {name}: {measured.rate:.2f} requests/s, '
        f'{statistics.median(measured.first_token) * 1e3:.0f} ms'
      )
      if number >= 0:
        rounds[name].append(measured)
  rate = {name: statistics.median(one.rate for one in all_) for name, all_ in rounds.items()}
  first = {
    name: np.array([seconds for one in all_ for seconds in one.first_token])
    for name, all_ in rounds.items()
  }
  tokens = rounds['ours'][0].tokens / max(4, 3 * clients)
  line(
    f'server, {clients} clients',
    'bare engine',
    rate['ours'],
    rate['bare'],
    'requests/s',
    wanted=WANTED.get(clients),
    better='more',
    overhead=rate['bare'] / rate['ours'] - 1,
    tokens_per_second=rate['ours'] * tokens,
    first_token_ms={
      name: np.percentile(values, [50, 95]).round(4).tolist()
      for name, values in ((name, 1e3 * values) for name, values in first.items())
    },
  )


def main(_) -> None:
  """Runs in a temporary folder."""
  with tempfile.TemporaryDirectory() as folder:
    run(pathlib.Path(folder))


if __name__ == '__main__':
  app.run(main)
