"""A run's weights as a Hugging Face directory: those of a stage, or of a checkpoint within one."""

import pathlib
from typing import Any, NamedTuple

import jax

from dcore_jax import hub, sharding
from dcore_jax.config import LoraSection, ModelSection, RunConfig
from dcore_jax.files import read_json
from dcore_jax.learn import lora
from dcore_jax.models import decoder
from dcore_jax.models.checkpoint_checks import check_folder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.hf_checkpoint import (
  ModelFiles,
  check_target,
  load_config,
  load_params,
  save_checkpoint,
)
from dcore_jax.models.peft import AdapterFiles, save_adapters
from dcore_jax.overrides import overlay
from dcore_jax.report.model_card import model_card
from dcore_jax.rollout.policy import (
  ORGANISM,
  base_dtype,
  find_stop_ids,
  load_policy,
  load_tokenizer,
)
from dcore_jax.run.pins import recorded_config, recorded_model
from dcore_jax.train.checkpoint import STATE, read_part

# A directory that holds one of these files has a tokenizer that can be loaded.
_TOKENIZER_FILES = ('tokenizer.json', 'vocab.json', 'tokenizer.model')


class Weights(NamedTuple):
  """Where weights are: in a Hugging Face directory or, with a `step`, in a training checkpoint."""

  folder: pathlib.Path
  run: pathlib.Path | None  # the work directory they were made in
  stage: str
  step: int | None = None


def export(
  checkpoint: pathlib.Path, out: pathlib.Path, *, dtype: str = 'bfloat16', overwrite: bool = False
) -> Weights:
  """Writes what `checkpoint` names as a Hugging Face directory; returns where the weights were.

  Args:
    checkpoint: a run's work directory (its last trained stage), a stage's directory in it,
      `checkpoints/STAGE` (the newest step) or `checkpoints/STAGE/STEP` in it, or any Hugging Face
      directory.
    out: the directory to write.
    dtype: 'bfloat16' or 'float32'.
    overwrite: allows to replace a non-empty `out`.

  Raises:
    ValueError: `checkpoint` is none of these, is damaged, or does not fit its run's model.
    FileExistsError: see `save_checkpoint`.
  """
  out = pathlib.Path(out)
  # Before anything is loaded: an 8B model takes minutes.
  check_target(out.absolute(), overwrite)
  found = find(pathlib.Path(checkpoint))
  if found.run is None:
    # A directory from elsewhere is only converted: what it says of itself is copied.
    config, params = _load_directory(found.folder)
    card_path = found.folder / 'README.md'
    card = card_path.read_text(encoding='utf-8') if card_path.is_file() else None
    tokenizer_dir = found.folder if _has_tokenizer(found.folder) else None
    ends = _read(found.folder / 'generation_config.json') or None
  else:
    run = read_json(found.run / 'config.json')
    section = recorded_model(run)
    config, params = _load(found, run, section)
    # A checkpoint within a stage has weights alone: tokenizer and model come from the run's config.
    tokenizer, tokenizer_dir = load_tokenizer(section)
    # A run that was killed has no summary yet; the card then leaves the measurements out.
    summary = _read(found.run / 'summary.json')
    card = model_card(run, config, stage=found.stage, step=found.step, summary=summary)
    ends = generation_config(_model_folder(section), config, tokenizer)
  save_checkpoint(
    out,
    config,
    params,
    ModelFiles(tokenizer_dir=tokenizer_dir, generation_config=ends, card=card),
    dtype=dtype,
    overwrite=overwrite,
  )
  return found


