"""The packed rows of an RL update whose prompts and responses are as long as they may be.

A row that does not hold a whole group repeats the group's prompt. The packer itself says how many
rows there are then, and what is in them.
Letters: R rows, T tokens in a row.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from dcore_jax import tokentree
from dcore_jax.config import RlSection


class GroupRows(NamedTuple):
  """The rows of the longest mini-batch.

  Attributes:
    rows: rows that hold tokens.
    dedup: tokens of the flat sequences per token of the rows (`tokentree.TokenTree.dedup`).
    loss_tokens: sampled tokens of the row that has most.
    seen: keys that a token sees on average, in the row where they are most. Padding sees itself.
  """

  rows: int
  dedup: float
  loss_tokens: int
  seen: float


def longest(section: RlSection) -> GroupRows:
  """Packs the mini-batch with the most prompts, all of them at their longest.

  Raises:
    ValueError: a row does not hold the prompt and one response.
  """
  if section.capacity < section.max_prompt_tokens + section.max_tokens:
    raise ValueError(
      f'rl.capacity = {section.capacity} does not hold a prompt of {section.max_prompt_tokens} '
      f'and a response of {section.max_tokens} tokens'
    )
  return _packed(
    # Prompts of a step are divided over its updates; the last one may have fewer.
    math.ceil(section.prompts / section.updates),
    section.group,
    section.max_prompt_tokens,
    section.max_tokens,
    section.capacity,
  )


# Several programs of a plan ask for the same rows; packing 64 responses takes 50 ms.
@functools.lru_cache(maxsize=64)
def _packed(prompts: int, group: int, prompt: int, response: int, T: int) -> GroupRows:
  weights = np.concatenate([np.zeros(prompt, np.float32), np.ones(response, np.float32)])
  sequences = []
  for number in range(prompts):
    # Prompts differ from their first token on, so that groups share nothing.
    tokens = np.full(prompt + response, number, np.int32)
    sequences += [tokentree.TokenSequence(tokens, weights, shared=prompt)] * group
  tree = tokentree.pack(sequences, T)
  # Devices wait for the one whose row has most to do, so that the fullest row stands for all.
  return GroupRows(
    rows=tree.rows,
    dedup=tree.dedup,
    loss_tokens=int(np.count_nonzero(tree.weight, axis=1).max()),
    # A token of depth d sees the d tokens above it and itself.
    seen=float(tree.position.mean(axis=1).max()) + 1,
  )
