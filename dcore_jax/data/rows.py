"""Prepares SFT rows for the training step.

Rows are read once, get a system prompt, are split into one row a turn, and become tokens and
weights.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
from absl import logging

from dcore_jax import tokentree
from dcore_jax.chat.examples import LOSS_MASKS, Piece, cut_example, encode_pieces
from dcore_jax.chat.messages import Message, split_reasoning
from dcore_jax.chat.template import TurnFormat, turn_format
from dcore_jax.config import SftSection
from dcore_jax.data.records import adapt_rows, sft_rows
from dcore_jax.files import read_rows
from dcore_jax.progress import SLOW, progress


@dataclasses.dataclass(frozen=True)
class SftRow:
  """A conversation to train on.

  Attributes:
    id: the row's id as published, or its number where it has none.
    messages: the conversation; the assistant's last message is the target.
    tools: specs that the chat template shows; None for none.
  """

  id: Any
  messages: tuple[Message, ...]
  tools: list[dict[str, Any]] | None = None


def parse_rows(records: Sequence[dict[str, Any]]) -> list[SftRow]:
  """Reads rows of ours, {id, conversations: [{role, content[, train]}][, tools]}.

  Raises:
    ValueError: naming a row that has no readable conversation, or says what would be lost.
  """
  rows = []
  for number, record in enumerate(records):
    # An error names the row by its id. A record that is no object is named by its number.
    name = record.get('id', number) if isinstance(record, dict) else number
    try:
      messages = tuple(Message.from_json(message) for message in record['conversations'])
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f'row {name!r} has no readable conversation: {error!r}') from error
    rows.append(SftRow(id=name, messages=messages, tools=record.get('tools')))
  return rows


def training_rows(config: SftSection, workdir: pathlib.Path) -> tuple[list[SftRow], int]:
  """Loads the rows to train on -> (rows, number of unreadable records that were left out).

  They come from the data sets that a config names, or else from the run's own distillation.

  Args:
    config: section `sft`: files, call_style, unreadable, max_rows, system_prompt,
      stock_system_prompts, split_turns.
    workdir: folder of the run, whose stage distill left rows.

  Raises:
    ValueError: nothing to train on, or a row that cannot be read.
  """
  unreadable = 0
  # Named files replace the run's own rows: a config that names them has no distillation to wait
  # for.
  if config.files:
    found = sft_rows(config.files, call_style=config.call_style, unreadable=config.unreadable)
    records = found.rows
    unreadable = found.unreadable
  else:
    records = _distilled_records(workdir / 'distill')
  return _prepared(records, config), unreadable


def given_rows(records: Sequence[Any], config: SftSection) -> tuple[list[SftRow], int]:
  """Prepares records of any schema that a caller gives, as `training_rows` does.

  Raises:
    ValueError: as `training_rows`.
  """
  found = adapt_rows(records, 'rows', call_style=config.call_style, unreadable=config.unreadable)
  return _prepared(found.rows, config), found.unreadable


def _prepared(records: Sequence[dict[str, Any]], config: SftSection) -> list[SftRow]:
  # `max_rows` counts rows as they are published, before a row becomes several by its turns.
  rows = parse_rows(records[: config.max_rows or None])
  # The prompt is added before rows are split, so that all turns of a dialogue begin with it.
  rows = with_system_prompt(rows, config.system_prompt, config.stock_system_prompts)
  return split_turns(rows) if config.split_turns else rows


def _distilled_records(folder: pathlib.Path) -> list[dict[str, Any]]:
  # Shards are numbered with leading zeros, so that the sorted order is that of the seeds.
  shards = sorted(folder.glob('rows*.jsonl'))
  if not shards:
    raise ValueError('no rows to train on: run the stage distill first, or name sft.files')
  # Shards are written one by one: only the summary says that none is missing.
  if not (folder / 'distill.json').exists():
    raise ValueError(
      f'{len(shards)} shards of rows are there, but the stage distill has not ended: run it on'
    )
  records = []
  for path in shards:
    records += read_rows(path)
  return records


def with_system_prompt(
  rows: Sequence[SftRow], prompt: str, stock: Sequence[str] = ()
) -> list[SftRow]:
  """Puts `prompt` before rows that have no system message or one of the texts in `stock`.

  An empty prompt changes nothing.

  Raises:
    ValueError: `stock` without a prompt to replace it by.
  """
  if not prompt:
    if stock:
      raise ValueError(
        'sft.stock_system_prompts are to be replaced, and sft.system_prompt is empty'
      )
    return list(rows)
  result = []
  for row in rows:
    messages = row.messages
    if messages and messages[0].role == 'system':
      # A system message that is not stock holds a policy or tools, which the row needs.
      if messages[0].content not in stock:
        result.append(row)
        continue
      messages = messages[1:]
    result.append(dataclasses.replace(row, messages=(Message('system', prompt), *messages)))
  return result


def split_turns(rows: Sequence[SftRow]) -> list[SftRow]:
  """Makes one row for each assistant message that is trained, with the messages before it.

  Earlier assistant messages lose their thoughts, as in docs/method.md, section 2.1. If a row
  becomes several rows, their ids are `<id>/<number>`.

  Raises:
    ValueError: a row whose assistant never speaks.
  """
  result = []
  for row in rows:
    context = []
    conversations = []
    for message in row.messages:
      if message.role == 'assistant':
        if message.trained:
          conversations.append((*context, message))
        # The chat template drops earlier thoughts too: training then sees the prompts of inference.
        _, answer = split_reasoning(message.content)
        message = Message('assistant', answer)
      context.append(message)
    # A row without a target would add nothing to the loss, and be lost without a word.
    if not conversations:
      raise ValueError(f'row {row.id!r} cannot be split: no message of the assistant is trained')
    for number, messages in enumerate(conversations):
      # A row that stays one keeps its id, by which other files may refer to it.
      name = f'{row.id}/{number}' if len(conversations) > 1 else row.id
      result.append(SftRow(id=name, messages=messages, tools=row.tools))
  return result


def encode_rows(
  tokenizer: Any,
  rows: Sequence[SftRow],
  *,
  loss_mask: str = 'final',
  capacity: int = 0,
  overlong: str = 'drop',
) -> list[tokentree.TokenSequence]:
  """Encodes rows as sequences, in order, all of whose tokens may be shared with other rows.

  Args:
    tokenizer: with a chat template.
    rows: each ends with the assistant's message.
    loss_mask: one of LOSS_MASKS, see `chat.examples.encode_pieces`.
    capacity: tokens of a packed row; 0 allows any length.
    overlong: what to do with rows longer than that. 'drop' counts and logs them here, and packing
      leaves them out; 'error' raises.

  Raises:
    ValueError: naming a row that cannot be trained on.
  """
  if overlong not in ('drop', 'error'):
    raise ValueError(f"sft.overlong = {overlong!r}; expected 'drop' or 'error'")
  # The result has one sequence for each row, in order, so no row may be left out.
  _, sequences = _encode(tokenizer, rows, loss_mask, unreadable='error')
  # Overlong rows are reported here and dropped by packing, which alone knows what fits into a row.
  if capacity:
    _report_overlong(rows, sequences, capacity, overlong)
  return sequences


def _encode(
  tokenizer: Any, rows: Sequence[SftRow], loss_mask: str, unreadable: str
) -> tuple[list[SftRow], list[tokentree.TokenSequence]]:
  """Encodes rows -> (those that can be trained on, their sequences)."""
  # Checked before the loop, where 'drop' would count the error once for each row.
  if loss_mask not in LOSS_MASKS:
    raise ValueError(f'sft.loss_mask = {loss_mask!r}; expected one of {LOSS_MASKS}')
  turns = turn_format(tokenizer)
  kept = []
  examples = []
  # The first problem is logged: thousands of rows of one schema fail for one reason.
  problem = ''
  for row in progress(rows, description='read rows', unit='row', delay=SLOW):
    try:
      pieces = cut_example(tokenizer, turns, row.messages, loss_mask, row.tools)
      examples.append(_without_untrained(pieces, row.messages, turns))
      kept.append(row)
    # Templates raise errors of Jinja's for messages that they cannot show.
    except (KeyError, TypeError, ValueError, jinja2.TemplateError) as error:
      problem = problem or f'row {row.id!r} cannot be trained on: {error!r}'
      if unreadable == 'error':
        raise ValueError(problem) from error
  if problem:
    # No row at all means that the template or the mask is wrong for this data set.
    if not kept:
      raise ValueError(f'none of {len(rows)} rows can be trained on; the first: {problem}')
    logging.warning(
      '%d of %d rows are left out; the first: %s', len(rows) - len(kept), len(rows), problem
    )
  # All rows are tokenized in one call, which is faster than a call for each row.
  encoded = encode_pieces(tokenizer, turns, examples, loss_mask)
  return kept, [
    tokentree.TokenSequence(tokens, weights, shared=len(tokens)) for tokens, weights in encoded
  ]


def _without_untrained(
  pieces: list[Piece], messages: Sequence[Message], turns: TurnFormat
) -> list[Piece]:
  """Makes context of the pieces whose messages are not to be trained."""
  # The loss mask always trains the last message, so that a row with an untrained one has no target.
  if not messages[-1].trained:
    raise ValueError('its last message is marked as not to be trained')
  # Pieces and messages are matched from the end, where the trained messages are.
  flags = [message.trained for message in messages if message.role == 'assistant']
  places = [place for place, piece in enumerate(pieces) if piece.trained]
  pieces = list(pieces)
  # A mask trains the last messages of the assistant: the last one, or all.
  for place, trained in zip(places, flags[-len(places) :], strict=True):
    if not trained:
      # The encoder ends trained pieces by this token; here it is part of the context.
      pieces[place] = Piece(pieces[place].text + turns.end_of_turn, False)
  return pieces


def section_sequences(
  tokenizer: Any, rows: Sequence[SftRow], config: SftSection
) -> tuple[list[SftRow], list[tokentree.TokenSequence]]:
  """Encodes rows as a config's section `sft` says -> (rows, their sequences).

  With `unreadable` = 'drop' rows that the chat template or the loss mask cannot take are missing
  from both, counted and logged. Otherwise see `encode_rows`.
  """
  # Checked before the rows are encoded, which takes minutes for a large data set.
  if config.overlong not in ('drop', 'error'):
    raise ValueError(f"sft.overlong = {config.overlong!r}; expected 'drop' or 'error'")
  kept, sequences = _encode(tokenizer, rows, config.loss_mask, config.unreadable)
  _report_overlong(kept, sequences, config.capacity, config.overlong)
  return kept, sequences


def _report_overlong(
  rows: Sequence[SftRow],
  sequences: Sequence[tokentree.TokenSequence],
  capacity: int,
  overlong: str,
) -> None:
  """Logs how many rows are longer than `capacity` tokens, or raises with 'error'."""
  # Lengths are known only here, because the template and the tokenizer decide them.
  sizes = [len(sequence.tokens) for sequence in sequences]
  count = sum(size > capacity for size in sizes)
  if not count:
    return
  # The longest row tells which capacity would keep all of them.
  longest = max(range(len(rows)), key=sizes.__getitem__)
  text = (
    f'{count} of {len(rows)} rows are longer than sft.capacity = {capacity} tokens; '
    f'the longest, {rows[longest].id!r}, has {sizes[longest]}'
  )
  if overlong == 'error':
    raise ValueError(text)
  logging.warning('%s. They are left out.', text)
