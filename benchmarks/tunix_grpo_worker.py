"""google-tunix's GRPO behind a pipe; runs in the interpreter of its own environment, which
`benchmarks.grpo_step` is told.

The first line on stdin is the job (JSON). With `memory` the answer is a line with the temporary
bytes of its compiled loss gradient, and that is all. Otherwise every further line asks for so many
steps of GRPO, answered by their seconds. Made for google-tunix 0.1.7 and jax 0.8.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.rl import algo_core, rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix_worker import (  # its neighbour: this file's folder is where a script looks first
  make_model,
  randomise,
)


class IdTokenizer:
  """Texts are ids with spaces between."""

  def encode(self, text: str) -> list[int]:
    """Ids of a text."""
    return [int(word) for word in text.split()]

  def decode(self, ids: list[int]) -> str:
    """Text of ids."""
    return ' '.join(map(str, ids))

  def bos_id(self) -> int:
    """The id before a text."""
    return 0

  def eos_id(self) -> int:
    """The id after a text."""
    return 1

  def pad_id(self) -> int:
    """The id of padding."""
    return 0


def grpo_config(job: dict[str, Any]) -> grpo_learner.GRPOConfig:
  """The settings of its learner."""
  config = grpo_learner.GRPOConfig(
    num_generations=job['group'], num_iterations=1, beta=0.0, epsilon=0.2
  )
  config.temperature = 1.0  # its learner sets it likewise
  return config


def temporaries(job: dict[str, Any]) -> int:
  """Bytes of temporaries of the gradient of its loss, compiled from shapes alone."""
  graph, state = nnx.split(nnx.eval_shape(lambda: make_model(job['config'])))
  B = job['rows']
  P = job['prompt']
  C = job['completion']

  def tokens(size):
    return jax.ShapeDtypeStruct((B, size), jnp.int32)

  example = grpo_learner.TrainExample(
    prompt_ids=tokens(P),
    prompt_mask=jax.ShapeDtypeStruct((B, P), bool),
    completion_ids=tokens(C),
    completion_mask=jax.ShapeDtypeStruct((B, C), bool),
    advantages=jax.ShapeDtypeStruct((B,), jnp.float32),
    ref_per_token_logps=None,
    old_per_token_logps=jax.ShapeDtypeStruct((B, C), jnp.float32),
  )

  def loss(state, example):
    return algo_core.grpo_loss_fn(nnx.merge(graph, state), example, grpo_config(job), 0, 1)

  compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(state, example).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def train(job: dict[str, Any]) -> None:
  """Its learner over batches that come when they are asked for; the seconds between two askings are
  those of the steps.
  """
  model = make_model(job['config'])
  randomise(model)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp'))
  roles = dict.fromkeys(
    (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh
  )
  rollout = base_rollout.RolloutConfig(
    max_tokens_to_generate=job['completion'],
    max_prompt_length=job['prompt'],
    temperature=1.0,
    top_p=1.0,
    top_k=None,
    kv_cache_size=job['prompt'] + job['completion'],
    eos_tokens=[1],
  )
  training = rl_cluster.RLTrainingConfig(
    actor_optimizer=optax.adamw(1e-6),
    eval_every_n_steps=10**9,
    max_steps=10**9,
    mini_batch_size=len(job['prompts']),
    train_micro_batch_size=len(job['prompts']),
  )
  cluster = rl_cluster.RLCluster(
    actor=model,
    tokenizer=IdTokenizer(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=roles, training_config=training, rollout_config=rollout
    ),
  )

  def reward(prompts, completions, **_):
    return [float(len(set(text.split()))) for text in completions]

  texts = np.array([' '.join(map(str, prompt)) for prompt in job['prompts']])

  def batches() -> Iterator[dict[str, np.ndarray]]:
    yield {'prompts': texts}  # compiles
    for line in sys.stdin:
      began = time.perf_counter()
      for _ in range(int(line)):
        yield {'prompts': texts}
      print(f'answer {time.perf_counter() - began}', flush=True)

  with mesh:
    grpo_learner.GRPOLearner(cluster, grpo_config(job), reward).train(batches())


def main() -> None:
  """Reads the job and answers it."""
  job = json.loads(sys.stdin.readline())
  if job['memory']:
    print(f'answer {temporaries(job)}', flush=True)
  else:
    train(job)


if __name__ == '__main__':
  main()
