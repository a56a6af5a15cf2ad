"""A packed row for people to read: what is trained, how its sequences share and branch, and what a token attends to."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np

from dcore_jax.tokentree import TokenTree

_GREEN, _YELLOW, _DIM, _BOLD, _RESET = '\033[32m', '\033[33m', '\033[2m', '\033[1m', '\033[0m'
_HEAD, _TAIL = 240, 160  # characters kept of a long stretch that nothing trains
_MAX_CHARACTER = 4  # bytes of a character in UTF-8, so the most tokens that can be holding one back
_MAX_INDENT = 12  # levels; deeper branches are marked by their numbers alone


@dataclasses.dataclass(frozen=True)
class Run:
  """Columns [start, stop) of a row that follow each other in one branch and belong to the same sequences."""

  start: int
  stop: int
  above: int  # index of the run that it continues; -1: a root
  depth: int  # runs above it
  sequences: tuple[int, ...]


def use_colour(stream: TextIO) -> bool:
  """A terminal that takes colours, and nobody who asks for none (no-color.org)."""
  return stream.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
  """The text of every token as it reads in its context; '' where a character is only finished by a later token.

  Joined, they are the decoded text. Bytes that never become a character are shown as U+FFFD.
  """
  decode = lambda part: tokenizer.decode(
    part, skip_special_tokens=False, clean_up_tokenization_spaces=False
  )
  texts, before, start = (
    [],
    0,
    0,
  )  # ids[before:start]: context that the decoder needs for spaces; ids[start:]: not yet shown
  for index in range(len(ids)):
    known, text = decode(ids[before:start]), decode(ids[before : index + 1])
    waiting = (
      text.endswith('\ufffd') and index + 1 < len(ids) and index - start + 1 < _MAX_CHARACTER
    )
    texts.append('' if waiting else text[len(known) :])
    if not waiting:
      before, start = start, index + 1
  return texts


def row_runs(tree: TokenTree, row: int) -> list[Run]:
  """The runs of a packed row in the order of their columns, padding left out."""
  members: list[list[int]] = [[] for _ in range(tree.capacity)]
  for number, path in enumerate(tree.paths):
    if len(path) and path[0] // tree.capacity == row:
      for column in (path % tree.capacity).tolist():
        members[column].append(number)
  parent = tree.parent[row].tolist()
  runs, run_of, start = [], [0] * tree.capacity, 0
  for column in range(1, tree.capacity + 1):
    if (
      column < tree.capacity
      and parent[column] == column - 1
      and members[column] == members[column - 1]
    ):
      continue
    if members[start]:
      above = run_of[parent[start]] if parent[start] >= 0 else -1
      runs.append(
        Run(start, column, above, runs[above].depth + 1 if above >= 0 else 0, tuple(members[start]))
      )
      run_of[start:column] = [len(runs) - 1] * (column - start)
    start = column
  return runs


def summary_line(tree: TokenTree, sequences: int) -> str:
  """What packing made of the rows, in one line."""
  occupancy = tree.live / max(1, tree.tokens.size)
  return (
    f'{tree.rows} packed rows of {tree.capacity} tokens, {sequences} sequences, {len(tree.dropped)} dropped as too long, '
    f'dedup {tree.dedup:.2f}, occupancy {occupancy:.1%}, {np.count_nonzero(tree.weight)} loss tokens of {tree.live} '
    f'(weight {tree.weight.sum():g})'
  )


class RowView:
  """Text of one packed row.

  Args:
    tree: of `tokentree.pack`.
    names: of the sequences that were packed, in their order.
    tokenizer: theirs.
    row: which packed row.
    colour: ANSI colours; else plain marks: «trained», «x2: trained with weight 2».
    full: show long untrained stretches whole.

  Raises:
    ValueError: a row that is not there.
  """

  def __init__(
    self,
    tree: TokenTree,
    names: Sequence[str],
    tokenizer: Any,
    row: int,
    *,
    colour: bool,
    full: bool = False,
  ):
    if not 0 <= row < tree.rows:
      raise ValueError(f'there is no packed row {row}: there are {tree.rows}, counted from 0')
    self.tree, self.names, self.tokenizer, self.row = tree, names, tokenizer, row
    self.colour, self.full = colour, full
    self.runs = row_runs(tree, row)

  def visible(self, query: int) -> np.ndarray:
    """bool[T]: what the token in column `query` attends to, by the inequality that attention uses."""
    columns = np.arange(self.tree.capacity)
    return (columns <= query) & (query < self.tree.end[self.row])

  def render(self, query: int | None = None) -> str:
    """The row as text; with a query column also what that token sees and what not.

    Raises:
      ValueError: a query that is no token of the row.
    """
    inside = sum(run.stop - run.start for run in self.runs)
    if query is not None and not any(run.start <= query < run.stop for run in self.runs):
      raise ValueError(
        f'row {self.row} has no token in column {query}: its {inside} tokens stand in columns 0 to {inside - 1}'
      )
    lines = [
      f'row {self.row}: {inside} of {self.tree.capacity} places, '
      f'{len({s for run in self.runs for s in run.sequences})} sequences, '
      f'{sum(run.above < 0 for run in self.runs)} trees; ' + self._legend()
    ]
    seen = None if query is None else self.visible(query)
    if seen is not None:
      lines.append(self._attention(query, seen))
    for run in self.runs:
      lines += self._run_lines(run, query, seen)
    return '\n'.join(lines)

  def _legend(self) -> str:
    if self.colour:
      return f'{_GREEN}trained{_RESET}, {_YELLOW}with a weight other than 1{_RESET}'
    return 'trained text is in «», with ×weight where that is not 1'

  def _attention(self, query: int, seen: np.ndarray) -> str:
    mine = next(run for run in self.runs if run.start <= query < run.stop)
    root = self.runs.index(mine)
    while self.runs[root].above >= 0:
      root = self.runs[root].above
    first = self.runs[root].start
    last = int(self.tree.end[self.row, first])
    others = {s for run in self.runs for s in run.sequences} - set(mine.sequences)
    inside = sum(run.stop - run.start for run in self.runs)
    hidden = last - first - int(seen.sum())
    (text,) = self._texts([query])
    return (
      f'token {query} ({text!r}, position {self.tree.position[self.row, query]}) of {self._who(mine.sequences)} sees '
      f'{seen.sum()} tokens, itself and its ancestors; it does not see the {hidden} of its tree that come later or in '
      f'other branches, nor the {inside - last + first} of other trees; {len(others)} other sequences stand in the row'
    )

  def _run_lines(self, run: Run, query: int | None, seen: np.ndarray | None) -> list[str]:
    indent = '│ ' * min(run.depth, _MAX_INDENT)
    position = self.tree.position[self.row]
    where = f'after column {self.tree.parent[self.row, run.start]}' if run.above >= 0 else 'root'
    header = (
      f'{where}; columns {run.start}-{run.stop - 1}, positions {position[run.start]}-{position[run.stop - 1]}; '
      f'{self._who(run.sequences)}'
    )
    lines = [
      f'{indent}{"├" if run.above >= 0 else "●"} {_BOLD if self.colour else ""}{header}{_RESET if self.colour else ""}'
    ]
    parts = [(run.start, run.stop)]
    if query is not None and run.start <= query < run.stop - 1:
      parts = [(run.start, query + 1), (query + 1, run.stop)]
    for start, stop in parts:
      hidden = seen is not None and not seen[start]
      if seen is not None:
        lines.append(
          f'{indent}│ ' + ('not seen: ' if hidden else 'seen: ') + f'columns {start}-{stop - 1}'
        )
      lines += [f'{indent}│ {line}' for line in self._text(start, stop, hidden).split('\n')]
    return lines

  def _who(self, sequences: Sequence[int]) -> str:
    shown = ', '.join(f'{number} ({_printable(self.names[number])})' for number in sequences[:4])
    more = f' and {len(sequences) - 4} more' if len(sequences) > 4 else ''
    return f'sequence{"s" if len(sequences) > 1 else ""} {shown}{more}'

  def _texts(self, columns: Sequence[int]) -> list[str]:
    return token_texts(self.tokenizer, self.tree.tokens[self.row, columns].tolist())

  def _text(self, start: int, stop: int, hidden: bool) -> str:
    """Columns [start, stop), stretches of one weight marked as one."""
    texts = self._texts(range(start, stop))
    weights = self.tree.weight[self.row, start:stop]
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), stop - start]
    parts = []
    for first, last in zip(cuts, cuts[1:]):
      text, weight = ''.join(texts[first:last]), float(weights[first])
      if not weight and not self.full and len(text) > _HEAD + _TAIL + 80:
        text = f'{text[:_HEAD]} [... {len(text) - _HEAD - _TAIL:,} characters ...] {text[-_TAIL:]}'
      parts.append(self._marked(_printable(text), weight, hidden))
    return ''.join(parts).removesuffix('\n')

  def _marked(self, text: str, weight: float, hidden: bool) -> str:
    if not self.colour:
      return text if not weight else f'«{"" if weight == 1 else f"×{weight:g}: "}{text}»'
    style = (_DIM if hidden else '') + ('' if not weight else _GREEN if weight == 1 else _YELLOW)
    shown = text if weight in (0, 1) else f'×{weight:g}: {text}'
    # A colour ends with its line: what stands left of the next one is not part of the text.
    return '\n'.join(
      f'{style}{line}{_RESET}' if style and line else line for line in shown.split('\n')
    )


def _printable(text: str) -> str:
  """Control characters by their names (a row may hold an escape sequence of its own); line ends are seen and kept."""
  return ''.join('⏎\n' if c == '\n' else c if c.isprintable() else repr(c)[1:-1] for c in text)


def find_query(
  tree: TokenTree, row: int | None, sequence: int | None, token: int | None
) -> tuple[int, int | None]:
  """(row, query column) that the choices mean: a sequence is looked at from its last token, and names its row.

  Raises:
    ValueError: a sequence that is not there, was dropped, or stands in another row; a token outside the sequence.
  """
  if sequence is None:
    return row or 0, token
  if not 0 <= sequence < len(tree.paths):
    raise ValueError(
      f'there is no sequence {sequence}: there are {len(tree.paths)}, counted from 0'
    )
  path = tree.paths[sequence]
  if not len(path):
    raise ValueError(f'sequence {sequence} is longer than {tree.capacity} tokens and was dropped')
  home, columns = int(path[0] // tree.capacity), path % tree.capacity
  if row is not None and row != home:
    raise ValueError(f'sequence {sequence} stands in packed row {home}, not in {row}')
  if token is not None and token not in columns:
    raise ValueError(f'column {token} of row {home} belongs to no token of sequence {sequence}')
  return home, int(columns[-1]) if token is None else token
