"""Prints a packed row for people to read.

The text shows what is trained, how sequences share and branch, and what a token attends to.
"""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np
from tokenizers.decoders import DecodeStream

from dcore_jax.tokentree import TokenTree

_GREEN = '\033[32m'
_YELLOW = '\033[33m'
_DIM = '\033[2m'
_BOLD = '\033[1m'
_RESET = '\033[0m'
# Of a long stretch that nothing trains, its first and last characters are shown.
_HEAD = 240
_TAIL = 160
_MAX_INDENT = 12  # levels; deeper branches would leave no room for text on a terminal


@dataclasses.dataclass(frozen=True)
class Run:
  """Columns [start, stop) of a row that follow each other in one branch.

  All of them belong to the same sequences.
  """

  start: int
  stop: int
  above: int  # index of the run that it continues; -1 for a root
  depth: int  # number of runs above it
  sequences: tuple[int, ...]


def use_colour(stream: TextIO) -> bool:
  """Says whether a stream is a terminal that shows colours, and nobody has switched them off.

  https://no-color.org defines the switch, the variable NO_COLOR.
  """
  return stream.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
  """Returns the text of every token as it reads in its context.

  The text is '' if a later token completes the character. Joined, the texts are the decoded text.
  Bytes that never become a character are shown as U+FFFD.
  """
  # Tokens decoded one by one would show U+FFFD for each part of a character.
  stream = DecodeStream(skip_special_tokens=False)
  texts = [stream.step(tokenizer.backend_tokenizer, token) or '' for token in ids]
  if texts:
    # The stream holds back what may still become a character. At the end nothing can follow.
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts[-1] += whole[sum(map(len, texts)) :]
  return texts


def row_runs(tree: TokenTree, row: int) -> list[Run]:
  """Returns the runs of a packed row in the order of their columns, padding left out."""
  # The sequences that a column belongs to. Where this list changes, a branch begins or ends.
  members: list[list[int]] = [[] for _ in range(tree.capacity)]
  for number, path in enumerate(tree.paths):
    if len(path) and path[0] // tree.capacity == row:
      for column in (path % tree.capacity).tolist():
        members[column].append(number)
  parent = tree.parent[row].tolist()
  runs: list[Run] = []
  run_of = [0] * tree.capacity  # index of the run in which a column stands
  start = 0
  # One column past the end closes the last run.
  for column in range(1, tree.capacity + 1):
    if column < tree.capacity:
      # A column continues its run if it is the child of the one before and shared by as many.
      follows = parent[column] == column - 1
      if follows and members[column] == members[column - 1]:
        continue
    # Columns of no sequence are padding.
    if members[start]:
      above = run_of[parent[start]] if parent[start] >= 0 else -1
      run = Run(
        start=start,
        stop=column,
        above=above,
        # A parent stands left of its children, so its run is known already.
        depth=runs[above].depth + 1 if above >= 0 else 0,
        sequences=tuple(members[start]),
      )
      run_of[start:column] = [len(runs)] * (column - start)
      runs.append(run)
    start = column
  return runs


def summary_line(tree: TokenTree, sequences: int) -> str:
  """Says in one line what packing made of the rows."""
  # A tree without rows has no tokens, and an occupancy of 0.
  occupancy = tree.live / max(1, tree.tokens.size)
  return (
    f'{tree.rows} packed rows of {tree.capacity} tokens, {sequences} sequences, '
    f'{len(tree.dropped)} dropped as too long, dedup {tree.dedup:.2f}, occupancy {occupancy:.1%}, '
    f'{np.count_nonzero(tree.weight)} loss tokens of {tree.live} (weight {tree.weight.sum():g})'
  )


