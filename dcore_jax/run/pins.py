"""The commits of what a run takes from the Hugging Face hub.

The first start of a run looks up which commit each name stands for, and writes it into config.json
under `hub`. Later starts take the same commits, whatever the hub's branches have become.
Distillation by itself (`experiments.distill`) writes them beside its rows, and a run that goes on
from the rows takes them from there.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from dcore_jax import hub
from dcore_jax.config import ModelSection, RunConfig
from dcore_jax.data.recipe import SOURCE, local_source
from dcore_jax.data.records import names_file, split_schema
from dcore_jax.files import read_json
from dcore_jax.overrides import overlay

FIELD = 'hub'  # of config.json, and of the file beside rows
# Beside the rows of a distillation by itself.
ROWS_FILE = 'hub.json'


def pin(config: RunConfig, *records: pathlib.Path) -> tuple[RunConfig, dict[str, str]]:
  """Returns the config with a commit in every name of the hub, and the commit of each name.

  Everything that the config's stages need is downloaded, so that nothing is missing later.

  Args:
    config: as asked for.
    records: files with commits that were taken before, where they are there; the first that has a
      name decides.

  Raises:
    ValueError: names all that is neither here nor on the hub.
  """
  commits: dict[str, str] = {}
  for record in records:
    held = read_json(record) if record.exists() else None
    if isinstance(held, dict):
      commits = dict(held.get(FIELD) or {}) | commits
  problems: list[str] = []

  def model(name: str) -> str:
    return _or_problem(name, 'model', commits, problems)

  def data(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_data_name(name, commits, problems) for name in names)

  section = dataclasses.replace(
    config.model, path=model(config.model.path), tokenizer=model(config.model.tokenizer)
  )
  config = dataclasses.replace(config, model=section)
  for stage in ('distill', 'sft', 'rl'):
    if stage in config.stages:
      section = getattr(config, stage)
      section = dataclasses.replace(section, files=data(section.files))
      config = dataclasses.replace(config, **{stage: section})
  recipe = {}
  for name, stage in (('seeds', 'distill'), ('prompts', 'rl')):
    if stage in config.stages:
      recipe[name] = _sources(getattr(config.recipe, name), commits, problems)
  config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **recipe))
  if problems:
    raise ValueError('; '.join(problems))
  return config, commits


def recorded_model(record: Mapping[str, Any]) -> ModelSection:
  """Returns the model of a run's config.json, with the commits that the run has taken."""
  section = overlay(ModelSection(), record['model'])
  commits = record.get(FIELD) or {}
  names = {}
  for field in ('path', 'tokenizer'):
    name = getattr(section, field)
    if name in commits:
      names[field] = hub.pinned(name, 'model', commits)
  return dataclasses.replace(section, **names)


def recorded_config(record: Mapping[str, Any]) -> RunConfig:
  """Returns the config of a run's config.json; its model as `recorded_model` has it."""
  fields = {name: value for name, value in record.items() if name != FIELD}
  return dataclasses.replace(overlay(RunConfig(), fields), model=recorded_model(record))


def _sources(
  section: Mapping[str, Any], commits: dict[str, str], problems: list[str]
) -> dict[str, Any]:
  pinned = {}
  for name, fields in section.items():
    place = fields.get(SOURCE, '')
    if not local_source(place):
      # A source that gives no seeds need not be here.
      counts = [value for value in fields.values() if isinstance(value, int)]
      if any(counts):
        place = _data_name(place, commits, problems)
    pinned[name] = {**fields, SOURCE: place}
  return pinned


def _data_name(name: str, commits: dict[str, str], problems: list[str]) -> str:
  """Pins `[schema:]place[#part]`."""
  schema, place = split_schema(name)
  place, mark, part = place.partition('#')
  # A path has slashes, too, and its reader says what is wrong with it.
  if names_file(place):
    return name
  place = _or_problem(place, 'dataset', commits, problems) + mark + part
  return f'{schema}:{place}' if schema else place


def _or_problem(name: str, kind: str, commits: dict[str, str], problems: list[str]) -> str:
  # What is no name of the hub has its own reader, which says what is wrong with it.
  if not hub.is_name(name):
    return name
  try:
    return hub.pinned(name, kind, commits)
  except ValueError as error:
    problems.append(str(error))
    return name
