"""The section `rl` of a config, and its presets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dcore_jax.config.fields import LEAST_TEMPERATURE, choice, option, presets, section

# What belongs to a method beside its name (docs/method.md, section 3.6). `rl.preset` sets it where
# the config says nothing else.
RL_PRESETS: Mapping[str, Mapping[str, Any]] = {
  # The released script: 96 prompts a round and at most 10 rounds, here as rounds of 32; what comes
  # above 3,072 of 4,096 tokens costs reward.
  'dapo': {
    'estimator': 'grpo',
    'objective': 'ppo',
    'clip_low': 0.2,
    'clip_high': 0.28,
    'dual_clip': 10.0,
    'aggregation': 'token',
    'kl_coefficient': 0.0,
    'dynamic_rounds': 29,
    'overlong_buffer': 1024,
    'overlong_penalty': 1.0,
    'warmup_steps': 10,
    'weight_decay': 0.1,
  },
  'gspo': {
    'estimator': 'grpo',
    'objective': 'gspo',
    'clip_low': 3e-4,
    'clip_high': 4e-4,
    'aggregation': 'sequence',
  },
  # Neither the deviation of a group nor the length of a response divides (Liu et al. 2025).
  'dr_grpo': {
    'estimator': 'dr_grpo',
    'objective': 'ppo',
    'aggregation': 'dr',
    'kl_coefficient': 0.0,
  },
  # Ratios count as at most 5, and as small as they are (MiniMax-M1 has no lower bound; the upper
  # one is that of ScaleRL, Khatri et al. 2025).
  'cispo': {
    'estimator': 'grpo',
    'objective': 'cispo',
    'clip_low': 1.0,
    'clip_high': 4.0,
    'aggregation': 'token',
    'kl_coefficient': 0.0,
  },
  'kl_cov': {
    'estimator': 'grpo',
    'objective': 'kl_cov',
    'cov_share': 0.002,
    'cov_penalty': 0.1,
    'kl_coefficient': 0.0,
  },
}


@dataclasses.dataclass(frozen=True)
class FleetSection:
  """Servers that make the rollouts, while updates run; see docs/guides/fleet.md."""

  endpoints: tuple[str, ...] = option(
    (),
    "Addresses of OpenAI-compatible servers, '/v1' included; () is the engine of this process.",
    free=True,
  )
  model: str = option('', "Name of the model at the servers; '' is the first that each lists.")
  api_key_env: str = option(
    'OPENAI_API_KEY', 'Environment variable with the key of the servers.', free=True
  )
  staleness: int = option(
    1,
    'Updates that the weights which drew a token may lack at most; 0 samples between updates, as '
    'the engine of this process does.',
    least=0,
  )
  publish_every: int = option(
    1, 'Steps between two publications of the weights; at most staleness + 1.', least=1
  )
  publish_dir: str = option(
    '', "Directory of published weights, which servers see, too; '' is W/fleet.", free=True
  )
  dtype: str = choice('bfloat16', ('bfloat16', 'float32'), 'Of published weights.')
  restart: str = option(
    '',
    'Command that starts a server anew with published weights, with {path}, {version} and '
    "{endpoint} filled in; '' asks it to take them (POST /update_weights), as ours does.",
    free=True,
  )
  concurrency: int = option(64, 'Requests under way at a server.', free=True, least=1)
  timeout: float = option(
    600.0, 'Seconds that a server has for a request, or for its start.', free=True, above=0
  )
  hedge: float = option(
    2.0,
    'A request that takes so many times as long as the longest of the other servers is asked of '
    'one of these, too; 0 never does.',
    free=True,
    least=1,
    also=(0,),
  )
  patience: float = option(
    600.0, 'Seconds without any server after which the run ends.', free=True, above=0
  )


@dataclasses.dataclass(frozen=True)
class RlSection:
  """Reinforcement learning: rollouts, rewards, advantages, updates."""

  preset: str = presets(
    RL_PRESETS,
    "'dapo', 'gspo', 'dr_grpo', 'cispo' or 'kl_cov': sets what belongs to that method "
    '(RL_PRESETS) wherever the config does not.',
  )
  files: tuple[str, ...] = option(
    (),
    "Data sets to ask about instead of the world's decision points: ToolRL rows, or messages, "
    'tools and reference calls.',
  )
  unreadable: str = choice(
    'error', ('error', 'drop'), "Rows that cannot be read: 'error', or 'drop' (counted and logged)."
  )
  tasks: Mapping[str, int] = option(
    {'single': 60, 'sequential': 120, 'parallel': 120, 'irrelevant': 60, 'multi_turn': 40},
    'Training tasks of the world, by kind.',
    least=0,
  )
  seed: int = option(
    0,
    "Seed of prompt order and sampling, beside the run's own: the repetitions of a sweep. "
    'What rl.validation sets aside does not depend on it.',
    least=0,
  )
  steps: int = option(468, 'Rollout batches; 468 is 5,000 prompts / 32 x 3 epochs.', least=0)
  prompts: int = option(32, 'Prompts a step.', least=1)
  episodes: bool = option(
    False, 'Act whole tasks of the world out and reward the state they leave.'
  )
  group: int = option(8, 'Rollouts of a prompt.', least=1)
  wave: int = option(
    32,
    'Prompts sampled and written down together: a kill loses the rollouts of one wave at most.',
    free=True,
    least=1,
  )
  validation: int = option(
    32,
    'Prompts set aside at most, in whole tasks; measured before, after, at each checkpoint.',
    least=0,
  )
  updates: int = option(4, 'Optimizer steps a rollout batch.', least=1)
  estimator: str = option(
    'da_grpo', 'An advantage estimator of learn/advantages.py or learn/controls.py.'
  )
  alpha: float = option(0.1, 'Weight of the entropy advantage psi (D-CORE, eq. 6).', least=0)
  delta: float = option(0.5, 'Bound of the entropy advantage (D-CORE, eq. 6), nats.', least=0)
  zero_test: str = option(
    'group', "Where psi acts: 'group', 'token' (released code), or 'below' (eq. 6 to the letter)."
  )
  psi_multiplier: float = option(1.0, 'Factor of psi; the released code has 2.', least=0)
  psi_when_wrong: str = option(
    'reinforce',
    "For uniform groups whose reward is not above right_above: 'reinforce', 'ignore' or 'punish'.",
  )
  right_above: float = option(0.0, 'Reward above which a uniform group counts as right.')
  psi_words: tuple[str, ...] = option((), 'Words on whose tokens alone psi acts; () is all tokens.')
  # The gradient flows through neither: both are weights of log-probabilities.
  entropy_of: str = choice(
    'old',
    ('old', 'current'),
    "Whose entropy psi is made of: 'old' is the policy that sampled (published), 'current' the one "
    'that is updated.',
  )
  # The share is measured in the first mini-batch of a step that has any psi.
  alpha_measure: str = option(
    '',
    "What alpha is adapted to hold: 'entropy' (nats a token), 'norm_share' (norm of psi's gradient "
    "by that of the whole one), 'reflections' (of a response), 'uniform_share' (of groups without "
    "variance), '' keeps alpha.",
  )
  # A measure, not a part of the method: a run may be measured from some step on.
  cosine_every: int = option(
    0,
    'Steps between two measures of the angle between the gradients of psi and of GRPO, which take '
    'two further backward passes of a mini-batch; 0 is never.',
    free=True,
    least=0,
  )
  alpha_target: float = option(0.3, 'Value of alpha_measure that is held.', above=0)
  alpha_rate: float = option(0.1, "Change of alpha's logarithm a step.", above=0)
  alpha_low: float = option(0.01, 'Least alpha.', above=0)
  alpha_high: float = option(1.0, 'Greatest alpha.', above=0)
  top_share: float = option(
    0.2, 'top_entropy: share of the tokens that are trained.', above=0, most=1
  )
  shaping_kappa: float = option(2.0, 'entropy_shaped: |A| / kappa bounds the bonus.', above=1)
  virtual_reward: float = option(
    4.0, "ngrpo: the largest reward there is; toolrl's is 4, that of episodes 3.", least=0
  )
  positive_weight: float = option(0.5, 'positive_weighted: factor of positive advantages.', least=0)
  teacher: str = option(
    '\nreference answer: {reference}',
    "self_distillation: what the teacher's prompt has behind its last message.",
  )
  reward: str = option(
    'toolrl', 'A reward of learn/rewards.py; episodes are rewarded by the state they leave.'
  )
  overlong_buffer: int = option(
    0, 'Tokens before max_tokens over which the reward falls (DAPO); 0 is off.', least=0
  )
  overlong_penalty: float = option(1.0, 'Reward lost at max_tokens.', least=0)
  dynamic_rounds: int = option(
    0,
    "Further rounds of prompts for groups with reward variance (DAPO's dynamic sampling).",
    least=0,
  )
  # DA-GRPO has a use for some of them.
  uniform_share: float = option(
    0.0,
    'Share of a batch that groups without variance may fill under dynamic sampling.',
    least=0,
    most=1,
  )
  learning_rate: float = option(1e-6, 'Learning rate.', least=0)
  warmup_steps: int = option(
    0, 'Rollout batches over which the learning rate rises; DAPO has 10.', least=0
  )
  weight_decay: float = option(0.01, 'Decoupled weight decay.', least=0)
  clip: float = option(1.0, 'Norm that gradients are clipped to; 0 does not clip.', least=0)
  objective: str = option(
    'ppo', "A loss of learn/objectives.py; rl.preset sets what belongs to 'gspo' and 'cispo'."
  )
  clip_low: float = option(0.2, 'Clipping range of the ratio below 1.', least=0)
  clip_high: float = option(0.2, 'Clipping range of the ratio above 1.', least=0)
  dual_clip: float = option(3.0, 'Bound of the loss where the advantage is negative.', above=1)
  cov_share: float = option(0.002, 'Share of the tokens that KL-Cov holds back.', least=0, most=1)
  cov_penalty: float = option(0.1, 'KL coefficient of the tokens that KL-Cov holds back.', least=0)
  # The paper prints 'sequence'; a sequence is one response, also of an episode.
  aggregation: str = option(
    'token', "Weights of tokens: 'token' (as released), 'sequence', or 'dr' (by max_tokens)."
  )
  kl_coefficient: float = option(
    0.001, 'Coefficient of the KL term; 0 needs no reference policy.', least=0
  )
  kl_estimator: str = option('k3', "'k1', 'k2' or 'k3'.")
  uniform_kl: float = option(
    0.0,
    'Coefficient of KL(uniform || policy) in groups of equal rewards; pushes mass to every id.',
    least=0,
  )
  entropy_bonus: float = option(
    0.0,
    'Coefficient of an entropy bonus, exactly -KL(policy || uniform) but for a constant.',
    least=0,
  )
  entropy_bonus_on: str = choice(
    'all', ('all', 'uniform'), "Tokens with the bonus: 'all', or of 'uniform' groups alone."
  )
  # For engines that are not exact, and for fleets.
  importance_cap: float = option(
    0.0, 'Above 0, tokens weigh min(old policy / rollout engine, cap).', least=0
  )
  temperature: float = option(1.0, 'Sampling temperature of rollouts.', least=LEAST_TEMPERATURE)
  max_prompt_tokens: int = option(
    8192, 'Longer prompts (first prompts of episodes) are dropped and counted.', least=1
  )
  max_tokens: int = option(4096, 'Tokens of a response.', least=1)
  capacity: int = option(16384, 'Tokens of a packed row.', least=2)
  rows: int = option(4, 'Packed rows of a micro-batch.', free=True, least=1)
  most_skipped: int = option(
    10,
    'Steps in a row that may be skipped because their gradient is no finite number; one more ends '
    'the run. 0 never does.',
    free=True,
    least=0,
  )
  checkpoint_every: int = option(25, 'Steps between checkpoints.', free=True, least=1)
  fleet: FleetSection = section(FleetSection, 'Servers that make the rollouts.')
