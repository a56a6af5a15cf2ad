"""The (DA-)GRPO step, and what it needs to know of sampled responses (docs/method.md, 3.2 to 3.5).

`Response` carries a response and the values of each of its tokens from the engine to the step. One
batch of them goes: `pack_responses` -> `score_rows`, where the trainer scores tokens itself ->
`with_advantages` -> `lay_values`, which puts on the tree what the loss reads -> `tree.batch` -> the
step of `make_grpo_step`.
Letters: A micro-batches, R rows, T tokens in a row, M loss tokens of a micro-batch, C those of a
chunk, D hidden, V vocabulary, P prompts, G rollouts of a prompt, m tokens of a response.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dcore_jax import sharding, tokentree
from dcore_jax.learn import advantages, head, lora, objectives, optimizer, psi
from dcore_jax.learn.step import Metrics, accumulate, loss_token_states, token_scores
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.tokentree import TokenTree

ScorePass = Callable[[Any, tokentree.RowBatch], tuple[jax.Array, jax.Array]]
_DEFAULT_EXECUTION = Execution()
_BY_TOKEN = ('clip_share', 'entropy', 'importance')  # metrics that are means over tokens
# Values that the loss is linear in, beside a token's weight in it.
_BY_LOSS = (
  'advantage',
  'advantage_up',
  'advantage_down',
  'psi',
  'without_psi',
  'psi_up',
  'psi_down',
  'uniform',
)


# --- responses on the host ---


@dataclasses.dataclass(frozen=True, eq=False)
class Response:
  """A sampled response and what is known of its m tokens.

  Values that a loss may read have the names of `objectives.PolicyLoss.extras`; a scalar holds for
  all tokens of the response.

  Attributes:
    prompt: int32 [n], the ids before the response.
    tokens: int32 [m], what was sampled.
    behaviour_logp: float32 [m], log-probabilities under the distribution that was sampled from.
    old_logp: float32 [m], those of the policy before the update, at the training temperature.
    entropy: float32 [m], nats, of the old policy's distributions.
    ref_logp: float32 [m], those of the reference policy.
    teacher_prompt: int32, the prompt with the reference in view; None without a teacher.
    teacher_logp: float32 [m], log-probabilities of the same tokens behind that prompt.
    advantage: float32 [m].
    psi: float32 [m], the part of the advantage that comes from entropies.
    relative: the group-relative part of the advantage, where the step itself chooses between the
      two; with the next two.
    zero_variance: 1 where psi takes its place, else 0.
    psi_weight: float32 [m], the factor of min(alpha H, delta) there.
    uniform: 1 where the rewards of the response's group are all equal, else 0.
    sequence: number of the response in its mini-batch.
    updated: 1 where updates lie between the old policy and the present one, else 0.
  """

  prompt: np.ndarray
  tokens: np.ndarray
  behaviour_logp: np.ndarray
  old_logp: np.ndarray
  entropy: np.ndarray
  ref_logp: np.ndarray | None = None
  teacher_prompt: np.ndarray | None = None
  teacher_logp: np.ndarray | None = None
  advantage: np.ndarray | None = None
  psi: np.ndarray | None = None
  relative: float | None = None
  zero_variance: float | None = None
  psi_weight: np.ndarray | None = None
  uniform: float | None = None
  sequence: int | None = None
  updated: float | None = None

  @property
  def teacher_gap(self) -> np.ndarray:
    """float32 [m], by how much the teacher finds a token more likely than the old policy, nats."""
    return self.teacher_logp - self.old_logp

  @property
  def without_psi(self) -> np.ndarray:
    """float32 [m], the rest of the advantage."""
    return self.advantage - self.psi


def pack_responses(
  responses: Sequence[Response],
  capacity: int,
  rows_multiple: int = 1,
  pad_id: int = 0,
  *,
  merge: bool = False,
) -> TokenTree:
  """Packs a sequence a response: its prompt has no loss weight and may be shared.

  A later prompt of an episode replays the answers before it. Without their thoughts it leaves the
  earlier response's path where those begin, and merges with the other turns and rollouts of the
  task as far as they agree. With all that was sampled, and with `merge`, it goes on from the
  earlier response, whose tokens are loss tokens and context at once.

  Args:
    responses: what to pack.
    capacity: tokens of a row.
    rows_multiple: the number of rows is rounded up to a multiple of it.
    pad_id: token of places that stay empty.
    merge: whether sampled tokens of the same prefix become one loss token, which weighs as many as
      it stands for. Only for a loss that merges (`objectives.PolicyLoss.merges`).
  """
  return tokentree.pack(_sequences(responses, merge=merge), capacity, rows_multiple, pad_id)


def _sequences(responses: Sequence[Response], *, merge: bool) -> list[tokentree.TokenSequence]:
  sequences = []
  for response in responses:
    # The model did not write its prompt, so nothing of it is trained.
    prompt_weights = np.zeros(len(response.prompt), np.float32)
    own_weights = np.ones(len(response.tokens), np.float32)
    # All tokens of a response have weight 1; the aggregation of the loss decides what a token
    # counts.
    tokens = np.concatenate([response.prompt, response.tokens])
    sequences.append(
      tokentree.TokenSequence(
        tokens=tokens,
        weights=np.concatenate([prompt_weights, own_weights]),
        shared=len(tokens) if merge else len(response.prompt),
      )
    )
  return sequences


def cut_groups(tree: TokenTree, groups: Sequence[Sequence[Response]], *, merge: bool) -> list[int]:
  """Finds the groups of which no row could hold the whole tree -> the tokens of each such tree.

  Each row that such a group lies in computes its trunk again.

  Args:
    tree: `pack_responses` of all responses, group by group.
    groups: the responses of each group.
    merge: as the tree was packed.
  """
  sizes = []
  first = 0
  for responses in groups:
    places = range(first, first + len(responses))
    first += len(responses)
    # Most groups lie in one row, which is seen at once. Others may have been divided although they
    # fit, where that takes fewer rows.
    if len(tree.rows_of(places)) > 1:
      size = tokentree.tree_size(_sequences(responses, merge=merge), tree.capacity)
      if size > tree.capacity:
        sizes.append(size)
  return sizes


def lay_values(
  tree: TokenTree,
  responses: Sequence[Response],
  names: AbstractSet[str],
  aggregation: str = 'token',
) -> TokenTree:
  """The tree of `pack_responses` with the named values of the responses on its loss tokens.

  A token that several responses share gets means of their values. Advantages and what else the loss
  is linear in are weighed as `aggregation` weighs tokens; log-probabilities are the same for all of
  them up to rounding, and everything else is a mean over tokens.
  """
  ones = [np.ones(len(response.tokens)) for response in responses]
  shares = [one / len(one) for one in ones]  # of each token in its sequence
  by_token = (ones, tree.add_up(ones))
  by_loss = (shares, tree.add_up(shares)) if aggregation == 'sequence' else by_token
  extras = {}
  if 'sequence_weight' in names:
    extras['sequence_weight'] = tree.add_up(shares).astype(np.float32)
  if 'sequence' in names:
    # Read by losses that do not merge: each token has one sequence.
    numbers = [np.broadcast_to(each.sequence, each.tokens.shape) for each in responses]
    extras['sequence'] = tree.scatter(numbers, np.int32)
  values = {}
  if names & objectives.SIDES:
    sides = [_sides(response, in_step=bool(names & psi.SIDES)) for response in responses]
    values = {name: [side[name] for side in sides] for name in sides[0]}
  for name in sorted(names - extras.keys()):
    # A scalar of a response is spread over its tokens, as the loss reads one value a token.
    own = values.get(name) or [
      np.broadcast_to(getattr(each, name), each.tokens.shape) for each in responses
    ]
    weights, total_RT = by_loss if name in _BY_LOSS else by_token
    weighted = [value * weight for value, weight in zip(own, weights, strict=True)]
    # In float64: the mean of equal float32 values is that value to the bit.
    mean_RT = tree.add_up(weighted) / np.where(total_RT, total_RT, 1)
    extras[name] = mean_RT.astype(np.float32)
  return tree.with_extras(**extras)


def _sides(response: Response, *, in_step: bool) -> dict[str, np.ndarray]:
  """The response's advantages by sign; with psi in the step the two parts of them apart."""
  if not in_step:
    return objectives.advantage_sides(response.advantage)
  shape = response.tokens.shape
  # The choice between the two is the rollout's, so that it is made before rollouts are added up.
  relative = np.float32(0) if response.zero_variance else response.relative
  weight = response.psi_weight if response.zero_variance else np.float32(0)
  return objectives.advantage_sides(np.broadcast_to(relative, shape)) | psi.weight_sides(
    np.broadcast_to(weight, shape)
  )


