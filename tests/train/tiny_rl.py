"""A reinforcement run of seconds: eight questions, a decoder of one layer. All tests of the loop share its compiled programs.

A program too: `python -m tests.train.tiny_rl FOLDER STEPS` trains on, for tests that kill it.
"""

import pathlib
import sys
from typing import Any

import jax
import ml_collections

from dcore_jax.chat.messages import Message
from dcore_jax.data.seeds import DecisionPoint
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts
from dcore_jax.rollout.engine import Engine
from dcore_jax.run.defaults import default_config
from dcore_jax.train import grpo_loop
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.rollout_batch import Questions, encode_prompts

TOKENIZER = build_tokenizer(sample_texts(), 640)
MODEL = DecoderConfig(
  vocab_size=640,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=1,
  num_attention_heads=2,
  num_key_value_heads=1,
  head_dim=16,
  rope_theta=1e4,
  tie_word_embeddings=True,
  max_position_embeddings=256,
)
_RATES = ('seconds', 'tokens_per_second', 'tflops', 'mfu')


def rl_config(**changes: Any) -> ml_collections.ConfigDict:
  config = default_config().rl
  config.update(
    dict(
      steps=3,
      prompts=2,
      group=4,
      wave=1,
      updates=2,
      learning_rate=1e-2,
      alpha=0.4,
      max_tokens=12,
      capacity=128,
      rows=2,
      checkpoint_every=1,
      validation=2,
    )
    | changes
  )
  return config


def points(count: int = 8) -> list[DecisionPoint]:
  return [
    DecisionPoint(
      str(i),
      'single',
      (Message('user', f'find the order of Karo {i}'),),
      f"[find_order(customer='K{i}')]",
    )
    for i in range(count)
  ]


def questions(config: ml_collections.ConfigDict, count: int = 8) -> Questions:
  return Questions(TOKENIZER, encode_prompts(TOKENIZER, points(count), 64)[0], config.reward)


def params(seed: int = 0) -> decoder.Params:
  drawn = decoder.init_params(MODEL, jax.random.key(seed))
  return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), drawn)


def make_engine(params: decoder.Params) -> Engine:
  return Engine(params, MODEL, stop_ids=[TOKENIZER.eos_token_id], lanes=8, max_len=96)


def train(
  folder: pathlib.Path,
  config: ml_collections.ConfigDict,
  *,
  count: int = 8,
  seed: int = 0,
  engine=make_engine,
):
  """What `run_rl` returns, for `count` questions and the weights of a seed."""
  with Metrics(folder) as metrics:
    return grpo_loop.run_rl(
      params(seed),
      MODEL,
      TOKENIZER,
      questions(config, count),
      config,
      metrics,
      folder / 'checkpoints',
      make_engine=engine,
      seed=1,
    )


def timeless(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The rows that a run has written, without what depends on the clock."""
  return [
    {k: v for k, v in row.items() if not k.startswith(_RATES)} for row in read_metrics(folder)
  ]


if __name__ == '__main__':
  train(
    pathlib.Path(sys.argv[1]), rl_config(steps=int(sys.argv[2]), checkpoint_every=2, validation=0)
  )
