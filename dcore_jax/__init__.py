"""D-CORE in JAX: self-distillation and DA-GRPO for language models that use tools.

    import dcore_jax
    from configs import nano

    config = nano.get_config('quick')            # without one: the paper's values
    model = dcore_jax.load('organism')           # or a directory, or a name on the hub
    rows = dcore_jax.distill_seeds(model, config=config)
    model = dcore_jax.sft(model, rows, config=config, epochs=1)
    model = dcore_jax.da_grpo(model, config=config, alpha=0.4)
    dcore_jax.evaluate_model(model, config=config)
    model.save('DIR')

These names are imported when they are first used, so that `import dcore_jax` itself loads neither
jax nor anything else that takes time.
"""

import importlib
from typing import Any

# Where each name is found. A room of the package would hide a name that is spelled like it.
_PLACES = {
  'load': ('dcore_jax.api.model', 'load'),
  'generate': ('dcore_jax.api.model', 'generate'),
  'chat_with': ('dcore_jax.api.serving', 'chat_with'),
  'serve_model': ('dcore_jax.api.serving', 'serve_model'),
  'distill_seeds': ('dcore_jax.api.training', 'distill_seeds'),
  'sft': ('dcore_jax.api.training', 'sft'),
  'da_grpo': ('dcore_jax.api.training', 'da_grpo'),
  'sample_groups': ('dcore_jax.api.groups', 'sample_groups'),
  'group_table': ('dcore_jax.api.groups', 'group_table'),
  'evaluate_model': ('dcore_jax.api.training', 'evaluate_model'),
  'export': ('dcore_jax.run.export', 'export'),
  'plan_run': ('dcore_jax.api.planning', 'plan_run'),
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
  if name not in _PLACES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, attribute = _PLACES[name]
  return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
