"""What a run needs from elsewhere: all of it is looked for before anything is loaded or written."""

import dataclasses
import pathlib

from dcore_jax import distributed, hub
from dcore_jax.config import ModelSection, RunConfig
from dcore_jax.data import published, recipe
from dcore_jax.data.records import find_records, names_file, split_schema
from dcore_jax.evaluate.suites import Suite, SuiteSettings
from dcore_jax.files import data_folder, data_path, write_json_atomic
from dcore_jax.run.pins import FIELD, ROWS_FILE, pin
from dcore_jax.run.suites import make_suites, read_options
from dcore_jax.train.held_out_prompts import SUITE as PROMPTS

# In `evaluate.suites`: the held-out tasks of the config's own world.
WORLD = 'world'
# What the pipeline measures by itself; all other names are of suites.
OWN = (WORLD, PROMPTS)


def find_needed(
  config: RunConfig, workdir: pathlib.Path
) -> tuple[RunConfig, dict[str, str], list[Suite]]:
  """Finds all that a run needs from elsewhere, before anything is loaded or written.

  Returns:
    The config with the commit in every name of the hub; the commits, see `pins`; its suites.

  Raises:
    ValueError: names all that is missing, and the command that gets it.
  """
  problems = _absent(config)
  commits: dict[str, str] = {}
  suites: list[Suite] = []
  found = config
  try:
    found, commits = pin(config, workdir / 'config.json', workdir / 'distill' / ROWS_FILE)
  except ValueError as error:
    problems.append(str(error))
  try:
    recipe.check(config, _check_here)
  except ValueError as error:
    problems.append(str(error))
  try:
    suites = config_suites(config)
  except ValueError as error:
    problems.append(str(error))
  if problems:
    raise ValueError('; '.join(problems))
  return found, commits, suites


def find_for_rows(config: RunConfig, workdir: pathlib.Path) -> RunConfig:
  """Finds what distillation by itself needs, and writes the commits beside its rows.

  Returns:
    The config with the commit in every name of the hub that distillation reads.

  Raises:
    ValueError: see `find_needed`.
  """
  asked = dataclasses.replace(config, stages=('distill',))
  ours = config.distill.backend == 'local'
  if not ours:
    # An endpoint has the model, which need not be here; the packaged organism always is.
    asked = dataclasses.replace(asked, model=ModelSection())
  found, commits, _ = find_needed(asked, workdir)
  if commits and distributed.writes():
    write_json_atomic(workdir / 'distill' / ROWS_FILE, {FIELD: commits})
  return dataclasses.replace(
    found, stages=config.stages, model=found.model if ours else config.model
  )


def _absent(config: RunConfig) -> list[str]:
  """Returns an error for each path that the config names and that is not here."""
  names = [] if config.model.init else [config.model.path]
  if 'sft' in config.stages:
    names += config.sft.files
  # Prompts that are set aside are measured, and kept out of fine-tuning, before RL begins.
  if 'rl' in config.stages or PROMPTS in config.evaluate.suites:
    names += config.rl.files
  problems = []
  for place in dict.fromkeys(split_schema(name)[1].partition('#')[0] for name in names if name):
    # What the hub may have is looked for by `pin`.
    if not names_file(place) and hub.is_name(place):
      continue
    try:
      data_path(place)
    except ValueError as error:
      problems.append(f'{error}{published.hint(place)}')
  return problems


def _check_here(name: str) -> None:
  """Raises ValueError where a data set is neither here nor a name of the hub."""
  place = split_schema(name)[1].partition('#')[0]
  # What the hub lacks is named by `pin`: here it would be asked once more.
  if names_file(place) or not hub.is_name(place):
    find_records(place)


def config_suites(config: RunConfig) -> list[Suite]:
  """Returns the suites that the config names beside OWN, prepared if a stage will run them.

  Raises:
    ValueError: see `make_suites`.
  """
  section = config.evaluate
  names = [name for name in section.suites if name not in OWN]
  if not any(name.startswith('evaluate_') for name in config.stages):
    return []
  settings = SuiteSettings(
    limit=section.limit,
    temperature=section.temperature,
    max_tokens=section.max_tokens,
    seed=config.seed,
    concurrency=config.engine.lanes,
    data=data_folder(),
  )
  return make_suites(names, settings, read_options(section.suite_options))
