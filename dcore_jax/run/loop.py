"""The two training loops: supervised fine-tuning on rows, and (DA-)GRPO on decision points.

Both dispatch a step before they fetch the numbers of the one before, and both are told everything by plain arguments: a
config section, the data, a place for metrics. Letters: P prompts, G rollouts of a prompt, R rows, T tokens in a row.
"""
import collections
import dataclasses
import functools
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from dcore_jax import sharding
from dcore_jax import tokentree
from dcore_jax.chat.template import render_prompt
from dcore_jax.distill.seeds import DecisionPoint
from dcore_jax.evaluate.lazy_reasoning import LOGGED_WORDS, count_reflections
from dcore_jax.learn import grpo, objectives, rewards, sft
from dcore_jax.learn.optimizer import HOST, TrainState, check_offload, init_state, make_optimizer
from dcore_jax.models import tree_attention
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.rollout.engine import Completion, Engine, Request
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.run.checkpoint import Checkpoints
from dcore_jax.run.metrics import Metrics
from dcore_jax.run.progress import progress
from dcore_jax.run.rows import encode_rows

Params = Any


# --- supervised fine-tuning -------------------------------------------------------------------------------------------------


def run_sft(params: Params, model: DecoderConfig, tokenizer: Any, rows: Sequence[dict[str, Any]],
            config: ml_collections.ConfigDict, metrics: Metrics, checkpoints: pathlib.Path, *,
            execution: Execution = Execution(), seed: int) -> tuple[Params, dict[str, Any]]:
  """Fine-tunes on the rows -> (parameters, {'rows', 'dropped', 'dedup', 'occupancy', 'attention', 'first_loss', 'last_loss',
  'steps', 'resumed_at', 'seconds_before'}); resumes from the newest checkpoint.

  Args:
    params: where to start from; donated.
    model, tokenizer: what they belong to.
    rows: {id, conversations}; `loss_mask` says what of each is trained.
    config: section `sft`: loss_mask, overlong, epochs, rows, accumulate, capacity, optimizer, learning_rate,
      adam_learning_rate, warmup, floor, weight_decay, clip, checkpoint_every.
    metrics: written as stage 'sft', a row a step.
    checkpoints: folder for parameters, optimizer and position.
    execution: how the passes run.
    seed: of the row order.
  """
  sequences = encode_rows(tokenizer, rows, loss_mask=config.loss_mask, capacity=config.capacity, overlong=config.overlong)
  if config.checkpoint_every < 1:
    raise ValueError(f'sft.checkpoint_every = {config.checkpoint_every} must be at least 1')
  data = sft.batches(sequences, capacity=config.capacity, rows=config.rows, epochs=config.epochs, seed=seed,
                     accumulate=config.accumulate, pad_id=tokenizer.pad_token_id, shards=sharding.shards(),
                     host=jax.process_index(), hosts=jax.process_count())
  tx = make_optimizer(config.optimizer, config.learning_rate, 'cosine', warmup=config.warmup, floor=config.floor,
                      total_steps=len(data), weight_decay=config.weight_decay, clip=config.clip,
                      adam_learning_rate=config.adam_learning_rate or None)
  step_fn = sft.make_sft_step(model, tx, execution)
  state = init_state(params, tx, offload='optimizer' in execution.offload)
  tree = data.tree
  fingerprint = zlib.crc32(tree.weight.tobytes(), zlib.crc32(tree.tokens.tobytes()))
  flat = sum(map(len, tree.paths)) / tree.rows * config.rows  # tokens of the unmerged rows that a step stands for
  with Checkpoints(checkpoints, keep=1) as saved, progress(total=len(data), description='sft') as bar:
    start, spent, opened = 0, 0.0, time.monotonic()
    found = saved.restore(state)
    if found:
      state, extra, start = found
      if extra['rows'] != fingerprint:
        raise ValueError(f'the checkpoints in {str(checkpoints)!r} were made from other rows')
      spent = extra['seconds']
      bar.initial = bar.n = start
    losses = [math.nan if row['loss'] is None else row['loss'] for row in metrics.rewind('sft', start)]

    def log(step: int, values: dict[str, jax.Array]) -> None:
      losses.append(float(values['loss']))
      metrics.write('sft', step, loss=losses[-1], grad_norm=float(values['grad_norm']), skipped=int(values['skipped']),
                    tokens_per_second=(step + 1 - start) * flat / (time.monotonic() - opened))
      bar.set_postfix(loss=f'{losses[-1]:.3f}')

    waiting = None
    for step, batch in enumerate(data.prefetched(start), start):
      state, values = step_fn(state, sharding.place_batch(batch))
      if waiting:  # fetched only now, so that the device is already busy with the next step
        log(*waiting)
      waiting = step, values
      if (step + 1) % config.checkpoint_every == 0 or step + 1 == len(data):
        log(*waiting)
        waiting = None
        saved.save(step + 1, state, {'seconds': spent + time.monotonic() - opened, 'rows': fingerprint})
      bar.update(1)
  tenth = max(1, len(losses) // 10)
  return state.params, {'rows': len(rows), 'dropped': len(tree.dropped), 'dedup': tree.dedup,
                        'occupancy': tree.live / tree.tokens.size, 'attention': tree_attention.resolve(execution.attention),
                        'steps': len(losses), 'first_loss': float(np.mean(losses[:tenth])),
                        'last_loss': float(np.mean(losses[-tenth:])), 'resumed_at': start, 'seconds_before': spent}


# --- DA-GRPO -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A decision point as token ids."""
  point: DecisionPoint
  tokens: np.ndarray  # int32 [n]


def encode_prompts(tokenizer: Any, points: Sequence[DecisionPoint], max_tokens: int) -> tuple[list[Prompt], int]:
  """(prompts of at most `max_tokens` tokens, number of those dropped for being longer)."""
  prompts = []
  for point in points:
    text = render_prompt(tokenizer, list(point.messages))
    tokens = np.array(tokenizer(text, add_special_tokens=False)['input_ids'], np.int32)
    if len(tokens) <= max_tokens:
      prompts.append(Prompt(point, tokens))
  return prompts, len(points) - len(prompts)


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
  """P x G rollouts of one policy, prompt by prompt."""
  prompts: list[Prompt]
  completions: list[Completion]  # P * G
  texts: list[str]  # P * G, what the rewards read
  total_PG: np.ndarray
  format_PG: np.ndarray
  correctness_PG: np.ndarray
  best_P: np.ndarray  # correctness of the reference itself

  def sequences(self, prompts: range) -> list[tokentree.Sequence]:
    """The rollouts of some of the prompts; each group shares its prompt and nothing else."""
    group = len(self.completions) // len(self.prompts)
    result = []
    for p in prompts:
      head = self.prompts[p].tokens
      for completion in self.completions[p * group:(p + 1) * group]:
        weights = np.concatenate([np.zeros(len(head), np.float32), np.ones(len(completion.tokens), np.float32)])
        result.append(tokentree.Sequence(np.concatenate([head, completion.tokens]), weights, shared=len(head)))
    return result


@functools.lru_cache(maxsize=4)
def _compiled_step(model: DecoderConfig, execution: Execution, learning_rate: float, weight_decay: float, clip: float,
                   temperature: float, **objective: float) -> tuple:
  """(optimizer, score pass, step, psi norm). Cached: the runs of a sweep differ in nothing that is compiled."""
  tx = make_optimizer('adamw', learning_rate, weight_decay=weight_decay, clip=clip)
  options = dict(temperature=temperature, execution=execution)
  return (tx, grpo.make_score_pass(model, **options), grpo.make_grpo_step(model, tx, **options, **objective),
          grpo.make_psi_norm(model, **options))


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
      self._held = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST)), copied)

  def params(self) -> Params:
    """On the devices, for as long as the caller holds them."""
    return jax.device_put(self._held, self._placed)


