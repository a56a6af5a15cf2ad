"""What functions of the interface make of their arguments: a checked config, and a policy."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from dcore_jax import sharding
from dcore_jax.api.model import Model
from dcore_jax.config import RunConfig
from dcore_jax.models import decoder
from dcore_jax.overrides import overlay
from dcore_jax.rollout.policy import Policy
from dcore_jax.run.config import read_config


def configured(
  section: str,
  options: Mapping[str, Any],
  config: ml_collections.ConfigDict | RunConfig | None,
  seed: int | None,
) -> RunConfig:
  """Returns the config of a call, with `options` in one section; ValueError names unknown ones."""
  # Checked as a config file is, so that an option that no section has cannot be ignored.
  values: dict[str, Any] = {section: dict(options)}
  if seed is not None:
    values['seed'] = seed
  # Without a config the defaults are the paper's.
  return overlay(RunConfig() if config is None else read_config(config), values)


def refuse_two_sources(
  what: str, given: Any, options: Mapping[str, Any], sources: Sequence[str]
) -> None:
  """Raises ValueError where data is given and named by an option: one would be ignored."""
  # An option that is empty or False names no data.
  named = [name for name in sources if options.get(name)]
  if given is not None and named:
    raise ValueError(f'{what} are given, and {named[0]} names others: leave one of them out')


def as_policy(model: Model) -> Policy:
  """Returns the model as a policy whose parameters are copied at every load."""

  def load(mesh: Mesh | None, dtype: Any = jnp.float32) -> Any:
    # A training step donates its parameters, and would take the person's model away.
    params = jax.tree.map(lambda leaf: leaf.astype(dtype, copy=True), model.params())
    # Without a mesh the arrays stay where the model has them.
    if mesh is None:
      return params
    # Placed by the axes of the specs, as a checkpoint that is loaded under this mesh.
    specs = decoder.abstract_params(model.config)
    return jax.device_put(params, sharding.shardings(specs, mesh))

  # A model that was trained here has the tokenizer and the stop tokens of the one it came from.
  return Policy(
    config=model.config,
    load=load,
    tokenizer=model.tokenizer,
    tokenizer_dir=model.folder,
    path=model.folder,
  )
