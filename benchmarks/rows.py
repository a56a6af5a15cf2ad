"""Training rows that the benchmarks share, as token sequences with the loss on the last message."""

import json
import pathlib
from typing import Any

import numpy as np

from dcore_jax import tokentree
from dcore_jax.chat.examples import encode_example
from dcore_jax.chat.messages import Message, ToolCall
from dcore_jax.chat.tool_calls import print_calls
from dcore_jax.data.records import sft_rows
from dcore_jax.data.rows import encode_rows, parse_rows
from dcore_jax.data.seeds import decision_points
from dcore_jax.data.world_seeds import task_seeds
from dcore_jax.files import data_path
from dcore_jax.worlds.toolworld.world import ToolWorld

REASONING_TOKENS = 200  # in each turn, as a reasoning model's rows have them


def airline(tokenizer: Any, count: int) -> list[list[tokentree.TokenSequence]]:
  """The first `count` recorded airline dialogues of tau-bench, each split into one row per
  assistant turn.
  """
  path = data_path('taubench/gpt-4o-airline_trajectories.json')
  return [
    _turns(tokenizer, [_message(record) for record in dialogue['traj']], number)
    for number, dialogue in enumerate(json.loads(pathlib.Path(path).read_text())[:count])
  ]


def toolworld(tokenizer: Any, count: int) -> list[list[tokentree.TokenSequence]]:
  """`count` multi-turn dialogues of ToolWorld, one row per step that the assistant decides."""
  tasks = ToolWorld(4).tasks('multi_turn', count, seed=0, split='train')
  dialogues = []
  for number, task in enumerate(tasks):
    points = [point for seed in task_seeds(ToolWorld(), task) for point in decision_points(seed)]
    dialogues.append(
      [
        _row(tokenizer, [*point.messages, Message('assistant', point.reference)], (number, turn))
        for turn, point in enumerate(points)
      ]
    )
  return dialogues


def single_turn(tokenizer: Any, count: int) -> list[tokentree.TokenSequence]:
  """The first `count` rows of ToolRL.

  They have long tool lists, which differ from row to row, and one answer each.
  """
  records = sft_rows(('toolrl/rlla_sft.json',)).rows[:count]
  return encode_rows(tokenizer, parse_rows(records))


def _message(record: dict[str, Any]) -> Message:
  calls = [
    ToolCall(call['function']['name'], json.loads(call['function']['arguments']))
    for call in record.get('tool_calls') or ()
  ]
  return Message(record['role'], print_calls(calls) if calls else record['content'] or '')


def _turns(tokenizer: Any, messages: list[Message], number: int) -> list[tokentree.TokenSequence]:
  return [
    _row(tokenizer, messages[: turn + 1], (number, turn))
    for turn, message in enumerate(messages)
    if message.role == 'assistant'
  ]


def _row(tokenizer: Any, messages: list[Message], seed: tuple[int, int]) -> tokentree.TokenSequence:
  """The conversation with REASONING_TOKENS random ids of the vocabulary before its answer."""
  tokens, weights = encode_example(tokenizer, messages)
  start = int(weights.argmax())
  thought = np.random.default_rng(seed).integers(
    256, 600 if len(tokenizer) < 1000 else 100_000, REASONING_TOKENS
  )
  tokens = np.concatenate([tokens[:start], thought, tokens[start:]]).astype(np.int32)
  return tokentree.TokenSequence(
    tokens, (np.arange(len(tokens)) >= start).astype(np.float32), len(tokens)
  )
