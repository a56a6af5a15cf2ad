"""The (DA-)GRPO step and the pass that scores the old policy, both on token trees (method 3.2-3.5).

One rollout batch goes: `pack` -> `score_rows` (old log-probs and entropies, one pass) -> `advantage_rows` ->
`tree.with_extras(advantage, old_logp, ref_logp)` -> steps over `tree.batch(...)`.
Letters: A micro-batches, R rows, T tokens in a row, M loss tokens of a micro-batch.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dcore_jax import sharding, tokentree
from dcore_jax.learn import advantages, head, objectives, optimizer, sft
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution

da_grpo_advantages = advantages.da_grpo_advantages
ScorePass = Callable[[Any, tokentree.RowBatch], tuple[jax.Array, jax.Array]]


def make_score_pass(
  config: DecoderConfig, *, temperature: float = 1.0, execution: Execution = Execution()
) -> ScorePass:
  """The jitted pass (params, batch) -> (log-probabilities, entropies) [A, M] of the batch's loss tokens."""
  score = lambda params, micro: sft.token_scores(
    params, config, micro, temperature=temperature, execution=execution
  )
  everywhere = lambda scores: tuple(
    sharding.constrain(array, 'micro_batch', 'length') for array in scores
  )

  def score_pass(params, batch):
    # One micro-batch, the usual case, needs no loop.
    if batch.weight.shape[0] == 1:
      scores = score(params, jax.tree.map(lambda leaf: leaf[0], batch))
      return everywhere(jax.tree.map(lambda leaf: leaf[None], scores))
    return everywhere(jax.lax.map(lambda micro: score(params, micro), batch))

  return jax.jit(score_pass)


