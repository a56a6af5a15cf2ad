"""What the fields of a run's config mean together, checked before anything is loaded."""

from typing import Any

from dcore_jax.config import STAGES, EvaluateSection, RunConfig
from dcore_jax.data import recipe
from dcore_jax.distill.wording import load_wording
from dcore_jax.learn import lora
from dcore_jax.run.needed import OWN, WORLD
from dcore_jax.run.suites import check_names, read_options
from dcore_jax.train import held_out_prompts, rl_options, sft_loop
from dcore_jax.train.sinks import check_sinks
from dcore_jax.worlds.environment import World
from dcore_jax.worlds.registry import check_kinds


def check_fields(config: RunConfig) -> None:
  """Checks what fields mean together.

  Raises:
    ValueError: a stage that there is not, or options that mean nothing or exclude each other.
  """
  unknown = [name for name in config.stages if name not in STAGES]
  if unknown:
    raise ValueError(f'unknown stages {unknown}; expected some of {STAGES}')
  if 'distill' in config.stages:
    load_wording(config.distill.wording)
  _check_suites(config.evaluate)
  held_out_prompts.check_fields(config)
  if config.lora.rank:
    lora.check_section(config.lora)
  list(recipe.parts(config))
  sft_loop.check_section(config.sft)
  rl_options.check_section(config.rl)
  check_sinks(config.report.sinks)
  if config.rl.episodes:
    defaults = RunConfig().rl
    # An option that episodes never read would be ignored without a word.
    _check_unset('files', config.rl.files, defaults.files)
    _check_unset('reward', config.rl.reward, defaults.reward)


def check_tasks(config: RunConfig, world: World) -> None:
  """Checks the numbers of tasks of the stages that will draw tasks of the world.

  Raises:
    ValueError: a kind that the world lacks, or one without a number.
  """
  for part, stage_name, _ in recipe.PARTS:
    section = getattr(config, stage_name)
    # Files and recipes take the place of the world's tasks, whose numbers then mean nothing.
    replaced = section.files or getattr(config.recipe, part)
    if stage_name in config.stages and not replaced:
      check_kinds(f'{stage_name}.tasks', section.tasks, world)


def _check_suites(section: EvaluateSection) -> None:
  """Checks names and options, which needs nothing of what the suites need."""
  if not section.suites:
    raise ValueError(f"evaluate.suites names nothing to measure; {WORLD!r} is the config's world")
  names = [name for name in section.suites if name not in OWN]
  check_names(names)
  if section.limit and not names:
    raise ValueError('evaluate.limit is for suites, and evaluate.suites names none')
  options = read_options(section.suite_options)
  unused = sorted(set(options) - set(names))
  if unused:
    raise ValueError(f'evaluate.suite_options: {unused} are not among evaluate.suites')
  unknown = sorted(name for name in section.published if name.partition('/')[0] not in names)
  if unknown:
    raise ValueError(f'evaluate.published: {unknown} are of suites that are not measured')


def _check_unset(field: str, value: Any, default: Any) -> None:
  if value != default:
    raise ValueError(
      f'rl.episodes acts out tasks of the world and rewards the state they leave; rl.{field} = '
      f'{value!r} is for single prompts: set one of them'
    )
