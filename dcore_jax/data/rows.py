"""SFT rows on their way from a data set to the training step: system prompt, one row a turn, tokens and weights."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import ml_collections
from absl import logging

from dcore_jax import tokentree
from dcore_jax.chat.examples import LOSS_MASKS, cut_example, encode_pieces
from dcore_jax.chat.messages import Message, split_reasoning
from dcore_jax.chat.template import turn_format
from dcore_jax.data.records import sft_rows

Row = dict[str, Any]


def training_rows(
  config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[list[Row], int]:
  """(rows {id, conversations[, tools]}, unreadable records left out): of the data sets a config names, or the distilled ones.

  Args:
    config: section `sft`: files, call_style, unreadable, max_rows, system_prompt, stock_system_prompts, split_turns.
    workdir: of the run, whose stage distill left rows.

  Raises:
    ValueError: nothing to train on, or a row that cannot be read.
  """
  unreadable = 0
  if config.files:
    found = sft_rows(config.files, call_style=config.call_style, unreadable=config.unreadable)
    rows, unreadable = found.rows, found.unreadable
  else:
    shards = sorted((workdir / 'distill').glob('rows*.jsonl'))
    if not shards:
      raise ValueError('no rows to train on: run the stage distill first, or name sft.files')
    if not (workdir / 'distill' / 'distill.json').exists():
      raise ValueError(
        f'{len(shards)} shards of rows are there, but the stage distill has not ended: run it on'
      )
    rows = [json.loads(line) for path in shards for line in path.read_text().splitlines()]
  rows = with_system_prompt(
    rows[: config.max_rows or None], config.system_prompt, config.stock_system_prompts
  )
  return (split_turns(rows) if config.split_turns else rows), unreadable


def with_system_prompt(rows: Sequence[Row], prompt: str, stock: Sequence[str] = ()) -> list[Row]:
  """Rows without a system message get `prompt`, and so do those whose system message is one of `stock`; '' changes nothing."""
  if not prompt:
    if stock:
      raise ValueError(
        'sft.stock_system_prompts are to be replaced, and sft.system_prompt is empty'
      )
    return list(rows)
  result = []
  for row in rows:
    messages = _conversation(row)
    if messages and messages[0].get('role') == 'system':
      if messages[0].get('content') not in stock:
        result.append(row)
        continue
      messages = messages[1:]
    result.append(row | {'conversations': [{'role': 'system', 'content': prompt}, *messages]})
  return result


def split_turns(rows: Sequence[Row]) -> list[Row]:
  """One row for every assistant message: everything up to it, earlier assistant messages without their thoughts (method 2.1).

  Rows of more than one are called `<id>/<number>`. A row whose assistant never speaks is an error.
  """
  result = []
  for row in rows:
    context, made = [], []
    for record in _conversation(row):
      if record.get('role') == 'assistant':
        made.append(
          row | {'id': f'{row.get("id")}/{len(made)}', 'conversations': [*context, record]}
        )
        record = record | {'content': split_reasoning(record['content'])[1]}
      context.append(record)
    if not made:
      raise ValueError(f'row {row.get("id")!r} cannot be split: the assistant never speaks')
    result += made if len(made) > 1 else [made[0] | {'id': row.get('id')}]
  return result


def _conversation(row: Row) -> list[dict[str, str]]:
  """The messages of a row as JSON; ValueError names a row that has none."""
  try:
    return [Message.from_json(record).to_json() for record in row['conversations']]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'row {row.get("id")!r} has no readable conversation: {error!r}') from error


def encode_rows(
  tokenizer: Any,
  rows: Sequence[Row],
  *,
  loss_mask: str = 'final',
  capacity: int = 0,
  overlong: str = 'drop',
) -> list[tokentree.Sequence]:
  """Rows as sequences, in order; all their tokens may be shared with other rows.

  Args:
    tokenizer: with a chat template.
    rows: {id, conversations[, tools]}; each ends with the assistant's message.
    loss_mask: one of LOSS_MASKS, see `chat.examples.encode_pieces`.
    capacity: tokens of a packed row; 0 = any.
    overlong: of rows longer than that: 'drop' only counts and logs them, packing leaves them out; 'error' raises.

  Raises:
    ValueError: naming a row that cannot be trained on.
  """
  if loss_mask not in LOSS_MASKS:
    raise ValueError(f'sft.loss_mask = {loss_mask!r}; expected one of {LOSS_MASKS}')
  if overlong not in ('drop', 'error'):
    raise ValueError(f"sft.overlong = {overlong!r}; expected 'drop' or 'error'")
  turns = turn_format(tokenizer)
  examples = []
  for number, row in enumerate(rows):
    try:
      messages = [Message.from_json(record) for record in row['conversations']]
      examples.append(cut_example(tokenizer, turns, messages, loss_mask, row.get('tools')))
    except (KeyError, TypeError, ValueError, jinja2.TemplateError) as error:
      raise ValueError(f'row {_name(row, number)!r} cannot be trained on: {error!r}') from error
  encoded = encode_pieces(tokenizer, turns, examples, loss_mask)
  sizes = [len(tokens) for tokens, _ in encoded]
  long = [index for index, size in enumerate(sizes) if capacity and size > capacity]
  if long:
    longest = max(long, key=sizes.__getitem__)
    text = (
      f'{len(long)} of {len(rows)} rows are longer than sft.capacity = {capacity} tokens; the longest, '
      f'{_name(rows[longest], longest)!r}, has {sizes[longest]}'
    )
    if overlong == 'error':
      raise ValueError(text)
    logging.warning('%s. They are left out.', text)
  return [tokentree.Sequence(tokens, weights, shared=len(tokens)) for tokens, weights in encoded]


def _name(row: Any, number: int) -> Any:
  return row.get('id', number) if isinstance(row, dict) else number
