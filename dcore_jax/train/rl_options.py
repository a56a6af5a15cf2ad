"""Section `rl` as the loop reads it: objects made of its options, sizes, and checks before a run.

A wrong option is an error here, before anything is sampled, and not hours later at the step that
first reads it.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import optax

from dcore_jax import overrides, sharding
from dcore_jax.config import RL_PRESETS, RlSection
from dcore_jax.learn import advantages, objectives, optimizer, rewards
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.sampling import SamplingParams
from dcore_jax.train.sources import RolloutSource

# GSPO's published clips are about a hundred times smaller. Its ratio is a mean over the tokens of a
# response, which stays close to 1.
_GSPO_CLIP = 0.05
# What alpha may be adapted to hold, and the metric that measures it.
_MEASURES = {
  'entropy': 'entropy',
  'norm_share': 'psi_grad_share',
  'reflections': 'reflections',
  'uniform_share': 'zero_variance_fraction',
}


def policy_loss(config: RlSection) -> objectives.PolicyLoss:
  """Returns the loss that section `rl` minimises."""
  return objectives.PolicyLoss(
    # Passed by name, one by one: a field that is renamed on either side is an error at once.
    objective=config.objective,
    clip_low=config.clip_low,
    clip_high=config.clip_high,
    dual_clip=config.dual_clip,
    cov_share=config.cov_share,
    cov_penalty=config.cov_penalty,
    aggregation=config.aggregation,
    max_tokens=config.max_tokens,
    kl_coefficient=config.kl_coefficient,
    kl_estimator=config.kl_estimator,
    uniform_kl=config.uniform_kl,
    entropy_bonus=config.entropy_bonus,
    entropy_bonus_on=config.entropy_bonus_on,
    importance_cap=config.importance_cap,
    # An estimator that the step cannot make brings whole advantages.
    entropy_of=config.entropy_of if _parts(config) else '',
  )


def make_estimator(
  config: RlSection, alpha: float, signs_P: np.ndarray | None = None
) -> advantages.Estimator:
  """Returns the advantage estimator that `rl.estimator` names, with the options of the section.

  An option that only an estimator from outside this package knows keeps its default.

  Args:
    config: section `rl`.
    alpha: stands for `rl.alpha`, which may be adapted during a run.
    signs_P: signs of the groups, for the placebo.
  """
  options = _psi_options(config, signs_P) | {
    'alpha': alpha,
    'delta': config.delta,
    'top_share': config.top_share,
    'shaping_kappa': config.shaping_kappa,
    'virtual_reward': config.virtual_reward,
    'positive_weight': config.positive_weight,
  }
  return advantages.make_estimator(config.estimator, options)


def group_parts(
  config: RlSection, rewards_PG: np.ndarray, signs_P: np.ndarray | None = None
) -> advantages.GroupParts:
  """Returns what the step makes advantages of; only where `policy_loss(config).entropy_of`."""
  return _parts(config, signs_P)(rewards_PG)


def _parts(
  config: RlSection, signs_P: np.ndarray | None = None
) -> Callable[[np.ndarray], advantages.GroupParts] | None:
  return advantages.make_parts(config.estimator, _psi_options(config, signs_P))


def _psi_options(config: RlSection, signs_P: np.ndarray | None) -> dict[str, Any]:
  # An estimator takes those of these options that it knows.
  return {
    'signs_P': signs_P,
    'zero_test': config.zero_test,
    'psi_multiplier': config.psi_multiplier,
    'psi_when_wrong': config.psi_when_wrong,
    'right_above': config.right_above,
  }


def next_alpha(config: RlSection, alpha: float, measured: float) -> float:
  """Returns `advantages.adapted_alpha` with the section's target, rate and bounds."""
  return advantages.adapted_alpha(
    alpha,
    measured,
    config.alpha_target,
    rate=config.alpha_rate,
    low=config.alpha_low,
    high=config.alpha_high,
  )


def alpha_measure(config: RlSection, row: Mapping[str, float]) -> float:
  """Returns what `rl.alpha_measure` names, of a step's row; NaN where the step says nothing."""
  name = _MEASURES[config.alpha_measure]
  # Under dynamic sampling the groups that were asked count, and not those that were kept.
  if name == 'zero_variance_fraction':
    return row.get('asked_zero_variance', row[name])
  # A step without psi has a share of 0, which says nothing about alpha.
  if name == 'psi_grad_share':
    return row[name] or math.nan
  return row[name]


def length_penalty(config: RlSection, lengths: np.ndarray) -> np.ndarray:
  """Returns `advantages.overlong_penalty` of responses with these numbers of tokens."""
  return advantages.overlong_penalty(
    lengths,
    max_tokens=config.max_tokens,
    buffer=config.overlong_buffer,
    penalty=config.overlong_penalty,
  )


