"""The (DA-)GRPO loop: rollouts, rewards, scores of the old policy, advantages, updates, engine update.

What waits for what: rollouts need the weights of the update before, and advantages the rewards, so those phases follow each
other on the device. What a person reads of a step (metrics, reflections, the loss and norms on the device) needs nothing to wait:
updates are dispatched, the engine takes the new weights, the next rollouts are under way, and a thread writes the row of the
step as soon as the device has its numbers. Rollouts are journaled wave by wave (`train.journal`), checkpoints written while the
next step runs. Letters: P prompts, G rollouts of a prompt, R rows, T tokens in a row.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dcore_jax import sharding, tokentree
from dcore_jax.learn import advantages, grpo, objectives
from dcore_jax.learn.optimizer import HOST, TrainState, check_offload, init_state, make_optimizer
from dcore_jax.models import tree_attention
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.progress import progress
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.statistics import paired_difference
from dcore_jax.train.checkpoint import STATE, Checkpoints
from dcore_jax.train.checksum import tree_sum
from dcore_jax.train.journal import Journal
from dcore_jax.train.metrics import Metrics
from dcore_jax.train.rollout_batch import (
  Rollout,
  RolloutBatch,
  Source,
  by_rollout,
  prompt_means,
  rollout_metrics,
  sequences,
  set_aside,
  take_groups,
)
from dcore_jax.train.throughput import forward_flops, matmul_rate

Params = Any
# Nats. The engine's own log-probabilities and entropies stand in for the trainer's where they differ by less; in float32 they
# differ by 1e-6 to 1e-5, in bfloat16 by 1e-2.
_EXACT = 1e-4
_MEASURED = 2**32 - 1  # the random stream of measurements; no step has this number


@functools.lru_cache(maxsize=4)
def _compiled_step(
  model: DecoderConfig,
  execution: Execution,
  learning_rate: float,
  weight_decay: float,
  clip: float,
  temperature: float,
  loss: objectives.PolicyLoss,
) -> tuple:
  """(optimizer, score pass, step, psi norm). Cached: the runs of a sweep differ in nothing that is compiled."""
  tx = make_optimizer('adamw', learning_rate, weight_decay=weight_decay, clip=clip)
  options = dict(temperature=temperature, execution=execution)
  return (
    tx,
    grpo.make_score_pass(model, **options),
    grpo.make_grpo_step(model, tx, **options, **dataclasses.asdict(loss)),
    grpo.make_psi_norm(model, **options, aggregation=loss.aggregation, max_tokens=loss.max_tokens),
  )


def policy_loss(config: ml_collections.ConfigDict) -> objectives.PolicyLoss:
  """What section `rl` minimises."""
  return objectives.PolicyLoss(
    **{field.name: config[field.name] for field in dataclasses.fields(objectives.PolicyLoss)}
  )


def rows_multiple(config: ml_collections.ConfigDict, longest_prompt: int, response: int) -> int:
  """Rows that a mini-batch comes in multiples of, for groups whose rollouts have `response` tokens at most.

  One shape for all steps: as many rows as rollouts of full length fill, and that again where packing leaves gaps. Micro-batches
  that stay empty are skipped on the device.
  """
  tokens = config.prompts // config.updates * (longest_prompt + config.group * response)
  return config.rows * math.ceil(tokens / (config.rows * config.capacity))


def check_sizes(config: ml_collections.ConfigDict, engine: Engine, source: Source) -> None:
  """ValueError where a prompt does not fit the engine, or a rollout not a packed row: now, and not at the step that draws it."""
  if source.longest_prompt >= engine.max_len:
    raise ValueError(
      f'a prompt of {source.longest_prompt} tokens leaves no room in engine.max_len = {engine.max_len}; '
      f'rl.max_prompt_tokens = {config.max_prompt_tokens} drops only longer ones'
    )
  longest = (
    engine.max_len
  )  # of a later response of an episode; of single ones what they can come to
  if source.responses == 1:
    longest = min(longest, source.longest_prompt + min(config.max_tokens, engine.max_new))
  if longest > config.capacity:
    raise ValueError(
      f'rl.capacity = {config.capacity} does not hold a rollout of {longest} tokens, prompt and response'
    )


class Reference:
  """The frozen policy of the KL term, a copy in the dtype of computation; with `execution.offload` it lies in host memory.

  Raises:
    ValueError: offloading where there is no such memory.
  """

  def __init__(self, params: Params, execution: Execution):
    dtype = execution.dtype(params)
    copied = jax.tree.map(lambda leaf: leaf.astype(dtype, copy=True), params)
    self._placed, self._held = jax.tree.map(lambda leaf: leaf.sharding, copied), copied
    if 'reference' in execution.offload:
      check_offload()
      self._held = jax.tree.map(
        lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST)), copied
      )

  def params(self) -> Params:
    """On the devices, for as long as the caller holds them."""
    return jax.device_put(self._held, self._placed)


class Scores(NamedTuple):
  """The old policy on the sampled tokens of some rollouts, as the trainer computes it."""

  logp_RT: np.ndarray
  entropy_RT: np.ndarray
  gap: np.ndarray  # of every token, between the engine's log-probability and this one
  entropy_gap: np.ndarray
  flops: float


class Psi(NamedTuple):
  """What psi contributes to the first mini-batch that has any."""

  norm: jax.Array  # of its gradient
  share: float  # of the mini-batch's loss tokens, those that the norm was divided by
  place: int  # of the mini-batch


@dataclasses.dataclass
class Update:
  """Optimizer steps that are under way. `seconds` of the phases before them; `values` are on the device until it is done."""

  began: float
  seconds: dict[str, float]
  values: list[dict[str, jax.Array]]
  psi: Psi | None
  facts: dict[str, float]
  flops: float
  ended: float = math.nan

  def numbers(self, engine: Engine) -> dict[str, float]:
    """Waits for the device -> everything that is written down of the update and of the phases."""
    jax.block_until_ready(self.values)
    updated = time.monotonic()
    jax.block_until_ready(engine.params)
    self.ended = time.monotonic()
    seconds = self.seconds | {'update': updated - self.began, 'engine_update': self.ended - updated}
    values = jax.device_get(self.values)
    means = {
      name: float(np.mean([v[name] for v in values]))
      for name in values[0]
      if name not in ('skipped', 'weight')
    }
    means['policy_entropy'] = means.pop(
      'entropy'
    )  # of the policy as it was updated; `facts` has the old one's
    if self.psi is not None:
      means['psi_grad_norm'] = float(self.psi.norm) * self.psi.share
      whole = float(values[self.psi.place]['grad_norm'])  # NaN of an update that was skipped
      means['psi_grad_share'] = means['psi_grad_norm'] / whole if whole else 0.0
    return {
      **means,
      **self.facts,
      'skipped': int(sum(v['skipped'] for v in values)),
      **{f'seconds_{name}': value for name, value in seconds.items()},
    }


class GrpoLoop:
  """Rollouts, rewards, advantages and updates of one run.

  Args:
    model, tokenizer: of the policy.
    engine: where rollouts are made; its weights follow the policy's.
    source: what is asked, and how answers are judged.
    items: those of the source that are trained on; drawn without replacement within an epoch, by (seed, epoch).
    config: section `rl`.
    execution: how the training passes run.
    seed: of prompt order and sampling.
    journal: where rollouts are kept until a checkpoint covers them; None keeps none.
  """

  def __init__(
    self,
    model: DecoderConfig,
    tokenizer: Any,
    engine: Engine,
    source: Source,
    items: Sequence[int],
    config: ml_collections.ConfigDict,
    *,
    execution: Execution = Execution(),
    seed: int,
    journal: Journal | None = None,
  ):
    if not items or len(items) < config.prompts:
      raise ValueError(f'{len(items)} prompts are too few for batches of {config.prompts}')
    for field, least in (
      ('updates', 1),
      ('group', 1),
      ('wave', 1),
      ('checkpoint_every', 1),
      ('dynamic_rounds', 0),
    ):
      if config[field] < least:
        raise ValueError(f'rl.{field} = {config[field]} must be at least {least}')
    if config.prompts % config.updates:
      raise ValueError(
        f'rl.prompts = {config.prompts} does not divide into rl.updates = {config.updates}'
      )
    if config.rows % sharding.shards():
      raise ValueError(
        f'rl.rows = {config.rows} do not divide over the {sharding.shards()} devices that split rows'
      )
    check_sizes(config, engine, source)
    self.model, self.engine, self.source, self.items = model, engine, source, items
    self.config, self.seed, self.journal = config, seed, journal
    self._tokenizer = tokenizer
    self._budget = (
      config.rows * config.capacity
    )  # loss tokens of a micro-batch: with shared prompts most tokens are
    self.loss = policy_loss(config)
    self.alpha = config.alpha  # changes where `alpha_measure` names what it has to hold
    # Unknown names and values that mean nothing are an error now, not after the first rollouts.
    self._estimator()(np.zeros((1, 2)), *np.zeros((2, 1, 2, 1)))
    advantages.select_groups(np.zeros((1, 2)), 1, uniform_share=config.uniform_share)
    if config.overlong_buffer:
      self._penalty(np.zeros(1))
    self.measure_psi = advantages.uses_entropy(config.estimator)
    if config.alpha_measure not in ('', 'entropy', 'psi_share'):
      raise ValueError(
        f"unknown rl.alpha_measure {config.alpha_measure!r}; expected '', 'entropy' or 'psi_share'"
      )
    if config.alpha_measure:  # bounds and target that cannot work are an error now
      advantages.adapted_alpha(
        config.alpha,
        math.nan,
        config.alpha_target,
        rate=config.alpha_rate,
        low=config.alpha_low,
        high=config.alpha_high,
      )
    if (config.alpha_measure or config.psi_words) and not self.measure_psi:
      raise ValueError(
        f'rl.alpha_measure and rl.psi_words are about psi, which {config.estimator!r} does not have'
      )
    self.tx, self._score, self._step, self._psi_norm = _compiled_step(
      model,
      execution,
      config.learning_rate,
      config.weight_decay,
      config.clip,
      config.temperature,
      self.loss,
    )
    response = source.responses * min(config.max_tokens, engine.max_new)
    self._rows = rows_multiple(config, source.longest_prompt, response)

  def _estimator(self) -> advantages.Estimator:
    return advantages.make_estimator(self.config.estimator, {**self.config, 'alpha': self.alpha})

  def adapt_alpha(self, row: dict[str, float]) -> None:
    """Takes the numbers of a step, before the next one is scored."""
    c = self.config
    if c.alpha_measure:
      # Without psi, alpha has nothing to answer for.
      measured = {'entropy': row['entropy'], 'psi_share': row['psi_grad_share'] or math.nan}
      self.alpha = advantages.adapted_alpha(
        self.alpha,
        measured[c.alpha_measure],
        c.alpha_target,
        rate=c.alpha_rate,
        low=c.alpha_low,
        high=c.alpha_high,
      )

  # --- rollouts -------------------------------------------------------------------------------------------------------------

  def chosen(self, step: int, turn: int = 0) -> list[int]:
    """The items of a step: a pure function of (seed, step, turn), so that a resumed run asks the same. Further turns of a step
    ask others than those before, as long as there are any."""
    prompts, per_epoch = self.config.prompts, len(self.items) // self.config.prompts
    if turn:
      asked = {index for earlier in range(turn) for index in self.chosen(step, earlier)}
      drawn = [
        self.items[i]
        for i in np.random.default_rng([self.seed, step, turn]).permutation(len(self.items))
      ]
      return sorted(drawn, key=asked.__contains__)[
        :prompts
      ]  # stable: what is new comes first, in the order drawn
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([self.seed, epoch]).permutation(len(self.items))
    return [self.items[i] for i in order[place * prompts : (place + 1) * prompts]]

  def batch(self, step: int) -> tuple[RolloutBatch, float, dict[str, float]]:
    """(the scored groups that a step learns from, seconds that scoring took, with `dynamic_rounds` what was asked for them).

    With `dynamic_rounds`, more items are asked as long as too few groups have reward variance (DAPO's dynamic sampling). Where
    the rounds do not suffice, the first of the other groups fill the batch.
    """
    c, parts, scoring = self.config, [], 0.0
    for turn in range(c.dynamic_rounds + 1):
      rollouts = self.rollouts(step, turn)
      began = time.monotonic()
      parts.append(self._shaped(self.source.judge(self.chosen(step, turn), rollouts)))
      scoring += time.monotonic() - began
      if not c.dynamic_rounds:
        return parts[0], scoring, {}
      rewards_PG = np.concatenate([part.total_PG for part in parts])
      kept = advantages.select_groups(rewards_PG, c.prompts, uniform_share=c.uniform_share)
      if len(kept) == c.prompts:
        break
    rest = np.setdiff1d(np.arange(len(rewards_PG)), kept)[: c.prompts - len(kept)]
    asked = {
      'asked_groups': len(rewards_PG),
      'asked_zero_variance': float(advantages.uniform_groups(rewards_PG).mean()),
    }
    return take_groups(parts, np.sort(np.concatenate([kept, rest]))), scoring, asked

  def _shaped(self, batch: RolloutBatch) -> RolloutBatch:
    """With DAPO's penalty on rollouts whose longest response comes close to the limit, where the config asks for it."""
    if not self.config.overlong_buffer:
      return batch
    lengths = np.array(
      [
        max((len(made.tokens) for _, made in rollout.exchanges), default=0)
        for rollout in batch.rollouts
      ]
    )
    penalty = self._penalty(lengths).reshape(batch.total_PG.shape)
    return dataclasses.replace(batch, total_PG=batch.total_PG + penalty.astype(np.float32))

  def _penalty(self, lengths: np.ndarray) -> np.ndarray:
    c = self.config
    return advantages.overlong_penalty(
      lengths, max_tokens=c.max_tokens, buffer=c.overlong_buffer, penalty=c.overlong_penalty
    )

  def rollouts(self, step: int, turn: int = 0) -> list[Rollout]:
    """Samples the groups of a step with the engine's present weights, or reads what an earlier process sampled with them."""
    chosen, wave, made = self.chosen(step, turn), self.config.wave, []
    weights, earlier = int(tree_sum(self.engine.params)) if self.journal else 0, turn * len(chosen)
    for first in range(0, len(chosen), wave):
      part = chosen[first : first + wave]
      engine = self.engine
      if self.journal:
        origin = (
          weights,
          self.source.fingerprint,
          part,
          self.config.group,
          self._sampling(),
          self.engine.max_len,
        )
        number = turn * -(-len(chosen) // wave) + first // wave
        engine = self.journal.engine(engine, step, number, zlib.crc32(repr(origin).encode()))
      made += self._sample(engine, part, step, earlier + first)
    return made

  def measured(self, chosen: Sequence[int]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(`rollout_metrics`, `prompt_means`) of items that are not trained on, always from the same random streams."""
    batch = self.source.judge(chosen, self._sample(self.engine, chosen, _MEASURED, 0))
    return rollout_metrics(batch), prompt_means(batch)

  def _sampling(self) -> SamplingParams:
    return SamplingParams(
      temperature=self.config.temperature, max_tokens=self.config.max_tokens, seed=self.seed
    )

  def _sample(self, engine: Any, chosen: Sequence[int], step: int, first: int) -> list[Rollout]:
    keys = [
      (step, first + place, g) for place in range(len(chosen)) for g in range(self.config.group)
    ]
    return self.source.sample(
      engine, [index for index in chosen for _ in range(self.config.group)], keys, self._sampling()
    )

  # --- learning -------------------------------------------------------------------------------------------------------------

  def update(
    self, state: TrainState, reference: Reference | None, batch: RolloutBatch
  ) -> tuple[TrainState, Update]:
    """Dispatches all optimizer steps on one rollout batch, and the engine's update -> (state, what is under way)."""
    seconds, size = (
      dict.fromkeys(('score', 'reference'), 0.0),
      len(batch.kinds) // self.config.updates,
    )
    with _timed(seconds, 'score'):
      parts = [batch.of(first, first + size) for first in range(0, len(batch.kinds), size)]
      trees = [self._pack(rollouts) for rollouts in parts]
      olds, scores = self._old_policy(state.params, trees, parts)
      trees = [
        self._with_advantages(*each, batch.total_PG[number * size : (number + 1) * size])
        for number, each in enumerate(zip(trees, parts, olds, strict=True))
      ]
    if (
      'updated' in self.loss.extras
    ):  # the first mini-batch is trained on the policy that its old one is
      trees = [
        tree.with_extras(updated=np.full(tree.tokens.shape, index > 0, np.float32))
        for index, tree in enumerate(trees)
      ]
    if self.config.kl_coefficient:
      with _timed(seconds, 'reference'):
        held = reference.params()
        trees = [
          tree.with_extras(
            ref_logp=grpo.score_rows(self._score, held, tree, self.config.rows, self._budget)[0]
          )
          for tree in trees
        ]
        del held
    psi = self._psi(state.params, trees) if self.measure_psi else None
    began, values = time.monotonic(), []
    for tree in trees:  # while the device works on one, the host lays the next one out
      data = self._batch(tree)
      data.extras.pop('psi', None)
      state, value = self._step(state, sharding.place_batch(data, whole=True))
      values.append(value)
    self.engine.update(state.params)
    gap = np.concatenate([part.gap for part in scores])
    loss_tokens = sum(np.count_nonzero(tree.weight) for tree in trees)
    facts = {
      'logp_gap_mean': float(gap.mean()),
      'logp_gap_max': float(gap.max()),
      'scored_fraction': len(gap) / loss_tokens,
      'dedup': float(np.mean([tree.dedup for tree in trees])),
      'entropy': float(
        sum(entropy_RT.sum(dtype=np.float64) for _, entropy_RT in olds) / loss_tokens
      ),
    }
    facts |= {'alpha': self.alpha} if self.measure_psi else {}
    # Sampling computes what a forward pass does; an update costs three.
    forward = sum(forward_flops(self.model, tree) for tree in trees)
    flops = forward * (4 + bool(self.config.kl_coefficient)) + sum(s.flops for s in scores)
    return state, Update(began, seconds, values, psi, facts, flops)

  def _pack(self, rollouts: Sequence[Rollout]) -> tokentree.TokenTree:
    tree = tokentree.pack(
      sequences(rollouts), self.config.capacity, self._rows, self._tokenizer.pad_token_id or 0
    )
    if tree.dropped:  # `check_sizes` has said so
      raise AssertionError(
        f'{len(tree.dropped)} rollouts are longer than rl.capacity = {self.config.capacity}'
      )
    return tree

  def _batch(self, tree: tokentree.TokenTree) -> tokentree.RowBatch:
    return tree.batch(
      budget=self._budget, accumulate=tree.rows // self.config.rows, shards=sharding.shards()
    )

  def _old_policy(
    self, params: Params, trees: Sequence[tokentree.TokenTree], parts: Sequence[list[Rollout]]
  ) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[Scores]]:
    """((log-probabilities, entropies) of the old policy on each mini-batch's tree, what the trainer has scored for it).

    An engine that computes what the trainer does has said both of every token as it drew it. Whether it does is measured on the
    first rollouts that have any; where it does not, or computes in another dtype, the trainer scores everything.
    """
    if self.engine.params['embed'].dtype == np.float32:
      made = [
        rollout for rollouts in parts for rollout in rollouts if rollout.exchanges
      ]  # some prompt may have been too long
      tried = made[: self.config.group]
      trial = self._scores(params, self._pack(tried), tried)
      if max(trial.gap.max(), trial.entropy_gap.max()) <= _EXACT:
        told = lambda tree, rollouts, name: _scattered(
          tree, [getattr(c, name) for r in rollouts for _, c in r.exchanges]
        )
        return [
          (told(*each, 'full_logprobs'), told(*each, 'entropies'))
          for each in zip(trees, parts, strict=True)
        ], [trial]
    scores = [self._scores(params, *each) for each in zip(trees, parts, strict=True)]
    return [(part.logp_RT, part.entropy_RT) for part in scores], scores

  def _scores(self, params: Params, tree: tokentree.TokenTree, rollouts: list[Rollout]) -> Scores:
    """One pass over a tree of these rollouts."""
    scored = grpo.score_rows(self._score, params, tree, self.config.rows, self._budget)
    mask, completions = (
      tree.gather(tree.weight > 0),
      [c for rollout in rollouts for _, c in rollout.exchanges],
    )
    gaps = [
      np.abs(
        np.concatenate([row[kept] for row, kept in zip(tree.gather(values), mask, strict=True)])
        - np.concatenate([getattr(c, name) for c in completions])
      )
      for values, name in zip(scored, ('full_logprobs', 'entropies'), strict=True)
    ]
    return Scores(*scored, *gaps, forward_flops(self.model, tree))

  def _with_advantages(
    self,
    tree: tokentree.TokenTree,
    rollouts: list[Rollout],
    old: tuple[np.ndarray, np.ndarray],
    rewards_PG: np.ndarray,
  ) -> tokentree.TokenTree:
    """A mini-batch's tree with old_logp, advantage, psi and what else the objective reads."""
    (logp_RT, entropy_RT), view = old, by_rollout(tree, rollouts)
    chosen_RT = (
      grpo.reflective_rows(tree, self._tokenizer, self.config.psi_words)
      if self.config.psi_words
      else None
    )
    advantage, psi = grpo.advantage_rows(view, rewards_PG, entropy_RT, self._estimator(), chosen_RT)
    extras = {'old_logp': logp_RT, 'advantage': advantage} | (
      {'psi': psi} if self.measure_psi else {}
    )
    if 'sequence' in self.loss.extras:
      if (
        len(tree.paths) > self._budget
      ):  # sums over sequences have as many places as a micro-batch has tokens
        raise ValueError(
          f'{len(tree.paths)} responses of a mini-batch exceed rl.rows x rl.capacity = {self._budget}'
        )
      extras['sequence'] = grpo.sequence_rows(tree)
    if 'uniform' in self.loss.extras:
      extras['uniform'] = grpo.uniform_rows(view, rewards_PG)
    if 'behaviour_logp' in self.loss.extras:
      own = [completion.logprobs for rollout in rollouts for _, completion in rollout.exchanges]
      extras['behaviour_logp'] = _scattered(tree, own)
    return tree.with_extras(**extras)

  def _psi(self, params: Params, trees: list[tokentree.TokenTree]) -> Psi:
    """A backward pass, over the micro-batches with psi alone."""
    place = next((place for place, tree in enumerate(trees) if tree.extras['psi'].any()), None)
    if place is None:
      return Psi(jnp.zeros(()), 1.0, 0)
    data = self._batch(trees[place])
    if self.loss.aggregation != 'token':  # then a token's share depends on its whole sequence
      return Psi(self._psi_norm(params, sharding.place_batch(data, whole=True)), 1.0, place)
    weight = data.weight * data.extras['psi'].any(axis=1, keepdims=True)
    share = float(weight.sum() / data.weight.sum())
    return Psi(
      self._psi_norm(params, sharding.place_batch(data._replace(weight=weight), whole=True)),
      share,
      place,
    )


def _scattered(tree: tokentree.TokenTree, rows: Sequence[np.ndarray]) -> np.ndarray:
  """[R, T] from values of each sequence's last tokens, those of its response."""
  return tree.scatter(
    [np.pad(row, (len(path) - len(row), 0)) for row, path in zip(rows, tree.paths, strict=True)]
  )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
  began = time.monotonic()
  yield
  seconds[name] += time.monotonic() - began


def _row(
  batch: RolloutBatch,
  update: Update,
  engine: Engine,
  peak: float,
  began: float,
  sampled: float,
  judged: float,
) -> dict[str, float]:
  """What is written down of a step; waits until the device is done with it. `peak`: operations a second that MFU refers to."""
  row = rollout_metrics(batch) | update.numbers(engine)
  took = update.ended - began
  tokens = sum(
    len(completion.tokens) for rollout in batch.rollouts for _, completion in rollout.exchanges
  )
  return row | {
    'seconds_rollout': sampled - began,
    'seconds_rewards': judged - sampled,
    'seconds': took,
    'tokens_per_second': tokens / took,
    'tflops': update.flops / took / 1e12,
    'mfu': update.flops / took / peak,
  }


def _difference(position: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
  """`paired_difference` of each of the `prompt_means`; None without held-out prompts."""
  before, after = position['prompts_before'], position['prompts_after']
  return {name: paired_difference(before[name], after[name]) for name in before} if after else None


def run_rl(
  params: Params,
  model: DecoderConfig,
  tokenizer: Any,
  source: Source,
  config: ml_collections.ConfigDict,
  metrics: Metrics,
  checkpoints: pathlib.Path,
  *,
  make_engine: Callable[[Params], Engine],
  execution: Execution = Execution(),
  seed: int,
) -> tuple[Params, dict[str, Any]]:
  """(DA-)GRPO -> (parameters, {'prompts', 'resumed_at', 'seconds_before', 'best_step', 'validation'}); resumes from the newest
  checkpoint.

  `validation` has the figures of `rollout_metrics` before and after, on prompts that are not trained on, with the same random
  streams; `difference`, `paired_difference` over these prompts; and the `prompt_means` behind it. `best_step` is the checkpoint
  with the highest reward there, which is kept beside the newest two.
  `resumed_at` and `seconds_before` tell what an earlier process did.

  Args:
    params: the policy to start from; donated. Its KL term is against a frozen copy, see `Reference`.
    model, tokenizer: what they belong to.
    source: what is asked, and how answers are judged.
    config: section `rl`: steps, prompts, validation, group, wave, dynamic_rounds, uniform_share, overlong_buffer,
      overlong_penalty, updates, estimator and its options (learn.advantages), alpha_measure, alpha_target, alpha_rate, alpha_low,
      alpha_high, psi_words, the fields of `objectives.PolicyLoss`, learning_rate, weight_decay, clip, temperature, capacity, rows,
      checkpoint_every.
    metrics: written as stage 'rl', a row a step, and 'validation', a row a checkpoint.
    checkpoints: folder for parameters, optimizer and position, and for the journal of rollouts.
    make_engine: builds the rollout engine for given weights.
    execution: how the training passes run.
    seed: of prompts and sampling.

  Raises:
    ValueError: sizes that do not fit each other, or checkpoints made from other prompts or from another model.
  """
  held_out, items = set_aside(source.kinds, config.validation)
  # Tied to their devices from the start, as what an update or a checkpoint returns is: programs would be compiled twice otherwise.
  params = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), params)
  journal = Journal(checkpoints / 'rollouts')
  loop = GrpoLoop(
    model,
    tokenizer,
    make_engine(params),
    source,
    items,
    config,
    execution=execution,
    seed=seed,
    journal=journal,
  )
  reference = Reference(params, execution) if config.kl_coefficient else None
  # The reference is not in the checkpoint: it is what the stage starts from, which stays where it is. Its bits are.
  origin = {'prompts': source.fingerprint, 'reference': int(tree_sum(params))}
  state = init_state(params, loop.tx, offload='optimizer' in execution.offload)
  position = {
    'seconds': 0.0,
    'before': None,
    'after': None,
    'prompts_before': None,
    'prompts_after': None,
  } | origin
  with (
    Checkpoints(checkpoints / STATE) as saved,
    progress(total=config.steps, description=config.estimator) as bar,
    concurrent.futures.ThreadPoolExecutor(1) as writer,
  ):
    start, opened = 0, time.monotonic()
    if found := saved.restore(state):
      state, position, start = found
      if different := [name for name in origin if position[name] != origin[name]]:
        raise ValueError(
          f'the checkpoints in {str(checkpoints)!r} were made from other {" and ".join(different)}'
        )
      loop.alpha = position['alpha']
      loop.engine.update(state.params)
      bar.initial = bar.n = start
    elif held_out:
      position['before'], position['prompts_before'] = (
        position['after'],
        position['prompts_after'],
      ) = loop.measured(held_out)
    spent, peak = position['seconds'], matmul_rate(execution.dtype(params).name)
    metrics.rewind('rl', start)
    metrics.rewind('validation', start)
    waiting, ended = None, time.monotonic()

    def write(
      step: int, batch: RolloutBatch, asked: dict[str, float], update: Update, *times: float
    ) -> tuple[float, dict[str, float]]:
      row = _row(batch, update, loop.engine, peak, *times) | asked
      metrics.write('rl', step, **row)
      bar.set_postfix(reward=f'{row["reward"]:.2f}', zero=f'{row["zero_variance_fraction"]:.2f}')
      bar.update(1)
      return update.ended, row

    for step in range(start, config.steps):
      batch, judging, asked = loop.batch(step)
      judged = time.monotonic()
      if waiting:
        ended, row = waiting.result()  # long done: these rollouts needed its weights
        loop.adapt_alpha(row)
      state, update = loop.update(state, reference, batch)
      waiting = writer.submit(write, step, batch, asked, update, ended, judged - judging, judged)
      if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
        (ended, row), waiting = (
          waiting.result(),
          None,
        )  # the row is on disk before the checkpoint that stands for it
        loop.adapt_alpha(row)
        if held_out:
          position['after'], position['prompts_after'] = loop.measured(held_out)
          change = _difference(position)['reward']
          metrics.write(
            'validation',
            step,
            **position['after'],
            reward_difference=change['difference'],
            reward_difference_error=change['standard_error'],
          )
        saved.save(
          step + 1,
          state,
          position | {'seconds': spent + time.monotonic() - opened, 'alpha': loop.alpha},
          score=position['after'] and position['after']['reward'],
        )
        journal.forget(
          [0, *saved.all_steps()][-2]
        )  # a fallback to the checkpoint before still has its rollouts
        ended = time.monotonic()
  return state.params, {
    'prompts': len(items),
    'resumed_at': start,
    'seconds_before': spent,
    'best_step': saved.best_step,
    'attention': tree_attention.resolve(execution.attention),
    'validation': {
      'before': position['before'],
      'after': position['after'],
      'difference': _difference(position),
      'by_prompt': {'before': position['prompts_before'], 'after': position['prompts_after']},
    },
  }
