"""The (DA-)GRPO step and the pass that scores the old policy, both on token trees (method 3.2-3.5).

One rollout batch goes: `pack` -> `score_rows` (old log-probs and entropies, one pass) -> `ADVANTAGES[...]` ->
`tree.with_extras(advantage, old_logp, ref_logp)` -> steps over `tree.batch(...)`.
Letters: A micro-batches, R rows, T tokens in a row, M loss tokens of a micro-batch.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dcore_jax import sharding
from dcore_jax import tokentree
from dcore_jax.learn import head
from dcore_jax.learn import objectives
from dcore_jax.learn import optimizer
from dcore_jax.learn import sft
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution

ScorePass = Callable[[Any, tokentree.RowBatch], tuple[jax.Array, jax.Array]]


def make_score_pass(config: DecoderConfig, *, temperature: float = 1.0, execution: Execution = Execution()) -> ScorePass:
  """The jitted pass (params, batch) -> (log-probabilities, entropies) [A, M] of the batch's loss tokens."""
  score = lambda params, micro: sft.token_scores(params, config, micro, temperature=temperature, execution=execution)
  everywhere = lambda scores: tuple(sharding.constrain(array, 'micro_batch', 'length') for array in scores)

  def score_pass(params, batch):
    # One micro-batch, the usual case, needs no loop.
    if batch.weight.shape[0] == 1:
      scores = score(params, jax.tree.map(lambda leaf: leaf[0], batch))
      return everywhere(jax.tree.map(lambda leaf: leaf[None], scores))
    return everywhere(jax.lax.map(lambda micro: score(params, micro), batch))

  return jax.jit(score_pass)