def sampling_params(config: RlSection, seed: int) -> SamplingParams:
  """Returns how rollouts are drawn."""
  # Nothing is truncated (top_p, top_k): the trainer computes probabilities over the whole
  # vocabulary, and ratios against truncated ones would be biased.
  return SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=seed)


def rows_multiple(config: RlSection, longest_prompt: int, response: int) -> int:
  """Returns the number of rows that a mini-batch comes in multiples of: all steps have one shape.

  As many rows as rollouts of full length fill. Where packing leaves gaps, the next multiple is
  taken; micro-batches that stay empty are skipped on the device.

  Args:
    config: section `rl`.
    longest_prompt: the tokens of the longest prompt.
    response: the most tokens that a rollout has, all its responses together.
  """
  # A group stores its prompt once (`tokentree`), and each of its rollouts a response.
  tokens = config.prompts // config.updates * (longest_prompt + config.group * response)
  return config.rows * math.ceil(tokens / (config.rows * config.capacity))


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
  """What the optimizer of section `rl` is made of; hashable."""

  learning_rate: float
  schedule: optimizer.Schedule
  weight_decay: float
  clip: float

  def make(self) -> optax.GradientTransformation:
    """Returns AdamW with these options."""
    return optimizer.make_optimizer(
      'adamw',
      self.learning_rate,
      self.schedule,
      weight_decay=self.weight_decay,
      clip=self.clip,
    )


def optimizer_options(config: RlSection) -> OptimizerOptions:
  """Returns the optimizer of section `rl`.

  The learning rate rises over `rl.warmup_steps` and then stays.
  """
  # Without warm-up the rate is the same at every step.
  schedule = optimizer.Schedule()
  if config.warmup_steps and config.steps:
    # Every rollout batch has `updates` optimizer steps.
    schedule = optimizer.Schedule(
      # The optimizer's schedule takes the share of its steps in which the rate rises.
      warmup=config.warmup_steps / config.steps,
      total_steps=config.steps * config.updates,
    )
  return OptimizerOptions(
    learning_rate=config.learning_rate,
    schedule=schedule,
    weight_decay=config.weight_decay,
    clip=config.clip,
  )


def check_options(config: RlSection, engine: Engine, source: RolloutSource) -> None:
  """Checks the section before anything is sampled.

  Raises:
    ValueError: naming a field whose value means nothing, or sizes that do not fit each other.
  """
  check_section(config)
  # Each device takes the same number of rows of a micro-batch.
  if config.rows % sharding.shards():
    raise ValueError(
      f'rl.rows = {config.rows} do not divide over the {sharding.shards()} devices that split rows'
    )
  _check_sizes(config, engine, source)


def check_section(config: RlSection) -> None:
  """Checks what the section says by itself, before anything is loaded.

  Warns where an objective or an estimator lacks what usually belongs to it.

  Raises:
    ValueError: naming a field whose value means nothing, or fields that exclude each other.
  """
  overrides.check_ranges(config, RlSection, 'rl.')
  # A group stays in one mini-batch, so that mini-batches hold equally many groups.
  if config.prompts % config.updates:
    raise ValueError(
      f'rl.prompts = {config.prompts} does not divide into rl.updates = {config.updates}'
    )
  if config.warmup_steps > config.steps:
    raise ValueError(
      f'rl.warmup_steps = {config.warmup_steps} exceeds rl.steps = {config.steps}: the learning '
      'rate would never come up to rl.learning_rate'
    )
  if config.reward not in rewards.REWARDS:
    raise ValueError(
      f'unknown rl.reward {config.reward!r}; expected one of {sorted(rewards.REWARDS)}'
    )
  # The loss checks its own options when it is made.
  with _in_section():
    policy_loss(config)
  _check_companions(config)
  # Options of functions are checked by the functions themselves, on the smallest input they take.
  nothing_PG = np.zeros((1, 2))
  nothing_PGT = np.zeros((1, 2, 1))
  with _in_section():
    estimator = make_estimator(config, config.alpha, signs_P=np.ones(1))
    estimator(nothing_PG, nothing_PGT, nothing_PGT)
    advantages.select_groups(nothing_PG, 1, uniform_share=config.uniform_share)
  # The buffer is the last part of the longest response, in which the penalty grows.
  if config.overlong_buffer > config.max_tokens:
    raise ValueError(
      f'rl.overlong_buffer = {config.overlong_buffer} exceeds rl.max_tokens = '
      f'{config.max_tokens}, the longest response'
    )
  _check_alpha(config)
  _check_psi(config)
  _check_teacher(config)
  _check_fleet(config)


