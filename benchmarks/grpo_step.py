"""The DA-GRPO step: what shared prompts save against our own flat form and trl's GRPOTrainer; whole steps; memory of the loss.

    python -m benchmarks.grpo_step --trl_python=ENV/bin/python                     # every case, about 90 minutes on 2 cores
    python -m benchmarks.grpo_step --cases=update --vocabularies=4096 --rounds=3

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 trl==1.16.0 scipy     # the environment of a peer

One JSON line a case: ours, peer, ratio (> 1: ours is better), bound. A peer whose environment is not named gives a line that says
so. `update` takes the same rollouts (4 prompts of 1,024 tokens, 8 responses of 128 each) and the same random weights everywhere:
the pass over the old policy, which also gives the entropies, and one optimizer step; losses must agree to 1e-4. `whole` is a step
from sampling to update with the packaged organism, `small` one of a model of two layers of width 128, where google-tunix (its
environment: benchmarks.rollout) is at home, and `memory` what the compiled gradient of the loss needs beside its arguments.
Bounds are the multiply-adds at the rate of one large matrix product.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags

from benchmarks import measure
from benchmarks.measure import line, say
from configs import nano
from dcore_jax import tokentree
from dcore_jax.chat.template import render_prompt
from dcore_jax.data.seeds import DecisionPoint, decision_points
from dcore_jax.data.toolworld_seeds import task_seeds
from dcore_jax.learn import grpo, optimizer
from dcore_jax.models import decoder, hf_checkpoint
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import ORGANISM, load_policy
from dcore_jax.train.grpo_loop import GrpoLoop, Reference
from dcore_jax.train.rollout_batch import Prompt, Questions, Rollout, RolloutBatch, encode_prompts
from dcore_jax.train.throughput import forward_flops
from dcore_jax.worlds.toolworld.tasks import KINDS
from dcore_jax.worlds.toolworld.world import ToolWorld

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS, LEARNING_RATE = 4, 8, 1024, 128, 1e-6
CASES = ('update', 'whole', 'small', 'memory')
_CASES = flags.DEFINE_list('cases', list(CASES), f'Which of {", ".join(CASES)} to run.')
_VOCABULARIES = flags.DEFINE_list(
  'vocabularies', ['4096', '151936'], 'Vocabulary sizes of the case update.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Interleaved rounds; medians are printed.')
_TRL = flags.DEFINE_string('trl_python', '', "Python of an environment with trl; '' skips it.")


_TUNIX = flags.DEFINE_string(
  'tunix_python', '', "Python of an environment with google-tunix 0.1.7; '' skips it."
)


def model(vocabulary: int) -> DecoderConfig:
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


class Rollouts:
  """The same for all: random tokens, rewards that differ in each group, and old log-probabilities that are `shift` off, so that
  the loss is not the zero of a step on the policy that sampled. (Ratios stay far below 3, where our dual clip would begin.)"""

  def __init__(self, vocabulary: int):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(1, vocabulary, shape).astype(np.int32)
    self.prompts_PT, self.completions_NT = (
      draw(PROMPTS, PROMPT_TOKENS),
      draw(PROMPTS * GROUP, RESPONSE_TOKENS),
    )
    self.rewards_PG = rng.integers(-3, 5, (PROMPTS, GROUP)).astype(np.float32)
    self.shift_NT = rng.normal(0, 0.2, self.completions_NT.shape).astype(np.float32)

  def sequences(self) -> list[tokentree.Sequence]:
    weights = np.repeat(np.float32([0, 1]), [PROMPT_TOKENS, RESPONSE_TOKENS])
    return [
      tokentree.Sequence(
        np.concatenate([self.prompts_PT[n // GROUP], completion]), weights, PROMPT_TOKENS
      )
      for n, completion in enumerate(self.completions_NT)
    ]


class Ours:
  """Our update phase on rows of a tree, or on flat padded ones, `rows` at a time; a call returns the loss."""

  def __init__(
    self,
    config: DecoderConfig,
    params: decoder.Params,
    rollouts: Rollouts,
    *,
    merge: bool,
    rows: int,
  ):
    self.tree = tokentree.pack(
      rollouts.sequences(),
      PROMPT_TOKENS + RESPONSE_TOKENS * (GROUP if merge else 1),
      rows,
      merge=merge,
    )
    self._rows = rows
    tx = optimizer.make_optimizer('adamw', LEARNING_RATE, weight_decay=0.01)
    self._score, self._step = grpo.make_score_pass(config), grpo.make_grpo_step(config, tx)
    self._state = optimizer.init_state(jax.tree.map(lambda leaf: leaf.copy(), params), tx)
    on_rows = lambda values_NT: self.tree.scatter(
      list(np.pad(values_NT, ((0, 0), (PROMPT_TOKENS, 0))))
    )
    centred_PG = rollouts.rewards_PG - rollouts.rewards_PG.mean(axis=1, keepdims=True)
    advantage_N = (
      centred_PG / (rollouts.rewards_PG.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    ).reshape(-1)
    self._shift_RT = on_rows(rollouts.shift_NT)
    self._advantage_RT = on_rows(np.repeat(advantage_N[:, None], RESPONSE_TOKENS, axis=1))

  def __call__(self) -> float:
    tree = self.tree
    logp_RT, _ = grpo.score_rows(self._score, self._state.params, tree, self._rows)
    tree = tree.with_extras(old_logp=logp_RT + self._shift_RT, advantage=self._advantage_RT)
    self._state, metrics = self._step(self._state, tree.batch(accumulate=tree.rows // self._rows))
    return float(metrics['loss'])


class Peer:
  """A worker process in an environment of its own; a call asks it for something and returns its answer."""

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
def trl_peer(config: DecoderConfig, params: decoder.Params, **job: Any) -> Iterator[Peer]:
  """trl on a copy of the model. Its tokenizer is the organism's, which speaks for rollouts of no text as well as any."""
  organism = load_policy(nano.get_config().model, seed=0)
  ids = {'eos_token_id': organism.stop_ids, 'pad_token_id': organism.tokenizer.pad_token_id}
  with tempfile.TemporaryDirectory() as folder:
    hf_checkpoint.save_checkpoint(
      f'{folder}/model', config, params, dtype='float32', generation_config=ids
    )
    job |= dict(model=f'{folder}/model', tokenizer=str(ORGANISM), folder=f'{folder}/trl')
    with Peer(_TRL.value, 'trl_worker.py', job) as peer:
      yield peer


