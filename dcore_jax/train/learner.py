"""The updates of a reinforcement step: old policy, advantages, reference, optimizer steps.

A response keeps all that is known of its tokens (`learn.grpo.Response`) until it is laid on its
mini-batch's packed rows. Updates are dispatched and not waited for: `Update.numbers` waits, and
returns what a person reads of them. Letters: P prompts, G rollouts of a prompt, R rows, T tokens in
a row, A micro-batches.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dcore_jax import sharding
from dcore_jax.config import RlSection
from dcore_jax.learn import advantages, grpo, lora, objectives, psi_gradient
from dcore_jax.learn.grpo import Response
from dcore_jax.learn.optimizer import TrainState
from dcore_jax.learn.psi import PsiScale
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.fleet import Fleet
from dcore_jax.rollout.policy import Policy
from dcore_jax.tokentree import TokenTree
from dcore_jax.train.mini_batches import MiniBatch, Packer, flat
from dcore_jax.train.other_policies import Reference, with_teacher_logp
from dcore_jax.train.psi_measure import Psi, PsiMeasure
from dcore_jax.train.rl_options import (
  OptimizerOptions,
  alpha_measure,
  group_parts,
  make_estimator,
  next_alpha,
  optimizer_options,
  policy_loss,
)
from dcore_jax.train.rollout_batch import RolloutBatch
from dcore_jax.train.sources import RolloutSource
from dcore_jax.train.throughput import forward_flops, product_flops

Params = Any
# Nats. The engine's own log-probabilities and entropies stand in for the trainer's where they
# differ by less. In float32 they differ by 1e-6 to 1e-5, in bfloat16 by 1e-2.
_EXACT = 1e-4


class Programs(NamedTuple):
  """The optimizer and the compiled functions of a run."""

  tx: optax.GradientTransformation
  score: grpo.ScorePass
  step: Any
  psi_norm: Any
  psi_cosine: Any


# Cached by all that is compiled in. Runs of a sweep, and tests, often differ in nothing else.
@functools.lru_cache(maxsize=4)
def _programs(
  model: DecoderConfig,
  execution: Execution,
  optimizer: OptimizerOptions,
  temperature: float,
  loss: objectives.PolicyLoss,
) -> Programs:
  tx = optimizer.make()
  # As the step has them: what is measured is a part of its gradient.
  measured = {
    'temperature': temperature,
    'execution': execution,
    'aggregation': loss.aggregation,
    'max_tokens': loss.max_tokens,
  }
  return Programs(
    tx=tx,
    score=grpo.make_score_pass(model, temperature=temperature, execution=execution),
    step=grpo.make_grpo_step(model, tx, loss, temperature=temperature, execution=execution),
    psi_norm=psi_gradient.make_psi_norm(model, **measured),
    # Compiled where it is called first: only runs that measure it pay for it.
    psi_cosine=psi_gradient.make_psi_cosine(model, **measured),
  )


class Scores(NamedTuple):
  """The old policy on the tokens of some responses, as the trainer computes it.

  Attributes:
    responses: with the trainer's old_logp and entropy.
    gap: of every token, |engine's log-probability - trainer's|.
    entropy_gap: the same of entropies.
    flops: operations that the pass took.
  """

  responses: list[Response]
  gap: np.ndarray
  entropy_gap: np.ndarray
  flops: float


@dataclasses.dataclass
class Update:
  """Optimizer steps that are under way.

  Attributes:
    began: time of their dispatch, by the monotonic clock.
    seconds: what the phases before them took.
    values: metrics of each step, on the device until it is done.
    psi: what is measured of psi; None for an estimator without it.
    facts: figures that are known already.
    flops: operations of the whole step, from sampling to update.
    ended: time when the engine had the new weights; NaN before `numbers`.
  """

  began: float
  seconds: dict[str, float]
  values: list[dict[str, jax.Array]]
  psi: Psi | None
  facts: dict[str, float]
  flops: float
  ended: float = math.nan

  def numbers(self, engine: Engine) -> dict[str, float]:
    """Waits for the device and returns all that is written down of the update and its phases."""
    # The first call that waits: until here, device and host have worked side by side.
    jax.block_until_ready(self.values)
    updated = time.monotonic()
    # The engine has its own copy of the weights, whose dispatch came last.
    jax.block_until_ready(engine.params)
    self.ended = time.monotonic()
    values = jax.device_get(self.values)
    row = {}
    for name in values[0]:
      # Averages over the optimizer steps of a batch; the two that are left out are no averages.
      if name not in ('skipped', 'weight'):
        row[name] = float(np.mean([value[name] for value in values]))
    # The steps' entropy is of the policy while it is updated; `facts` has that of the old one.
    row['policy_entropy'] = row.pop('entropy')
    if self.psi is not None:
      row['psi_grad_norm'] = float(self.psi.norm) * self.psi.share
      # The share is of the update that the measured mini-batch makes, not of the first one.
      whole = float(values[self.psi.place]['grad_norm'])  # NaN where the update was skipped
      row['psi_grad_share'] = row['psi_grad_norm'] / whole if whole else 0.0
      if self.psi.cosine is not None:
        row['psi_cosine'] = float(self.psi.cosine)
    row |= self.facts
    row['skipped'] = int(sum(value['skipped'] for value in values))
    for name, seconds in self.seconds.items():
      row[f'seconds_{name}'] = seconds
    # Two phases, so that a slow transfer to the engine is not taken for a slow update.
    row['seconds_update'] = updated - self.began
    row['seconds_engine_update'] = self.ended - updated
    return row


class Learner:
  """Makes the updates of a run from scored rollouts.

  Args:
    policy: model and tokenizer.
    engine: made the rollouts; gets the new weights.
    source: what the rollouts answer; its sizes fix the shapes of a step.
    config: section `rl`.
    execution: how the training passes run.
    frozen: what the adapters in the train state stand beside; None where all parameters are in it.

  Attributes:
    alpha: weight of the entropy in psi; changes where `rl.alpha_measure` names what it has to hold.
    programs: the compiled functions.
    packer: lays rollouts out in rows.
  """

  def __init__(
    self,
    policy: Policy,
    engine: Engine | Fleet,
    source: RolloutSource,
    config: RlSection,
    execution: Execution,
    *,
    frozen: lora.Frozen | None = None,
  ):
    self.alpha = config.alpha
    self._policy = policy
    self._engine = engine
    self._frozen = frozen
    self._config = config
    # Resolved once: a wrong option is an error before the first rollout.
    self._loss = policy_loss(config)
    self._of_fleet = isinstance(engine, Fleet)
    self._with_psi = advantages.uses_entropy(config.estimator)
    self._taught = advantages.uses_teacher(config.estimator)
    self.packer = Packer(
      config,
      source,
      engine.max_new,
      policy.tokenizer.pad_token_id,
      # Tokens that are merged have one probability under the policy that drew them. Servers may
      # draw equal tokens with unequal weights.
      merge=self._loss.merges and not self._of_fleet,
    )
    # Positional, since lru_cache takes a keyword for another key.
    self.programs = _programs(
      policy.config,
      execution,
      optimizer_options(config),
      config.temperature,
      self._loss,
    )
    self._measure = PsiMeasure(
      functools.partial(self.programs.psi_norm, frozen=frozen),
      functools.partial(self.programs.psi_cosine, frozen=frozen),
      self.packer.row_batch,
      self._loss.aggregation,
    )

  def adapt_alpha(self, row: dict[str, float]) -> None:
    """Takes the numbers of a step, before the next one's advantages are computed."""
    # Measured on this step, used from the next one on: alpha follows with one step's delay.
    if self._config.alpha_measure:
      self.alpha = next_alpha(self._config, self.alpha, alpha_measure(self._config, row))

  def update(
    self,
    state: TrainState,
    reference: Reference | None,
    batch: RolloutBatch,
    *,
    cosine: bool = False,
  ) -> tuple[TrainState, Update]:
    """Dispatches all optimizer steps on one rollout batch, and the engine's update.

    Args:
      state: parameters and moments; donated.
      reference: the policy of the KL term, where there is one.
      batch: the scored rollouts.
      cosine: whether to measure the angle between the gradients of psi and of GRPO.

    Returns:
      (the state after them, what is under way).
    """
    # Both phases are in every row of metrics, also where one is not run.
    seconds = {'score': 0.0, 'reference': 0.0}
    taught_flops = 0.0
    with _timed(seconds, 'score'):
      params = lora.attach(self._frozen, state.params)
      minis, scores = self._score(params, self.packer.mini_batches(batch))
      if self._taught:
        minis, taught_flops = self._with_teacher(params, minis)
      minis = [self._with_advantages(number, mini) for number, mini in enumerate(minis)]
    # Only a KL term reads the reference.
    if self._config.kl_coefficient:
      with _timed(seconds, 'reference'):
        minis = self._with_reference(reference, minis)
    # Only what the loss reads goes to the device.
    names = self._loss.extras
    how = self._loss.aggregation
    trees = [grpo.lay_values(mini.tree, mini.responses, names, how) for mini in minis]
    # Before the updates: psi's gradient is that of the policy which sampled.
    psi = None
    if self._with_psi:
      laid = [(mini.responses, tree) for mini, tree in zip(minis, trees, strict=True)]
      psi = self._measure.norm(state.params, laid)
      if cosine:
        psi = psi._replace(cosine=self._measure.cosine(state.params, laid))
    # Arguments and not constants of the program: alpha may change with every step.
    scale = None
    if self._loss.entropy_of:
      scale = PsiScale(alpha=np.float32(self.alpha), delta=np.float32(self._config.delta))
    began = time.monotonic()
    values = []
    for tree in trees:  # while the device works on one, the host lays the next one out
      state, value = self.programs.step(
        state, sharding.place_batch(self.packer.row_batch(tree), whole=True), scale, self._frozen
      )
      values.append(value)
    # Dispatched before the host adds anything up, so that the next rollouts can begin.
    self._engine.update(lora.attach(self._frozen, state.params))
    # Sampling computes what a forward pass does, and an update three times that.
    passes = 5 if self._config.kl_coefficient else 4
    # Counted from the trees, without padding: what the mathematics needs. Rollouts that repeat each
    # other count once, though each was sampled.
    flops = passes * sum(forward_flops(self._policy.config, mini.tree) for mini in minis)
    if self._frozen is not None:
      # A base that is not trained has no products for its gradient.
      flops -= sum(product_flops(self._policy.config, mini.tree) for mini in minis)
    update = Update(
      began=began,
      seconds=seconds,
      values=values,
      psi=psi,
      facts=self._facts(minis, scores),
      flops=flops + taught_flops + sum(part.flops for part in scores),
    )
    return state, update

  def _facts(self, minis: Sequence[MiniBatch], scores: Sequence[Scores]) -> dict[str, float]:
    gap = np.concatenate([part.gap for part in scores])
    # Each host has all responses, so that these figures need no exchange.
    sampled = sum(len(response.tokens) for mini in minis for response in mini.responses)
    # Summed over packed rows, so that the order of addition, and with it the last bit that an
    # adapted alpha depends on, is that of earlier versions' runs where nothing is merged.
    entropy = 0.0
    for mini in minis:
      entropy += mini.tree.add_up([response.entropy for response in mini.responses]).sum()
    # Warns as well, once a run.
    cut = self.packer.cut_groups(minis)
    facts = {
      'logp_gap_mean': float(gap.mean()),
      'logp_gap_max': float(gap.max()),
      'scored_fraction': len(gap) / sampled,
      'dedup': float(np.mean([mini.tree.dedup for mini in minis])),
      'cut_groups': cut,
      'entropy': float(entropy / sampled),
    }
    if self._with_psi:
      facts['alpha'] = self.alpha
    if self._taught:
      gaps = [response.teacher_gap for mini in minis for response in mini.responses]
      # The estimate of KL(policy || teacher) a token, before the update.
      facts['teacher_kl'] = float(-np.concatenate(gaps).mean())
    return facts

  def _score(self, params: Params, minis: list[MiniBatch]) -> tuple[list[MiniBatch], list[Scores]]:
    """Settles the old policy's log-probabilities and entropies -> (mini-batches, what was scored).

    An engine that computes what the trainer does has reported both for every token as it drew it.
    Whether it does is measured on the first group. Where it does not, or computes in another dtype,
    the trainer scores everything.
    """
    # Only a float32 engine can agree to 1e-4. A fleet tells numbers of older weights, and no
    # entropies.
    if self._engine.params['embed'].dtype == np.float32 and not self._of_fleet:
      rollouts = flat([mini.rollouts for mini in minis])
      # A rollout has no response where its first prompt was too long.
      made = [responses for responses in rollouts if responses]
      # One group shows it: engine and trainer differ by their kernels, not by their prompts.
      tried = flat(made[: self._config.group])
      trial = self._scores(params, self.packer.pack(tried), tried)
      if max(trial.gap.max(), trial.entropy_gap.max()) <= _EXACT:
        return minis, [trial]
    scores = [self._scores(params, mini.tree, mini.responses) for mini in minis]
    scored = []
    for mini, part in zip(minis, scores, strict=True):
      scored.append(mini.with_responses(part.responses))
    return scored, scores

  def _scores(self, params: Params, tree: TokenTree, responses: Sequence[Response]) -> Scores:
    """One pass over the tree of these responses."""
    logp_RT, entropy_RT = self._score_rows(params, tree)
    logp = grpo.gather_values(tree, responses, logp_RT)
    # Both are read off the same pass, so that the entropy costs no forward pass of its own.
    entropy = grpo.gather_values(tree, responses, entropy_RT)
    engine_logp = np.concatenate([response.old_logp for response in responses])
    engine_entropy = np.concatenate([response.entropy for response in responses])
    scored = []
    for response, own_logp, own_entropy in zip(responses, logp, entropy, strict=True):
      scored.append(dataclasses.replace(response, old_logp=own_logp, entropy=own_entropy))
    return Scores(
      responses=scored,
      gap=np.abs(np.concatenate(logp) - engine_logp),
      entropy_gap=np.abs(np.concatenate(entropy) - engine_entropy),
      flops=forward_flops(self._policy.config, tree),
    )

  def _score_rows(self, params: Params, tree: TokenTree) -> tuple[np.ndarray, np.ndarray]:
    """Scores a tree under any policy -> (log-probabilities, entropies), float32 [R, T]."""
    # Old policy, reference and teacher in passes of one shape, so that one program serves them all.
    return grpo.score_rows(self.programs.score, params, tree, self._config.rows, self.packer.budget)

  def _with_advantages(self, number: int, mini: MiniBatch) -> MiniBatch:
    """Gives the responses of mini-batch `number` all values but those of the reference."""
    responses = mini.responses
    if 'sequence' in self._loss.extras and len(responses) > self.packer.budget:
      # Sums over sequences have as many places as a micro-batch has loss tokens.
      raise ValueError(
        f'{len(responses)} responses of a mini-batch exceed rl.rows x rl.capacity = '
        f'{self.packer.budget}'
      )
    # None: every token may have its psi.
    psi_tokens = None
    if self._config.psi_words:
      words = self._config.psi_words
      marks = grpo.reflective_tokens(responses, self._policy.tokenizer, words)
      psi_tokens = mini.by_rollout(marks)
    # Made anew for each mini-batch, since alpha changes from step to step.
    estimator = make_estimator(self._config, self.alpha, mini.signs_P)
    parts = None
    if self._loss.entropy_of:
      parts = group_parts(self._config, mini.rewards_PG, mini.signs_P)
    signal = 'teacher_gap' if self._taught else 'entropy'
    rollouts = grpo.with_advantages(
      mini.rollouts, mini.rewards_PG, estimator, psi_tokens, parts, signal
    )
    # The first mini-batch is trained on the very policy that its old log-probabilities are of.
    updated = 1.0 if number else 0.0
    numbered = []
    for sequence, response in enumerate(flat(rollouts)):
      numbered.append(dataclasses.replace(response, sequence=sequence, updated=updated))
    return mini.with_responses(numbered)

  def _with_teacher(
    self, params: Params, minis: Sequence[MiniBatch]
  ) -> tuple[list[MiniBatch], float]:
    """Gives all responses the teacher's log-probabilities -> (mini-batches, operations)."""

    def score(tree: TokenTree) -> np.ndarray:
      return self._score_rows(params, tree)[0]

    result = []
    flops = 0.0
    for mini in minis:
      responses, tree = with_teacher_logp(mini.responses, self.packer.pack_taught, score)
      result.append(mini.with_responses(responses))
      flops += forward_flops(self._policy.config, tree)
    return result, flops

  def _with_reference(self, reference: Reference, minis: Sequence[MiniBatch]) -> list[MiniBatch]:
    """Gives all responses their log-probabilities under the reference policy."""
    # Offloaded weights are on the devices only while this function runs.
    held = reference.params()
    result = []
    for mini in minis:
      logp_RT, _ = self._score_rows(held, mini.tree)
      logp = grpo.gather_values(mini.tree, mini.responses, logp_RT)
      responses = []
      for response, ref_logp in zip(mini.responses, logp, strict=True):
        responses.append(dataclasses.replace(response, ref_logp=ref_logp))
      result.append(mini.with_responses(responses))
    return result


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
  began = time.monotonic()
  yield
  seconds[name] += time.monotonic() - began