@contextlib.contextmanager
def _in_section() -> Iterator[None]:
  """Tells what functions that know no config find wrong as said in the section `rl`."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'rl: {error}') from error


def _check_companions(config: RlSection) -> None:
  """Names what usually belongs to an objective or an estimator, where the section differs.

  Raises:
    ValueError: GSPO with clips at which no ratio of sequences is ever clipped.
  """
  if config.preset:
    # A preset has set the companions; what differs from it was set by a person.
    return
  for field, name in (('objective', config.objective), ('estimator', config.estimator)):
    preset = RL_PRESETS.get(name, {})
    # A preset of the same name that does not set this field says nothing about its companions.
    if preset.get(field) != name:
      continue
    missing = []
    for other, usual in preset.items():
      value = getattr(config, other)
      if other not in ('objective', 'estimator') and value != usual:
        missing.append(f'rl.{other} = {usual} (here {value})')
    if not missing:
      continue
    message = f'rl.{field} = {name!r} usually goes with {", ".join(missing)}'
    # The mean log ratio of a sequence moves by about 1e-4 in a step.
    if name == 'gspo' and max(config.clip_low, config.clip_high) > _GSPO_CLIP:
      raise ValueError(
        f'{message}; at these clips no sequence is ever clipped. Set them, or '
        "rl.preset = 'gspo', which does"
      )
    warnings.warn(f'{message}; rl.preset = {name!r} sets it', stacklevel=2)


def _check_alpha(config: RlSection) -> None:
  if config.alpha_measure == 'psi_share':
    raise ValueError(
      "rl.alpha_measure = 'psi_share' is called 'norm_share' now: it is a share of norms, and no "
      'share of what an update does'
    )
  if config.alpha_measure and config.alpha_measure not in _MEASURES:
    raise ValueError(
      f'unknown rl.alpha_measure {config.alpha_measure!r}; expected one of {sorted(_MEASURES)}, '
      "or ''"
    )
  # Called for its checks of target, rate and bounds alone; the result is not used.
  if config.alpha_measure:
    next_alpha(config, config.alpha, math.nan)
  about_psi = config.alpha_measure or config.psi_words
  if about_psi and not advantages.uses_entropy(config.estimator):
    raise ValueError(
      f'rl.alpha_measure and rl.psi_words are about psi, which {config.estimator!r} does not have'
    )


def _check_psi(config: RlSection) -> None:
  if config.entropy_of == 'current' and not _parts(config):
    raise ValueError(
      f"rl.entropy_of = 'current' needs an estimator whose psi the step makes: da_grpo without "
      f"psi_when_wrong = 'punish', not {config.estimator!r}"
    )


def _check_teacher(config: RlSection) -> None:
  if not advantages.uses_teacher(config.estimator):
    return
  if '{reference}' not in config.teacher:
    raise ValueError(f'rl.teacher = {config.teacher!r} shows no {{reference}}')
  if config.episodes:
    raise ValueError(
      f'rl.estimator = {config.estimator!r} needs a reference answer for each prompt, which '
      'rl.episodes does not have'
    )


def _check_fleet(config: RlSection) -> None:
  fleet = config.fleet
  if not fleet.endpoints:
    return
  if fleet.publish_every > fleet.staleness + 1:
    raise ValueError(
      f'rl.fleet.publish_every = {fleet.publish_every} leaves weights that lack '
      f'{fleet.publish_every - 1} updates, and rl.fleet.staleness allows {fleet.staleness}'
    )
  # What another policy drew would be taken for the present one's.
  if not config.importance_cap:
    raise ValueError(
      'rl.fleet: rollouts of servers are weighed by the ratio of the two policies; set '
      'rl.importance_cap, to 2 for example'
    )
  for url in fleet.endpoints:
    if not url.startswith(('http://', 'https://')):
      raise ValueError(f'rl.fleet.endpoints: {url!r} is no address; http://HOST:8000/v1 is one')


def _check_sizes(config: RlSection, engine: Engine, source: RolloutSource) -> None:
  """ValueError where a prompt does not fit the engine, or a rollout not a packed row."""
  if source.longest_prompt >= engine.max_len:
    raise ValueError(
      f'a prompt of {source.longest_prompt} tokens leaves no room in '
      f'engine.max_len = {engine.max_len}; '
      f'rl.max_prompt_tokens = {config.max_prompt_tokens} drops only longer ones'
    )
  taught = source.longest_teacher_prompt + min(config.max_tokens, engine.max_new)
  if source.longest_teacher_prompt and taught > config.capacity:
    raise ValueError(
      f"rl.capacity = {config.capacity} does not hold a teacher's prompt with its response, "
      f'{taught} tokens'
    )
  # Later prompts of an episode grow up to the engine's limit; a single response has its own.
  longest = engine.max_len
  if source.responses == 1:
    response = min(config.max_tokens, engine.max_new)
    # A packed row holds whole rollouts, prompt and responses together.
    longest = min(longest, source.longest_prompt + response)
  if longest > config.capacity:
    raise ValueError(
      f'rl.capacity = {config.capacity} does not hold a rollout of {longest} tokens, '
      'prompt and response'
    )
