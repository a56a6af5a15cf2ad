"""Every field of a run's config: its type, its default, and what it means.

One frozen dataclass a section, `RunConfig` for the whole. They are the only source of the
defaults, of what is checked (`dcore_jax.overrides`), of what may change between two starts of a
run (`free`), and of what `--help=all` prints. The defaults are
the paper's values where it has one (docs/method.md, sections 2.4 and 3); `configs/*.py` change
what their model needs.
"""

from dcore_jax.config.fields import Range
from dcore_jax.config.rl import RL_PRESETS, FleetSection, RlSection
from dcore_jax.config.sections import (
  STAGES,
  DistillSection,
  EngineSection,
  EvaluateSection,
  ExecutionSection,
  ExportSection,
  LabelsSection,
  LoraSection,
  MeshSection,
  ModelSection,
  RecipeSection,
  ReportSection,
  RunConfig,
  SftSection,
  WorldSection,
)

__all__ = [
  'RL_PRESETS',
  'STAGES',
  'DistillSection',
  'EngineSection',
  'EvaluateSection',
  'ExecutionSection',
  'ExportSection',
  'FleetSection',
  'LabelsSection',
  'LoraSection',
  'MeshSection',
  'ModelSection',
  'Range',
  'RecipeSection',
  'ReportSection',
  'RlSection',
  'RunConfig',
  'SftSection',
  'WorldSection',
]
