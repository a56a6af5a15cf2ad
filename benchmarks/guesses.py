"""Measures what guessing tokens ahead gives and costs one stream of answers.

    python -m benchmarks.guesses                    # about 5 minutes on 2 cores
    python -m benchmarks.guesses --layers=8

The model is a random one of SmolLM2-135M's shape. One JSON line a case, against the same engine
without guesses, in interleaved rounds:
    repeats    the likeliest tokens: a random model soon goes in circles, as code and plans do in
               part, so that nearly every guess is right
    random     tokens at temperature 1, which nobody can guess; what is wanted is to lose nothing

`tokens_per_pass` is 1 without guesses. A pass with guesses reads the weights once, too, but has
several rows.
"""

import dataclasses
import time

import jax
import numpy as np
from absl import app, flags

from benchmarks.measure import line, say
from benchmarks.shapes import SMOLLM2
from dcore_jax.models import decoder
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.requests import Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes

_LAYERS = flags.DEFINE_integer('layers', SMOLLM2.num_hidden_layers, 'Layers of the model.')
_TOKENS = flags.DEFINE_integer('tokens', 256, 'Tokens of an answer.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Interleaved rounds; medians are printed.')
_PROMPT = 64
# Temperature of sampling, and the ratio that is asked for.
CASES = {'repeats': (0.0, 2.0), 'random': (1.0, 0.95)}


def main(_) -> None:
  """Times both cases with and without guesses."""
  config = dataclasses.replace(SMOLLM2, num_hidden_layers=_LAYERS.value)
  params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
  tokens = _TOKENS.value
  engines = {}
  for name, guesses in (('guesses', 15), ('none', 0)):
    sizes = EngineSizes(lanes=1, max_len=_PROMPT + tokens, max_new=tokens, guesses=guesses)
    engines[name] = Engine(params, config, stop_ids=[], sizes=sizes)
    engines[name].prepare()
  prompt = np.random.default_rng(0).integers(1, config.vocab_size, _PROMPT).astype(np.int32)

  for case, (temperature, wanted) in CASES.items():
    rates = {name: [] for name in engines}
    passes = {}
    for seed in range(_ROUNDS.value):
      # In turn first: a machine that slows down must not speak for one of them.
      for name in sorted(engines, reverse=bool(seed % 2)):
        engine = engines[name]
        before = engine.stats.passes
        began = time.perf_counter()
        sampling = SamplingParams(temperature=temperature, max_tokens=tokens, seed=seed)
        (done,) = engine.generate([Request(prompt, (seed,))], sampling)
        seconds = time.perf_counter() - began
        rates[name].append(len(done.tokens) / seconds)
        passes[name] = engine.stats.passes - before
        say(f'{case}: {name} {len(done.tokens)} tokens in {seconds:.2f} s')
    rate = {name: float(np.median(values)) for name, values in rates.items()}
    line(
      f'{case}, {_LAYERS.value} layers',
      'the same engine without guesses',
      rate['guesses'],
      rate['none'],
      'tokens/s',
      wanted=wanted,
      better='more',
      tokens_per_pass=tokens / passes['guesses'],
    )


if __name__ == '__main__':
  app.run(main)
