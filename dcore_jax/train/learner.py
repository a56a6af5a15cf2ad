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
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dcore_jax import sharding
from dcore_jax.config import RlSection
from dcore_jax.learn import advantages, grpo, objectives
from dcore_jax.learn.grpo import Response
from dcore_jax.learn.optimizer import HOST, TrainState, check_offload
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.policy import Policy
from dcore_jax.tokentree import RowBatch, TokenTree
from dcore_jax.train.rl_options import (
  OptimizerOptions,
  make_estimator,
  next_alpha,
  optimizer_options,
  policy_loss,
  rows_multiple,
)
from dcore_jax.train.rollout_batch import Rollout, RolloutBatch
from dcore_jax.train.sources import RolloutSource
from dcore_jax.train.throughput import forward_flops

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
  return Programs(
    tx=tx,
    score=grpo.make_score_pass(model, temperature=temperature, execution=execution),
    step=grpo.make_grpo_step(model, tx, loss, temperature=temperature, execution=execution),
    psi_norm=grpo.make_psi_norm(
      model,
      temperature=temperature,
      execution=execution,
      aggregation=loss.aggregation,
      max_tokens=loss.max_tokens,
    ),
  )


class Reference:
  """The frozen policy of the KL term: a copy in the dtype of computation.

  With `execution.offload` it lies in host memory while it is not needed.

  Raises:
    ValueError: offloading where there is no such memory.
  """

  def __init__(self, params: Params, execution: Execution):
    # The reference is only scored, so that two bytes a number suffice where the policy computes in
    # bfloat16.
    dtype = execution.dtype(params)
    # A copy even where the dtype is the same: the first update donates the parameters' memory.
    copied = jax.tree.map(lambda leaf: leaf.astype(dtype, copy=True), params)
    # Where each array belongs on the devices, to bring it back after offloading.
    self._placed = jax.tree.map(lambda leaf: leaf.sharding, copied)
    self._held = copied
    if 'reference' in execution.offload:
      check_offload()
      self._held = jax.tree.map(
        lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST)), copied
      )

  def params(self) -> Params:
    """The parameters on the devices, for as long as the caller holds them."""
    # Nothing moves where the arrays are there already.
    return jax.device_put(self._held, self._placed)


@dataclasses.dataclass(frozen=True)
class MiniBatch:
  """The rollouts of one optimizer step.

  Attributes:
    rollouts: the responses of each rollout, prompt by prompt.
    rewards_PG: reward of each rollout.
    tree: all responses, packed, without values.
  """

  rollouts: list[list[Response]]
  rewards_PG: np.ndarray
  tree: TokenTree

  @property
  def responses(self) -> list[Response]:
    """All responses, in the order in which the tree has them."""
    return _flat(self.rollouts)

  @property
  def groups(self) -> list[list[Response]]:
    """The responses of each prompt's rollouts together, in the order of the tree."""
    P, G = self.rewards_PG.shape
    return [_flat(self.rollouts[p * G : (p + 1) * G]) for p in range(P)]

  def with_responses(self, responses: Sequence[Response]) -> 'MiniBatch':
    """The same rollouts with other values; `responses` are in the order of the property."""
    return dataclasses.replace(self, rollouts=_like(self.rollouts, responses))


def _flat(rollouts: Sequence[Sequence[Any]]) -> list[Any]:
  flat = []
  for responses in rollouts:
    flat += responses
  return flat


def _like(rollouts: Sequence[Sequence[Any]], flat: Sequence[Any]) -> list[list[Any]]:
  """The inverse of `_flat`: cuts the list as the rollouts are."""
  result = []
  start = 0
  for responses in rollouts:
    result.append(list(flat[start : start + len(responses)]))
    start += len(responses)
  return result