def gather_values(
  tree: TokenTree, responses: Sequence[Response], values_RT: np.ndarray
) -> list[np.ndarray]:
  """Per-token values of the rows -> those of each response's own tokens."""
  gathered = tree.gather(values_RT)
  # A path begins with the prompt, whose tokens have no scores.
  return [
    values[len(response.prompt) :] for values, response in zip(gathered, responses, strict=True)
  ]


def with_advantages(
  rollouts: Sequence[Sequence[Response]],
  rewards_PG: np.ndarray,
  estimator: advantages.Estimator,
  psi_tokens: Sequence[Sequence[np.ndarray]] | None = None,
  parts: advantages.GroupParts | None = None,
  signal: Literal['entropy', 'teacher_gap'] = 'entropy',
) -> list[list[Response]]:
  """Gives responses their advantage, psi and `uniform`; with `parts` also what these are made of.

  An advantage belongs to a rollout. An episode has several responses, and none where its first
  prompt was too long.

  Args:
    rollouts: the responses of each rollout, prompt by prompt; their entropies are read.
    rewards_PG: reward of each rollout.
    estimator: one of `advantages.ADVANTAGES` with its options bound.
    psi_tokens: for each response which of its tokens may have psi, bool [m]; all by default.
    parts: of the same rewards, for a step that puts psi into advantages itself.
    signal: which value of the tokens the estimator reads.

  Raises:
    ValueError: the rewards do not number the rollouts.
  """
  # The estimators compute in float32, and groups must be uniform for both or for neither.
  rewards_PG = np.float32(rewards_PG)
  signals = [_joined([getattr(each, signal) for each in responses]) for responses in rollouts]
  allowed = None
  if psi_tokens is not None:
    allowed = [_joined(marks, bool) for marks in psi_tokens]
  # An episode's rollout is one sequence of tokens to the estimator, all its responses together.
  advantage, psi_part = advantages.token_advantages(estimator, rewards_PG, signals, allowed)
  # One verdict for each group, given to all tokens of its rollouts.
  uniform_P1 = advantages.uniform_groups(rewards_PG)
  uniform = np.broadcast_to(uniform_P1, rewards_PG.shape).reshape(-1)
  result = []
  for number, responses in enumerate(rollouts):
    # The rollout's advantages are cut again at the ends of its responses.
    changed = []
    start = 0
    for place, response in enumerate(responses):
      stop = start + len(response.tokens)
      changed.append(
        dataclasses.replace(
          response,
          advantage=advantage[number][start:stop],
          psi=psi_part[number][start:stop],
          uniform=float(uniform[number]),
          **_parts_of(response, parts, number, psi_tokens and psi_tokens[number][place]),
        )
      )
      start = stop
    result.append(changed)
  return result