def score_rows(
  score_pass: ScorePass,
  params: Any,
  tree: tokentree.TokenTree,
  rows: int,
  budget: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Scores a whole tree, `rows` rows at a time in one constant shape -> (logp, entropy), float32 [R, T], 0 elsewhere.

  `budget` is the number of loss tokens a pass has room for, by default what the tree needs; trees that share one share
  one compiled program. `tree.gather` turns either result into one array per sequence.
  """
  if rows < 1 or tree.rows % rows:
    raise ValueError(
      f'{tree.rows} rows of the tree do not divide into {rows}; pack with rows_multiple={rows}'
    )
  budget = budget or tree.loss_budget(rows, sharding.shards())
  out = np.zeros((2, tree.rows, tree.capacity), np.float32)
  pending = []
  for start in range(0, tree.rows, rows):
    if not tree.weight[start : start + rows].any():
      continue  # rows that only fill the tree up
    batch = tree.batch(range(start, start + rows), budget=budget, shards=sharding.shards())
    # Dispatched: nothing waits until all are under way.
    pending.append((start, batch, score_pass(params, sharding.place_batch(batch, whole=True))))
  for start, batch, scores in pending:
    used = batch.weight[0] != 0
    for values, target in zip(jax.device_get(scores), out):
      target[start : start + rows].reshape(-1)[batch.slot[0][used]] = values[0][used]
  return out[0], out[1]


def advantage_rows(
  tree: tokentree.TokenTree,
  rewards_PG: np.ndarray,
  entropy_RT: np.ndarray,
  estimator: advantages.Estimator,
  psi_tokens_RT: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """(advantage, psi) [R, T] of the tree's loss tokens, by one of `ADVANTAGES` with its options bound.

  The tree holds the rollouts prompt by prompt: rollout g of prompt p was sequence p x G + g. A dropped one still counts
  in its group's mean. Tokens that `psi_tokens_RT` leaves out get no psi (`reflective_rows`). Raises ValueError when the
  rewards do not number the sequences.
  """
  rewards_PG = np.asarray(rewards_PG)
  if rewards_PG.size != len(tree.paths):
    raise ValueError(f'{rewards_PG.size} rewards for {len(tree.paths)} sequences')
  longest = max(map(len, tree.paths))
  padded = lambda rows: np.stack([np.pad(row, (0, longest - len(row))) for row in rows]).reshape(
    *rewards_PG.shape, -1
  )
  mask_PGT = padded(tree.gather(tree.weight != 0))
  advantages_PGT = estimator(rewards_PG, padded(tree.gather(entropy_RT)) * mask_PGT, mask_PGT)
  psi_PGT = advantages.psi_part(estimator, advantages_PGT, rewards_PG, mask_PGT)
  if psi_tokens_RT is not None:
    left_out_PGT = psi_PGT * ~padded(tree.gather(psi_tokens_RT))
    advantages_PGT, psi_PGT = advantages_PGT - left_out_PGT, psi_PGT - left_out_PGT
  return tuple(tree.scatter(values.reshape(-1, longest)) for values in (advantages_PGT, psi_PGT))


def reflective_rows(tree: tokentree.TokenTree, tokenizer: Any, words: Sequence[str]) -> np.ndarray:
  """bool [R, T]: loss tokens of which the words hold a part, each sequence's response read as one text."""
  ids, place = np.unique(tree.tokens, return_inverse=True)
  pieces = np.array(
    tokenizer.batch_decode(ids[:, None].tolist(), clean_up_tokenization_spaces=False), object
  )
  texts, chosen = pieces[place.reshape(-1)], np.zeros(tree.tokens.size, bool)
  for path, weight in zip(tree.paths, tree.gather(tree.weight)):
    response = path[weight != 0]
    chosen[response] = advantages.word_tokens(texts[response].tolist(), words)
  return chosen.reshape(tree.tokens.shape)


def uniform_rows(tree: tokentree.TokenTree, rewards_PG: np.ndarray) -> np.ndarray:
  """float32 [R, T]: 1 on the tokens of groups whose rewards are all equal. A rollout at the mean of another group is not meant,
  though its advantage is 0, too. The tree is that of `advantage_rows`."""
  uniform_PG = np.broadcast_to(advantages.uniform_groups(np.float32(rewards_PG)), rewards_PG.shape)
  rows = zip(tree.paths, uniform_PG.reshape(-1), strict=True)
  return tree.scatter([np.full(len(path), here, np.float32) for path, here in rows])


def sequence_rows(tree: tokentree.TokenTree) -> np.ndarray:
  """int32 [R, T]: the number of the sequence that a loss token belongs to; rollouts share no loss token. Of an episode every
  response is a sequence of its own."""
  numbers = [np.full(len(path), number, np.float32) for number, path in enumerate(tree.paths)]
  return tree.scatter(numbers).astype(np.int32)


def make_grpo_step(
  config: DecoderConfig,
  tx: optax.GradientTransformation,
  *,
  temperature: float = 1.0,
  execution: Execution = Execution(),
  **options: Any,
) -> Callable[[sft.TrainState, tokentree.RowBatch], tuple[sft.TrainState, sft.Metrics]]:
  """The jitted step (state, batch) -> (state, metrics); the state is donated.

  `options` are the fields of `objectives.PolicyLoss`, whose `extras` names the values that a batch brings. Sums over loss
  tokens are divided once, by the aggregation of the whole batch; a token's weight in the tree counts beside it.
  A statistic of the objective costs GSPO one more vocabulary projection, and KL-Cov, which compares the tokens of all
  micro-batches, one more forward pass.
  Metrics: loss, pg_loss, kl, uniform_kl, divided as the loss is; clip_share, entropy (of the current policy), importance, means
  over tokens; weight, grad_norm, skipped. Those of terms that are off are absent.
  """
  loss = objectives.PolicyLoss(**options)

  def batch_logp(params, batch):
    def score(micro):  # those without weight are skipped here as in the update
      scores = lambda: sft.token_scores(
        params, config, micro, temperature=temperature, execution=execution
      )[0]
      return jax.lax.cond(jnp.any(micro.weight != 0), scores, lambda: jnp.zeros_like(micro.weight))

    return jax.lax.map(score, batch)

  def objective(logp_C, entropy_C, values):
    weight_C, extras = values
    total, sums = loss.sums(logp_C, entropy_C, weight_C, extras)
    return total, sums | {'loss': total, 'weight': jnp.sum(extras.get('token_weight', weight_C))}

  def objective_sum(params, micro):
    hidden_MD, matrix_VD = (
      sft.loss_token_states(params, config, micro, execution),
      decoder.head_matrix(params),
    )
    extras = micro.extras
    if loss.scope == 'micro-batch':
      logp_M, _ = head.log_probs_and_entropy(
        *jax.lax.stop_gradient((hidden_MD, matrix_VD)),
        micro.target,
        temperature,
        used_M=micro.weight,
      )
      extras = loss.with_statistic(logp_M, micro.weight, extras)
    total, sums = head.token_loss(
      objective,
      hidden_MD,
      matrix_VD,
      micro.target,
      (micro.weight, extras),
      temperature,
      entropy='value',
    )
    if loss.uniform_kl:
      gap_M = head.uniform_gap(hidden_MD, matrix_VD, micro.target, temperature)
      rest = -jnp.sum(micro.weight * extras['uniform'] * gap_M)
      total += loss.uniform_kl * rest
      sums |= {
        'uniform_kl': sums['uniform_kl'] + rest,
        'loss': sums['loss'] + loss.uniform_kl * rest,
      }
    return total, sums

  def grpo_step(state, batch):
    _check_extras(batch, loss.extras)
    weight, total = objectives.aggregate(
      batch.weight, batch.extras.get('sequence'), loss.aggregation, loss.max_tokens
    )
    extras = batch.extras | (
      {'token_weight': batch.weight} if loss.aggregation == 'sequence' else {}
    )
    batch = batch._replace(weight=weight, extras=extras)
    if loss.scope == 'mini-batch':
      logp_AM = batch_logp(state.params, batch)
      batch = batch._replace(extras=loss.with_statistic(logp_AM, batch.weight, batch.extras))
    grads, sums = sft.accumulate(objective_sum, state.params, batch)
    weight = sums.pop('weight')
    by_loss, by_token = (1 / jnp.maximum(divisor, 1e-8) for divisor in (total, weight))
    metrics = {
      name: value * (by_token if name in ('clip_share', 'entropy', 'importance') else by_loss)
      for name, value in sums.items()
    }
    state, applied = optimizer.apply_gradients(
      tx,
      state,
      jax.tree.map(lambda g: g * by_loss, grads),
      offload='optimizer' in execution.offload,
    )
    return state, metrics | applied | {'weight': weight}

  return jax.jit(grpo_step, donate_argnums=0)


def make_psi_norm(
  config: DecoderConfig,
  *,
  temperature: float = 1.0,
  execution: Execution = Execution(),
  aggregation: str = 'token',
  max_tokens: int = 4096,
) -> Callable[[Any, tokentree.RowBatch], jax.Array]:
  """The jitted (params, batch) -> norm of the gradient that psi alone contributes to the first step on a batch.

  There the ratios are 1, so that it is the gradient of the mean of -psi log pi (extras: psi), aggregated as in the step. It
  costs a backward pass: for measuring how much of an update is due to psi, as one mini-batch of a rollout shows.
  """

  def objective(logp_C, _, values):
    weight_C, psi_C = values
    return -jnp.sum(weight_C * psi_C * logp_C), ()

  def psi_sum(params, micro):
    hidden_MD = sft.loss_token_states(params, config, micro, execution)
    return head.token_loss(
      objective,
      hidden_MD,
      decoder.head_matrix(params),
      micro.target,
      (micro.weight, micro.extras['psi']),
      temperature,
    )

  def psi_norm(params, batch):
    _check_extras(batch, {'psi'} | ({'sequence'} if aggregation != 'token' else set()))
    weight, total = objectives.aggregate(
      batch.weight, batch.extras.get('sequence'), aggregation, max_tokens
    )
    grads, _ = sft.accumulate(psi_sum, params, batch._replace(weight=weight))
    return optax.global_norm(grads) / jnp.maximum(total, 1e-8)

  return jax.jit(psi_norm)


def _check_extras(batch: tokentree.RowBatch, needed: AbstractSet[str]) -> None:
  if needed - batch.extras.keys():
    raise ValueError(f'the batch lacks the extras {sorted(needed - batch.extras.keys())}')
