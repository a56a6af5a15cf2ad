"""D-CORE-8B as its authors published it (ICML 2026), measured beside the figures of its card.

Command:   python -m experiments.train --config=configs/dcore_8b.py --workdir=runs/dcore_8b
           --config.evaluate.suite_options="tau2.user_base_url=URL,tau2.user_model=NAME"
Hardware:  8 A100-80G, or any device with room for 8B: --config.engine.tensor=1
Result:    none yet: no accelerator was at hand. The card has BFCL v4 53.15 %, tau-bench 44.9 %,
           tau2-bench 35.8 % and ACEBench .752. Suite bfcl4 has no web search, and there is no suite
           of tau-bench, so that 44.9 is not compared. Whom the card had play tau2's user is not
           known here
"""

import ml_collections

from configs.paper import paper_config

PUBLISHED = {'bfcl4/overall': 0.5315, 'tau2/overall/pass^1': 0.358, 'acebench/overall': 0.752}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config. It has no variants, so `variant` must be empty."""
  if variant:
    raise ValueError(f'unknown variant {variant!r} of dcore_8b')
  c = paper_config(
    'qwen3_8b', 'bowiehsu/D-CORE-8B', sft_rows=16, stages=('evaluate_base', 'report')
  )
  c.name = 'configs/dcore_8b.py'
  c.evaluate.suites = ('bfcl4', 'tau2', 'acebench')
  c.evaluate.published.update(PUBLISHED)
  return c