def rounds(runs: dict[str, Callable[[], float]]) -> dict[str, float]:
  """Median seconds of interleaved rounds; each run tells its own seconds."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for number in range(_ROUNDS.value):
    for name, run in runs.items():
      seconds[name].append(run())
      say(f'round {number}: {name} {seconds[name][-1]:.2f} s')
  return {name: float(np.median(values)) for name, values in seconds.items()}


def timed(run: Callable[[], Any]) -> Callable[[], float]:
  def call() -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began

  return call


# --- cases -----------------------------------------------------------------------------------------------------------------


def update(vocabulary: int) -> None:
  """The update phase on given rollouts."""
  case, config, rollouts = (
    f'update phase, vocabulary {vocabulary}',
    model(vocabulary),
    Rollouts(vocabulary),
  )
  params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
  ours = {
    'tree': Ours(config, params, rollouts, merge=True, rows=1),
    'flat': Ours(config, params, rollouts, merge=False, rows=4),
  }
  rate = measure.matmul_rate()
  facts = {
    name: dict(tokens=run.tree.live, bound=4 * forward_flops(config, run.tree) / rate)
    for name, run in ours.items()
  }
  with contextlib.ExitStack() as stack:
    losses = {name: run() for name, run in ours.items()}
    runs = {name: timed(run) for name, run in ours.items()}
    if _TRL.value:
      given = {
        'prompts': rollouts.prompts_PT.repeat(GROUP, axis=0).tolist(),
        'completions': rollouts.completions_NT.tolist(),
        'rewards': rollouts.rewards_PG.tolist(),
        'shift': rollouts.shift_NT.tolist(),
      }
      peer = stack.enter_context(
        trl_peer(
          config,
          params,
          rollouts=given,
          prompts=['-'] * PROMPTS,
          references=[''] * PROMPTS,
          group=GROUP,
          micro=4,
          rollouts_per_update=PROMPTS * GROUP,
          updates=1,
          max_tokens=RESPONSE_TOKENS,
          kl_coefficient=0.0,
          learning_rate=LEARNING_RATE,
        )
      )
      losses['trl'] = peer('step')['loss']
      runs['trl'] = lambda: peer('step')['seconds']
    else:
      measure.skipped(case, 'trl GRPOTrainer', 'name its environment by --trl_python')
    say(f'{case}: losses {losses}')
    for name, loss in losses.items():
      if abs(loss - losses['tree']) > 1e-4:
        raise AssertionError(f'{case}: {name} has loss {loss}, the tree {losses["tree"]}')
    seconds = rounds(runs)
  for name, peer_name in (('flat', 'our flat padded form'), ('trl', 'trl GRPOTrainer')):
    if name in seconds:
      line(
        case,
        peer_name,
        seconds['tree'],
        seconds[name],
        's',
        wanted=4,
        **facts['tree'],
        loss=losses['tree'],
        peer_loss=losses[name],
        flat_tokens=facts['flat']['tokens'],
        flat_bound=facts['flat']['bound'],
      )


def whole() -> None:
  """A step from sampling to update: the geometry of configs/nano.py, 32 prompts x 8, 4 updates, KL against the reference."""
  case, c = 'whole step, organism', nano.get_config()
  policy = load_policy(c.model, seed=0)
  tasks = [task for kind in KINDS for task in ToolWorld().tasks(kind, 16, seed=5, split='train')]
  points = [point for task in tasks for seed in task_seeds(task) for point in decision_points(seed)]
  prompts, _ = encode_prompts(policy.tokenizer, points, c.rl.max_prompt_tokens)
  params = policy.load(None)
  engine = Engine(
    params,
    policy.config,
    stop_ids=policy.stop_ids,
    lanes=c.engine.lanes,
    max_len=c.engine.max_len,
    steps_per_call=c.engine.steps_per_call,
  )
  loop = GrpoLoop(
    policy.config,
    policy.tokenizer,
    engine,
    Questions(policy.tokenizer, prompts, c.rl.reward),
    range(len(prompts)),
    c.rl,
    seed=0,
  )
  copy = lambda: jax.tree.map(lambda leaf: leaf.copy(), params)
  state, reference = optimizer.init_state(copy(), loop.tx), Reference(params, Execution())
  engine.update(state.params)
  phases: list[dict[str, float]] = []  # of our measured steps

  def step(number: int) -> dict[str, float]:
    nonlocal state
    began = time.perf_counter()
    rollouts = loop.rollouts(number)
    seconds = {'rollout': time.perf_counter() - began}
    batch = loop.source.judge(loop.chosen(number), rollouts)
    state, under_way = loop.update(state, reference, batch)
    numbers = under_way.numbers(engine)
    length = float(
      np.mean([len(completion.tokens) for r in rollouts for _, completion in r.exchanges])
    )
    return (
      seconds
      | {name: numbers[f'seconds_{name}'] for name in ('score', 'reference', 'update')}
      | {'seconds': time.perf_counter() - began, 'response_tokens': length}
    )

  def our_step() -> float:
    while True:  # other lengths may need other programs, which are compiled once in a run: a step counts that compiles none
      compiled = engine.stats.compilations
      measured = step(len(phases))
      if engine.stats.compilations == compiled:
        phases.append(measured)
        return measured['seconds']
      say(
        f'a step that compiled {engine.stats.compilations - compiled} programs: {measured["seconds"]:.2f} s'
      )

  with contextlib.ExitStack() as stack:
    runs, peer_lengths = {'ours': our_step}, []
    if _TRL.value:
      # trl takes prompts in the order of its data set: those that our steps take.
      order = [
        prompts[index].point for number in range(_ROUNDS.value + 1) for index in loop.chosen(number)
      ]
      asked = [
        (render_prompt(policy.tokenizer, list(point.messages)), point.reference) for point in order
      ]
      peer = stack.enter_context(
        trl_peer(
          policy.config,
          params,
          rollouts=None,
          prompts=[text for text, _ in asked],
          references=[r for _, r in asked],
          group=c.rl.group,
          micro=16,
          rollouts_per_update=c.rl.prompts * c.rl.group // c.rl.updates,
          updates=c.rl.updates,
          max_tokens=c.rl.max_tokens,
          kl_coefficient=c.rl.kl_coefficient,
          learning_rate=c.rl.learning_rate,
        )
      )

      def peer_step() -> float:
        answer = peer('step')
        peer_lengths.append(answer['completions/mean_length'])
        return answer['seconds']

      runs['trl'] = peer_step
    else:
      measure.skipped(case, 'trl GRPOTrainer', 'name its environment by --trl_python')
    for run in runs.values():
      run()  # compiles
    seconds = rounds(runs)
  split = {
    name: float(np.median([step[name] for step in phases[1:]]))
    for name in phases[0]
    if name != 'seconds'
  }
  line(
    case,
    'trl GRPOTrainer',
    seconds['ours'],
    seconds.get('trl'),
    's',
    wanted=4,
    **split,
    peer_response_tokens=float(np.median(peer_lengths[1:])) if peer_lengths else None,
  )


def tiny(vocabulary: int) -> DecoderConfig:
  return DecoderConfig(
    vocab_size=vocabulary,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=True,
  )


class Words:
  """What our loop asks of a tokenizer, for texts of numbers."""

  pad_token_id = 0

  def batch_decode(self, rows: list[np.ndarray], skip_special_tokens: bool) -> list[str]:
    del skip_special_tokens
    return [' '.join(map(str, row)) for row in rows]


class Numbers(Questions):
  """Prompts of random tokens; a response is worth as many as it has different tokens."""

  def judge(self, chosen: Sequence[int], rollouts: list[Rollout]) -> RolloutBatch:
    values_PG = np.float32([len(set(rollout.texts[0].split())) for rollout in rollouts]).reshape(
      len(chosen), -1
    )
    return RolloutBatch(
      [self.kinds[index] for index in chosen],
      rollouts,
      values_PG,
      values_PG * 0,
      values_PG,
      values_PG > 30,
    )


def small() -> None:
  """A whole step where fixed costs count: 4 prompts of 32 tokens x 8 responses of up to 32, one update, no reference."""
  case, config, c = 'whole step, two layers of width 128', tiny(256), nano.get_config().rl
  c.update(
    dict(
      prompts=4,
      wave=4,
      group=8,
      updates=1,
      max_tokens=32,
      capacity=512,
      rows=1,
      estimator='grpo',
      kl_coefficient=0.0,
      learning_rate=LEARNING_RATE,
    )
  )
  rng, params = (
    np.random.default_rng(0),
    jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0)),
  )
  tokens = rng.integers(2, 256, (4, 32)).astype(np.int32)
  point = DecisionPoint('', 'single', (), '')
  engine = Engine(params, config, stop_ids=[1], lanes=32, max_len=64)
  loop = GrpoLoop(
    config,
    Words(),
    engine,
    Numbers(Words(), [Prompt(point, row) for row in tokens], ''),
    range(4),
    c,
    seed=0,
  )
  state, count = optimizer.init_state(jax.tree.map(lambda leaf: leaf.copy(), params), loop.tx), 0

  def steps(number: int) -> None:
    nonlocal state, count
    for count in range(count + 1, count + 1 + number):
      state, under_way = loop.update(
        state, None, loop.source.judge(loop.chosen(count), loop.rollouts(count))
      )
      under_way.numbers(engine)

  steps(3)
  runs = {'ours': timed(lambda: steps(10))}
  with contextlib.ExitStack() as stack:
    if _TUNIX.value:
      job = dict(
        memory=False,
        config=dataclasses.asdict(config),
        group=8,
        prompt=32,
        completion=32,
        prompts=tokens.tolist(),
      )
      peer = stack.enter_context(Peer(_TUNIX.value, 'tunix_grpo_worker.py', job))
      peer('3')
      runs['tunix'] = lambda: peer('10')
    else:
      measure.skipped(case, 'google-tunix GRPOLearner', 'name its environment by --tunix_python')
    seconds = rounds(runs)
  line(
    case,
    'google-tunix GRPOLearner',
    seconds['ours'] / 10,
    seconds['tunix'] / 10 if 'tunix' in seconds else None,
    's',
    wanted=1,
  )


def memory() -> None:
  """Temporaries of the gradient of the loss: 8 rows of 512 + 512 tokens that share nothing, two layers of width 128."""
  case, config, B, P, C = 'temporaries of the loss, vocabulary 151,936', tiny(151_936), 8, 512, 512
  shape = lambda *dims, dtype=np.int32: jax.ShapeDtypeStruct(dims, dtype)
  loss_tokens, numbers = shape(1, B * C), shape(1, B * C, dtype=np.float32)
  rows = (shape(1, B, P + C),) * 3
  batch = tokentree.RowBatch(
    *rows,
    loss_tokens,
    loss_tokens,
    loss_tokens,
    numbers,
    {'old_logp': numbers, 'advantage': numbers},
  )
  abstract = jax.tree.map(
    lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), decoder.abstract_params(config)
  )
  tx = optax.sgd(1.0)
  step = (
    grpo.make_grpo_step(config, tx)
    .lower(jax.eval_shape(lambda p: optimizer.init_state(p, tx), abstract), batch)
    .compile()
  )
  ours, theirs = step.memory_analysis().temp_size_in_bytes / 2**20, None
  if _TUNIX.value:
    job = dict(
      memory=True, config=dataclasses.asdict(config), group=8, rows=B, prompt=P, completion=C
    )
    with Peer(_TUNIX.value, 'tunix_grpo_worker.py', job) as peer:
      theirs = peer() / 2**20
  else:
    measure.skipped(case, 'google-tunix grpo_loss_fn', 'name its environment by --tunix_python')
  line(case, 'google-tunix grpo_loss_fn', ours, theirs, 'MiB', wanted=10)


def main(_) -> None:
  unknown = sorted(set(_CASES.value) - set(CASES))
  if unknown:
    raise app.UsageError(f'unknown cases {unknown}; known are {CASES}')
  if 'update' in _CASES.value:
    for vocabulary in map(int, _VOCABULARIES.value):
      update(vocabulary)
  for name, case in dict(whole=whole, small=small, memory=memory).items():
    if name in _CASES.value:
      case()


if __name__ == '__main__':
  app.run(main)
