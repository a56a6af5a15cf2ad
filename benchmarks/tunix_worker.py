"""google-tunix's sampler behind a pipe; runs in the interpreter of its own environment, which
`benchmarks.rollout` is told.

The first line on stdin says what to sample (JSON: config of the model, prompts as ids, budget,
stop_ids), every further one is a seed; each is answered by a line with the number of useful tokens.
Made for google-tunix 0.1.7 and jax 0.8.
"""

import json
import sys
from typing import Any

import jax
from flax import nnx
from tunix.generate import sampler as tunix_sampler
from tunix.models.qwen3 import model as qwen3


class IdTokenizer:
  """Texts are ids with spaces between: the sampler takes text only.

  An id of 0 for the first token leaves that out.
  """

  def encode(self, text: str) -> list[int]:
    """Ids of a text."""
    return [int(word) for word in text.split()]

  def decode(self, ids: list[int]) -> str:
    """Text of ids."""
    return ''

  def bos_id(self) -> int:
    """The id before a text."""
    return 0

  def eos_id(self) -> int:
    """The id after a text."""
    return 0

  def pad_id(self) -> int:
    """The id of padding."""
    return 0


def make_model(config: dict[str, Any]) -> qwen3.Qwen3:
  """A model of the size that a `config.json` says."""
  return qwen3.Qwen3(
    qwen3.ModelConfig(
      num_layers=config['num_hidden_layers'],
      vocab_size=config['vocab_size'],
      embed_dim=config['hidden_size'],
      hidden_dim=config['intermediate_size'],
      num_heads=config['num_attention_heads'],
      head_dim=config['head_dim'],
      num_kv_heads=config['num_key_value_heads'],
      rope_theta=config['rope_theta'],
      norm_eps=config['rms_norm_eps'],
      use_tied_embedding=config['tie_word_embeddings'],
    ),
    rngs=nnx.Rngs(0),
  )


def randomise(model: qwen3.Qwen3) -> None:
  """Random weights of deviation 0.02, as ours has; some of its own are zero."""
  leaves, structure = jax.tree.flatten(nnx.state(model))
  keys = jax.random.split(jax.random.key(0), len(leaves))
  drawn = [
    0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) if leaf.ndim > 1 else leaf
    for key, leaf in zip(keys, leaves, strict=True)
  ]
  nnx.update(model, jax.tree.unflatten(structure, drawn))


def make_sampler(config: dict[str, Any], cache_size: int) -> tunix_sampler.Sampler:
  """A sampler of a random model of this size."""
  model = make_model(config)
  randomise(model)
  cache = tunix_sampler.CacheConfig(
    cache_size, config['num_hidden_layers'], config['num_key_value_heads'], config['head_dim']
  )
  return tunix_sampler.Sampler(model, IdTokenizer(), cache)


def main() -> None:
  """Reads what to sample, and samples for every seed."""
  case = json.loads(sys.stdin.readline())
  longest = max(map(len, case['prompts']))
  budget = case['budget']
  sample = make_sampler(case['config'], longest + budget)
  texts = [' '.join(map(str, prompt)) for prompt in case['prompts']]
  for line in sys.stdin:
    # Without top_p its sampler is greedy at any temperature; 1.0 keeps every token.
    out = sample(
      texts,
      max_generation_steps=budget,
      max_prompt_length=longest,
      temperature=1.0,
      top_p=1.0,
      seed=int(line),
      eos_tokens=case['stop_ids'] or None,
    )
    # It strips the stop token, which is one that was sampled.
    print(sum(min(len(tokens) + 1, budget) for tokens in out.tokens), flush=True)


if __name__ == '__main__':
  main()
