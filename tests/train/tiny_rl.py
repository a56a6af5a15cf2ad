"""A reinforcement run of seconds: eight questions, a decoder of one layer.

All tests of the loop share its compiled programs.

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
from dcore_jax.models.decoder import Execution
from dcore_jax.organism.tokenizer import build_tokenizer
from dcore_jax.organism.vocabulary import sample_texts
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import ORGANISM, Policy
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.run.config import default_config
from dcore_jax.train.learner import Learner
from dcore_jax.train.metrics import Metrics, read_metrics
from dcore_jax.train.prompt_order import PromptOrder
from dcore_jax.train.rl_loop import run_rl
from dcore_jax.train.sampler import Sampler
from dcore_jax.train.sources import Questions, RolloutSource, encode_prompts
from dcore_jax.train.stage_run import StageRun

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
POLICY = Policy(
  config=MODEL,
  load=lambda mesh: params(),
  tokenizer=TOKENIZER,
  tokenizer_dir=ORGANISM,
  path=None,
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
  sizes = EngineSizes(lanes=8, max_len=96)
  return Engine(params, MODEL, stop_ids=[TOKENIZER.eos_token_id], sizes=sizes)


def make_sampler(engine: Engine, source: RolloutSource, config: ml_collections.ConfigDict):
  """Without a journal, over all items of the source."""
  order = PromptOrder(items=range(len(source.kinds)), prompts=config.prompts, seed=1)
  return Sampler(engine, source, order, config)


def make_learner(engine: Engine, source: RolloutSource, config: ml_collections.ConfigDict):
  return Learner(POLICY, engine, source, config, Execution())


def train_on(
  folder: pathlib.Path,
  source: RolloutSource,
  config: ml_collections.ConfigDict,
  *,
  seed: int = 0,
  engine=make_engine,
  execution: Execution | None = None,
):
  """What `run_rl` returns, for the weights of a seed."""
  with Metrics(folder) as metrics:
    return run_rl(
      params(seed),
      POLICY,
      source,
      config,
      StageRun(metrics=metrics, checkpoints=folder / 'checkpoints', seed=1),
      make_engine=engine,
      execution=execution or Execution(),
    )


def train(folder: pathlib.Path, config: ml_collections.ConfigDict, *, count: int = 8, **options):
  """What `run_rl` returns, for `count` questions."""
  return train_on(folder, questions(config, count), config, **options)


def timeless(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The rows that a run has written, without what depends on the clock."""
  return [
    {k: v for k, v in row.items() if not k.startswith(_RATES)} for row in read_metrics(folder)
  ]


if __name__ == '__main__':
  train(
    pathlib.Path(sys.argv[1]), rl_config(steps=int(sys.argv[2]), checkpoint_every=2, validation=0)
  )
