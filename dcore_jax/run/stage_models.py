"""The models of a run by the names of their stages, and the one engine that they share."""

import pathlib
from typing import Any

import jax

from dcore_jax import sharding
from dcore_jax.config import RunConfig
from dcore_jax.models import decoder
from dcore_jax.models.hf_checkpoint import ModelFiles, load_params, save_checkpoint
from dcore_jax.progress import show_compiling
from dcore_jax.rollout.engine import Engine
from dcore_jax.rollout.local_backend import LocalBackend
from dcore_jax.rollout.policy import Policy, base_dtype, make_engine
from dcore_jax.run.export import generation_config


class StageModels:
  """Loads and saves what stages hand on, and holds at most one engine.

  Keys and values of an engine's lanes fill most of a device's memory.

  Args:
    config: the run's config.
    policy: the base model and its tokenizer.
    mesh: what weights are laid out on; None on one device.
    workdir: holds the directories of the stages.
  """

  def __init__(
    self,
    config: RunConfig,
    policy: Policy,
    mesh: jax.sharding.Mesh | None,
    workdir: pathlib.Path,
  ):
    self._config = config
    self._policy = policy
    self._mesh = mesh
    self._workdir = workdir
    self._engine: Engine | None = None
    self._grouped = False

  def params(self, name: str, dtype: Any = None) -> Any:
    """Loads the parameters of a stage: 'base', or one that the work directory holds.

    They are float32 unless `dtype` says otherwise; under LoRA, whose base is not trained, they have
    the dtype of computation.

    Raises:
      ValueError: the stage has no result.
    """
    dtype = dtype or base_dtype(self._config, self._mesh)
    # Read anew at every call: training donates its parameters, and a copy that is kept beside them
    # would take memory from the engine.
    if name == 'base':
      return self._policy.load(self._mesh, dtype)
    path = self._workdir / name
    if not self.has(name):
      raise ValueError(f'stage {name!r} has no result in {str(self._workdir)!r}; run it first')
    shardings = None
    if self._mesh:
      specs = decoder.abstract_params(self._policy.config)
      shardings = sharding.shardings(specs, self._mesh)
    # Each device reads its own slices, so that a model need not fit on one device.
    _, params = load_params(path, dtype, shardings=shardings)
    return params

  def has(self, name: str) -> bool:
    """Whether a stage has left a model in the work directory."""
    return (self._workdir / name / 'config.json').exists()

  # Stages hand their models on in float32: rounded to bfloat16, whose steps near 1 are 0.8 %, the
  # updates of a whole RL stage (learning rate 1e-6) could vanish.
  def save(self, name: str, params: Any, dtype: str = 'float32', card: str | None = None) -> None:
    """Writes a stage's model as a Hugging Face directory, with `card` as its README."""
    policy = self._policy
    save_checkpoint(
      self._workdir / name,
      policy.config,
      params,
      ModelFiles(
        tokenizer_dir=policy.tokenizer_dir,
        generation_config=generation_config(policy.path, policy.config, policy.tokenizer),
        card=card,
      ),
      dtype=dtype,
      overwrite=True,
    )

  def engine(self, params: Any, *, groups: bool = False) -> Engine:
    """Returns the run's one engine with the given weights.

    It computes in the dtype of computation and on its own mesh. An engine of another size is let
    go first: there may be no room for the caches of both.

    Args:
      params: the weights.
      groups: whether rollouts come in groups that share a prompt, see `make_engine`.
    """
    # Without fewer trunks than lanes, groups and single prompts have the same engine.
    if self._grouped != groups and self._config.engine.trunks:
      self._engine = None
    # Nor can plain weights and unmerged adapters take each other's place.
    if self._engine and jax.tree.structure(self._engine.params) != jax.tree.structure(params):
      self._engine = None
    if self._engine is None:
      self._engine = make_engine(self._config, self._policy, params, self._mesh, groups=groups)
      self._grouped = groups
      # Once for all stages: later ones only change the weights.
      show_compiling(self._engine.prepare)
    else:
      self._engine.update(params)
    return self._engine

  def let_engine_go(self) -> None:
    """Makes room where the engine's caches take most of a device's memory, as on accelerators."""
    # What it compiled is kept by jax.
    if self._mesh or sharding.platform() != 'cpu':
      self._engine = None

  def backend(self, journal: pathlib.Path) -> LocalBackend:
    """Returns our engine with the base model behind a journal, as distillation asks it."""
    params = self.params('base')
    # Taken from the float32 weights, so that the journal's answers stay valid whatever dtype the
    # engine computes in.
    name = self._policy.name(params)
    engine = self.engine(params)
    return LocalBackend(engine, self._policy.tokenizer, journal=journal, model=name)