class RowView:
  """Text of one packed row.

  Args:
    tree: what `tokentree.pack` returned.
    names: names of the sequences that were packed, in their order.
    tokenizer: the one that encoded them.
    row: number of the packed row.
    colour: whether ANSI colours mark what is trained. Otherwise plain marks do: «trained»,
      «×2: trained with weight 2».
    full: whether long untrained stretches are shown whole.

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
    # A negative row would silently be counted from the end.
    if not 0 <= row < tree.rows:
      raise ValueError(f'there is no packed row {row}: there are {tree.rows}, counted from 0')
    self.tree = tree
    self.names = names
    self.tokenizer = tokenizer
    self.row = row
    self.colour = colour
    self.full = full
    self.runs = row_runs(tree, row)
    self.inside = sum(run.stop - run.start for run in self.runs)  # tokens of the row

  def visible(self, query: int) -> np.ndarray:
    """Returns as bool[T] what the token in column `query` attends to.

    The inequality is the one that attention uses.
    """
    columns = np.arange(self.tree.capacity)
    # j <= i < end[j]: earlier columns whose subtree the query lies in.
    return (columns <= query) & (query < self.tree.end[self.row])

  def render(self, query: int | None = None) -> str:
    """Returns the row as text; with a query column also what that token sees and what not.

    Raises:
      ValueError: a query that is no token of the row.
    """
    if query is not None and not any(run.start <= query < run.stop for run in self.runs):
      raise ValueError(
        f'row {self.row} has no token in column {query}: its {self.inside} tokens stand in '
        f'columns 0 to {self.inside - 1}'
      )
    trees = sum(run.above < 0 for run in self.runs)
    lines = [
      f'row {self.row}: {self.inside} of {self.tree.capacity} places, '
      f'{len(self._sequences())} sequences, {trees} trees; {self._legend()}'
    ]
    seen = None if query is None else self.visible(query)
    if seen is not None:
      lines.append(self._attention(query, seen))
    for run in self.runs:
      lines += self._run_lines(run, query, seen)
    return '\n'.join(lines)

  def _sequences(self) -> set[int]:
    """Returns the numbers of all sequences in the row."""
    return set().union(*(run.sequences for run in self.runs))

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
    # `end` of a root is the end of its whole tree.
    tree_size = int(self.tree.end[self.row, first]) - first
    count = int(seen.sum())
    others = self._sequences() - set(mine.sequences)
    (text,) = self._texts([query])
    position = self.tree.position[self.row, query]
    return (
      f'token {query} ({text!r}, position {position}) of {self._who(mine.sequences)} sees '
      f'{count} tokens, itself and its ancestors; it does not see the {tree_size - count} of its '
      f'tree that come later or in other branches, nor the {self.inside - tree_size} of other '
      f'trees; {len(others)} other sequences stand in the row'
    )

  def _run_lines(self, run: Run, query: int | None, seen: np.ndarray | None) -> list[str]:
    # A row of many turns branches once for each turn, and grows deeper than a terminal is wide.
    indent = '│ ' * min(run.depth, _MAX_INDENT)
    mark = '●'
    where = 'root'
    if run.above >= 0:
      mark = '├'
      where = f'after column {self.tree.parent[self.row, run.start]}'
    position = self.tree.position[self.row]
    header = (
      f'{where}; columns {run.start}-{run.stop - 1}, '
      f'positions {position[run.start]}-{position[run.stop - 1]}; {self._who(run.sequences)}'
    )
    if self.colour:
      header = _BOLD + header + _RESET
    lines = [f'{indent}{mark} {header}']
    parts = [(run.start, run.stop)]
    if query is not None and run.start <= query < run.stop - 1:
      # Of the query's own run, what comes after the query is not seen.
      parts = [(run.start, query + 1), (query + 1, run.stop)]
    for start, stop in parts:
      hidden = seen is not None and not seen[start]
      if seen is not None:
        sight = 'not seen' if hidden else 'seen'
        lines.append(f'{indent}│ {sight}: columns {start}-{stop - 1}')
      lines += [f'{indent}│ {line}' for line in self._text(start, stop, hidden).split('\n')]
    return lines

  def _who(self, sequences: Sequence[int]) -> str:
    # Four names are enough to find a group: a prompt's rollouts may be hundreds.
    shown = ', '.join(f'{number} ({_printable(self.names[number])})' for number in sequences[:4])
    more = f' and {len(sequences) - 4} more' if len(sequences) > 4 else ''
    return f'sequence{"s" if len(sequences) > 1 else ""} {shown}{more}'

  def _texts(self, columns: Sequence[int]) -> list[str]:
    return token_texts(self.tokenizer, self.tree.tokens[self.row, columns].tolist())

  def _text(self, start: int, stop: int, hidden: bool) -> str:
    """Returns the text of columns [start, stop); stretches of one weight are marked as one."""
    texts = self._texts(range(start, stop))
    weights = self.tree.weight[self.row, start:stop]
    # Weights are cut where they change, so that one mark stands for a whole stretch.
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), stop - start]
    parts = []
    for first, last in itertools.pairwise(cuts):
      text = ''.join(texts[first:last])
      weight = float(weights[first])
      # 80 characters of slack: a note about what is left out must not be as long as it.
      if not weight and not self.full and len(text) > _HEAD + _TAIL + 80:
        text = f'{text[:_HEAD]} [... {len(text) - _HEAD - _TAIL:,} characters ...] {text[-_TAIL:]}'
      parts.append(self._marked(_printable(text), weight, hidden))
    return ''.join(parts).removesuffix('\n')

  def _marked(self, text: str, weight: float, hidden: bool) -> str:
    # The number is shown, because the mark or colour says only that it is not 1.
    if weight not in (0, 1):
      text = f'×{weight:g}: {text}'
    if not self.colour:
      return f'«{text}»' if weight else text
    style = _DIM if hidden else ''
    if weight:
      style += _GREEN if weight == 1 else _YELLOW
    # A colour ends with its line: the branch marks left of the next line are not part of the text.
    lines = [f'{style}{line}{_RESET}' if style and line else line for line in text.split('\n')]
    return '\n'.join(lines)


def _printable(text: str) -> str:
  """Names control characters, since a row may hold escape sequences; shows and keeps line ends."""
  return ''.join(_printable_character(character) for character in text)


def _printable_character(character: str) -> str:
  if character == '\n':
    return '⏎\n'
  return character if character.isprintable() else repr(character)[1:-1]


def find_query(
  tree: TokenTree, row: int | None, sequence: int | None, token: int | None
) -> tuple[int, int | None]:
  """Returns (row, query column) for what a person chose.

  A sequence is in one row. Its last token is the query unless a token is given.

  Raises:
    ValueError: a sequence that is not there, was dropped, or stands in another row; a token outside
      the sequence.
  """
  # Without a sequence the token is a column of the row.
  if sequence is None:
    return row or 0, token
  if not 0 <= sequence < len(tree.paths):
    raise ValueError(
      f'there is no sequence {sequence}: there are {len(tree.paths)}, counted from 0'
    )
  path = tree.paths[sequence]
  if not len(path):
    raise ValueError(f'sequence {sequence} is longer than {tree.capacity} tokens and was dropped')
  # Paths hold flat indices over all rows.
  home = int(path[0] // tree.capacity)
  columns = path % tree.capacity
  if row is not None and row != home:
    raise ValueError(f'sequence {sequence} stands in packed row {home}, not in {row}')
  if token is not None and token not in columns:
    raise ValueError(f'column {token} of row {home} belongs to no token of sequence {sequence}')
  return home, int(columns[-1]) if token is None else token
