"""Makes inputs from seeds by mutation, gives them to a target, and keeps what broke it."""

import hashlib
import pathlib
import random
import signal
import time
from typing import NamedTuple

from tests.fuzz.targets import Target

# A generous limit for a few kilobytes. Of the processor's time, since the machine may be busy.
SECONDS = 20
LONGEST = 4096  # bytes of an input
_POOL = 256  # inputs that are mutated further


class Failure(NamedTuple):
  """An input and what it did."""

  data: bytes
  error: str


def mutate(random_: random.Random, target: Target, pool: list[bytes]) -> bytes:
  """Returns an input that differs from one of the pool in one to eight places."""
  data = bytearray(random_.choice(pool))
  for _ in range(random_.randint(1, 8)):
    place = random_.randint(0, len(data))
    kind = random_.randrange(6)
    if kind == 0:
      data[place:place] = random_.choice(target.words)
    elif kind == 1:
      del data[place : place + random_.randint(1, 8)]
    elif kind == 2:
      data[place : place + 1] = bytes([random_.randrange(256)])
    elif kind == 3:
      # Repeated parts find what grows faster than its input, and what nests.
      part = data[place : place + random_.randint(1, 16)]
      data[place:place] = part * random_.choice([1, 2, 8, 64, 200])
    elif kind == 4:
      other = random_.choice(pool)
      start = random_.randint(0, len(other))
      data[place:place] = other[start : start + random_.randint(1, 64)]
    else:
      data[place:place] = random_.choice(target.words) * random_.choice([1, 3, 100])
  return bytes(data[:LONGEST])


def attempt(target: Target, data: bytes) -> Failure | None:
  """Gives an input to a target; None where it kept its promise."""

  def too_long(*_: object) -> None:
    # Not an `Exception`: no reader may take it for a fault of the input.
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGPROF, too_long)
  signal.setitimer(signal.ITIMER_PROF, SECONDS)
  try:
    target.read(data)
  except KeyboardInterrupt:
    return Failure(data, f'takes more than {SECONDS} s')
  except Exception as error:
    return Failure(data, repr(error)[:200])
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)
  return None


def fuzz(target: Target, count: int, seed: int) -> tuple[list[Failure], float]:
  """Returns (failures, one of each kind; inputs a second). The same seed makes the same inputs."""
  random_ = random.Random(seed)
  pool = list(target.seeds)
  failures: dict[str, Failure] = {}
  began = time.perf_counter()
  for number in range(count):
    data = target.seeds[number] if number < len(target.seeds) else mutate(random_, target, pool)
    failure = attempt(target, data)
    if failure:
      failures.setdefault(failure.error[:60], failure)
    # One in eight goes on, so that changes add up.
    if random_.random() < 0.125:
      if len(pool) < _POOL:
        pool.append(data)
      else:
        pool[random_.randrange(len(target.seeds), _POOL)] = data
  return list(failures.values()), count / (time.perf_counter() - began)


def save(failure: Failure, folder: pathlib.Path, name: str) -> pathlib.Path:
  """Writes an input as a case that the tests read from then on."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{name}-{hashlib.sha256(failure.data).hexdigest()[:12]}'
  path.write_bytes(failure.data)
  return path
