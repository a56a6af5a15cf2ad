"""Every field a pipeline config may have, with its value where a config does not say otherwise.

The values are the paper's where it has one (method: sections 2.4 and 3); `configs/*.py` change what their model needs.
"""
import ml_collections

STAGES = ('evaluate_base', 'distill', 'sft', 'evaluate_sft', 'rl', 'evaluate_rl', 'export', 'report')


def default_config() -> ml_collections.ConfigDict:
  """A fresh, complete config."""
  c = ml_collections.ConfigDict()
  c.name = 'unnamed'  # shown in the report
  c.seed = 0  # of everything that is drawn
  c.stages = STAGES  # which are run, in the order of STAGES

  c.model = ml_collections.ConfigDict()
  c.model.path = ''  # Hugging Face directory; '' = the organism inside the package
  c.model.tokenizer = ''  # directory; '' = the model's own. Relative paths are looked up under the data folder too
  c.model.preset = ''  # name in models/presets.py: what `path` must hold, and what a plan takes it to hold
  c.model.init = ml_collections.ConfigDict()  # a config.json to initialise at random instead of loading `path`

  c.execution = ml_collections.ConfigDict()  # how training passes run; what they compute does not depend on it
  c.execution.attention = 'auto'  # or a name of models/tree_attention.py
  c.execution.compute = 'auto'  # 'bfloat16', 'float32'; auto: bfloat16 on accelerators. Parameters and moments are float32
  c.execution.remat = 'none'  # 'full' recomputes each layer in the backward pass, 'attention' and 'dots' parts of it
  c.execution.offload = ()  # 'optimizer', 'reference': kept in host memory while they are not needed; accelerators only
  c.execution.unroll = True  # without remat, compile layer by layer: faster on a CPU, too much code for deep models

  c.mesh = ml_collections.ConfigDict()  # devices of all hosts = data x fsdp x tensor; -1: what the others leave
  c.mesh.data = 1  # copies of the parameters
  c.mesh.fsdp = -1  # ways that parameters are split, and with them the rows
  c.mesh.tensor = 1  # ways that heads, ffn and vocabulary are split

  c.world = ml_collections.ConfigDict()
  c.world.max_subtasks = 4  # 2 to 5

  c.engine = ml_collections.ConfigDict()
  c.engine.lanes = 64
  c.engine.max_len = 1024  # tokens of prompt and response
  c.engine.max_new = 0  # tokens of a response; 0 = max_len
  c.engine.trunks = 0  # prompts held at once; 0 = lanes
  c.engine.tile = 0  # lanes decoded together; 0 = the engine's choice
  c.engine.steps_per_call = 16
  c.engine.tensor = 0  # ways that the engine splits heads, ffn and vocabulary; 0 = as in training

  c.evaluate = ml_collections.ConfigDict()
  c.evaluate.tasks = 128  # of each kind
  c.evaluate.temperature = 0.6  # Qwen3's recommendation for thinking
  c.evaluate.max_tokens = 512  # of a response

  c.distill = ml_collections.ConfigDict()
  c.distill.tasks = ml_collections.ConfigDict(dict(single=150, sequential=250, parallel=300, irrelevant=150, multi_turn=120))
  c.distill.temperature = 0.6
  c.distill.max_tokens = 256
  c.distill.retries = 1  # of completions that cannot be read; the released code repeats a failed request once

  c.sft = ml_collections.ConfigDict()
  c.sft.files = ()  # data sets instead of the distilled rows: paths, or hub names owner/name[#configuration]; `schema:` before
  #   either where the schema (run.row_schemas) is not to be guessed from a row's fields
  c.sft.call_style = 'python'  # of rows that hold calls as data: 'python' = [f(a=1)], 'hermes' = <tool_call> JSON
  c.sft.unreadable = 'error'  # rows whose calls or tools cannot be read: 'error', or 'drop' (counted and logged)
  c.sft.max_rows = 0  # use only the first so many; 0 = all
  c.sft.split_turns = False  # a row for every assistant message, earlier ones without thoughts; D-CORE's are split already
  c.sft.system_prompt = ''  # of rows without a system message; '' leaves them without
  c.sft.stock_system_prompts = ()  # system messages that system_prompt replaces
  c.sft.loss_mask = 'final'  # what is trained: 'final' (paper), 'final+structure' (released code), 'all_assistant'
  c.sft.overlong = 'drop'  # rows longer than capacity: 'drop' (counted and logged) or 'error'; they are never truncated
  c.sft.epochs = 3
  c.sft.capacity = 16384  # tokens of a packed row
  c.sft.rows = 16  # packed rows a step
  c.sft.accumulate = 1  # micro-batches they are split into
  c.sft.optimizer = 'adamw'
  c.sft.learning_rate = 1e-5
  c.sft.adam_learning_rate = 0.0  # of the embedding and norms under Muon
  c.sft.warmup = 0.05
  c.sft.floor = 0.01
  c.sft.weight_decay = 0.0
  c.sft.clip = 1.0
  c.sft.checkpoint_every = 100  # steps

  c.rl = ml_collections.ConfigDict()
  c.rl.files = ()  # files of ToolRL rows to ask about instead of ToolWorld's decision points
  c.rl.tasks = ml_collections.ConfigDict(dict(single=60, sequential=120, parallel=120, irrelevant=60, multi_turn=40))
  c.rl.seed = 0  # of prompt order and sampling, beside the run's own: the repetitions of a sweep
  c.rl.steps = 468  # 5,000 prompts / 32 x 3 epochs
  c.rl.prompts = 32  # a step
  c.rl.group = 8  # rollouts of a prompt
  c.rl.validation = 32  # prompts set aside, on which the policy is measured before and after
  c.rl.updates = 4  # optimizer steps a rollout batch
  c.rl.estimator = 'da_grpo'
  c.rl.alpha = 0.1
  c.rl.delta = 0.5  # nats
  c.rl.zero_test = 'group'
  c.rl.psi_multiplier = 1.0
  c.rl.reward = 'toolrl'
  c.rl.learning_rate = 1e-6
  c.rl.weight_decay = 0.01
  c.rl.clip = 1.0
  c.rl.clip_low = 0.2
  c.rl.clip_high = 0.2
  c.rl.dual_clip = 3.0
  c.rl.kl_coefficient = 0.001
  c.rl.temperature = 1.0
  c.rl.max_prompt_tokens = 8192  # longer prompts are dropped and counted
  c.rl.max_tokens = 4096
  c.rl.capacity = 16384
  c.rl.rows = 4  # packed rows of a micro-batch
  c.rl.checkpoint_every = 25  # steps

  c.export = ml_collections.ConfigDict()
  c.export.dtype = 'bfloat16'

  c.report = ml_collections.ConfigDict()
  c.report.traces = 3  # shown side by side, before and after
  return c