# Micro-batches come in multiples of this: one shape is compiled (5 s for the organism), and those left empty cost nothing.
PARTS = 16


class GrpoLoop:
  """Rollouts, rewards, advantages and updates of one run.

  Args:
    model, tokenizer: of the policy.
    engine: where rollouts are made; its weights follow the policy's.
    prompts: what is asked; drawn without replacement within an epoch, by (seed, epoch).
    config: section `rl`.
    execution: how the training passes run.
    seed: of prompt order and sampling.
  """

  def __init__(self, model: DecoderConfig, tokenizer: Any, engine: Engine, prompts: Sequence[Prompt],
               config: ml_collections.ConfigDict, *, execution: Execution = Execution(), seed: int):
    if not prompts or len(prompts) < config.prompts:
      raise ValueError(f'{len(prompts)} prompts are too few for batches of {config.prompts}')
    if config.prompts % config.updates:
      raise ValueError(f'rl.prompts = {config.prompts} does not divide into rl.updates = {config.updates}')
    if config.rows % sharding.shards():
      raise ValueError(f'rl.rows = {config.rows} do not divide over the {sharding.shards()} devices that split rows')
    if config.estimator not in objectives.ADVANTAGES:
      raise ValueError(f'unknown rl.estimator {config.estimator!r}; expected one of {sorted(objectives.ADVANTAGES)}')
    self.model, self.tokenizer, self.engine = model, tokenizer, engine
    self.prompts, self.config, self.seed = prompts, config, seed
    self._budget = config.rows * config.capacity  # loss tokens of a micro-batch: with shared prompts most tokens are
    self.measure_psi = config.estimator not in ('grpo', 'dr_grpo')
    self.tx, self._score, self._step, self._psi_norm = _compiled_step(
        model, execution, config.learning_rate, config.weight_decay, config.clip, config.temperature,
        **{name: config[name] for name in ('clip_low', 'clip_high', 'dual_clip', 'kl_coefficient')})
    options = {'da_grpo': ('alpha', 'delta', 'zero_test', 'psi_multiplier'), 'rl_zvp': ('alpha', 'zero_test', 'psi_multiplier')}
    self._estimator = functools.partial(objectives.ADVANTAGES[config.estimator],
                                        **{name: config[name] for name in options.get(config.estimator, ())})

  def prompts_of(self, step: int) -> list[Prompt]:
    """The prompts of a step: a pure function of (seed, step), so that a resumed run asks the same."""
    per_epoch = len(self.prompts) // self.config.prompts
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
    return [self.prompts[i] for i in order[place * self.config.prompts:(place + 1) * self.config.prompts]]

  def rollout(self, step: int) -> RolloutBatch:
    """Samples and scores the groups of a step with the engine's present weights."""
    return self.sample(self.prompts_of(step), step)

  def sample(self, prompts: list[Prompt], step: int) -> RolloutBatch:
    """A group of scored rollouts for each prompt; `step` names the random stream."""
    G = self.config.group
    requests = [Request(prompt.tokens, (step, p, g)) for p, prompt in enumerate(prompts) for g in range(G)]
    sampling = SamplingParams(temperature=self.config.temperature, max_tokens=self.config.max_tokens, seed=self.seed)
    completions = self.engine.generate(requests, sampling)
    texts = self.tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    references = [prompt.point.reference for prompt in prompts]
    reward = rewards.batch_reward(self.config.reward, texts, [r for r in references for _ in range(G)])
    best = rewards.batch_reward(self.config.reward, [f'<think>\n \n</think>\n\n{r}' for r in references], references)
    shaped = [np.asarray(part).reshape(len(prompts), G) for part in (reward.total, reward.format, reward.correctness)]
    return RolloutBatch(prompts, completions, texts, *shaped, np.asarray(best.correctness))

  def _trees(self, params: Params, reference: 'Reference | None',
             batch: RolloutBatch) -> tuple[list[tokentree.TokenTree], float]:
    """One tree a mini-batch, with everything the update reads, and the mean entropy of the old policy (nats a token)."""
    P, G = batch.total_PG.shape
    size, trees, entropy, tokens = P // self.config.updates, [], 0.0, 0
    held = reference.params() if reference else None
    for first in range(0, P, size):
      chosen = range(first, first + size)
      multiple = self.config.rows * PARTS
      tree = tokentree.pack(batch.sequences(chosen), self.config.capacity, multiple, self.tokenizer.pad_token_id)
      if tree.dropped:
        raise ValueError(f'rl.capacity = {self.config.capacity} does not hold every rollout; '
                         f'the engine allows {self.engine.max_len}')
      logp_RT, entropy_RT = grpo.score_rows(self._score, params, tree, self.config.rows, self._budget)
      extras = {'old_logp': logp_RT}
      if self.config.kl_coefficient:
        extras['ref_logp'], _ = grpo.score_rows(self._score, held, tree, self.config.rows, self._budget)
      advantage, psi = grpo.advantage_rows(tree, batch.total_PG[first:first + size], entropy_RT, self._estimator)
      extras |= {'advantage': advantage} | ({'psi': psi} if self.measure_psi else {})
      trees.append(tree.with_extras(**extras))
      entropy += float(entropy_RT.sum())
      tokens += int(np.count_nonzero(tree.weight))
    return trees, entropy / max(1, tokens)

  def _logp_gap(self, trees: list[tokentree.TokenTree], batch: RolloutBatch) -> tuple[float, float]:
    """(mean, largest) difference between the engine's log-probabilities and the trainer's."""
    recomputed = [logp[weight > 0] for tree in trees
                  for logp, weight in zip(tree.gather(tree.extras['old_logp']), tree.gather(tree.weight), strict=True)]
    gaps = np.abs(np.concatenate(recomputed) - np.concatenate([c.logprobs for c in batch.completions]))
    return float(gaps.mean()), float(gaps.max())

  def update(self, state: TrainState, reference: 'Reference | None', batch: RolloutBatch) -> tuple[TrainState, dict[str, Any]]:
    """All optimizer steps on one rollout batch -> (state, metrics)."""
    trees, entropy = self._trees(state.params, reference, batch)
    gap_mean, gap_max = self._logp_gap(trees, batch)
    options = dict(budget=self._budget, shards=sharding.shards())
    batches = [tree.batch(accumulate=tree.rows // self.config.rows, **options) for tree in trees]
    psi = {}
    if self.measure_psi:  # on the first mini-batch that has any
      shown = next((data for data in batches if data.extras['psi'].any()), batches[0])
      psi['psi_grad_norm'] = self._psi_norm(state.params, sharding.place_batch(shown, whole=True))
    collected = []
    for data in batches:
      data.extras.pop('psi', None)
      state, values = self._step(state, sharding.place_batch(data, whole=True))
      collected.append(values)
    self.engine.update(state.params)
    values = {name: np.mean([float(v[name]) for v in collected]) for name in collected[0] if name not in ('skipped', 'weight')}
    values['policy_entropy'] = values.pop('entropy')
    return state, {**values, **psi, 'skipped': sum(int(v['skipped']) for v in collected), 'entropy': entropy,
                   'logp_gap_mean': gap_mean, 'logp_gap_max': gap_max, 'dedup': float(np.mean([t.dedup for t in trees]))}


def rollout_metrics(batch: RolloutBatch) -> dict[str, float]:
  """What the rollouts of a step say by themselves. Zero variance is exact equality of a group's rewards."""
  zero_P = batch.total_PG.max(axis=1) == batch.total_PG.min(axis=1)
  right_P = (batch.correctness_PG == batch.best_P[:, None]).all(axis=1)
  lengths = np.array([len(c.tokens) for c in batch.completions])
  kinds = collections.defaultdict(list)
  for prompt, row in zip(batch.prompts, batch.total_PG):
    kinds[prompt.point.kind].append(row.mean())
  return {
      'reward': float(batch.total_PG.mean()), 'reward_format': float(batch.format_PG.mean()),
      'reward_correctness': float(batch.correctness_PG.mean()),
      'zero_variance_fraction': float(zero_P.mean()), 'all_right_fraction': float((zero_P & right_P).mean()),
      'all_wrong_fraction': float((zero_P & ~right_P).mean()),
      'reflections': float(np.mean([count_reflections(t, LOGGED_WORDS) for t in batch.texts])),
      'reflections_lazy_words': float(np.mean([count_reflections(t) for t in batch.texts])),
      'response_tokens': float(lengths.mean()), 'unfinished': float(np.mean([not c.finished for c in batch.completions])),
      **{f'reward_{kind}': float(np.mean(values)) for kind, values in kinds.items()},
  }


def run_rl(params: Params, model: DecoderConfig, tokenizer: Any, points: Sequence[DecisionPoint],
           config: ml_collections.ConfigDict, metrics: Metrics, checkpoints: pathlib.Path, *,
           make_engine: Callable[[Params], Engine], execution: Execution = Execution(),
           seed: int) -> tuple[Params, dict[str, Any]]:
  """(DA-)GRPO -> (parameters, {'prompts', 'prompts_dropped', 'resumed_at',
  'seconds_before', 'validation'}); resumes from the newest checkpoint.

  `validation` has the figures of `rollout_metrics` before and after, on prompts that are not trained on, with the same
  random streams; `resumed_at` and `seconds_before` tell what an earlier process did.

  Args:
    params: the policy to start from; donated. Its KL term is against a frozen copy, see `Reference`.
    model, tokenizer: what they belong to.
    points: prompts with their reference answers.
    config: section `rl`: steps, prompts, validation, group, updates, estimator, alpha, delta, zero_test, psi_multiplier, learning_rate,
      weight_decay, clip, clip_low, clip_high, dual_clip, kl_coefficient, temperature, max_prompt_tokens, max_tokens, reward,
      capacity, rows, checkpoint_every.
    metrics: written as stage 'rl', a row a step.
    checkpoints: folder for parameters, optimizer and position.
    make_engine: builds the rollout engine for given weights.
    execution: how the training passes run.
    seed: of prompts and sampling.
  """
  prompts, dropped = encode_prompts(tokenizer, points, config.max_prompt_tokens)
  held_out, prompts = _set_aside(prompts, config.validation)
  loop = GrpoLoop(model, tokenizer, make_engine(params), prompts, config, execution=execution, seed=seed)
  measure = lambda: rollout_metrics(loop.sample(held_out, config.steps)) if held_out else None
  before = measure()
  reference = Reference(params, execution) if config.kl_coefficient else None
  state = init_state(params, loop.tx, offload='optimizer' in execution.offload)
  with Checkpoints(checkpoints, keep=1) as saved, progress(total=config.steps, description=config.estimator) as bar:
    start, spent, opened = 0, 0.0, time.monotonic()
    found = saved.restore(state)
    if found:
      state, extra, start = found
      spent = extra['seconds']
      loop.engine.update(state.params)
      bar.initial = bar.n = start
    metrics.rewind('rl', start)
    for step in range(start, config.steps):
      began = time.monotonic()
      batch = loop.rollout(step)
      sampled = time.monotonic()
      state, values = loop.update(state, reference, batch)
      ended = time.monotonic()
      row = rollout_metrics(batch) | values | {'seconds_rollout': sampled - began, 'seconds_update': ended - sampled}
      metrics.write('rl', step, **row)
      bar.set_postfix(reward=f'{row["reward"]:.2f}', zero=f'{row["zero_variance_fraction"]:.2f}')
      bar.update(1)
      if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
        saved.save(step + 1, state, {'seconds': spent + time.monotonic() - opened})
  return state.params, {'prompts': len(prompts), 'prompts_dropped': dropped, 'resumed_at': start, 'seconds_before': spent,
                        'validation': {'before': before, 'after': measure()}}


def _set_aside(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
  """(`count` prompts, always the same ones, the others). Neighbours stay together: they may be steps of one task."""
  kinds = collections.defaultdict(list)
  for prompt in prompts:
    kinds[prompt.point.kind].append(prompt)
  if count > sum(map(len, kinds.values())):
    raise ValueError(f'rl.validation = {count} exceeds the {len(prompts)} prompts')
  shares = np.floor(np.array([len(group) for group in kinds.values()]) * count / max(1, len(prompts))).astype(int)
  shares[:count - shares.sum()] += 1
  aside = [p for group, share in zip(kinds.values(), shares) for p in group[:share]]
  rest = [p for group, share in zip(kinds.values(), shares) for p in group[share:]]
  return aside, rest