def _parts_of(
  response: Response,
  parts: advantages.GroupParts | None,
  rollout: int,
  allowed: np.ndarray | None,
) -> dict[str, Any]:
  """The fields of a response that the parts of its rollout's advantage go to."""
  if parts is None:
    return {}
  weight = np.full(len(response.tokens), parts.weight_PG.reshape(-1)[rollout], np.float32)
  return {
    'relative': parts.relative_PG.reshape(-1)[rollout],
    'zero_variance': float(parts.zero_PG.reshape(-1)[rollout]),
    # Tokens without a wanted word keep the advantage 0 of their rollout.
    'psi_weight': weight if allowed is None else weight * allowed,
  }


def _joined(arrays: Sequence[np.ndarray], dtype: type = np.float32) -> np.ndarray:
  """The arrays end to end; empty where there are none."""
  # The empty array in front allows for episodes without a response.
  return np.concatenate([np.zeros(0, dtype), *arrays])


def reflective_tokens(
  responses: Sequence[Response], tokenizer: Any, words: Sequence[str]
) -> list[np.ndarray]:
  """bool [m] for each response: tokens that hold a part of one of the words.

  Each response is read as one text, so that a word may span tokens.
  """
  # Decoding is the slow part: each id that occurs is decoded once.
  ids = np.unique(_joined([response.tokens for response in responses], np.int32))
  texts = tokenizer.batch_decode(ids[:, None].tolist(), clean_up_tokenization_spaces=False)
  pieces = np.array(texts, object)
  marks = []
  for response in responses:
    # `ids` is sorted and holds every token, so that the search finds its place.
    own = pieces[np.searchsorted(ids, response.tokens)]
    marks.append(advantages.word_tokens(own.tolist(), words))
  return marks


# --- scores of a policy ---