def export_adapters(
  checkpoint: pathlib.Path, out: pathlib.Path, *, dtype: str = 'float32', overwrite: bool = False
) -> Weights:
  """Writes the adapters of a LoRA run as a directory that `peft` loads; returns where they were.

  They stand beside the model that the run began with: those of RL are joined with those of SFT,
  and have twice the rank. Where the checkpoints of SFT are gone, they stand beside RUN/sft.

  Args:
    checkpoint: what `export` takes, of a run with `lora.rank`; a stage stands for its newest step.
    out: the directory to write.
    dtype: 'bfloat16' or 'float32'.
    overwrite: allows to replace a non-empty `out`.

  Raises:
    ValueError: nothing that was trained with adapters, no checkpoint of them, a base that is not on
      disk (`model.init`), or several hosts.
    FileExistsError: see `save_checkpoint`.
  """
  if jax.process_count() > 1:
    raise ValueError('adapters are small: one host writes them')
  check_target(pathlib.Path(out).absolute(), overwrite)
  found = find(pathlib.Path(checkpoint))
  run = read_json(found.run / 'config.json') if found.run else {}
  section = overlay(LoraSection(), run.get('lora', {}))
  if not section.rank:
    raise ValueError(f'{checkpoint} has no adapters: it is not of a run with lora.rank')
  if found.step is None:
    found = _newest(found)
    if found is None:
      raise ValueError(f'{checkpoint} has no checkpoint left, which would hold its adapters')
  base = _model_folder(recorded_model(run))
  if base is None:
    raise ValueError('model.init: the base was drawn at random, so that adapters have none to load')
  config = load_config(base)
  adapters = _read_adapters(found.folder, config, section)
  alpha = section.alpha
  first = _newest(Weights(found.run / 'sft', found.run, 'sft'))
  if found.stage != 'sft' and first is None:
    base = found.run / 'sft'
  elif found.stage != 'sft':
    adapters = lora.joined(_read_adapters(first.folder, config, section), adapters)
    # alpha / rank stays what it was.
    alpha *= 2
  files = AdapterFiles(alpha=alpha, base=str(base.absolute()), dtype=dtype)
  save_adapters(out, config, adapters, files, overwrite=overwrite)
  return found


def _newest(found: Weights) -> Weights | None:
  """Returns the newest step of a stage of a run; None where it has no checkpoints."""
  folder = found.run / 'checkpoints' / found.stage
  steps = _steps(folder)
  return find(folder / str(steps[-1])) if steps else None


def _read_adapters(step: pathlib.Path, config: DecoderConfig, section: LoraSection) -> Any:
  """Reads the adapters of a training checkpoint; they fit on one device."""
  example = jax.tree.map(_place, lora.abstract_adapters(config, section))
  return read_part(step, {'params': example})['params']


def find(checkpoint: pathlib.Path) -> Weights:
  """Finds the weights that a path stands for, see `export`.

  Raises:
    ValueError: the path is nothing that holds weights.
  """
  # Absolute, so that a path like '.' or '3' has a name and parents.
  path = checkpoint.absolute()
  # Only steps have numbers as names.
  if path.name.isdecimal():
    path = _states(path.parent) / path.name
    if (path / 'tree').is_dir():
      return _checkpoint(path)
  steps = _steps(path)
  # A stage's folder of checkpoints stands for its newest step.
  if steps:
    return find(path / str(steps[-1]))
  check_folder(path)
  # Both runs and models have a config.json; only a model's names its type.
  if 'model_type' in _read(path / 'config.json'):
    run = path.parent if path.name in _stages(path.parent) else None
    return Weights(path, run, path.name)
  if not _is_run(path):
    raise ValueError(
      f'{checkpoint} is neither a run, nor a checkpoint of one, nor a Hugging Face directory'
    )
  for stage in _stages(path):
    # A stage that has ended left a directory; one that was killed has checkpoints only.
    for place in (path / stage, path / 'checkpoints' / stage):
      if (place / 'config.json').is_file() or _steps(place):
        return find(place)
  raise ValueError(f'{checkpoint} is a run in which nothing has been trained yet')


def generation_config(
  folder: pathlib.Path | None, model: DecoderConfig, tokenizer: Any
) -> dict[str, Any]:
  """Returns a generation_config.json with every token id that ends an answer.

  Args:
    folder: the directory that a model was loaded from, whose own file is kept otherwise; None for
      a random initialisation.
    model: its architecture.
    tokenizer: a transformers tokenizer with a chat template.
  """
  stored = _read(folder / 'generation_config.json') if folder else {}
  # All of them: a serving engine that does not read the chat template stops at these ids alone, and
  # would sample on behind an answer whose end of turn is not among them.
  return stored | {
    'eos_token_id': find_stop_ids(model, tokenizer, folder),
    'pad_token_id': tokenizer.pad_token_id,
  }