def score_rows(score_pass: ScorePass, params: Any, tree: tokentree.TokenTree, rows: int,
               budget: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Scores a whole tree, `rows` rows at a time in one constant shape -> (logp, entropy), float32 [R, T], 0 elsewhere.

  `budget` is the number of loss tokens a pass has room for, by default what the tree needs; trees that share one share
  one compiled program. `tree.gather` turns either result into one array per sequence.
  """
  if rows < 1 or tree.rows % rows:
    raise ValueError(f'{tree.rows} rows of the tree do not divide into {rows}; pack with rows_multiple={rows}')
  budget = budget or tree.loss_budget(rows, sharding.shards())
  out = np.zeros((2, tree.rows, tree.capacity), np.float32)
  pending = []
  for start in range(0, tree.rows, rows):
    if not tree.weight[start:start + rows].any():
      continue  # rows that only fill the tree up
    batch = tree.batch(range(start, start + rows), budget=budget, shards=sharding.shards())
    # Dispatched: nothing waits until all are under way.
    pending.append((start, batch, score_pass(params, sharding.place_batch(batch, whole=True))))
  for start, batch, scores in pending:
    used = batch.weight[0] != 0
    for values, target in zip(jax.device_get(scores), out):
      target[start:start + rows].reshape(-1)[batch.slot[0][used]] = values[0][used]
  return out[0], out[1]


def advantage_rows(tree: tokentree.TokenTree, rewards_PG: np.ndarray, entropy_RT: np.ndarray,
                   estimator: Callable[..., objectives.Advantages]) -> tuple[np.ndarray, np.ndarray]:
  """(advantage, psi) [R, T] of the tree's loss tokens, by one of `objectives.ADVANTAGES` with its options bound.

  The tree holds the rollouts prompt by prompt: rollout g of prompt p was sequence p x G + g. A dropped one still counts
  in its group's mean. Raises ValueError when the rewards do not number the sequences.
  """
  rewards_PG = np.asarray(rewards_PG)
  if rewards_PG.size != len(tree.paths):
    raise ValueError(f'{rewards_PG.size} rewards for {len(tree.paths)} sequences')
  longest = max(map(len, tree.paths))
  padded = lambda rows: np.stack([np.pad(row, (0, longest - len(row))) for row in rows]).reshape(*rewards_PG.shape, -1)
  mask_PGT = padded(tree.gather(tree.weight != 0))
  result = estimator(rewards_PG, padded(tree.gather(entropy_RT)) * mask_PGT, mask_PGT)
  return tuple(tree.scatter(values.reshape(-1, longest)) for values in result)


def make_grpo_step(config: DecoderConfig, tx: optax.GradientTransformation, *, clip_low: float = 0.2,
                   clip_high: float = 0.2, dual_clip: float = 3.0, kl_coefficient: float = 0.0,
                   temperature: float = 1.0, execution: Execution = Execution()
                   ) -> Callable[[sft.TrainState, tokentree.RowBatch], tuple[sft.TrainState, sft.Metrics]]:
  """The jitted step (state, batch) -> (state, metrics); the state is donated.

  The batch's extras: advantage, old_logp; ref_logp where kl_coefficient > 0. Loss: the mean over loss tokens, by their
  weights, of the clipped objective + kl_coefficient x k3 (weights 1: token mean as released; weights 1 / |y_i|: the
  sequence mean of the paper).
  Metrics: loss, pg_loss, kl, clip_share, entropy (of the current policy), weight, grad_norm, skipped.
  """
  needed = {'advantage', 'old_logp'} | ({'ref_logp'} if kl_coefficient else set())

  def objective(logp_C, entropy_C, values):
    weight_C, extras = values
    (pg, weight), (clipped, _) = objectives.clipped_objective(
        logp_C, extras['old_logp'], extras['advantage'], weight_C,
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    sums = {'pg_loss': pg, 'clip_share': clipped, 'entropy': jnp.sum(weight_C * entropy_C)}
    loss = pg
    if kl_coefficient:
      sums['kl'], _ = objectives.kl_penalty(logp_C, extras['ref_logp'], weight_C)
      loss += kl_coefficient * sums['kl']
    return loss, sums | {'loss': loss, 'weight': weight}

  def objective_sum(params, micro):
    hidden_MD = sft.loss_token_states(params, config, micro, execution)
    return head.token_loss(objective, hidden_MD, decoder.head_matrix(params), micro.target, (micro.weight, micro.extras),
                           temperature, entropy='value')

  def grpo_step(state, batch):
    if needed - batch.extras.keys():
      raise ValueError(f'the batch lacks the extras {sorted(needed - batch.extras.keys())}')
    grads, sums = sft.accumulate(objective_sum, state.params, batch)
    weight = sums.pop('weight')
    scale = 1 / jnp.maximum(weight, 1e-8)
    metrics = jax.tree.map(lambda value: value * scale, sums) | {'weight': weight}
    state, applied = optimizer.apply_gradients(tx, state, jax.tree.map(lambda g: g * scale, grads),
                                               offload='optimizer' in execution.offload)
    return state, metrics | applied

  return jax.jit(grpo_step, donate_argnums=0)


def make_psi_norm(config: DecoderConfig, *, temperature: float = 1.0,
                  execution: Execution = Execution()) -> Callable[[Any, tokentree.RowBatch], jax.Array]:
  """The jitted (params, batch) -> norm of the gradient that psi alone contributes to the first step on a batch.

  There the ratios are 1, so that it is the gradient of the mean of -psi log pi (extras: psi). It costs a backward pass: for
  measuring how much of an update is due to psi, as one mini-batch of a rollout shows.
  """
  def objective(logp_C, _, values):
    weight_C, psi_C = values
    return -jnp.sum(weight_C * psi_C * logp_C), jnp.sum(weight_C)

  def psi_sum(params, micro):
    hidden_MD = sft.loss_token_states(params, config, micro, execution)
    return head.token_loss(objective, hidden_MD, decoder.head_matrix(params), micro.target,
                           (micro.weight, micro.extras['psi']), temperature)

  def psi_norm(params, batch):
    grads, weight = sft.accumulate(psi_sum, params, batch)
    return optax.global_norm(grads) / jnp.maximum(weight, 1e-8)

  return jax.jit(psi_norm)
