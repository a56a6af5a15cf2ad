"""Every field a pipeline config may have, with its value where a config does not say otherwise.

The values are the paper's where it has one (method: sections 2.4 and 3); `configs/*.py` change what their model needs.
"""

import ml_collections

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


def default_config() -> ml_collections.ConfigDict:
  """A fresh, complete config."""
  c = ml_collections.ConfigDict()
  c.name = 'unnamed'  # shown in the report
  c.seed = 0  # of everything that is drawn
  c.stages = STAGES  # which are run, in the order of STAGES

  c.model = ml_collections.ConfigDict()
  c.model.path = ''  # Hugging Face directory; '' = the organism inside the package
  c.model.tokenizer = (
    ''  # directory; '' = the model's own. Relative paths are looked up under the data folder too
  )
  c.model.preset = (
    ''  # name in models/presets.py: what `path` must hold, and what a plan takes it to hold
  )
  c.model.init = (
    ml_collections.ConfigDict()
  )  # a config.json to initialise at random instead of loading `path`

  c.execution = (
    ml_collections.ConfigDict()
  )  # how training passes run; what they compute does not depend on it
  c.execution.attention = 'auto'  # or a name of models/tree_attention.py
  c.execution.compute = 'auto'  # 'bfloat16', 'float32'; auto: bfloat16 on accelerators. Parameters and moments are float32.
  #   Accelerators round operands of float32 products, unless JAX_DEFAULT_MATMUL_PRECISION=highest
  c.execution.remat = (
    'none'  # 'full' recomputes each layer in the backward pass, 'attention' and 'dots' parts of it
  )
  c.execution.offload = ()  # 'optimizer', 'reference': kept in host memory while they are not needed; accelerators only
  c.execution.unroll = (
    True  # without remat, compile layer by layer: faster on a CPU, too much code for deep models
  )

  c.mesh = (
    ml_collections.ConfigDict()
  )  # devices of all hosts = data x fsdp x tensor; -1: what the others leave
  c.mesh.data = 1  # copies of the parameters
  c.mesh.fsdp = -1  # ways that parameters are split, and with them the rows
  c.mesh.tensor = 1  # ways that heads, ffn and vocabulary are split

  c.world = ml_collections.ConfigDict()
  c.world.max_subtasks = 4  # 2 to 5

  c.engine = ml_collections.ConfigDict()
  c.engine.lanes = 64
  c.engine.max_len = 1024  # tokens of prompt and response
  c.engine.max_new = 0  # tokens of a response; 0 = max_len
  c.engine.trunks = 0  # prompts held at once where their rollouts come in groups (not of episodes); 0, and elsewhere: lanes
  c.engine.tile = 0  # lanes decoded together; 0 = the engine's choice
  c.engine.steps_per_call = 16
  c.engine.tensor = 0  # ways that the engine splits heads, ffn and vocabulary; 0 = as in training

  c.evaluate = ml_collections.ConfigDict()
  c.evaluate.tasks = 128  # of each kind
  c.evaluate.temperature = 0.6  # Qwen3's recommendation for thinking
  c.evaluate.max_tokens = 512  # of a response

  c.distill = ml_collections.ConfigDict()
  c.distill.tasks = ml_collections.ConfigDict(
    dict(single=150, sequential=250, parallel=300, irrelevant=150, multi_turn=120)
  )
  c.distill.files = ()  # seeds (`experiments.seeds` writes them) instead of ToolWorld's tasks
  c.distill.exact_refusals = False  # drop irrelevant seeds whose refusal is not the reference text: where those are canonical
  c.distill.wording = (
    'english'  # prompts and templates: 'english', 'organism', or a JSON file (distill/wording.py)
  )
  c.distill.reference = 'shown'  # calls that the decomposer sees: 'shown', 'hidden', or 'pseudo' = the model's own by majority
  c.distill.examples = 3  # worked decompositions in its prompt; paper: reference and examples
  c.distill.strict_count = (
    False  # as many subtasks as calls, as released; else a subtask may own several calls
  )
  c.distill.candidates = 1  # decompositions sampled at once; the first that verifies is kept
  c.distill.samples = 1  # of a subtask, until its calls are right
  c.distill.retries = (
    1  # of completions that cannot be read; the released code repeats a failed request once
  )
  c.distill.verify = (
    'calls'  # 'state': whatever leaves the same state, where a world executes calls
  )
  c.distill.max_chars = 200_000  # of a row
  c.distill.temperature = 0.6
  c.distill.top_p = 1.0
  c.distill.top_k = 0
  c.distill.max_tokens = 256
  c.distill.shard_seeds = 1000  # seeds of a file of rows
  c.distill.labels = ml_collections.ConfigDict()  # where reference = 'pseudo'
  c.distill.labels.samples = 5  # whose majority is the label
  c.distill.labels.base_url = ''  # an endpoint that labels; '' = the distilling model itself
  c.distill.labels.model = ''  # its name there
  c.distill.labels.prompt_price = 0.0  # as below
  c.distill.labels.completion_price = 0.0
  c.distill.backend = 'local'  # our engine, or 'openai': an endpoint
  c.distill.base_url = ''  # of the endpoint; the key is OPENAI_API_KEY's
  c.distill.model = ''  # its name there
  c.distill.prompt_price = (
    0.0  # of a million tokens there: distill.json then holds the cost of a call; 0 = not known
  )
  c.distill.completion_price = 0.0
  c.distill.concurrency = 64  # requests under way
  c.distill.timeout = 600.0  # seconds
  c.distill.request_retries = 5

  c.sft = ml_collections.ConfigDict()
  c.sft.files = ()  # data sets instead of the distilled rows: paths, or hub names owner/name[#configuration]; `schema:` before
  #   either where the schema (run.row_schemas) is not to be guessed from a row's fields
  c.sft.call_style = (
    'python'  # of rows that hold calls as data: 'python' = [f(a=1)], 'hermes' = <tool_call> JSON
  )
  c.sft.unreadable = (
    'error'  # rows whose calls or tools cannot be read: 'error', or 'drop' (counted and logged)
  )
  c.sft.max_rows = 0  # use only the first so many; 0 = all
  c.sft.split_turns = False  # a row for every assistant message, earlier ones without thoughts; D-CORE's are split already
  c.sft.system_prompt = ''  # of rows without a system message; '' leaves them without
  c.sft.stock_system_prompts = ()  # system messages that system_prompt replaces
  c.sft.loss_mask = (
    'final'  # what is trained: 'final' (paper), 'final+structure' (released code), 'all_assistant'
  )
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
  c.rl.tasks = ml_collections.ConfigDict(
    dict(single=60, sequential=120, parallel=120, irrelevant=60, multi_turn=40)
  )
  c.rl.seed = 0  # of prompt order and sampling, beside the run's own: the repetitions of a sweep
  c.rl.steps = 468  # 5,000 prompts / 32 x 3 epochs
  c.rl.prompts = 32  # a step
  c.rl.episodes = False  # act whole tasks of the world out and reward the state they leave, instead of asking decision points
  c.rl.group = 8  # rollouts of a prompt
  c.rl.wave = 32  # prompts that are sampled, and written down, together: a kill loses the rollouts of one wave at most
  c.rl.validation = (
    32  # prompts set aside, on which the policy is measured before, after and at each checkpoint
  )
  c.rl.updates = 4  # optimizer steps a rollout batch
  c.rl.estimator = 'da_grpo'  # or 'grpo', 'rl_zvp', 'dr_grpo', 'rloo' (learn/advantages.py says what its options do)
  c.rl.alpha = 0.1
  c.rl.delta = 0.5  # nats
  c.rl.zero_test = 'group'  # or 'token' (released code), 'below' (eq. 6 to the letter)
  c.rl.psi_multiplier = 1.0  # released code: 2
  c.rl.psi_when_wrong = 'reinforce'  # or 'ignore', 'punish': what befalls groups whose equal reward is not above right_above
  c.rl.right_above = 0.0
  c.rl.psi_words = ()  # psi only on tokens of these words, such as evaluate.lazy_reasoning.LOGGED_WORDS; () = on all
  c.rl.alpha_measure = ''  # what alpha is adapted to hold at alpha_target: 'entropy' (nats a token), 'psi_share' (psi's part of
  #   the gradient norm, in the first mini-batch of a step that has any); '' keeps alpha
  c.rl.alpha_target = 0.3
  c.rl.alpha_rate = 0.1  # of the logarithm of alpha, a step
  c.rl.alpha_low = 0.01
  c.rl.alpha_high = 1.0
  c.rl.reward = 'toolrl'  # a name of learn/rewards.py; episodes are rewarded by state
  c.rl.overlong_buffer = (
    0  # tokens before max_tokens over which the reward falls by overlong_penalty (DAPO); 0 = off
  )
  c.rl.overlong_penalty = 1.0
  c.rl.dynamic_rounds = 0  # times that further prompts are asked for groups with reward variance (DAPO's dynamic sampling)
  c.rl.uniform_share = (
    0.0  # of a batch that groups without variance may fill then; DA-GRPO has a use for some
  )
  c.rl.learning_rate = 1e-6
  c.rl.weight_decay = 0.01
  c.rl.clip = 1.0
  c.rl.objective = 'ppo'  # or 'gspo' (clips of 3e-4 and 4e-4, by sequence), 'kl_cov', 'cispo' (learn/objectives.py)
  c.rl.clip_low = 0.2
  c.rl.clip_high = 0.2
  c.rl.dual_clip = 3.0
  c.rl.cov_share = 0.002  # of the tokens, held back by KL-Cov
  c.rl.cov_penalty = 0.1
  c.rl.aggregation = 'token'  # as released; 'sequence' (printed in the paper; one is a response, also of an episode), 'dr' (by
  #   max_tokens)
  c.rl.kl_coefficient = 0.001  # 0: no reference policy
  c.rl.kl_estimator = 'k3'
  c.rl.uniform_kl = 0.0  # coefficient of KL(uniform || policy) in groups of equal rewards: diversity without psi, or beside it
  c.rl.importance_cap = (
    0.0  # > 0: tokens weigh min(old policy / rollout engine, cap), for engines that are not exact
  )
  c.rl.temperature = 1.0
  c.rl.max_prompt_tokens = (
    8192  # longer prompts, of episodes longer first prompts, are dropped and counted
  )
  c.rl.max_tokens = 4096
  c.rl.capacity = 16384
  c.rl.rows = 4  # packed rows of a micro-batch
  c.rl.checkpoint_every = 25  # steps

  c.export = ml_collections.ConfigDict()
  c.export.dtype = 'bfloat16'

  c.report = ml_collections.ConfigDict()
  c.report.traces = 3  # shown side by side, before and after
  return c
