"""What computing in 16 bits changes, on the packaged organism, whose answers mean something.

Rollouts are sampled in 16 bits, and their tokens scored by the trainer's pass in 16 bits and in
float32. The first gap is in the importance ratios of every DA-GRPO step.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import rows
from benchmarks.device.rows import Row
from benchmarks.device.setting import Setting
from dcore_jax.chat.encoding import encode_rendered
from dcore_jax.chat.template import render_prompt
from dcore_jax.config import ModelSection
from dcore_jax.data.seeds import decision_points
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.learn import grpo
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import load_policy
from dcore_jax.rollout.requests import Completion, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.worlds.toolworld.world import ToolWorld

_PART = 'bf16'
_PROMPTS = 16
_ANSWER = 128
# Nats, a token in the mean: engine and trainer in one dtype, and either against float32.
# rollout/engine.py says how far apart passes of other shapes are.
_SAME = {'float32': 1e-4, 'bfloat16': 0.02}
_ROUNDED = 0.03


def measure(setting: Setting) -> Iterator[Row]:
  """Yields the gaps between engine and trainer, in 16 bits and in float32."""
  policy = load_policy(ModelSection(), seed=0)
  params = policy.load(None)
  asked = _prompts(policy.tokenizer)
  # The cases of a CPU are those of accelerators: bfloat16 is slow there, and rounds alike.
  for dtype in ('float32', 'bfloat16'):
    cast = decoder.cast(params, jnp.dtype(dtype))
    engine = Engine(
      cast, policy.config, stop_ids=policy.stop_ids, sizes=EngineSizes(lanes=16, max_len=768)
    )
    with jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
      requests = [Request(prompt, (number,)) for number, prompt in enumerate(asked)]
      done = engine.generate(requests, SamplingParams(temperature=1.0, max_tokens=_ANSWER))
      own = _gap(policy.config, params, asked, done, dtype)
    yield _row(f'engine and trainer, both {dtype}', own, _SAME[dtype])
    if dtype == 'bfloat16':
      with jax.default_matmul_precision('highest'):
        exact = _gap(policy.config, params, asked, done, 'float32')
      yield _row('engine in bfloat16, trainer in float32', exact, _ROUNDED)


def _row(case: str, gap: np.ndarray, tolerance: float) -> Row:
  row = rows.fact(
    _PART,
    f'{case}, mean gap',
    float(gap.mean()),
    'nats',
    largest=float(gap.max()),
    p99=float(np.quantile(gap, 0.99)),
    tokens=len(gap),
  )
  return rows.within(row, tolerance)


def _prompts(tokenizer: object) -> list[np.ndarray]:
  """Returns the first decision points of some tasks of ToolWorld, as token ids."""
  world = ToolWorld()
  found = []
  for task in world.tasks('sequential', _PROMPTS, seed=5, split='train'):
    seed = task_seeds(world, task)[0]
    text = render_prompt(tokenizer, list(next(iter(decision_points(seed))).messages))
    found.append(np.array(encode_rendered(tokenizer, text), np.int32))
  return found


def _gap(
  config: DecoderConfig,
  params: decoder.Params,
  asked: list[np.ndarray],
  done: list[Completion],
  dtype: str,
) -> np.ndarray:
  """Returns |engine's log-probability - that of the trainer's pass in `dtype`| of every token."""
  responses = []
  for prompt, completion in zip(asked, done, strict=True):
    responses.append(
      grpo.Response(
        prompt=prompt,
        tokens=completion.tokens,
        behaviour_logp=completion.logprobs,
        old_logp=completion.full_logprobs,
        entropy=completion.entropies,
      )
    )
  tree = grpo.pack_responses(responses, 1024)
  score = grpo.make_score_pass(config, execution=Execution(compute=dtype))
  logp_RT, _ = grpo.score_rows(score, params, tree, 1)
  trainer = grpo.gather_values(tree, responses, logp_RT)
  return np.abs(np.concatenate(trainer) - np.concatenate([r.old_logp for r in responses]))
