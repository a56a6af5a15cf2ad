"""Sweeps at the organism's scale: the paper's tables and figures, and what it leaves open.

alpha_delta, psi, psi_rivals    `reinforcement`: from SFT checkpoints that all settings share
decomposition                   `decomposition`: what the decomposer sees (Table 6)
distill_size                    `sizes`: how many rows, and GRPO without and with them (Table 4)
families                        `families`: one model's rows train other families (Table 5)
variance                        `variance`: the spread of rewards (figures 5a, 12, 13, 14)
composition, behaviours         `thoughts`: numbers of subtasks (3c, 3d), kinds of thoughts (3a, 7a)
self_distillation               `self_distillation`: the policy as its own teacher, and Algorithm 1

`sweep` runs any of them; `tables` makes estimates over runs, verdicts and files.
"""

from dcore_jax.run.ablation.sweep import CHECKPOINTS, SEEDS, SUITES, format_table, run_suite

__all__ = ['CHECKPOINTS', 'SEEDS', 'SUITES', 'format_table', 'run_suite']
