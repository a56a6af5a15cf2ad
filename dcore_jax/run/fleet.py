"""The fleet of servers that a run's config names."""

import os
import pathlib
from typing import Any

import jax

from dcore_jax.config import RunConfig
from dcore_jax.models.hf_checkpoint import ModelFiles
from dcore_jax.rollout.fleet import Fleet
from dcore_jax.rollout.fleet_endpoint import Limits
from dcore_jax.rollout.policy import Policy, engine_sizes
from dcore_jax.run.export import generation_config


def make_fleet(config: RunConfig, policy: Policy, params: Any, workdir: pathlib.Path) -> Fleet:
  """Returns the fleet that section `rl.fleet` names.

  Args:
    config: the run's config.
    policy: the model.
    params: its weights.
    workdir: of the run; weights are published in its folder `fleet`, if the section names no other.

  Raises:
    ValueError: several hosts, of which each would ask the servers for itself.
  """
  section = config.rl.fleet
  if jax.process_count() > 1:
    raise ValueError(
      'rl.fleet is for one host: the servers make the rollouts, so that the hosts of a run would '
      'each ask for them; leave rl.fleet.endpoints out, or start one process'
    )
  sizes = engine_sizes(config, groups=True).resolved(policy.config)
  return Fleet(
    params,
    policy.config,
    section,
    # The lengths of section `engine` hold for servers, too.
    limits=Limits(
      max_len=sizes.max_len,
      max_new=sizes.max_new,
      vocab=policy.config.vocab_size,
      stop_ids=frozenset(policy.stop_ids),
    ),
    folder=pathlib.Path(section.publish_dir) if section.publish_dir else workdir / 'fleet',
    files=ModelFiles(
      tokenizer_dir=policy.tokenizer_dir,
      generation_config=generation_config(policy.path, policy.config, policy.tokenizer),
    ),
    # Servers of one's own may ask for none, and the client does not start without one.
    api_key=os.environ.get(section.api_key_env) or 'none',
  )
