"""What a suite of a sweep consists of."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dcore_jax.run.ablation.runs import Job
from dcore_jax.run.ablation.tables import Row


@dataclasses.dataclass(frozen=True)
class Suite:
  """A sweep that `experiments.ablate` runs.

  Attributes:
    jobs: names of what one process runs at a seed: settings, or what several settings share.
    run: runs a job, or finds it done, and returns a record a setting: 'setting', 'seed',
      'checkpoint', and what `table` reads.
    table: makes the table of all records so far.
    verdict: says in one line whether the finding holds.
    panels: figures that are drawn and stand in the markdown table.
    text: writes the content of the suite's file for a terminal, without its verdict; by default
      `tables.format_rows`.
    seeds: repetitions by default.
    checkpoints: SFT checkpoints that jobs start from by default; 0 where each job trains its own.
  """

  jobs: tuple[str, ...]
  run: Callable[[Job], list[dict[str, Any]]]
  table: Callable[[Sequence[dict[str, Any]]], list[Row]]
  verdict: Callable[[Sequence[Row]], str]
  panels: tuple[str, ...]
  text: Callable[[dict[str, Any]], str] | None = None
  seeds: int = 3
  checkpoints: int = 0