def sampled_responses(rollout: Rollout) -> list[Response]:
  """The responses of a rollout with what the engine has reported of their tokens."""
  responses = []
  for prompt, completion in rollout.exchanges:
    responses.append(
      Response(
        prompt=prompt,
        tokens=completion.tokens,
        # The engine's two numbers differ where sampling was truncated: one is of the truncated
        # policy, the other of the whole one, which a trainer computes.
        behaviour_logp=completion.logprobs,
        old_logp=completion.full_logprobs,
        entropy=completion.entropies,
      )
    )
  return responses


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


class Psi(NamedTuple):
  """What psi contributes to the first mini-batch that has any.

  Attributes:
    norm: of its gradient, on the device.
    share: the part of the mini-batch's loss tokens that the norm was divided by.
    place: number of the mini-batch.
  """

  norm: jax.Array
  share: float
  place: int


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

  Attributes:
    alpha: weight of the entropy in psi; changes where `rl.alpha_measure` names what it has to hold.
    programs: the compiled functions.
  """

  def __init__(
    self,
    policy: Policy,
    engine: Engine,
    source: RolloutSource,
    config: RlSection,
    execution: Execution,
  ):
    self.alpha = config.alpha
    self._policy = policy
    self._engine = engine
    self._config = config
    # Resolved once: a wrong option is an error before the first rollout.
    self._loss = policy_loss(config)
    self._warned_of_cuts = False
    self._with_psi = advantages.uses_entropy(config.estimator)
    # Loss tokens of a micro-batch. All places are budgeted: where prompts are shared, most tokens
    # of a row are sampled ones.
    self._budget = config.rows * config.capacity
    # The longest response that the engine can give, all turns of an episode together.
    response = source.responses * min(config.max_tokens, engine.max_new)
    self._rows = rows_multiple(config, source.longest_prompt, response)
    # Positional, since lru_cache takes a keyword for another key.
    self.programs = _programs(
      policy.config,
      execution,
      optimizer_options(config),
      config.temperature,
      self._loss,
    )

  def adapt_alpha(self, row: dict[str, float]) -> None:
    """Takes the numbers of a step, before the next one's advantages are computed."""
    # Measured on this step, used from the next one on: alpha follows with one step's delay.
    if self._config.alpha_measure == 'entropy':
      self.alpha = next_alpha(self._config, self.alpha, row['entropy'])
    elif self._config.alpha_measure == 'psi_share':
      # A step without psi says nothing about alpha: NaN leaves it as it is.
      self.alpha = next_alpha(self._config, self.alpha, row['psi_grad_share'] or math.nan)

  def update(
    self, state: TrainState, reference: Reference | None, batch: RolloutBatch
  ) -> tuple[TrainState, Update]:
    """Dispatches all optimizer steps on one rollout batch, and the engine's update.

    Returns:
      (the state after them, what is under way).
    """
    # Both phases are in every row of metrics, also where one is not run.
    seconds = {'score': 0.0, 'reference': 0.0}
    with _timed(seconds, 'score'):
      minis, scores = self._score(state.params, self.mini_batches(batch))
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
    psi = self._psi(state.params, minis, trees) if self._with_psi else None
    began = time.monotonic()
    values = []
    for tree in trees:  # while the device works on one, the host lays the next one out
      state, value = self.programs.step(
        state, sharding.place_batch(self._row_batch(tree), whole=True)
      )
      values.append(value)
    # Dispatched before the host adds anything up, so that the next rollouts can begin.
    self._engine.update(state.params)
    # Sampling computes what a forward pass does, and an update three times that.
    passes = 5 if self._config.kl_coefficient else 4
    # Counted from the trees, without padding: what the mathematics needs. Rollouts that repeat each
    # other count once, though each was sampled.
    forward = sum(forward_flops(self._policy.config, mini.tree) for mini in minis)
    update = Update(
      began=began,
      seconds=seconds,
      values=values,
      psi=psi,
      facts=self._facts(minis, scores),
      flops=passes * forward + sum(part.flops for part in scores),
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
    facts = {
      'logp_gap_mean': float(gap.mean()),
      'logp_gap_max': float(gap.max()),
      'scored_fraction': len(gap) / sampled,
      'dedup': float(np.mean([mini.tree.dedup for mini in minis])),
      'cut_groups': self._cut_groups(minis),
      'entropy': float(entropy / sampled),
    }
    if self._with_psi:
      facts['alpha'] = self.alpha
    return facts

  def _cut_groups(self, minis: Sequence[MiniBatch]) -> int:
    """Counts the groups that no row could hold, and warns of the first ones of a run."""
    sizes = []
    for mini in minis:
      sizes += grpo.cut_groups(mini.tree, mini.groups, merge=self._loss.merges)
    if sizes and not self._warned_of_cuts:
      self._warned_of_cuts = True
      warnings.warn(
        f'{len(sizes)} groups of rollouts need more than a row of rl.capacity = '
        f'{self._config.capacity} tokens, the largest {max(sizes)}: each of their rows computes '
        'their prompt again. A larger rl.capacity saves that, where it fits in memory.',
        stacklevel=2,
      )
    return len(sizes)

  def mini_batches(self, batch: RolloutBatch) -> list[MiniBatch]:
    """Splits a rollout batch into the mini-batches of its optimizer steps, and packs them."""
    # Prompts divide evenly over the updates, which `check_options` has made sure of.
    size = len(batch.kinds) // self._config.updates
    minis = []
    for first in range(0, len(batch.kinds), size):
      rollouts = [sampled_responses(made) for made in batch.of(first, first + size)]
      minis.append(
        # Groups stay whole: a mini-batch has complete prompts, and so all rewards of its groups.
        MiniBatch(
          rollouts=rollouts,
          rewards_PG=batch.total_PG[first : first + size],
          tree=self._pack(_flat(rollouts)),
        )
      )
    return minis

  def _pack(self, responses: Sequence[Response]) -> TokenTree:
    # Without a padding token any id will do, since padding weighs nothing.
    tree = grpo.pack_responses(
      responses,
      self._config.capacity,
      self._rows,
      self._policy.tokenizer.pad_token_id or 0,
      merge=self._loss.merges,
    )
    if tree.dropped:  # `check_options` has made sure that rollouts fit
      raise AssertionError(
        f'{len(tree.dropped)} rollouts are longer than rl.capacity = {self._config.capacity}'
      )
    return tree

  def _row_batch(self, tree: TokenTree) -> RowBatch:
    accumulate = tree.rows // self._config.rows
    return tree.batch(budget=self._budget, accumulate=accumulate, shards=sharding.shards())

  def _score(self, params: Params, minis: list[MiniBatch]) -> tuple[list[MiniBatch], list[Scores]]:
    """Settles the old policy's log-probabilities and entropies -> (mini-batches, what was scored).

    An engine that computes what the trainer does has reported both for every token as it drew it.
    Whether it does is measured on the first group. Where it does not, or computes in another dtype,
    the trainer scores everything.
    """
    # Only a float32 engine can agree to 1e-4.
    if self._engine.params['embed'].dtype == np.float32:
      rollouts = _flat([mini.rollouts for mini in minis])
      # A rollout has no response where its first prompt was too long.
      made = [responses for responses in rollouts if responses]
      # One group shows it: engine and trainer differ by their kernels, not by their prompts.
      tried = _flat(made[: self._config.group])
      trial = self._scores(params, self._pack(tried), tried)
      if max(trial.gap.max(), trial.entropy_gap.max()) <= _EXACT:
        return minis, [trial]
    scores = [self._scores(params, mini.tree, mini.responses) for mini in minis]
    scored = []
    for mini, part in zip(minis, scores, strict=True):
      scored.append(mini.with_responses(part.responses))
    return scored, scores

  def _scores(self, params: Params, tree: TokenTree, responses: Sequence[Response]) -> Scores:
    """One pass over the tree of these responses."""
    logp_RT, entropy_RT = grpo.score_rows(
      self.programs.score, params, tree, self._config.rows, self._budget
    )
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

  def _with_advantages(self, number: int, mini: MiniBatch) -> MiniBatch:
    """Gives the responses of mini-batch `number` all values but those of the reference."""
    responses = mini.responses
    if 'sequence' in self._loss.extras and len(responses) > self._budget:
      # Sums over sequences have as many places as a micro-batch has loss tokens.
      raise ValueError(
        f'{len(responses)} responses of a mini-batch exceed rl.rows x rl.capacity = {self._budget}'
      )
    # None: every token may have its psi.
    psi_tokens = None
    if self._config.psi_words:
      words = self._config.psi_words
      marks = grpo.reflective_tokens(responses, self._policy.tokenizer, words)
      psi_tokens = _like(mini.rollouts, marks)
    # Made anew for each mini-batch, since alpha changes from step to step.
    estimator = make_estimator(self._config, self.alpha)
    rollouts = grpo.with_advantages(mini.rollouts, mini.rewards_PG, estimator, psi_tokens)
    # The first mini-batch is trained on the very policy that its old log-probabilities are of.
    updated = 1.0 if number else 0.0
    numbered = []
    for sequence, response in enumerate(_flat(rollouts)):
      numbered.append(dataclasses.replace(response, sequence=sequence, updated=updated))
    return mini.with_responses(numbered)

  def _with_reference(self, reference: Reference, minis: Sequence[MiniBatch]) -> list[MiniBatch]:
    """Gives all responses their log-probabilities under the reference policy."""
    # Offloaded weights are on the devices only while this function runs.
    held = reference.params()
    result = []
    for mini in minis:
      # In rows of the same shape as for the old policy, so that one program serves both.
      logp_RT, _ = grpo.score_rows(
        self.programs.score, held, mini.tree, self._config.rows, self._budget
      )
      logp = grpo.gather_values(mini.tree, mini.responses, logp_RT)
      responses = []
      for response, ref_logp in zip(mini.responses, logp, strict=True):
        responses.append(dataclasses.replace(response, ref_logp=ref_logp))
      result.append(mini.with_responses(responses))
    return result

  def _psi(self, params: Params, minis: Sequence[MiniBatch], trees: Sequence[TokenTree]) -> Psi:
    """Measures psi's gradient on the first mini-batch that has any psi, by one backward pass."""
    for place, (mini, tree) in enumerate(zip(minis, trees, strict=True)):
      responses = mini.responses
      # A group whose rewards differ has no psi under DA-GRPO; the first mini-batch may have none.
      if not any(response.psi.any() for response in responses):
        continue
      # What an aggregation needs beside it is on the tree already.
      laid = grpo.lay_values(tree, responses, {'psi'}, self._loss.aggregation)
      batch = self._row_batch(laid)
      share = 1.0
      # Under other aggregations the weight of a token depends on its whole sequence.
      if self._loss.aggregation == 'token':
        batch, share = only_psi(batch)
      norm = self.programs.psi_norm(params, sharding.place_batch(batch, whole=True))
      return Psi(norm=norm, share=share, place=place)
    # Zeros on the device: a step without psi has the same metrics as any other.
    return Psi(norm=jnp.zeros(()), share=1.0, place=0)


def only_psi(batch: RowBatch) -> tuple[RowBatch, float]:
  """Leaves micro-batches without psi out -> (the batch, the share of the weight that is left).

  The backward pass skips micro-batches without weight. A norm over the rest was divided by the
  rest's weight only: times the share it is that of the whole mini-batch.
  """
  has_psi_A1 = batch.extras['psi'].any(axis=1, keepdims=True)
  weight_AM = batch.weight * has_psi_A1
  share = float(weight_AM.sum() / batch.weight.sum())
  return batch._replace(weight=weight_AM), share


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
  began = time.monotonic()
  yield
  seconds[name] += time.monotonic() - began
