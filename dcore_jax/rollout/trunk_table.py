"""Which tokens each trunk holds, and who reads it.

Letters as in device.py.
"""

from collections.abc import Collection

import numpy as np

from dcore_jax.rollout.prefill import Fill

# Tokens in common that are worth a copy of a trunk, which moves the keys and values of all of them;
# a quarter of the prompt must be in common as well.
_MIN_PREFIX = 32


class TrunkTable:
  """Which tokens each trunk holds and how many lanes read it.

  A trunk that no lane reads keeps its tokens until it is needed for others. A prompt that begins
  with them continues it, and a prompt that has a long prefix in common starts from a copy.

  Attributes:
    length_U: int32, tokens that each trunk holds.
  """

  def __init__(self, trunks: int, max_len: int):
    self.length_U = np.zeros(trunks, np.int32)
    # -1 is no token: a comparison with a longer prompt ends where the trunk ends.
    self._tokens_US = np.full((trunks, max_len), -1, np.int32)
    self._users_U = np.zeros(trunks, np.int32)
    self._used_U = np.zeros(trunks, np.int64)  # the clock when a lane last let go of it
    self._clock = 0
    # Trunks that the fills of this round read or write, and those that they write.
    self._pinned: set[int] = set()
    self._written: set[int] = set()

  def start_round(self) -> None:
    """Notes that all fills planned so far have reached the device."""
    self._pinned = set()
    self._written = set()

  def forget(self) -> None:
    """Drops the tokens of trunks that no lane reads."""
    self.length_U[self._users_U == 0] = 0

  def acquire(self, prompt: np.ndarray) -> tuple[int, Fill | None] | None:
    """Finds a trunk for one more lane with this prompt.

    Returns:
      (the trunk, what it lacks of the prompt: None where it lacks nothing). None in place of both
      where the rollout has to wait: for a trunk to become idle, or for a fill of this round that
      writes the prefix it shall start from.
    """
    n = len(prompt)
    common_U = self._common(prompt)
    # Others may read such a trunk already: the rollouts of a group share it.
    exact = np.flatnonzero((common_U == n) & (self.length_U == n))
    if len(exact):
      self._users_U[exact[0]] += 1
      return int(exact[0]), None
    best = int(common_U.argmax())
    # At least the last token goes through the model: sampling starts from its hidden state.
    start = min(int(common_U[best]), n - 1)
    # The prompt continues all that an idle trunk holds, as the next turn of a conversation does:
    # nothing is copied.
    if 0 < start == self.length_U[best] and self._idle(best):
      target = best
    elif start >= max(_MIN_PREFIX, n // 4):
      # The prefix is still being written by this round; the next round can copy it.
      if best in self._written:
        return None
      # A copy into another trunk leaves the prefix to prompts that come later. Where there is no
      # other, the prefix is cut short in its own trunk.
      target = self._idle_one(excluded=(best,))
      if target is None and self._idle(best):
        target = best
    else:
      # Too little in common: copying would cost about what computing does.
      target = self._idle_one()
      start = 0
    if target is None:
      return None
    source = best if start else target
    self._take(target, prompt)
    # A source must not become the target of another fill of this round: fills are grouped into
    # calls by their lengths, and are not made in the order they were planned in.
    self._pinned.add(source)
    return target, Fill(source=source, target=target, start=start, tokens=prompt[start:])

  def release(self, trunk: int) -> None:
    """Notes that one lane less reads the trunk."""
    self._users_U[trunk] -= 1
    # A count and not a time: which trunk is given up must not depend on how fast the machine is.
    self._clock += 1
    self._used_U[trunk] = self._clock

  def _common(self, prompt: np.ndarray) -> np.ndarray:
    """Returns int [U]: tokens that the prompt and each trunk have in common from the first on."""
    differs_US = self._tokens_US[:, : len(prompt)] != prompt[None, :]
    # argmax is 0 also where nothing differs.
    common_U = np.where(differs_US.any(axis=1), differs_US.argmax(axis=1), len(prompt))
    # Tokens of a trunk that was forgotten are still in the table, with length 0.
    return np.minimum(common_U, self.length_U)

  def _idle(self, trunk: int) -> bool:
    return not self._users_U[trunk] and trunk not in self._pinned

  def _idle_one(self, excluded: Collection[int] = ()) -> int | None:
    """Returns an empty trunk, or the one that has been idle for longest; None: all are in use."""
    idle = []
    for trunk in np.flatnonzero(self._users_U == 0).tolist():
      if self._idle(trunk) and trunk not in excluded:
        idle.append(trunk)

    def age(trunk: int) -> tuple[bool, int]:
      """Orders idle trunks: empty ones first, then by when a lane last read them."""
      return self.length_U[trunk] > 0, self._used_U[trunk]

    # Empty ones first; then the one whose tokens are least likely to be asked for again.
    return min(idle, key=age, default=None)

  def _take(self, trunk: int, tokens: np.ndarray) -> None:
    self._tokens_US[trunk] = -1
    self._tokens_US[trunk, : len(tokens)] = tokens
    self.length_U[trunk] = len(tokens)
    self._users_U[trunk] += 1
    self._pinned.add(trunk)
    self._written.add(trunk)
