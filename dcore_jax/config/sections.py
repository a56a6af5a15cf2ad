"""The sections of a config but for `rl`, and the config as a whole."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dcore_jax.config.fields import LEAST_TEMPERATURE, choice, option, section
from dcore_jax.config.rl import RlSection

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


@dataclasses.dataclass(frozen=True)
class ModelSection:
  """Which model is trained: without `path` and `init` the organism inside the package."""

  path: str = option(
    '',
    "Hugging Face directory, or 'owner/name[@revision]' on the hub; '' is the organism inside the "
    'package.',
  )
  tokenizer: str = option(
    '', "Directory of the tokenizer; '' is the model's own. Looked up under the data folder too."
  )
  preset: str = option(
    '', 'Name in models/presets.py: what `path` must hold, and what a plan takes it to hold.'
  )
  init: Mapping[str, Any] = option(
    {}, 'A config.json to initialise at random instead of loading `path`.'
  )


@dataclasses.dataclass(frozen=True)
class ExecutionSection:
  """How training passes run. What they compute does not depend on it."""

  attention: str = option('auto', "'auto', or the name of an attention of packed rows.")
  # Accelerators round the operands of float32 products unless JAX_DEFAULT_MATMUL_PRECISION=highest.
  compute: str = option(
    'auto',
    "'bfloat16', 'float32', or 'auto': bfloat16 on accelerators. Parameters and moments stay "
    'float32.',
  )
  remat: str = option(
    'none',
    "What the backward pass recomputes: 'none', 'full' (each layer), 'attention' or 'dots'.",
    free=True,
  )
  offload: tuple[str, ...] = option(
    (),
    "Of 'optimizer' and 'reference', what lies in host memory while it is idle; accelerators only.",
    free=True,
  )
  unroll: bool = option(
    True,
    'Without remat, compile layer by layer: faster on a CPU, too much code for deep models.',
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class LoraSection:
  """Adapters that SFT and RL train instead of the parameters; there is no dropout."""

  rank: int = option(0, 'Rank of the adapters; 0 trains all parameters.', least=0)
  alpha: float = option(32.0, "The adapters' products count alpha / rank times.", above=0)
  targets: tuple[str, ...] = option(
    ('q', 'k', 'v', 'o', 'gate', 'up', 'down'), 'Matrices of a layer that have adapters.'
  )
  rollouts: str = choice(
    'merged',
    ('merged', 'unmerged'),
    "Weights of rollouts in RL: 'merged' (a copy of the model), or 'unmerged' (no copy, slower).",
  )


@dataclasses.dataclass(frozen=True)
class MeshSection:
  """How the devices of all hosts are divided: data x fsdp x tensor. -1 is what the others leave."""

  data: int = option(1, 'Copies of the parameters.', free=True, least=1, also=(-1,))
  fsdp: int = option(
    -1, 'Ways that parameters are split, and with them the rows.', free=True, least=1, also=(-1,)
  )
  tensor: int = option(
    1, 'Ways that heads, ffn and vocabulary are split.', free=True, least=1, also=(-1,)
  )


@dataclasses.dataclass(frozen=True)
class WorldSection:
  """The world whose tasks are evaluated, distilled and acted out; see worlds/registry.py."""

  name: str = option('toolworld', 'A registered world.')
  max_subtasks: int = option(4, 'Subtasks of a ToolWorld task at most, 2 to 5.', least=1)
  options: Mapping[str, Any] = option({}, "Options of another world than ToolWorld's.")


@dataclasses.dataclass(frozen=True)
class EngineSection:
  """The rollout engine."""

  lanes: int = option(64, 'Rollouts in flight.', free=True, least=1)
  max_len: int = option(1024, 'Tokens of prompt and response together.', least=2)
  max_new: int = option(0, 'Tokens of a response; 0 is max_len.', least=0)
  # Episodes share their first prompt alone, so that their rollouts need a trunk each.
  trunks: int = option(
    0,
    'Prompts held at once where rollouts come in groups, but for episodes; 0 is one a lane.',
    free=True,
    least=0,
  )
  steps_per_call: int = option(
    16, 'Passes of the engine between two looks of the host.', free=True, least=1
  )
  # What is drawn does not depend on it; a pass of other rows adds up in another order.
  guesses: int = option(
    15,
    'Tokens of a rollout that are guessed ahead at most; 0 is none.',
    free=True,
    least=0,
    most=63,
  )
  cache_dtype: str = choice(
    '',
    ('', 'int8'),
    'Keys and values: as the weights, or int8 with a scale for each slot and head.',
  )
  tensor: int = option(
    0,
    'Ways that the engine splits heads, ffn and vocabulary; 0 is as in training.',
    free=True,
    least=0,
  )
  # A pass over the devices of several hosts waits for the network in every layer.
  apart: bool = option(
    True,
    'Whether each of several hosts makes its share of the rollouts on its own devices, which must '
    'hold the model; else one engine is split over the devices of all.',
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class EvaluateSection:
  """Held-out tasks, acted out before, between and after the training stages."""

  tasks: int = option(128, 'Tasks of each kind.', least=1)
  temperature: float = option(
    0.6,
    "Qwen3's recommendation for thinking; 0 takes the likeliest token.",
    least=LEAST_TEMPERATURE,
    also=(0,),
  )
  max_tokens: int = option(512, 'Tokens of a response.', least=1)
  suites: tuple[str, ...] = option(
    ('world',),
    "What is measured: 'world' (the tasks of section world), 'prompts' (those that rl.validation "
    'sets aside), and suites by name (docs/guides).',
  )
  limit: int = option(
    0, 'Takes the first so many tasks of each category of a suite; 0: all.', least=0
  )
  suite_options: str = option(
    '', "Options of suites, 'SUITE.OPTION=VALUE' with commas between them."
  )
  published: Mapping[str, float] = option(
    {},
    "Figures that others have published, 'SUITE/CATEGORY' or 'SUITE/CATEGORY/METRIC' -> value: "
    'shown beside what is measured.',
    free=True,
  )


@dataclasses.dataclass(frozen=True)
class RecipeSection:
  """Named data for distillation and reinforcement learning; see data/recipe.py for an entry."""

  seeds: Mapping[str, Any] = option(
    {}, "Sources of the seeds of stage distill, instead of the world's tasks: name -> entry."
  )
  prompts: Mapping[str, Any] = option(
    {}, "Sources of the prompts of stage rl, instead of the world's tasks: name -> entry."
  )
  allow_unchecked: bool = option(
    False, 'Go on where a test is missing that the data is to be compared with.'
  )


@dataclasses.dataclass(frozen=True)
class LabelsSection:
  """Pseudo-labels, where distill.reference is 'pseudo'."""

  samples: int = option(5, 'Solutions whose majority is the label.', least=1)
  base_url: str = option(
    '', "An endpoint that labels; '' is the distilling model itself.", free=True
  )
  model: str = option('', 'Name of the model at the endpoint.')
  prompt_price: float = option(
    0.0, 'Price of a million prompt tokens there; 0 is not known.', free=True, least=0
  )
  completion_price: float = option(
    0.0, 'Price of a million completion tokens there; 0 is not known.', free=True, least=0
  )


@dataclasses.dataclass(frozen=True)
class DistillSection:
  """Self-distillation: decompose, solve, compose, verify (D-CORE, algorithm 1)."""

  tasks: Mapping[str, int] = option(
    {'single': 150, 'sequential': 250, 'parallel': 300, 'irrelevant': 150, 'multi_turn': 120},
    'Training tasks of the world, by kind, whose turns are the seeds.',
    least=0,
  )
  files: tuple[str, ...] = option(
    (), "Seed files (`experiments.seeds` writes them) instead of the world's tasks."
  )
  unreadable: str = choice(
    'error',
    ('error', 'drop'),
    "Records of files that are no seeds: 'error', or 'drop' (counted and logged).",
  )
  # For worlds whose refusals are canonical.
  exact_refusals: bool = option(
    False, 'Drop irrelevant seeds whose refusal is not the reference text.'
  )
  wording: str = option(
    'english', "Prompts and templates: 'english', 'organism', or a JSON file (distill/wording.py)."
  )
  reference: str = choice(
    'shown',
    ('shown', 'hidden', 'pseudo'),
    "Calls that the decomposer sees: 'shown', 'hidden', or 'pseudo' (majority labels).",
  )
  examples: int = option(3, 'Worked decompositions in the prompt.', least=0)
  strict_count: bool = option(
    False, 'As many subtasks as calls, as in the released code; else a subtask may own several.'
  )
  candidates: int = option(
    1, 'Decompositions sampled at once; the first that verifies is kept.', least=1
  )
  samples: int = option(1, 'Samples of a subtask until its calls are right.', least=1)
  # The released code repeats a failed request once.
  retries: int = option(1, 'Repetitions of completions that cannot be read.', least=0)
  verify: str = choice(
    'calls',
    ('calls', 'state'),
    "'calls', or 'state': whatever leaves the same state, where a world executes calls.",
  )
  max_chars: int = option(200_000, 'Characters of a row.', least=1)
  temperature: float = option(
    0.6,
    'Sampling temperature; 0 takes the likeliest token.',
    least=LEAST_TEMPERATURE,
    also=(0,),
  )
  top_p: float = option(
    1.0, 'Nucleus of the sampled distribution; 1 is all of it.', above=0, most=1
  )
  top_k: int = option(0, 'Tokens sampled among; 0 is all.', least=0)
  max_tokens: int = option(256, 'Tokens of a response.', least=1)
  shard_seeds: int = option(1000, 'Seeds of one file of rows.', least=1)
  labels: LabelsSection = section(LabelsSection, 'Pseudo-labels.')
  backend: str = choice(
    'local',
    ('local', 'openai', 'scripted'),
    "'local' is our engine, 'openai' an endpoint, 'scripted' copies the references, to try a run.",
  )
  base_url: str = option(
    '', "The endpoint's address; its key is read from OPENAI_API_KEY.", free=True
  )
  model: str = option('', 'Name of the model at the endpoint.')
  prompt_price: float = option(
    0.0,
    'Price of a million prompt tokens there, for the cost in distill.json; 0 is not known.',
    free=True,
    least=0,
  )
  completion_price: float = option(
    0.0, 'Price of a million completion tokens there; 0 is not known.', free=True, least=0
  )
  concurrency: int = option(64, 'Requests under way at the endpoint.', free=True, least=1)
  timeout: float = option(600.0, 'Seconds that the endpoint has for a request.', free=True, above=0)
  request_retries: int = option(
    5, 'Repetitions of a request that failed at the endpoint.', free=True, least=0
  )


@dataclasses.dataclass(frozen=True)
class SftSection:
  """Supervised fine-tuning on packed rows."""

  # `schema:` stands before a name where the schema is not to be guessed from a row's fields.
  files: tuple[str, ...] = option(
    (),
    'Data sets instead of the distilled rows: [schema:]PATH or owner/name[@revision][#part].',
  )
  call_style: str = choice(
    'python',
    ('python', 'hermes'),
    "How calls are written that rows hold as data: 'python' or 'hermes' (JSON in tags).",
  )
  unreadable: str = choice(
    'error', ('error', 'drop'), "Rows that cannot be read: 'error', or 'drop' (counted and logged)."
  )
  max_rows: int = option(0, 'Rows used, the first ones; 0 is all.', least=0)
  # Where SFT and RL read the same data set, a prompt that is measured must be new to both.
  hold_out: bool = option(
    False, 'Leave out the rows of tasks that rl.validation sets aside, counted.'
  )
  # D-CORE's own rows are split already.
  split_turns: bool = option(
    False, 'A row for every assistant message, earlier ones without their thoughts.'
  )
  system_prompt: str = option('', "System message of rows that have none; '' adds none.")
  stock_system_prompts: tuple[str, ...] = option((), 'System messages that system_prompt replaces.')
  loss_mask: str = choice(
    'final',
    ('final', 'final+structure', 'all_assistant'),
    "'final' (paper), 'final+structure' (released code) or 'all_assistant'.",
  )
  overlong: str = choice(
    'drop',
    ('drop', 'error'),
    "Rows longer than capacity: 'drop' (counted and logged) or 'error'; never truncated.",
  )
  epochs: int = option(3, 'Passes over the rows.', least=1)
  capacity: int = option(16384, 'Tokens of a packed row.', least=2)
  rows: int = option(16, 'Packed rows a step.', least=1)
  accumulate: int = option(
    1, 'Micro-batches that the rows of a step are split into.', free=True, least=1
  )
  optimizer: str = option(
    'adamw', "'adamw', 'muon', or 'muon_nadam', which the organism was made with."
  )
  learning_rate: float = option(1e-5, 'Peak learning rate.', least=0)
  adam_learning_rate: float = option(
    0.0, 'Peak learning rate of the embedding and norms under Muon.', least=0
  )
  warmup: float = option(
    0.05, 'Share of the steps over which the learning rate rises.', least=0, most=1
  )
  floor: float = option(
    0.01, 'Share of the peak learning rate that is left at the end.', least=0, most=1
  )
  weight_decay: float = option(0.0, 'Decoupled weight decay.', least=0)
  clip: float = option(1.0, 'Norm that gradients are clipped to; 0 does not clip.', least=0)
  most_skipped: int = option(
    10,
    'Steps in a row that may be skipped because their gradient is no finite number; one more ends '
    'the run. 0 never does.',
    free=True,
    least=0,
  )
  checkpoint_every: int = option(100, 'Steps between checkpoints.', free=True, least=1)


@dataclasses.dataclass(frozen=True)
class ExportSection:
  """The final Hugging Face directory."""

  dtype: str = choice('bfloat16', ('bfloat16', 'float32'), "'bfloat16' or 'float32'.")


@dataclasses.dataclass(frozen=True)
class ReportSection:
  """report.html, and where else the numbers of a run go."""

  traces: int = option(3, 'Tasks shown side by side, before and after.', least=0)
  sinks: tuple[str, ...] = option(
    (), "Programs that get the metrics as well: of 'trackio' and 'wandb', optional packages."
  )
  project: str = option('dcore_jax', 'Name of the project there.')


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """A whole run."""

  name: str = option('unnamed', 'Shown in the report.', free=True)
  seed: int = option(0, 'Seed of everything that is drawn.', least=0, most=2**32 - 1)
  stages: tuple[str, ...] = option(STAGES, 'Stages that are run, always in this order.', free=True)
  model: ModelSection = section(ModelSection, 'The model that is trained.')
  execution: ExecutionSection = section(ExecutionSection, 'How training passes run.')
  lora: LoraSection = section(LoraSection, 'Low-rank adapters.')
  mesh: MeshSection = section(MeshSection, 'How devices are divided.')
  world: WorldSection = section(WorldSection, 'Where tasks come from.')
  engine: EngineSection = section(EngineSection, 'The rollout engine.')
  evaluate: EvaluateSection = section(EvaluateSection, 'Measurements on held-out tasks.')
  recipe: RecipeSection = section(RecipeSection, 'Data of distillation and RL, by source.')
  distill: DistillSection = section(DistillSection, 'Self-distillation.')
  sft: SftSection = section(SftSection, 'Supervised fine-tuning.')
  rl: RlSection = section(RlSection, 'Reinforcement learning.')
  export: ExportSection = section(ExportSection, 'The exported checkpoint.')
  report: ReportSection = section(ReportSection, 'The report.', free=True)
