"""A run's weights as a Hugging Face directory: those of a finished stage, or of a checkpoint in the middle of one."""

import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections

from dcore_jax import sharding
from dcore_jax.files import data_path, read_json
from dcore_jax.models import decoder
from dcore_jax.models.config import DecoderConfig
from dcore_jax.models.hf_checkpoint import check_target, load_config, load_params, save_checkpoint
from dcore_jax.report.model_card import model_card
from dcore_jax.rollout.policy import ORGANISM, find_stop_ids, load_tokenizer
from dcore_jax.train.checkpoint import STATE, read_part


class Weights(NamedTuple):
  """Where weights are: in a Hugging Face directory, or with `step` in a checkpoint of training."""

  folder: pathlib.Path
  run: pathlib.Path | None  # the work directory they were made in
  stage: str
  step: int | None = None


def export(
  checkpoint: pathlib.Path, out: pathlib.Path, *, dtype: str = 'bfloat16', overwrite: bool = False
) -> Weights:
  """Writes what `checkpoint` names as a Hugging Face directory -> where the weights were.

  Args:
    checkpoint: a run's work directory (its last trained stage), a stage's directory in it, `checkpoints/STAGE` (the newest
      step) or `checkpoints/STAGE/STEP` in it, or any Hugging Face directory.
    out: the directory to write.
    dtype: 'bfloat16' or 'float32'.
    overwrite: allows to replace a non-empty `out`.

  Raises:
    ValueError: nothing of these, or a checkpoint that is damaged or does not fit its run's model.
    FileExistsError: see `save_checkpoint`.
  """
  check_target(out.absolute(), overwrite)
  found = find(checkpoint)
  if found.run is None:
    config, params = load_params(found.folder, shardings=_spread(load_config(found.folder)))
    card = found.folder / 'README.md'
    save_checkpoint(
      out,
      config,
      params,
      tokenizer_dir=_with_tokenizer(found.folder),
      dtype=dtype,
      overwrite=overwrite,
      generation_config=_read(found.folder / 'generation_config.json') or None,
      card=card.read_text(encoding='utf-8') if card.is_file() else None,
    )
    return found
  run = read_json(found.run / 'config.json')
  section = ml_collections.ConfigDict(run['model'])
  config, params = _load(found, section)
  tokenizer, tokenizer_dir = load_tokenizer(section)
  card = model_card(
    run, config, stage=found.stage, step=found.step, summary=_read(found.run / 'summary.json')
  )
  save_checkpoint(
    out,
    config,
    params,
    tokenizer_dir=tokenizer_dir,
    dtype=dtype,
    overwrite=overwrite,
    card=card,
    generation_config=generation_config(section, config, tokenizer),
  )
  return found


def find(checkpoint: pathlib.Path) -> Weights:
  """What a path stands for (see `export`); ValueError where it is nothing that holds weights."""
  path = checkpoint.absolute()
  if path.name.isdecimal():
    path = _states(path.parent) / path.name
  if path.name.isdecimal() and (path / 'tree').is_dir():
    stage = path.parent.parent if path.parent.name == STATE else path.parent
    return Weights(path, _run_of(stage.parents[1]), stage.name, int(path.name))
  steps = _steps(path)
  if steps:
    return find(path / str(steps[-1]))
  record = _read(path / 'config.json')
  if 'model_type' in record:
    return Weights(path, path.parent if path.name in _stages(path.parent) else None, path.name)
  if _is_run(path):
    for stage in _stages(path):
      for place in (path / stage, path / 'checkpoints' / stage):
        if (place / 'config.json').is_file() or _steps(place):
          return find(place)
    raise ValueError(f'{checkpoint} is a run in which nothing has been trained yet')
  raise ValueError(
    f'{checkpoint} is neither a run, nor a checkpoint of one, nor a Hugging Face directory'
  )


def generation_config(
  section: ml_collections.ConfigDict, model: DecoderConfig, tokenizer: Any
) -> dict[str, Any]:
  """That of the model which a config section `model` names, with every id that ends an answer of `model`."""
  folder = data_path(section.path) if section.path else None if section.init else ORGANISM
  stored = _read(folder / 'generation_config.json') if folder else {}
  return stored | {
    'eos_token_id': find_stop_ids(model, tokenizer, folder),
    'pad_token_id': tokenizer.pad_token_id,
  }


def _load(found: Weights, section: ml_collections.ConfigDict) -> tuple[DecoderConfig, Any]:
  if found.step is None:
    return load_params(found.folder, shardings=_spread(load_config(found.folder)))
  if section.init:
    config = DecoderConfig.from_hf(section.init.to_dict())
  else:
    config = load_config(data_path(section.path) if section.path else ORGANISM)
  specs, placed = decoder.abstract_params(config), _spread(config)
  place = lambda spec, where=None: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=where)
  example = jax.tree.map(place, specs, *([] if placed is None else [placed]))
  # A training state; its optimizer's part stays where it is.
  return config, read_part(found.folder, {'params': example})['params']


def _spread(config: DecoderConfig) -> Any:
  """The shardings of parameters that are split over all devices; None where there is one."""
  if jax.device_count() == 1:
    return None
  return sharding.shardings(
    decoder.abstract_params(config), sharding.make_mesh(fsdp=jax.device_count())
  )


def _states(folder: pathlib.Path) -> pathlib.Path:
  """Where the steps in a stage's folder of checkpoints are: reinforcement keeps its journal of rollouts beside them."""
  return folder / STATE if (folder / STATE).is_dir() else folder


def _steps(path: pathlib.Path) -> list[int]:
  """The steps that are complete in a folder of checkpoints."""
  return sorted(
    int(child.name)
    for child in _states(path).glob('[0-9]*')
    if child.name.isdecimal() and (child / 'tree').is_dir()
  )


def _is_run(path: pathlib.Path) -> bool:
  return {'model', 'stages', 'rl'} <= _read(path / 'config.json').keys()


def _stages(path: pathlib.Path) -> tuple[str, ...]:
  """The stages of a run that train, the last one first; none where `path` is no run."""
  return (_read(path / 'config.json')['rl']['estimator'], 'sft') if _is_run(path) else ()


def _run_of(path: pathlib.Path) -> pathlib.Path:
  if not _is_run(path):
    raise ValueError(
      f'{path} holds no config.json of a run: what model the checkpoint is of cannot be known'
    )
  return path


def _with_tokenizer(folder: pathlib.Path) -> pathlib.Path | None:
  return (
    folder
    if any(
      (folder / name).is_file() for name in ('tokenizer.json', 'vocab.json', 'tokenizer.model')
    )
    else None
  )


def _read(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file, empty where there is none."""
  return read_json(path) if path.is_file() else {}
