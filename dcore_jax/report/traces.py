"""Splits the conversations of the report into reasoning, its hesitant words, and other text."""

import re
from collections.abc import Mapping
from typing import Any

from dcore_jax.report.figures import kind_label

# What the lazy measure counts (docs/method.md, section 5.4). It counts substrings; only whole words
# are marked for the reader.
_HESITATION = re.compile(r'\b(wait|but|alternatively|however)\b', re.IGNORECASE)
_THINK = re.compile(r'<think>(.*?)(?:</think>|\Z)', re.DOTALL)


def trace(
  trace: dict[str, Any], places: Mapping[tuple[str, Any], int] | None = None
) -> dict[str, Any]:
  """Returns a task with one column a stage, its texts split into segments.

  Args:
    trace: the task, see `report.write_report`.
    places: number of each trace on the page of all traces, by stage and id.
  """
  query = str(trace.get('query', ''))
  columns = []
  for column in trace.get('columns') or []:
    # The query stands above all columns once; the instructions are the same in each and long.
    messages = [
      {'role': message['role'], 'segments': segments(str(message['content']))}
      for message in column.get('messages') or []
      if message['role'] != 'system' and str(message['content']).strip() != query.strip()
    ]
    columns.append(
      {
        'stage': column.get('stage', ''),
        'correct': column.get('correct'),
        'lazy': column.get('lazy'),
        'messages': messages,
        'place': (places or {}).get((column.get('stage', ''), column.get('id'))),
      }
    )
  kind = trace.get('kind', '')
  return {'query': query, 'kind': kind_label(kind), 'columns': columns}


def segments(text: str) -> list[tuple[str, str]]:
  """Splits a message into ('think' | 'hesitation' | 'text', piece).

  The tags themselves are dropped. Pieces are plain text; escaping is the template's work.
  """
  pieces = []
  position = 0
  for think in _THINK.finditer(text):
    pieces.append(('text', text[position : think.start()]))
    parts = _HESITATION.split(think.group(1).strip('\n'))  # odd places hold the words themselves
    pieces += [('hesitation' if place % 2 else 'think', part) for place, part in enumerate(parts)]
    position = think.end()
  pieces.append(('text', text[position:].lstrip('\n') if position else text))
  return [(kind, piece) for kind, piece in pieces if piece.strip() or (kind == 'think' and piece)]
