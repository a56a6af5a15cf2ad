"""What trunks lack of their prompts, and how it is cut into calls of the prefill program.

Letters as in device.py.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dcore_jax.rollout.sizes import EngineSizes, bucket, bucket_ladder

# Tokens. Longer prompts are prefilled in pieces of this length, so that the scores of attention
# stay below 1024 x max_len for each head.
PIECE = 1024
# Tokens. Shorter prompts go through the model together, up to this many.
_BATCH = 256


class Fill(NamedTuple):
  """Tokens to be appended to the first `start` slots of trunk `source`, as trunk `target`."""

  source: int
  target: int
  start: int
  tokens: np.ndarray  # int32 [n], n >= 1


class PrefillCall(NamedTuple):
  """Pieces that one call of the prefill program appends.

  Attributes:
    length: slots that each piece's tokens are padded to, a step of the ladder.
    span: slots that hold the longest result, a step of the ladder.
    pieces: at most as many as the engine has lanes.
  """

  length: int
  span: int
  pieces: Sequence[Fill]

  def arrays(self, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens_XT, place_4X) as `device.prefill` takes them, one row for each lane."""
    tokens_XT = np.zeros((lanes, self.length), np.int32)
    place_4X = np.zeros((4, lanes), np.int32)
    for row, piece in enumerate(self.pieces):
      tokens_XT[row, : len(piece.tokens)] = piece.tokens
      place_4X[:, row] = (piece.source, piece.target, piece.start, len(piece.tokens))
    return tokens_XT, place_4X


def prefill_rows(length: int, lanes: int) -> int:
  """Returns how many pieces of `length` tokens go through the model together."""
  # The arrays of a call have a row for each lane, so that more could never be filled.
  return max(1, min(_BATCH // length, lanes))


def prefill_calls(fills: Sequence[Fill], sizes: EngineSizes) -> Iterator[PrefillCall]:
  """Yields the calls that make the fills, in the order they must be made in.

  Pieces of like lengths share a call. A long fill is cut into pieces, each of which continues the
  one before it and therefore goes into a later call.
  """
  ladder = bucket_ladder(sizes.max_len)
  while fills:
    # Each (length, span) is a program, and the pieces of a call share it.
    by_shape: dict[tuple[int, int], list[Fill]] = collections.defaultdict(list)
    # What does not fit into one piece waits for the next round of calls.
    rest = []
    for fill in fills:
      # The first piece reads the source and writes the target; what follows continues the target.
      piece = fill._replace(tokens=fill.tokens[:PIECE])
      end = fill.start + len(piece.tokens)
      by_shape[bucket(ladder, len(piece.tokens)), bucket(ladder, end)].append(piece)
      if len(fill.tokens) > PIECE:
        rest.append(
          Fill(source=fill.target, target=fill.target, start=end, tokens=fill.tokens[PIECE:])
        )
    for (length, span), pieces in by_shape.items():
      for first in range(0, len(pieces), sizes.lanes):
        yield PrefillCall(length, span, pieces[first : first + sizes.lanes])
    fills = rest
