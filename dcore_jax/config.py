"""Every field of a run's config: its type, its default, and what it means.

One frozen dataclass a section, `RunConfig` for the whole. They are the only source of the
defaults, of what is checked (`dcore_jax.overrides`), of what may change between two starts of a
run (`free`), and of what `--help` prints. The defaults are
the paper's values where it has one (docs/method.md, sections 2.4 and 3); `configs/*.py` change
what their model needs.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

STAGES = (
  'evaluate_base',
  'distill',
  'sft',
  'evaluate_sft',
  'rl',
  'evaluate_rl',
  'export',
  'report',
)


# Counts are numbers of 32 bits where arrays are made of them.
_LARGEST_COUNT = 2**31 - 1
# Logits that are divided by less overflow, and 0/0 in one lane would end the engine.
_LEAST_TEMPERATURE = 1e-5


@dataclasses.dataclass(frozen=True)
class Range:
  """The numbers that a field may hold; all of them are finite.

  Attributes:
    least: the smallest.
    most: the largest.
    above: all are larger than this.
    also: further values, which stand for something else than a number.
  """

  least: float | None = None
  most: float | None = None
  above: float | None = None
  also: tuple[float, ...] = ()

  def problem(self, value: float) -> str:
    """Returns what a value must be, or '' where it is allowed."""
    if not math.isfinite(value):
      return 'must be finite'
    if value in self.also:
      return ''
    if self.most is None and isinstance(value, int) and value > _LARGEST_COUNT:
      return f'must be at most {_LARGEST_COUNT}'
    held = self.least is None or value >= self.least
    held &= self.most is None or value <= self.most
    held &= self.above is None or value > self.above
    return '' if held else 'must be ' + self._words()

  def _words(self) -> str:
    if self.least is not None and self.most is not None:
      words = f'in {self.least}..{self.most}'
    elif self.most is not None:
      words = f'above {self.above} and at most {self.most}'
    elif self.least is not None:
      words = f'at least {self.least}'
    else:
      words = f'above {self.above}'
    return ' or '.join([words, *(f'{value}' for value in self.also)])


def _option(default: Any, doc: str, *, free: bool = False, **limits: Any) -> Any:
  """A field of a section.

  Args:
    default: its default.
    doc: what it means, in units.
    free: whether it may change between two starts of a run, since it says where or how fast
      something is done and not what: results do not depend on it, but for the order of sums.
    **limits: fields of `Range`, for a number or a mapping to numbers.
  """
  metadata = {'doc': doc, 'free': free, 'range': Range(**limits)}
  if isinstance(default, dict):
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


def _choice(default: str, choices: tuple[str, ...], doc: str) -> Any:
  """A field that holds one of a few texts, checked before anything is run."""
  return dataclasses.field(
    default=default, metadata={'doc': doc, 'free': False, 'choices': choices}
  )


def _presets(known: Mapping[str, Mapping[str, Any]], doc: str) -> Any:
  """A field that names a set of values for other fields of its section; '' is none."""
  metadata = {'doc': doc, 'free': False, 'presets': known}
  return dataclasses.field(default='', metadata=metadata)


def _section(kind: type, doc: str, *, free: bool = False) -> Any:
  """A field that holds another section; `free` is of all that is in it."""
  return dataclasses.field(default_factory=kind, metadata={'doc': doc, 'free': free})


@dataclasses.dataclass(frozen=True)
class ModelSection:
  """Which model is trained: without `path` and `init` the organism inside the package."""

  path: str = _option('', "Hugging Face directory; '' is the organism inside the package.")
  tokenizer: str = _option(
    '', "Directory of the tokenizer; '' is the model's own. Looked up under the data folder too."
  )
  preset: str = _option(
    '', 'Name in models/presets.py: what `path` must hold, and what a plan takes it to hold.'
  )
  init: Mapping[str, Any] = _option(
    {}, 'A config.json to initialise at random instead of loading `path`.'
  )


@dataclasses.dataclass(frozen=True)
class ExecutionSection:
  """How training passes run. What they compute does not depend on it."""

  attention: str = _option('auto', "'auto', or the name of an attention of packed rows.")
  # Accelerators round the operands of float32 products unless JAX_DEFAULT_MATMUL_PRECISION=highest.
  compute: str = _option(
    'auto',
    "'bfloat16', 'float32', or 'auto': bfloat16 on accelerators. Parameters and moments stay "
    'float32.',
  )
  remat: str = _option(
    'none',
    "What the backward pass recomputes: 'none', 'full' (each layer), 'attention' or 'dots'.",
    free=True,
  )
  offload: tuple[str, ...] = _option(
    (),
    "Of 'optimizer' and 'reference', what lies in host memory while it is idle; accelerators only.",
    free=True,
  )
  unroll: bool = _option(
    True,
    'Without remat, compile layer by layer: faster on a CPU, too much code for deep models.',
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class MeshSection:
  """How the devices of all hosts are divided: data x fsdp x tensor. -1 is what the others leave."""

  data: int = _option(1, 'Copies of the parameters.', free=True, least=1, also=(-1,))
  fsdp: int = _option(
    -1, 'Ways that parameters are split, and with them the rows.', free=True, least=1, also=(-1,)
  )
  tensor: int = _option(
    1, 'Ways that heads, ffn and vocabulary are split.', free=True, least=1, also=(-1,)
  )


@dataclasses.dataclass(frozen=True)
class WorldSection:
  """The world whose tasks are evaluated, distilled and acted out; see worlds/registry.py."""

  name: str = _option('toolworld', 'A registered world.')
  max_subtasks: int = _option(4, 'Subtasks of a ToolWorld task at most, 2 to 5.', least=1)
  options: Mapping[str, Any] = _option({}, "Options of another world than ToolWorld's.")


@dataclasses.dataclass(frozen=True)
class EngineSection:
  """The rollout engine."""

  lanes: int = _option(64, 'Rollouts in flight.', free=True, least=1)
  max_len: int = _option(1024, 'Tokens of prompt and response together.', least=2)
  max_new: int = _option(0, 'Tokens of a response; 0 is max_len.', least=0)
  # Episodes share their first prompt alone, so that their rollouts need a trunk each.
  trunks: int = _option(
    0,
    'Prompts held at once where rollouts come in groups, but for episodes; 0 is one a lane.',
    free=True,
    least=0,
  )
  steps_per_call: int = _option(
    16, 'Passes of the engine between two looks of the host.', free=True, least=1
  )
  # What is drawn does not depend on it; a pass of other rows adds up in another order.
  guesses: int = _option(
    15,
    'Tokens of a rollout that are guessed ahead at most; 0 is none.',
    free=True,
    least=0,
    most=63,
  )
  cache_dtype: str = _choice(
    '',
    ('', 'int8'),
    'Keys and values: as the weights, or int8 with a scale for each slot and head.',
  )
  tensor: int = _option(
    0,
    'Ways that the engine splits heads, ffn and vocabulary; 0 is as in training.',
    free=True,
    least=0,
  )


@dataclasses.dataclass(frozen=True)
class EvaluateSection:
  """Held-out tasks, acted out before, between and after the training stages."""

  tasks: int = _option(128, 'Tasks of each kind.', least=1)
  temperature: float = _option(
    0.6,
    "Qwen3's recommendation for thinking; 0 takes the likeliest token.",
    least=_LEAST_TEMPERATURE,
    also=(0,),
  )
  max_tokens: int = _option(512, 'Tokens of a response.', least=1)


@dataclasses.dataclass(frozen=True)
class LabelsSection:
  """Pseudo-labels, where distill.reference is 'pseudo'."""

  samples: int = _option(5, 'Solutions whose majority is the label.', least=1)
  base_url: str = _option(
    '', "An endpoint that labels; '' is the distilling model itself.", free=True
  )
  model: str = _option('', 'Name of the model at the endpoint.')
  prompt_price: float = _option(
    0.0, 'Price of a million prompt tokens there; 0 is not known.', free=True, least=0
  )
  completion_price: float = _option(
    0.0, 'Price of a million completion tokens there; 0 is not known.', free=True, least=0
  )


@dataclasses.dataclass(frozen=True)
class DistillSection:
  """Self-distillation: decompose, solve, compose, verify (D-CORE, algorithm 1)."""

  tasks: Mapping[str, int] = _option(
    {'single': 150, 'sequential': 250, 'parallel': 300, 'irrelevant': 150, 'multi_turn': 120},
    'Training tasks of the world, by kind, whose turns are the seeds.',
    least=0,
  )
  files: tuple[str, ...] = _option(
    (), "Seed files (`experiments.seeds` writes them) instead of the world's tasks."
  )
  unreadable: str = _choice(
    'error',
    ('error', 'drop'),
    "Records of files that are no seeds: 'error', or 'drop' (counted and logged).",
  )
  # For worlds whose refusals are canonical.
  exact_refusals: bool = _option(
    False, 'Drop irrelevant seeds whose refusal is not the reference text.'
  )
  wording: str = _option(
    'english', "Prompts and templates: 'english', 'organism', or a JSON file (distill/wording.py)."
  )
  reference: str = _choice(
    'shown',
    ('shown', 'hidden', 'pseudo'),
    "Calls that the decomposer sees: 'shown', 'hidden', or 'pseudo' (majority labels).",
  )
  examples: int = _option(3, 'Worked decompositions in the prompt.', least=0)
  strict_count: bool = _option(
    False, 'As many subtasks as calls, as in the released code; else a subtask may own several.'
  )
  candidates: int = _option(
    1, 'Decompositions sampled at once; the first that verifies is kept.', least=1
  )
  samples: int = _option(1, 'Samples of a subtask until its calls are right.', least=1)
  # The released code repeats a failed request once.
  retries: int = _option(1, 'Repetitions of completions that cannot be read.', least=0)
  verify: str = _choice(
    'calls',
    ('calls', 'state'),
    "'calls', or 'state': whatever leaves the same state, where a world executes calls.",
  )
  max_chars: int = _option(200_000, 'Characters of a row.', least=1)
  temperature: float = _option(
    0.6,
    'Sampling temperature; 0 takes the likeliest token.',
    least=_LEAST_TEMPERATURE,
    also=(0,),
  )
  top_p: float = _option(
    1.0, 'Nucleus of the sampled distribution; 1 is all of it.', above=0, most=1
  )
  top_k: int = _option(0, 'Tokens sampled among; 0 is all.', least=0)
  max_tokens: int = _option(256, 'Tokens of a response.', least=1)
  shard_seeds: int = _option(1000, 'Seeds of one file of rows.', least=1)
  labels: LabelsSection = _section(LabelsSection, 'Pseudo-labels.')
  backend: str = _choice(
    'local', ('local', 'openai'), "'local' is our engine, 'openai' an endpoint."
  )
  base_url: str = _option(
    '', "The endpoint's address; its key is read from OPENAI_API_KEY.", free=True
  )
  model: str = _option('', 'Name of the model at the endpoint.')
  prompt_price: float = _option(
    0.0,
    'Price of a million prompt tokens there, for the cost in distill.json; 0 is not known.',
    free=True,
    least=0,
  )
  completion_price: float = _option(
    0.0, 'Price of a million completion tokens there; 0 is not known.', free=True, least=0
  )
  concurrency: int = _option(64, 'Requests under way at the endpoint.', free=True, least=1)
  timeout: float = _option(
    600.0, 'Seconds that the endpoint has for a request.', free=True, above=0
  )
  request_retries: int = _option(
    5, 'Repetitions of a request that failed at the endpoint.', free=True, least=0
  )


@dataclasses.dataclass(frozen=True)
class SftSection:
  """Supervised fine-tuning on packed rows."""

  # `schema:` stands before a name where the schema is not to be guessed from a row's fields.
  files: tuple[str, ...] = _option(
    (), 'Data sets instead of the distilled rows: [schema:]PATH or owner/name[#configuration].'
  )
  call_style: str = _choice(
    'python',
    ('python', 'hermes'),
    "How calls are written that rows hold as data: 'python' or 'hermes' (JSON in tags).",
  )
  unreadable: str = _choice(
    'error', ('error', 'drop'), "Rows that cannot be read: 'error', or 'drop' (counted and logged)."
  )
  max_rows: int = _option(0, 'Rows used, the first ones; 0 is all.', least=0)
  # D-CORE's own rows are split already.
  split_turns: bool = _option(
    False, 'A row for every assistant message, earlier ones without their thoughts.'
  )
  system_prompt: str = _option('', "System message of rows that have none; '' adds none.")
  stock_system_prompts: tuple[str, ...] = _option(
    (), 'System messages that system_prompt replaces.'
  )
  loss_mask: str = _choice(
    'final',
    ('final', 'final+structure', 'all_assistant'),
    "'final' (paper), 'final+structure' (released code) or 'all_assistant'.",
  )
  overlong: str = _choice(
    'drop',
    ('drop', 'error'),
    "Rows longer than capacity: 'drop' (counted and logged) or 'error'; never truncated.",
  )
  epochs: int = _option(3, 'Passes over the rows.', least=1)
  capacity: int = _option(16384, 'Tokens of a packed row.', least=2)
  rows: int = _option(16, 'Packed rows a step.', least=1)
  accumulate: int = _option(
    1, 'Micro-batches that the rows of a step are split into.', free=True, least=1
  )
  optimizer: str = _option(
    'adamw', "'adamw', 'muon', or 'muon_nadam', which the organism was made with."
  )
  learning_rate: float = _option(1e-5, 'Peak learning rate.', least=0)
  adam_learning_rate: float = _option(
    0.0, 'Peak learning rate of the embedding and norms under Muon.', least=0
  )
  warmup: float = _option(
    0.05, 'Share of the steps over which the learning rate rises.', least=0, most=1
  )
  floor: float = _option(
    0.01, 'Share of the peak learning rate that is left at the end.', least=0, most=1
  )
  weight_decay: float = _option(0.0, 'Decoupled weight decay.', least=0)
  clip: float = _option(1.0, 'Norm that gradients are clipped to; 0 does not clip.', least=0)
  checkpoint_every: int = _option(100, 'Steps between checkpoints.', free=True, least=1)


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
class RlSection:
  """Reinforcement learning: rollouts, rewards, advantages, updates."""

  preset: str = _presets(
    RL_PRESETS,
    "'dapo', 'gspo', 'dr_grpo', 'cispo' or 'kl_cov': sets what belongs to that method "
    '(RL_PRESETS) wherever the config does not.',
  )
  files: tuple[str, ...] = _option(
    (),
    "Data sets to ask about instead of the world's decision points: ToolRL rows, or messages, "
    'tools and reference calls.',
  )
  unreadable: str = _choice(
    'error', ('error', 'drop'), "Rows that cannot be read: 'error', or 'drop' (counted and logged)."
  )
  tasks: Mapping[str, int] = _option(
    {'single': 60, 'sequential': 120, 'parallel': 120, 'irrelevant': 60, 'multi_turn': 40},
    'Training tasks of the world, by kind.',
    least=0,
  )
  seed: int = _option(
    0,
    "Seed of prompt order and sampling, beside the run's own: the repetitions of a sweep.",
    least=0,
  )
  steps: int = _option(468, 'Rollout batches; 468 is 5,000 prompts / 32 x 3 epochs.', least=0)
  prompts: int = _option(32, 'Prompts a step.', least=1)
  episodes: bool = _option(
    False, 'Act whole tasks of the world out and reward the state they leave.'
  )
  group: int = _option(8, 'Rollouts of a prompt.', least=1)
  wave: int = _option(
    32,
    'Prompts sampled and written down together: a kill loses the rollouts of one wave at most.',
    free=True,
    least=1,
  )
  validation: int = _option(
    32,
    'Prompts set aside at most, in whole tasks; measured before, after, at each checkpoint.',
    least=0,
  )
  updates: int = _option(4, 'Optimizer steps a rollout batch.', least=1)
  estimator: str = _option('da_grpo', 'An advantage estimator of learn/advantages.py.')
  alpha: float = _option(0.1, 'Weight of the entropy advantage psi (D-CORE, eq. 6).', least=0)
  delta: float = _option(0.5, 'Bound of the entropy advantage (D-CORE, eq. 6), nats.', least=0)
  zero_test: str = _option(
    'group', "Where psi acts: 'group', 'token' (released code), or 'below' (eq. 6 to the letter)."
  )
  psi_multiplier: float = _option(1.0, 'Factor of psi; the released code has 2.', least=0)
  psi_when_wrong: str = _option(
    'reinforce',
    "For uniform groups whose reward is not above right_above: 'reinforce', 'ignore' or 'punish'.",
  )
  right_above: float = _option(0.0, 'Reward above which a uniform group counts as right.')
  psi_words: tuple[str, ...] = _option(
    (), 'Words on whose tokens alone psi acts; () is all tokens.'
  )
  # The share is measured in the first mini-batch of a step that has any psi.
  alpha_measure: str = _option(
    '',
    "What alpha is adapted to hold: 'entropy' (nats a token), 'psi_share' (psi's part of the "
    "gradient norm), '' keeps alpha.",
  )
  alpha_target: float = _option(0.3, 'Value of alpha_measure that is held.', above=0)
  alpha_rate: float = _option(0.1, "Change of alpha's logarithm a step.", above=0)
  alpha_low: float = _option(0.01, 'Least alpha.', above=0)
  alpha_high: float = _option(1.0, 'Greatest alpha.', above=0)
  reward: str = _option(
    'toolrl', 'A reward of learn/rewards.py; episodes are rewarded by the state they leave.'
  )
  overlong_buffer: int = _option(
    0, 'Tokens before max_tokens over which the reward falls (DAPO); 0 is off.', least=0
  )
  overlong_penalty: float = _option(1.0, 'Reward lost at max_tokens.', least=0)
  dynamic_rounds: int = _option(
    0,
    "Further rounds of prompts for groups with reward variance (DAPO's dynamic sampling).",
    least=0,
  )
  # DA-GRPO has a use for some of them.
  uniform_share: float = _option(
    0.0,
    'Share of a batch that groups without variance may fill under dynamic sampling.',
    least=0,
    most=1,
  )
  learning_rate: float = _option(1e-6, 'Learning rate.', least=0)
  warmup_steps: int = _option(
    0, 'Rollout batches over which the learning rate rises; DAPO has 10.', least=0
  )
  weight_decay: float = _option(0.01, 'Decoupled weight decay.', least=0)
  clip: float = _option(1.0, 'Norm that gradients are clipped to; 0 does not clip.', least=0)
  objective: str = _option(
    'ppo', "A loss of learn/objectives.py; rl.preset sets what belongs to 'gspo' and 'cispo'."
  )
  clip_low: float = _option(0.2, 'Clipping range of the ratio below 1.', least=0)
  clip_high: float = _option(0.2, 'Clipping range of the ratio above 1.', least=0)
  dual_clip: float = _option(3.0, 'Bound of the loss where the advantage is negative.', above=1)
  cov_share: float = _option(0.002, 'Share of the tokens that KL-Cov holds back.', least=0, most=1)
  cov_penalty: float = _option(0.1, 'KL coefficient of the tokens that KL-Cov holds back.', least=0)
  # The paper prints 'sequence'; a sequence is one response, also of an episode.
  aggregation: str = _option(
    'token', "Weights of tokens: 'token' (as released), 'sequence', or 'dr' (by max_tokens)."
  )
  kl_coefficient: float = _option(
    0.001, 'Coefficient of the KL term; 0 needs no reference policy.', least=0
  )
  kl_estimator: str = _option('k3', "'k1', 'k2' or 'k3'.")
  uniform_kl: float = _option(
    0.0, 'Coefficient of KL(uniform || policy) in groups of equal rewards.', least=0
  )
  # For engines that are not exact.
  importance_cap: float = _option(
    0.0, 'Above 0, tokens weigh min(old policy / rollout engine, cap).', least=0
  )
  temperature: float = _option(1.0, 'Sampling temperature of rollouts.', least=_LEAST_TEMPERATURE)
  max_prompt_tokens: int = _option(
    8192, 'Longer prompts (first prompts of episodes) are dropped and counted.', least=1
  )
  max_tokens: int = _option(4096, 'Tokens of a response.', least=1)
  capacity: int = _option(16384, 'Tokens of a packed row.', least=2)
  rows: int = _option(4, 'Packed rows of a micro-batch.', free=True, least=1)
  checkpoint_every: int = _option(25, 'Steps between checkpoints.', free=True, least=1)


@dataclasses.dataclass(frozen=True)
class ExportSection:
  """The final Hugging Face directory."""

  dtype: str = _choice('bfloat16', ('bfloat16', 'float32'), "'bfloat16' or 'float32'.")


@dataclasses.dataclass(frozen=True)
class ReportSection:
  """report.html."""

  traces: int = _option(3, 'Tasks shown side by side, before and after.', least=0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A whole run."""

  name: str = _option('unnamed', 'Shown in the report.', free=True)
  seed: int = _option(0, 'Seed of everything that is drawn.', least=0, most=2**32 - 1)
  stages: tuple[str, ...] = _option(STAGES, 'Stages that are run, always in this order.', free=True)
  model: ModelSection = _section(ModelSection, 'The model that is trained.')
  execution: ExecutionSection = _section(ExecutionSection, 'How training passes run.')
  mesh: MeshSection = _section(MeshSection, 'How devices are divided.')
  world: WorldSection = _section(WorldSection, 'Where tasks come from.')
  engine: EngineSection = _section(EngineSection, 'The rollout engine.')
  evaluate: EvaluateSection = _section(EvaluateSection, 'Measurements on held-out tasks.')
  distill: DistillSection = _section(DistillSection, 'Self-distillation.')
  sft: SftSection = _section(SftSection, 'Supervised fine-tuning.')
  rl: RlSection = _section(RlSection, 'Reinforcement learning.')
  export: ExportSection = _section(ExportSection, 'The exported checkpoint.')
  report: ReportSection = _section(ReportSection, 'The report.', free=True)