def make_score_pass(
  config: DecoderConfig, *, temperature: float = 1.0, execution: Execution = _DEFAULT_EXECUTION
) -> ScorePass:
  """The jitted pass (params, batch) -> (log-probabilities, entropies) [A, M] of the loss tokens."""

  def score(params, micro):
    return token_scores(params, config, micro, temperature=temperature, execution=execution)

  def score_pass(params, batch):
    if batch.weight.shape[0] == 1:  # the usual case needs no loop
      scores = score(params, jax.tree.map(lambda leaf: leaf[0], batch))
      logp_AM, entropy_AM = jax.tree.map(lambda leaf: leaf[None], scores)
    else:
      # One micro-batch after the other, so that the activations of one are held at a time.
      logp_AM, entropy_AM = jax.lax.map(lambda micro: score(params, micro), batch)
    # Every host reads all scores.
    return (
      sharding.constrain(logp_AM, 'micro_batch', 'length'),
      sharding.constrain(entropy_AM, 'micro_batch', 'length'),
    )

  return jax.jit(score_pass)


def score_rows(
  score_pass: ScorePass,
  params: Any,
  tree: TokenTree,
  rows: int,
  budget: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Scores a whole tree -> (log-probabilities, entropies), float32 [R, T], 0 elsewhere.

  Args:
    score_pass: from `make_score_pass`.
    params: the policy's.
    tree: what is scored.
    rows: rows of one pass. All passes have one constant shape.
    budget: loss tokens that a pass has room for; by default what the tree needs. Trees with the
      same budget share one compiled program.

  Raises:
    ValueError: the rows of the tree do not divide into passes.
  """
  if rows < 1 or tree.rows % rows:
    raise ValueError(
      f'{tree.rows} rows of the tree do not divide into {rows}; pack with rows_multiple={rows}'
    )
  budget = budget or tree.loss_budget(rows, sharding.shards())
  pending = []
  for start in range(0, tree.rows, rows):
    if not tree.weight[start : start + rows].any():
      continue  # rows that only fill the tree up
    batch = tree.batch(range(start, start + rows), budget=budget, shards=sharding.shards())
    # Dispatched only: nothing waits for the device until all passes are under way.
    scores = score_pass(params, sharding.place_batch(batch, whole=True))
    pending.append((start, batch, scores))
  logp_RT = np.zeros((tree.rows, tree.capacity), np.float32)
  entropy_RT = np.zeros((tree.rows, tree.capacity), np.float32)
  for start, batch, scores in pending:
    logp_1M, entropy_1M = jax.device_get(scores)
    # One micro-batch a pass; `slot` counts from the first of its rows.
    # Padding of the budget has weight 0 and points at slot 0, which is another token's.
    used = batch.weight[0] != 0
    slots = batch.slot[0][used]
    logp_RT[start : start + rows].reshape(-1)[slots] = logp_1M[0][used]
    entropy_RT[start : start + rows].reshape(-1)[slots] = entropy_1M[0][used]
  return logp_RT, entropy_RT


# --- the step ---


def make_grpo_step(
  config: DecoderConfig,
  tx: optax.GradientTransformation,
  loss: objectives.PolicyLoss,
  *,
  temperature: float = 1.0,
  execution: Execution = _DEFAULT_EXECUTION,
) -> Callable[..., tuple[optimizer.TrainState, Metrics]]:
  """The jitted step (state, batch, psi's scale, frozen) -> (state, metrics); the state is donated.

  Where `loss.entropy_of` says so, the step makes advantages of their parts by `learn.psi`, with
  alpha and delta of a `psi.PsiScale` that it takes as an argument. Otherwise the batch brings whole
  advantages, and the scale is None. Under LoRA `frozen` is what the adapters in the state stand
  beside; otherwise it is None.

  Sums over loss tokens are divided once, by what the aggregation of the whole batch says; a token's
  weight in the tree counts beside it. A statistic of the objective costs GSPO one more vocabulary
  projection. KL-Cov, which compares the tokens of all micro-batches, costs one more forward pass.

  Metrics: loss, pg_loss, kl, uniform_kl and entropy_bonus, divided as the loss is; clip_share,
  entropy (of the current policy) and importance, means over tokens; weight, grad_norm, skipped.
  Those of terms that are off are absent.

  Args:
    config: of the decoder.
    tx: the optimizer.
    loss: what is minimised; its `extras` names the values that a batch must bring.
    temperature: of the policy's distributions.
    execution: how the passes run.
  """
  objective_sum = functools.partial(
    _objective_sum, config=config, loss=loss, temperature=temperature, execution=execution
  )

  def grpo_step(state, batch, scale=None, frozen=None):
    def loss_sum(params, micro):
      return objective_sum(lora.attach(frozen, params), micro)

    # Runs once, while the step is traced: names are known then, and a missing one is a clear error.
    objectives.check_extras(batch.extras, loss.extras)
    if (scale is None) == bool(loss.entropy_of):
      raise ValueError(f'entropy_of = {loss.entropy_of!r} and a scale of psi go together')
    weight, total = objectives.aggregate(
      batch.weight, batch.extras.get('sequence_weight'), loss.aggregation, loss.max_tokens
    )
    extras = batch.extras
    if loss.aggregation == 'sequence':
      # Weights now are shares of a sequence; means over tokens need those of the tree.
      extras = extras | {'token_weight': batch.weight}
    if loss.entropy_of:
      extras = extras | psi.scale_values(scale, batch.weight)
    batch = batch._replace(weight=weight, extras=extras)
    # Computed over all micro-batches before the first gradient, because its order statistics need
    # all tokens.
    if loss.scope == 'mini-batch':
      params = lora.attach(frozen, state.params)
      logp_AM, entropy_AM = _batch_scores(params, batch, config, temperature, execution)
      extras = loss.with_statistic(logp_AM, batch.weight, batch.extras, entropy_AM)
      batch = batch._replace(extras=extras)
    # Undivided sums are added, so that the result does not depend on the number of micro-batches.
    grads, sums = accumulate(loss_sum, state.params, batch)
    # A batch without loss tokens has loss and gradient 0, not NaN: hence the bound on divisors.
    weight = sums.pop('weight')
    by_loss = 1 / jnp.maximum(total, 1e-8)
    by_token = 1 / jnp.maximum(weight, 1e-8)
    metrics = {}
    for name, value in sums.items():
      metrics[name] = value * (by_token if name in _BY_TOKEN else by_loss)
    state, applied = optimizer.apply_gradients(
      tx,
      state,
      jax.tree.map(lambda g: g * by_loss, grads),
      offload='optimizer' in execution.offload,
    )
    return state, metrics | applied | {'weight': weight}

  # Donated, because parameters and moments would otherwise be in memory twice.
  return jax.jit(grpo_step, donate_argnums=0)


def _batch_scores(
  params: Any,
  batch: tokentree.RowBatch,
  config: DecoderConfig,
  temperature: float,
  execution: Execution,
) -> tuple[jax.Array, jax.Array]:
  """(log-probabilities, entropies) [A, M] of the loss tokens.

  Micro-batches without weight are skipped.
  """

  def score(micro):
    def scores():
      return token_scores(params, config, micro, temperature=temperature, execution=execution)

    def nothing():
      return jnp.zeros_like(micro.weight), jnp.zeros_like(micro.weight)

    # Micro-batches that only fill the batch up would cost a whole forward pass.
    return jax.lax.cond(jnp.any(micro.weight != 0), scores, nothing)

  return jax.lax.map(score, batch)


def _objective_sum(
  params: Any,
  micro: tokentree.RowBatch,
  *,
  config: DecoderConfig,
  loss: objectives.PolicyLoss,
  temperature: float,
  execution: Execution,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(loss, sums for the metrics) over the loss tokens of a micro-batch, undivided."""

  def objective(logp_C, entropy_C, values):
    weight_C, extras = values
    total, sums = loss.sums(logp_C, entropy_C, weight_C, extras)
    return total, sums | {'loss': total, 'weight': jnp.sum(extras.get('token_weight', weight_C))}

  # Hidden states of the loss tokens alone: prompts need no vocabulary projection.
  hidden_MD = loss_token_states(params, config, micro, execution)
  matrix_VD = decoder.head_matrix(params)
  # Statistics are constants of the loss: no gradient flows into them.
  extras = micro.extras
  if loss.scope == 'micro-batch':
    logp_M, entropy_M = head.log_probs_and_entropy(
      # The decoder is run once: statistic and loss share its hidden states.
      *jax.lax.stop_gradient((hidden_MD, matrix_VD)),
      micro.target,
      temperature,
      used_M=micro.weight,
    )
    extras = loss.with_statistic(logp_M, micro.weight, extras, entropy_M)
  total, sums = head.token_loss(
    objective,
    hidden_MD,
    matrix_VD,
    micro.target,
    (micro.weight, extras),
    head.LossOptions(
      temperature=temperature,
      # Only the bonus differentiates the entropy; metrics and psi read its value.
      entropy='gradient' if loss.entropy_bonus else 'value',
    ),
  )
  # Added here because the gap depends on hidden states, which the loss of a token does not see.
  if loss.uniform_kl:
    # KL(uniform || policy) = -logp - gap; `loss.sums` has the first half.
    gap_M = head.uniform_gap(hidden_MD, matrix_VD, micro.target, temperature)
    rest = -jnp.sum(micro.weight * extras['uniform'] * gap_M)
    total += loss.uniform_kl * rest
    sums |= {
      'uniform_kl': sums['uniform_kl'] + rest,
      'loss': sums['loss'] + loss.uniform_kl * rest,
    }
  return total, sums
