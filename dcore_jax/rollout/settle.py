"""Who goes where after a pass: which draws count, who has ended, and whose texts part.

Letters as in passes.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dcore_jax.rollout.lane_table import InFlight, LaneTable
from dcore_jax.rollout.passes import Part


class Verdicts(NamedTuple):
  """The draws of a pass as lists, one entry a draw: rollouts are few, and arrays of few are slow.

  Attributes:
    tokens: what was drawn.
    stops: whether it ends a rollout.
    fulls: whether it is the last one that the rollout may draw.
  """

  tokens: list[int]
  stops: list[bool]
  fulls: list[bool]


class Outcome(NamedTuple):
  """What a pass has brought for one branch.

  Attributes:
    accepted: for each of the branch's rollouts the number of its draws that count.
    ended: rollouts that have ended.
    stays: (tokens that the branch gets, rollouts that stay on it).
    leaves: the same for the branches of those that leave.
  """

  accepted: list[int]
  ended: list[InFlight]
  stays: tuple[list[int], list[InFlight]]
  leaves: list[tuple[list[int], list[InFlight]]]


def settle(part: Part, verdicts: Verdicts, lanes: LaneTable) -> Outcome:
  """Reads the draws of a part, which is complete.

  A rollout's first draw counts. The next one does if the first is the token that was guessed, since
  its row then stands behind the right text, and so on. Where rollouts draw different tokens, those
  with the guessed one stay, or else the most.
  """
  rollouts = part.branch.rollouts
  guessed = part.guessed
  width = len(guessed) + 1
  accepted = [0] * len(rollouts)
  ended = []
  leaves = []
  active = range(len(rollouts))
  for step in range(width):
    by_token: dict[int, list[int]] = {}
    # Of the rollouts that draw here, at least one: those that had another token have left.
    for number in active:
      place = part.draws + number * width + step
      token = verdicts.tokens[place]
      rollout = rollouts[number]
      accepted[number] = step + 1
      if rollout.sampling.stop:
        rollout.stop = lanes.stop_string(rollout, [*guessed[:step], token])
      if verdicts.stops[place] or verdicts.fulls[place] or rollout.stop is not None:
        ended.append(rollout)
      else:
        by_token.setdefault(token, []).append(number)
    if not by_token:
      # The text is kept up to here though nobody rides on it: a later turn may begin with it.
      return Outcome(accepted, ended, ([*guessed[:step], token], []), leaves)
    # Behind the last guess there is a draw, and no guess that it could agree with.
    guess = guessed[step] if step < len(guessed) else None
    kept = _kept(by_token, guess)
    for token, numbers in by_token.items():
      if token != kept:
        leaves.append(([*guessed[:step], token], [rollouts[number] for number in numbers]))
    active = by_token[kept]
    if kept != guess:
      break
  return Outcome(
    accepted, ended, ([*guessed[:step], kept], [rollouts[number] for number in active]), leaves
  )


def _kept(by_token: dict[int, Sequence[int]], guess: int | None) -> int:
  """Returns the token with which rollouts stay on their branch; of equals the first."""
  if guess in by_token:
    return guess
  return max(by_token, key=lambda token: len(by_token[token]))
