"""What to change when a stage does not fit into memory."""

import contextlib
from collections.abc import Iterator

import jax

# Of each stage: what may change in the work directory that it has, and what needs another one.
_SETTINGS = {
  'sft': ('a larger sft.accumulate', 'sft.rows or sft.capacity'),
  'rl': ('a lower rl.rows or engine.lanes', 'rl.capacity or engine.max_len'),
}
_ENGINE = ('a lower engine.lanes', 'engine.max_len')


@contextlib.contextmanager
def explained(stage: str) -> Iterator[None]:
  """Turns an error of a device or host that is out of memory into one that a person can act on.

  Raises:
    ValueError: out of memory; names the stage and the settings that it depends on.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    text = str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in text:
      raise
    # XLA's own text goes on for pages, and says in its first line how much was asked for.
    first = (text.splitlines() or [''])[0][:200]
    here, elsewhere = _SETTINGS.get(stage, _ENGINE)
    raise ValueError(
      f'stage {stage}: out of memory ({first or type(error).__name__}). Go on with {here}, '
      f'execution.remat = full or more devices (mesh.fsdp); or begin in another work directory '
      f'with a lower {elsewhere}. python -m experiments.plan says what fits'
    ) from error
