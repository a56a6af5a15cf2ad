"""trl's AsyncGRPO packer behind a pipe; runs in the interpreter of its own environment.

The first line on stdin is the job (JSON): prompts and responses as token ids, the rollouts of a
group, and the unique tokens that a row may hold. Every further line asks to pack them all once,
answered by a line with the CPU seconds and what was stored. Made for trl 1.16.
"""

import json
import sys
import time
from typing import Any

import torch
from trl.experimental.async_grpo.async_grpo_trainer import TokenBudgetBatcher


def samples(job: dict[str, Any]) -> list[dict[str, Any]]:
  """What trl's rollout worker hands to its packer."""
  made = []
  for number, (prompt, response) in enumerate(zip(job['prompts'], job['responses'], strict=True)):
    size = len(prompt) + len(response)
    made.append(
      {
        'input_ids': torch.tensor(prompt + response),
        'completion_mask': torch.tensor([0] * len(prompt) + [1] * len(response)),
        'old_log_probs': torch.zeros(size),
        'advantage': 1.0,
        'group_id': number // job['group'],
      }
    )
  return made


def pack(job: dict[str, Any], given: list[dict[str, Any]]) -> dict[str, float]:
  """Packs once, as the trainer's batcher and collator do for one process."""
  capacity = job['capacity']
  # The batcher is made for an endless stream: it hands a row out when a sample does not fit. This
  # one fits nowhere else.
  last = {
    'input_ids': torch.full((capacity,), -1),
    'completion_mask': torch.zeros(capacity),
    'group_id': None,
  }
  began = time.process_time()
  rows = []
  for (row,) in TokenBudgetBatcher([*given, last], 1, capacity, {}):
    rows.append(row.pack())
  seconds = time.process_time() - began
  tokens = sum(len(row['input_ids']) for row in rows)
  flat = sum(len(sample['input_ids']) for sample in given)
  return {
    'seconds': seconds,
    'tokens': tokens,
    'rows': len(rows),
    'dedup': flat / tokens,
    # Keys and values that attention copies before it starts.
    'gathered': sum(len(row['tree_kv_index']) for row in rows),
  }


def main() -> None:
  """Answers each request with one packing."""
  job = json.loads(sys.stdin.readline())
  given = samples(job)
  for _ in sys.stdin:
    print('answer ' + json.dumps(pack(job, given)), flush=True)


if __name__ == '__main__':
  main()
