"""Measures the DA-GRPO step: what sharing prompts saves, whole steps, memory of the loss.

    python -m benchmarks.grpo_step --trl_python=ENV/bin/python
    python -m benchmarks.grpo_step --cases=update --vocabularies=4096 --rounds=3
    python -m benchmarks.grpo_step --cases=repeated,packing --trl_python=ENV/bin/python

All cases take about 90 minutes on 2 cores. The environment of a peer:

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 trl==1.16.0 scipy

One JSON line a case: ours, peer, ratio (> 1: ours is better), bound. Peers are our own flat form
and trl's GRPOTrainer; one whose environment is not named gives a line that says so. Cases:

  update  The same rollouts (4 prompts of 1,024 tokens, 8 responses of 128 each) and the same random
          weights everywhere: the pass over the old policy, which also gives the entropies, and one
          optimizer step. Losses must agree to 1e-4.
  whole   A step from sampling to update with the packaged organism.
  small   The same for a model of two layers of width 128, where google-tunix (its environment:
          benchmarks.rollout) is at home.
  repeated  The updates of a step of the organism whose rollouts repeat each other, merged and not
          (benchmarks.repeated).
  packing  Groups of 8,192 + 8 x 4,096 tokens on the host, against trl's AsyncGRPO packer.
  memory  What the compiled gradient of the loss needs beside its arguments.

Bounds are the multiply-adds at the rate of one large matrix product.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from absl import app, flags

from benchmarks import measure, repeated
from benchmarks.measure import line, say
from benchmarks.organism_step import OrganismStep
from benchmarks.peers import Peer, trl_peer
from benchmarks.random_prompts import Numbers, Words, prompts
from configs import nano
from dcore_jax import tokentree
from dcore_jax.chat.template import render_prompt
from dcore_jax.learn import grpo, objectives, optimizer
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import ORGANISM, Policy
from dcore_jax.rollout.sizes import EngineSizes
from dcore_jax.train.learner import Learner
from dcore_jax.train.prompt_order import PromptOrder
from dcore_jax.train.sampler import Sampler
from dcore_jax.train.throughput import forward_flops, matmul_rate

PROMPTS = 4
GROUP = 8
PROMPT_TOKENS = 1024
RESPONSE_TOKENS = 128
LEARNING_RATE = 1e-6
CASES = ('update', 'whole', 'small', 'repeated', 'packing', 'memory')
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
  """The model of the `update` case."""
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
  """The same for all: random tokens, rewards that differ in each group, and old log-probabilities
  that are `shift` off, so that the loss is not the zero of a step on the policy that sampled.
  (Ratios stay far below 3, where our dual clip would begin.)
  """

  def __init__(self, vocabulary: int):
    rng = np.random.default_rng(0)

    def draw(*shape):
      return rng.integers(1, vocabulary, shape).astype(np.int32)

    self.prompts_PT = draw(PROMPTS, PROMPT_TOKENS)
    self.completions_NT = draw(PROMPTS * GROUP, RESPONSE_TOKENS)
    self.rewards_PG = rng.integers(-3, 5, (PROMPTS, GROUP)).astype(np.float32)
    self.shift_NT = rng.normal(0, 0.2, self.completions_NT.shape).astype(np.float32)

  def sequences(self) -> list[tokentree.TokenSequence]:
    """Prompts with their responses; responses are trained."""
    weights = np.repeat(np.float32([0, 1]), [PROMPT_TOKENS, RESPONSE_TOKENS])
    return [
      tokentree.TokenSequence(
        np.concatenate([self.prompts_PT[n // GROUP], completion]), weights, PROMPT_TOKENS
      )
      for n, completion in enumerate(self.completions_NT)
    ]


class Ours:
  """Our update phase on rows of a tree, or on flat padded ones, `rows` at a time; a call returns
  the loss.
  """

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
    self._score = grpo.make_score_pass(config)
    self._step = grpo.make_grpo_step(config, tx, objectives.PolicyLoss())
    self._state = optimizer.init_state(jax.tree.map(lambda leaf: leaf.copy(), params), tx)

    def on_rows(values_NT):
      return self.tree.scatter(list(np.pad(values_NT, ((0, 0), (PROMPT_TOKENS, 0)))))

    centred_PG = rollouts.rewards_PG - rollouts.rewards_PG.mean(axis=1, keepdims=True)
    advantage_N = (
      centred_PG / (rollouts.rewards_PG.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    ).reshape(-1)
    advantage_RT = on_rows(np.repeat(advantage_N[:, None], RESPONSE_TOKENS, axis=1))
    self._shift_RT = on_rows(rollouts.shift_NT)
    self._sides = objectives.advantage_sides(advantage_RT)

  def __call__(self) -> float:
    """Scores the old policy and makes one update; returns the loss."""
    tree = self.tree
    logp_RT, _ = grpo.score_rows(self._score, self._state.params, tree, self._rows)
    tree = tree.with_extras(old_logp=logp_RT + self._shift_RT, **self._sides)
    self._state, metrics = self._step(self._state, tree.batch(accumulate=tree.rows // self._rows))
    return float(metrics['loss'])


def rounds(runs: dict[str, Callable[[], float]]) -> dict[str, float]:
  """Median seconds of interleaved rounds; each run tells its own seconds."""
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for number in range(_ROUNDS.value):
    for name, run in runs.items():
      seconds[name].append(run())
      say(f'round {number}: {name} {seconds[name][-1]:.2f} s')
  return {name: float(np.median(values)) for name, values in seconds.items()}


def timed(run: Callable[[], Any]) -> Callable[[], float]:
  """A function that runs `run` and returns its seconds."""

  def call() -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began

  return call


# --- cases ----------------------------------------------------------------------------------------


def update(vocabulary: int) -> None:
  """The update phase on given rollouts."""
  case = f'update phase, vocabulary {vocabulary}'
  config = model(vocabulary)
  rollouts = Rollouts(vocabulary)
  params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
  ours = {
    'tree': Ours(config, params, rollouts, merge=True, rows=1),
    'flat': Ours(config, params, rollouts, merge=False, rows=4),
  }
  rate = matmul_rate('float32')
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
          _TRL.value,
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


def trl_job(ours: OrganismStep, c: ml_collections.ConfigDict) -> dict[str, Any]:
  """What trl is asked for: the steps of ours."""
  # trl takes prompts in the order of its data set: those that our steps take.
  points = []
  for number in range(_ROUNDS.value + 1):
    points += [ours.prompts[index].point for index in ours.order.chosen(number)]
  return dict(
    rollouts=None,
    prompts=[render_prompt(ours.policy.tokenizer, list(point.messages)) for point in points],
    references=[point.reference for point in points],
    group=c.rl.group,
    micro=16,
    rollouts_per_update=c.rl.prompts * c.rl.group // c.rl.updates,
    updates=c.rl.updates,
    max_tokens=c.rl.max_tokens,
    kl_coefficient=c.rl.kl_coefficient,
    learning_rate=c.rl.learning_rate,
  )


def whole() -> None:
  """A step from sampling to update.

  The geometry is that of configs/nano.py: 32 prompts x 8, 4 updates, KL against the reference.
  """
  case = 'whole step, organism'
  c = nano.get_config()
  ours = OrganismStep(c)
  runs: dict[str, Callable[[], float]] = {'ours': ours}
  peer_lengths = []
  with contextlib.ExitStack() as stack:
    if _TRL.value:
      peer = stack.enter_context(
        trl_peer(_TRL.value, ours.policy.config, ours.params, **trl_job(ours, c))
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
  split = {}
  for name in ours.phases[0]:
    if name != 'seconds':
      split[name] = float(np.median([step[name] for step in ours.phases[1:]]))
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
  """The model of the `small` and `memory` cases."""
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


def small() -> None:
  """A whole step where fixed costs count.

  4 prompts of 32 tokens x 8 responses of up to 32, one update, no reference.
  """
  case = 'whole step, two layers of width 128'
  config = tiny(256)
  c = nano.get_config().rl
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
  rng = np.random.default_rng(0)
  params = jax.jit(decoder.init_params, static_argnums=0)(config, jax.random.key(0))
  tokens = rng.integers(2, 256, (4, 32)).astype(np.int32)
  engine = Engine(params, config, stop_ids=[1], sizes=EngineSizes(lanes=32, max_len=64))
  policy = Policy(config=config, load=None, tokenizer=Words(), tokenizer_dir=ORGANISM, path=None)
  source = Numbers(prompts(tokens))
  order = PromptOrder(items=range(4), prompts=4, seed=0)
  sampler = Sampler(engine, source, order, c)
  learner = Learner(policy, engine, source, c, Execution())
  copied = jax.tree.map(lambda leaf: leaf.copy(), params)
  state = optimizer.init_state(copied, learner.programs.tx)
  count = 0

  def steps(number: int) -> None:
    nonlocal state, count
    for _ in range(number):
      count += 1
      batch = source.judge(order.chosen(count), sampler.rollouts(count))
      state, under_way = learner.update(state, None, batch)
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
  """Temporaries of the gradient of the loss.

  8 rows of 512 + 512 tokens that share nothing, two layers of width 128.
  """
  case = 'temporaries of the loss, vocabulary 151,936'
  config = tiny(151_936)
  B = 8
  P = 512
  C = 512

  def shape(*dims, dtype=np.int32):
    return jax.ShapeDtypeStruct(dims, dtype)

  loss_tokens = shape(1, B * C)
  numbers = shape(1, B * C, dtype=np.float32)
  loss = objectives.PolicyLoss()
  rows = shape(1, B, P + C)
  batch = tokentree.RowBatch(
    tokens=rows,
    position=rows,
    end=rows,
    parent=loss_tokens,
    slot=loss_tokens,
    target=loss_tokens,
    weight=numbers,
    extras=dict.fromkeys(loss.extras, numbers),
  )
  abstract = jax.tree.map(
    lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), decoder.abstract_params(config)
  )
  tx = optax.sgd(1.0)
  step = (
    grpo.make_grpo_step(config, tx, loss)
    .lower(jax.eval_shape(lambda p: optimizer.init_state(p, tx), abstract), batch)
    .compile()
  )
  ours = step.memory_analysis().temp_size_in_bytes / 2**20
  theirs = None
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
  """Runs the cases that are asked for."""
  unknown = sorted(set(_CASES.value) - set(CASES))
  if unknown:
    raise app.UsageError(f'unknown cases {unknown}; known are {CASES}')
  if 'update' in _CASES.value:
    for vocabulary in map(int, _VOCABULARIES.value):
      update(vocabulary)
  if 'repeated' in _CASES.value:
    repeated.updates(_ROUNDS.value)
  if 'packing' in _CASES.value:
    repeated.packing(_ROUNDS.value, _TRL.value)
  for name, case in dict(whole=whole, small=small, memory=memory).items():
    if name in _CASES.value:
      case()


if __name__ == '__main__':
  app.run(main)