def _load(found: Weights, run: dict[str, Any], section: ModelSection) -> tuple[DecoderConfig, Any]:
  """Loads (architecture, parameters) of a run's weights.

  `run` is its config, and `section` the part `model` of it.
  """
  if found.step is None:
    return _load_directory(found.folder)
  if run.get('lora', {}).get('rank'):
    return _load_adapted(found, recorded_config(run))
  if section.init:
    config = DecoderConfig.from_hf(dict(section.init))
  else:
    config = load_config(_model_folder(section))
  specs = decoder.abstract_params(config)
  shardings = _spread(config)
  if shardings is None:
    # orbax reads a checkpoint into the shapes, dtypes and shardings of such an example.
    example = jax.tree.map(_place, specs)
  else:
    example = jax.tree.map(_place, specs, shardings)
  # The optimizer's part of a training state, twice as large, is not read.
  return config, read_part(found.folder, {'params': example})['params']


def _load_adapted(found: Weights, run: RunConfig) -> tuple[DecoderConfig, Any]:
  """Loads the base of a LoRA stage, with the adapters of one of its checkpoints attached."""
  mesh = None if jax.device_count() == 1 else sharding.make_mesh(fsdp=jax.device_count())
  dtype = base_dtype(run, mesh)
  if found.stage == 'sft':
    policy = load_policy(run.model, seed=run.seed)
    config = policy.config
    base = policy.load(mesh, dtype)
  else:
    folder = found.run / 'sft'
    config, base = load_params(folder, dtype, shardings=_spread(load_config(folder)))
  specs = lora.abstract_adapters(config, run.lora)
  if mesh is None:
    example = jax.tree.map(_place, specs)
  else:
    example = sharding.abstract(specs, mesh)
  adapters = read_part(found.folder, {'params': example})['params']
  return config, lora.attach(lora.Frozen(base, lora.scale(run.lora)), adapters)


def _load_directory(folder: pathlib.Path) -> tuple[DecoderConfig, Any]:
  return load_params(folder, shardings=_spread(load_config(folder)))


def _place(spec: decoder.ParamSpec, sharding: Any = None) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)


def _spread(config: DecoderConfig) -> Any:
  """Returns shardings that split parameters over all devices; None if there is one device."""
  # Each device reads its own slices, so that a model need not fit on one of them.
  if jax.device_count() == 1:
    return None
  mesh = sharding.make_mesh(fsdp=jax.device_count())
  return sharding.shardings(decoder.abstract_params(config), mesh)


def _model_folder(section: ModelSection) -> pathlib.Path | None:
  """Returns the directory that section `model` names; None for a random initialisation."""
  if section.path:
    return hub.find(section.path, 'model')
  return None if section.init else ORGANISM


def _checkpoint(path: pathlib.Path) -> Weights:
  """Returns the weights of one step, [W/]checkpoints/STAGE[/state]/STEP."""
  stage = path.parent.parent if path.parent.name == STATE else path.parent
  run = stage.parents[1]
  if not _is_run(run):
    raise ValueError(
      f'{run} holds no config.json of a run: what model the checkpoint is of cannot be known'
    )
  return Weights(folder=path, run=run, stage=stage.name, step=int(path.name))


def _states(folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder of a stage's steps: RL keeps its rollouts beside it."""
  return folder / STATE if (folder / STATE).is_dir() else folder


def _steps(path: pathlib.Path) -> list[int]:
  """Returns the steps that are complete in a folder of checkpoints, in ascending order."""
  # A step that is being written, or was left by a kill, has another name or lacks its `tree`.
  steps = []
  for child in _states(path).glob('[0-9]*'):
    if child.name.isdecimal() and (child / 'tree').is_dir():
      steps.append(int(child.name))
  return sorted(steps)


def _is_run(path: pathlib.Path) -> bool:
  # A run's config.json has these sections, and a model's has not.
  return {'model', 'stages', 'rl'} <= _read(path / 'config.json').keys()


def _stages(path: pathlib.Path) -> tuple[str, ...]:
  """Returns the trained models of a run, the last one first; none if `path` is no run."""
  if not _is_run(path):
    return ()
  # RL comes after SFT, so that its weights are the run's last ones.
  return _read(path / 'config.json')['rl']['estimator'], 'sft'


def _has_tokenizer(folder: pathlib.Path) -> bool:
  return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the contents of a JSON file, and an empty record if there is no such file."""
  return read_json(path) if path.is_file() else {}
