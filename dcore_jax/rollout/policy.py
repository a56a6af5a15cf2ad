"""Models with everything needed to use them, and their engines.

A model is the packaged organism, a local directory, or random weights.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import transformers
from jax.sharding import Mesh

import dcore_jax
from dcore_jax import distributed, hub, sharding
from dcore_jax.chat.template import turn_format
from dcore_jax.config import ExecutionSection, ModelSection, RunConfig
from dcore_jax.files import read_json
from dcore_jax.models import decoder, presets
from dcore_jax.models.checkpoint_checks import check_folder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.models.hf_checkpoint import load_config, load_params
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.sizes import EngineSizes

ORGANISM = pathlib.Path(dcore_jax.__file__).parent / 'organism'
_TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'tokenizer.model')
_LONGEST_REASON = 300  # characters of another library's error
# So many numbers of each parameter go into a model's fingerprint.
_NAMED_NUMBERS = 1024


@dataclasses.dataclass
class Policy:
  """A model with everything needed to use it.

  Attributes:
    config: its configuration.
    load: returns the parameters in their shards on a mesh, float32 or in the dtype that it is
      given; they are read or drawn at every call.
    tokenizer: its tokenizer.
    tokenizer_dir: where the tokenizer was loaded from.
    path: the directory of the weights; None if they are random.
  """

  config: DecoderConfig
  load: Callable[..., Any]
  tokenizer: transformers.PreTrainedTokenizerBase
  tokenizer_dir: pathlib.Path
  path: pathlib.Path | None

  def name(self, params: Any) -> str:
    """Returns where the weights come from, and a fingerprint of them.

    What was sampled from other weights must not be taken for theirs.
    """
    # A part of each parameter is enough: training changes all of them, and reading 30 GB takes
    # minutes.
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
      # Sliced on the device: only these numbers are copied to the host.
      first_row = leaf[(0,) * (leaf.ndim - 1)][:_NAMED_NUMBERS]
      digest.update(distributed.on_host(first_row).astype(np.float32).tobytes())
    source = self.path.name if self.path else 'random'
    return f'{source}-{digest.hexdigest()[:8]}'

  @property
  def words(self) -> str:
    """What a person calls the model: where it is, and its size."""
    where = 'random weights'
    if self.path:
      where = 'the organism' if self.path == ORGANISM else str(self.path)
    return f'{where} ({self.config.param_count / 1e6:,.1f} M parameters)'

  @property
  def stop_ids(self) -> list[int]:
    """All tokens that end an answer."""
    return find_stop_ids(self.config, self.tokenizer, self.path)

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of tokens as an engine looks for stop strings in it."""
    return self.tokenizer.decode(ids, skip_special_tokens=True)


def find_stop_ids(config: DecoderConfig, tokenizer: Any, folder: pathlib.Path | None) -> list[int]:
  """Returns the tokens that end an answer.

  They are those of the folder's generation_config.json and config.json, the tokenizer's end of
  text, and the template's end of turn. Llama-3.1 stops at three tokens (end of text, of message, of
  turn), of which its tokenizer names one.
  """
  try:
    end_of_turn_id = turn_format(tokenizer).end_of_turn_id
  except jinja2.TemplateError as error:
    raise ValueError(f'the chat template of {tokenizer.name_or_path!r} fails: {error}') from error
  ids = [
    *_generation_stop_ids(folder),
    *config.stop_token_ids,
    tokenizer.eos_token_id,
    end_of_turn_id,
  ]
  # Some tokenizers have no end of text, and some templates no end of turn.
  return sorted({i for i in ids if i is not None})


def make_execution(section: ExecutionSection) -> Execution:
  """Returns how passes over the model run, from section `execution` of a run's config."""
  return Execution(
    attention=section.attention,
    compute=section.compute,
    remat=section.remat,
    unroll=section.unroll,
    offload=section.offload,
  )


def base_dtype(config: RunConfig, mesh: Mesh | None) -> Any:
  """Returns the dtype in which a run's stages load parameters.

  Those that are trained are float32. Under LoRA the base is not, and has the dtype of computation.
  """
  if not config.lora.rank:
    return jnp.dtype(jnp.float32)
  # What computes is asked for by the mesh in context.
  with jax.set_mesh(mesh):
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return make_execution(config.execution).dtype({'embed': shape})


def engine_sizes(config: RunConfig, *, groups: bool) -> EngineSizes:
  """Returns the sizes that section `engine` of a run's config asks for.

  Args:
    config: the run's config.
    groups: whether rollouts come in groups that share a prompt. For these the section may want
      fewer trunks than lanes. With a prompt for each rollout, a lane would be idle for each trunk
      missing.
  """
  section = config.engine
  return EngineSizes(
    lanes=section.lanes,
    max_len=section.max_len,
    max_new=section.max_new,
    trunks=section.trunks if groups else 0,
    steps_per_call=section.steps_per_call,
    guesses=section.guesses,
    cache_dtype=section.cache_dtype,
  )


