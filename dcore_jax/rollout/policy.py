"""Models with everything needed to use them, and their engines: the packaged organism, local directories, random weights."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
import transformers
from jax.sharding import Mesh

import dcore_jax
from dcore_jax import distributed, sharding
from dcore_jax.chat.template import turn_format
from dcore_jax.files import data_path, parse_json
from dcore_jax.models import decoder, presets
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.decoder import Execution
from dcore_jax.models.hf_checkpoint import load_config, load_params
from dcore_jax.rollout.backends import LocalBackend
from dcore_jax.rollout.engine import Engine

ORGANISM = pathlib.Path(dcore_jax.__file__).parent / 'organism'


@dataclasses.dataclass
class Policy:
  """A model with everything needed to use it."""

  config: DecoderConfig
  load: Callable[
    [Mesh | None], Any
  ]  # the parameters, float32, in their shards on a mesh; read or drawn at every call
  tokenizer: transformers.PreTrainedTokenizerBase
  tokenizer_dir: pathlib.Path
  path: pathlib.Path | None  # of the weights; None where they are random

  def name(self, params: Any) -> str:
    """Where the weights come from, and a fingerprint of them: what was sampled from others must not be taken for theirs."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
      digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)][:1024], np.float32).tobytes())
    return f'{self.path.name if self.path else "random"}-{digest.hexdigest()[:8]}'

  @property
  def stop_ids(self) -> list[int]:
    """All that end an answer."""
    return find_stop_ids(self.config, self.tokenizer, self.path)


def find_stop_ids(config: DecoderConfig, tokenizer: Any, folder: pathlib.Path | None) -> list[int]:
  """What ends an answer: by the folder's generation_config.json and config.json, the tokenizer's end of text, and the template's
  end of turn.

  Llama-3.1 stops at three tokens (end of text, of message, of turn), of which its tokenizer names one.
  """
  ids = [
    *_generation_stop_ids(folder),
    *config.stop_token_ids,
    tokenizer.eos_token_id,
    turn_format(tokenizer).end_of_turn_id,
  ]
  return sorted({i for i in ids if i is not None})


def make_engine(
  config: ml_collections.ConfigDict,
  policy: Policy,
  params: decoder.Params,
  mesh: Mesh | None,
  *,
  groups: bool = False,
) -> Engine:
  """The engine that section `engine` describes, with weights on the training `mesh`: in the dtype of computation, and on a mesh
  of its own where the section asks for one. `groups`: rollouts come in groups that share a prompt, for which the section may
  want fewer trunks than lanes; with a prompt for each, as many would be idle as there are trunks too few."""
  c = config.engine
  params = decoder.cast(params, Execution(**config.execution).dtype(params))
  if mesh := distributed.engine_mesh(config, mesh):
    params = jax.device_put(
      params, sharding.shardings(decoder.abstract_params(policy.config), mesh)
    )
  return Engine(
    params,
    policy.config,
    stop_ids=policy.stop_ids,
    lanes=c.lanes,
    max_len=c.max_len,
    max_new=c.max_new or None,
    trunks=c.trunks or None if groups else None,
    tile=c.tile or None,
    steps_per_call=c.steps_per_call,
  )


def local_backend(config: ml_collections.ConfigDict, journal: pathlib.Path) -> LocalBackend:
  """An engine of its own with the config's model."""
  distributed.keep_programs()
  policy = load_policy(config.model, seed=config.seed)
  mesh = distributed.training_mesh(config)
  params = policy.load(mesh)
  engine = make_engine(config, policy, params, mesh)
  return LocalBackend(engine, policy.tokenizer, journal=journal, model=policy.name(params))


def load_tokenizer(
  config: ml_collections.ConfigDict,
) -> tuple[transformers.PreTrainedTokenizerBase, pathlib.Path]:
  """(tokenizer, its directory) of a config section `model`: its own, or that of its model. ValueError where there is none."""
  folder = (
    data_path(config.tokenizer or config.path) if config.tokenizer or config.path else ORGANISM
  )
  try:
    return transformers.AutoTokenizer.from_pretrained(str(folder)), folder
  except OSError as error:
    raise ValueError(f'no tokenizer can be loaded from {str(folder)!r}: {error}') from error


def load_policy(config: ml_collections.ConfigDict, *, seed: int) -> Policy:
  """The model a config section `model` names: a directory, the organism, or a random initialisation.

  Raises:
    ValueError: a path that is not there or holds another model than `preset`, a tokenizer larger than the embedding. (And
      `load` where a checkpoint does not fit its config.)
  """
  path = data_path(config.path) if config.path else ORGANISM
  tokenizer, tokenizer_dir = load_tokenizer(config)
  if config.init and config.path:
    raise ValueError(
      f'model.init asks for random weights and model.path = {config.path!r} for stored ones; set one of them'
    )
  model = DecoderConfig.from_hf(dict(config.init)) if config.init else load_config(path)
  if config.preset and not presets.same_model(model, presets.config(config.preset)):
    raise ValueError(f'{str(path)!r} does not hold a model of the preset {config.preset!r}')
  specs = decoder.abstract_params(model)

  def load(mesh: Mesh | None) -> Any:
    placed = sharding.shardings(specs, mesh) if mesh else None
    if config.init:
      return jax.jit(decoder.init_params, static_argnums=0, out_shardings=placed)(
        model, jax.random.key(seed)
      )
    return load_params(path, shardings=placed)[1]

  if len(tokenizer) > model.vocab_size:
    raise ValueError(
      f'the tokenizer in {str(tokenizer_dir)!r} has {len(tokenizer)} tokens, '
      f'the embedding {model.vocab_size} rows'
    )
  return Policy(model, load, tokenizer, tokenizer_dir, None if config.init else path)


def _generation_stop_ids(folder: pathlib.Path | None) -> tuple[int, ...]:
  """`eos_token_id` of a generation_config.json, one or a list; () where there is no such file or field."""
  path = folder / 'generation_config.json' if folder else None
  if path is None or not path.exists():
    return ()
  ids = parse_json(path.read_text(encoding='utf-8'), str(path)).get('eos_token_id')
  ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
  if not all(isinstance(i, int) for i in ids):
    raise ValueError(f'{path}: eos_token_id is {ids!r}, expected token ids')
  return tuple(ids)