def make_engine(
  config: RunConfig,
  policy: Policy,
  params: decoder.Params,
  mesh: Mesh | None,
  *,
  groups: bool = False,
) -> Engine:
  """Makes the engine that section `engine` of a run's config describes.

  Args:
    config: the run's config.
    policy: the model.
    params: its weights on `mesh`; the engine has them in the dtype of computation, and on a mesh of
      its own if the section asks for one.
    mesh: the mesh of the training.
    groups: whether rollouts come in groups that share a prompt (`engine_sizes`).
  """
  # Cast where the parameters are: half as many bytes then move to the engine's mesh.
  params = decoder.cast(params, make_execution(config.execution).dtype(params))
  # Sampling may want more tensor parallelism than training, since a decode step reads all weights
  # for few tokens.
  engine_mesh = distributed.engine_mesh(config, mesh)
  if engine_mesh:
    placed = sharding.shardings(decoder.specs_of(params, policy.config), engine_mesh)
    params = jax.tree.map(distributed.moved, params, placed)
  sizes = engine_sizes(config, groups=groups)
  return Engine(params, policy.config, stop_ids=policy.stop_ids, sizes=sizes)


def local_backend(config: RunConfig, journal: pathlib.Path) -> LocalBackend:
  """Makes an engine of its own with the config's model, as a backend."""
  # Compiling takes most of a short run; programs are kept for the next one.
  distributed.keep_programs()
  policy = load_policy(config.model, seed=config.seed)
  mesh = distributed.training_mesh(config)
  params = policy.load(mesh)
  engine = make_engine(config, policy, params, mesh)
  # Named by the weights as they were loaded: cast, they have another fingerprint.
  return LocalBackend(engine, policy.tokenizer, journal=journal, model=policy.name(params))


def load_tokenizer(
  config: ModelSection,
) -> tuple[transformers.PreTrainedTokenizerBase, pathlib.Path]:
  """Returns (tokenizer, its directory) of a config section `model`: its own, or that of its model.

  Raises:
    ValueError: there is none.
  """
  if config.path:
    # What is no model directory has no tokenizer either, which would be said first.
    check_folder(hub.find(config.path, 'model'))
  # Random weights need a tokenizer of their own; without one it is the organism's.
  path = config.tokenizer or config.path
  folder = hub.find(path, 'model') if path else ORGANISM
  held = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
  if not held:
    # transformers makes an empty one from config.json then, and says nothing.
    raise ValueError(f'no tokenizer is in {str(folder)!r}: none of {list(_TOKENIZER_FILES)}')
  try:
    # transformers raises OSError both for a missing file and for one that it cannot read.
    return transformers.AutoTokenizer.from_pretrained(str(folder)), folder
  except Exception as error:
    # A damaged file ends in whatever the library happens to run into, which names no file.
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise ValueError(
      f'no tokenizer can be loaded from {str(folder)!r}, which has {held}: '
      f'{reason[:_LONGEST_REASON]}'
    ) from error


def load_policy(config: ModelSection, *, seed: int) -> Policy:
  """Returns the model that a config section `model` names.

  It is a directory, the organism, or a random initialisation.

  Raises:
    ValueError: a path that is not there or holds another model than `preset`, a tokenizer larger
      than the embedding. (And `load` where a checkpoint does not fit its config.)
  """
  path = hub.find(config.path, 'model') if config.path else ORGANISM
  if config.init and config.path:
    raise ValueError(
      f'model.init asks for random weights and model.path = {config.path!r} for stored ones; '
      'set one of them'
    )
  # Before the tokenizer, whose library reads config.json too and knows less of what is wrong in it.
  model = DecoderConfig.from_hf(dict(config.init)) if config.init else load_config(path)
  tokenizer, tokenizer_dir = load_tokenizer(config)
  if config.preset and not presets.same_model(model, presets.config(config.preset)):
    raise ValueError(f'{str(path)!r} does not hold a model of the preset {config.preset!r}')
  # A tokenizer may be smaller than the embedding, whose rows are padded in many models.
  if len(tokenizer) > model.vocab_size:
    raise ValueError(
      f'the tokenizer in {str(tokenizer_dir)!r} has {len(tokenizer)} tokens, '
      f'the embedding {model.vocab_size} rows'
    )
  # Shapes alone: weights are read or drawn when somebody calls `load`.
  specs = decoder.abstract_params(model)

  def draw(mesh: Mesh | None, dtype: Any = jnp.float32) -> decoder.Params:
    placed = sharding.shardings(specs, mesh) if mesh else None
    # Compiled with the shardings of its result, so that no device draws the whole model.
    init = jax.jit(decoder.init_params, static_argnums=0, out_shardings=placed)
    return decoder.cast(init(model, jax.random.key(seed)), dtype)

  def read(mesh: Mesh | None, dtype: Any = jnp.float32) -> decoder.Params:
    placed = sharding.shardings(specs, mesh) if mesh else None
    # The config that comes with the parameters has been read already. They are converted while they
    # are read: a model of bfloat16 is never held in float32.
    return load_params(path, dtype, shardings=placed)[1]

  return Policy(
    config=model,
    load=draw if config.init else read,
    tokenizer=tokenizer,
    tokenizer_dir=tokenizer_dir,
    path=None if config.init else path,
  )


def _generation_stop_ids(folder: pathlib.Path | None) -> tuple[int, ...]:
  """Returns `eos_token_id` of a generation_config.json, which is one id or a list.

  () where there is no such file or field.
  """
  path = folder / 'generation_config.json' if folder else None
  if path is None or not path.exists():
    return ()
  record = read_json(path)
  if not isinstance(record, dict):
    raise ValueError(f'{path} does not hold a JSON object')
  ids = record.get('eos_token_id')
  if ids is None:
    return ()
  # Both forms occur: Qwen3's file has a list, and older files have one number.
  if not isinstance(ids, list):
    ids = [ids]
  if not all(isinstance(i, int) for i in ids):
    raise ValueError(f'{path}: eos_token_id is {ids!r}, expected token ids')
  return tuple(ids)
